"""`train`, `evaluate` and `predict` on a folder with a CSV file. Needs mmkernels[cli,demo]."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from test_cli import call

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
for package in ("tokenizers", "tqdm", "torchmetrics", "safetensors", "matplotlib"):
    pytest.importorskip(package)

from mmkernels import saving  # noqa: E402

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}


def picture(path, colour, seed):
    noise = np.random.default_rng(seed).integers(-25, 25, (20, 20, 3))
    Image.fromarray((noise + COLOURS[colour]).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three colours, 0.png to 17.png, and a text file that pretends to be one."""
    root = tmp_path_factory.mktemp("folder")
    for number in range(18):
        picture(root / f"{number}.png", list(COLOURS)[number % 3], number)
    (root / "broken.png").write_text("no picture")
    return root


@pytest.fixture
def without_pictures(monkeypatch):
    """They take most of the time, and other tests look at them."""
    monkeypatch.setattr("mmkernels.plot.save", lambda picture, path: None)


def write(path, lines, header="path,text,label"):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


LABELS = {
    "binary": lambda number, colour: "yes" if colour == "red" else "no",
    "multiclass": lambda number, colour: colour,
    "multilabel": lambda number, colour: {"red": "warm|bright", "green": "bright", "blue": "|"}[colour],
    "regression": lambda number, colour: str(100.5 + list(COLOURS).index(colour)),
}


def lines_of(task):
    colours = [list(COLOURS)[number % 3] for number in range(18)]
    return [f"{n}.png,a picture,{LABELS[task](n, colour)}" for n, colour in enumerate(colours)]


QUICK = ("--size", 12, "--threads", 1, "--batch-size", 6)


@pytest.mark.parametrize("task", LABELS)
def test_train_evaluate_predict(task, folder, tmp_path):
    """Each task, guessed from its labels: what is skipped is told, what was learnt comes back, row by row."""
    good = lines_of(task)
    table = write(folder / f"{task}.csv", [*good[:4], "broken.png,a,b", "gone.png,a,b", *good[4:], "1.png,,b"])
    model = tmp_path / "model"
    done = call("train", table, "--out", model, "--epochs", 2, *QUICK)
    assert done.exit_code == 0, done.output
    assert f"{task} from image and text; " in done.output
    for line in ("line 6: ", "line 7: gone.png does not exist", "line 22: its text is empty"):
        assert line in done.output
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["task"] == task and [row["line"] for row in metrics["skipped"]] == [6, 7, 22]
    assert sum(metrics["rows"].values()) == 18 and metrics["validation"]["loss"] > 0
    drawn = {"regression": {"numbers"}, "multilabel": {"curves"}}.get(task, {"curves", "confusion"}) | {"attention"}
    assert {path.stem for path in model.glob("*.png")} == drawn | {"losses"}

    done = call("evaluate", model, table, "--json", tmp_path / "found.json", "--plots", tmp_path / "plots", *QUICK[2:])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == 18 and len(found["skipped"]) == 3
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == drawn

    done = call("predict", model, table, "--out", tmp_path / "out.csv", *QUICK[2:])
    assert done.exit_code == 0 and "18 of 21 rows predicted" in done.output, done.output
    before, after = rows(table), rows(tmp_path / "out.csv")
    assert [{name: row[name] for name in before[0]} for row in after] == before
    assert [number for number, row in enumerate(after) if row["error"]] == [4, 5, 20]
    assert all(bool(row["predicted"]) != bool(row["error"]) for row in after)
    check_answers(task, after, found["metrics"], model)


def check_answers(task, answers, metrics, model):
    """Predictions in the CSV file are the model's, and what was measured is of them."""
    _, preprocessing = saving.load(model)
    answers = [row for row in answers if not row["error"]]
    if task == "regression":
        off = [abs(float(row["predicted"]) - float(row["label"])) for row in answers]
        assert sum(off) / len(off) == pytest.approx(metrics["mae"], abs=5e-6)  # eight digits of 100 are written
        assert all(90 < float(row["predicted"]) < 115 for row in answers)
    elif task == "multilabel":
        assert all(0 <= float(row[f"p({label})"]) <= 1 for row in answers for label in preprocessing.labels)
    else:
        right = [row["predicted"] == row["label"] for row in answers]
        assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
        assert all(row["predicted"] in preprocessing.labels for row in answers)
    if task == "binary":
        assert all((float(row["probability"]) > 0.5) == (row["predicted"] == "yes") for row in answers)


def test_what_each_word_is_read_by_is_drawn(folder, tmp_path):
    """Of fusions that read words, whatever the row lacks."""
    lines = [*lines_of("binary"), "2.png,,no", ",a picture,yes"]
    table = write(folder / "words.csv", lines)
    options = ("--fusion", "bidirectional", "--architecture", "shared", "--allow-missing", "--epochs", 1)
    done = call("train", table, "--out", tmp_path / "model", *options, *QUICK)
    assert done.exit_code == 0, done.output
    assert {path.stem for path in (tmp_path / "model").glob("*.png")} >= {"attention", "words", "curves"}


def test_what_train_is_told(folder, tmp_path, without_pictures):
    """Every option arrives: the model and its preprocessing are what was asked for, the same for the same seed."""
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("picture 1 2 3\na 4 5 6\n")
    table = write(folder / "options.csv", [*lines_of("binary"), "2.png,,no"])
    options = {
        "task": "multiclass", "architecture": "shared", "fusion": "gated", "heads": 2, "norm": "group",
        "epochs": 1, "size": 14, "resize": "pad", "denoise": "median",
        "embeddings": vectors, "accumulate": 2, "precision": "bfloat16",
        "seed": 3, "hold-out": 0.3, "learning-rate": 1e-9, "weight-decay": 0.1, "vocabulary": 50, "batch-size": 6,
        "threads": 1, "root": folder, "modality-dropout": 0.1,
    }  # fmt: skip
    chosen = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = call("train", table, "--out", tmp_path / "model", "--allow-missing", "--recompute", *chosen)
    assert done.exit_code == 0 and "words have a vector" in done.output, done.output
    model, preprocessing = saving.load(tmp_path / "model")
    config = {
        "task": "multiclass",
        "architecture": "shared",
        "fusion": "gated",
        "num_heads": 2,
        "embedding": 3,
        "norm": "group",
    }
    assert config.items() <= model.config.items()
    assert preprocessing.size == (14, 14) and preprocessing.denoise == "median" and preprocessing.resize == "pad"
    assert preprocessing.allow_missing and preprocessing.labels == ("no", "yes")
    word = model.embedding.weight[preprocessing.tokenizer.token_to_id("picture")]
    assert torch.equal(word.round(), torch.tensor([1.0, 2, 3]))  # so small a rate changes less
    call("train", table, "--out", tmp_path / "again", "--allow-missing", *chosen)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "lines, options, code, message",
    [
        ([*lines_of("binary"), "gone.png,a,no"], ["--strict"], 1, "1 of 19 rows"),
        (["gone.png,a,no"], [], 1, "1 of 1 rows"),
        (lines_of("multiclass"), ["--balance"], 2, "two labels"),
        (lines_of("multiclass"), ["--task", "binary"], 1, "binary needs 2 different labels"),
        (lines_of("binary"), ["--embeddings", __file__], 1, "line 1"),
        (lines_of("binary"), ["--size", "4"], 2, "--size"),
        (lines_of("binary"), ["--fusion", "glue"], 2, "--fusion"),
    ],
)
def test_what_train_refuses(lines, options, code, message, folder, tmp_path):
    """In a line, without a traceback."""
    table = write(folder / "refused.csv", lines)
    done = call("train", table, "--out", tmp_path / "model", *QUICK, *options)
    assert done.exit_code == code and message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "model").exists()


def test_resume(folder, tmp_path, monkeypatch, without_pictures):
    """Stopped half-way and called again: the same model as in one go."""
    from mmkernels.training import fitting

    table = write(folder / "resume.csv", lines_of("binary"))
    chosen = ["--epochs", 3, *QUICK]
    assert call("train", table, "--out", tmp_path / "whole", *chosen).exit_code == 0
    update = fitting._step
    done = []

    def stopped(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(None)
        return update(*arguments)

    monkeypatch.setattr(fitting, "_step", stopped)
    assert call("train", table, "--out", tmp_path / "halved", *chosen).exit_code == 1
    monkeypatch.setattr(fitting, "_step", update)
    other = call("train", table, "--out", tmp_path / "halved", "--resume", *chosen, "--learning-rate", 1)
    assert other.exit_code == 1 and "learning_rate" in other.output
    assert call("train", table, "--out", tmp_path / "halved", "--resume", *chosen).exit_code == 0
    whole, halved = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halved"))
    assert whole == halved and not (tmp_path / "halved" / "checkpoint").exists()


@pytest.mark.slow
def test_two_processes(folder, tmp_path, without_pictures):
    """torchrun's two train what one does, and tell it once. One loss is of float32's mean over another order."""
    table = write(folder / "together.csv", lines_of("binary"))
    chosen = [str(word) for word in ("train", table, "--epochs", 2, "--norm", "none", *QUICK)]
    assert call(*chosen, "--out", tmp_path / "one").exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "mmkernels", *chosen, "--out", str(tmp_path / "two"), "--distributed", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.count("rows to train with") == 1, done.stderr
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"]) and two["validation"]["confusion"]
    assert saving.load(tmp_path / "two")[0].config == saving.load(tmp_path / "one")[0].config


def test_what_predict_refuses(folder, tmp_path):
    table = write(folder / "some.csv", lines_of("binary"))
    done = call("predict", folder, table, "--out", tmp_path / "out.csv")
    assert done.exit_code == 1 and "isn't a model's folder" in done.output
    assert call("predict", folder, table, "--out", table).exit_code == 2


def test_without_images(folder, tmp_path, without_pictures):
    """Text alone: where in an image is no question, so gated attention is the default."""
    words = ["good", "fine", "bad", "poor"]
    lines = [f"a {words[n % 4]} day {n},{'yes' if n % 4 < 2 else 'no'}" for n in range(24)]
    table = write(folder / "words.csv", lines, "text,label")
    refused = call("train", table, "--out", tmp_path / "model", "--fusion", "spatial")
    assert refused.exit_code == 2 and "take gated" in refused.output
    done = call("train", table, "--out", tmp_path / "model", "--epochs", 12, "--learning-rate", 0.01, *QUICK)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "model/metrics.json").read_text())["validation"]["accuracy"] == 1
