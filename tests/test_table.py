"""A folder with a CSV file: every bad row is named, every good one is used. Needs mmkernels[demo]."""

import contextlib
import csv
import io
import os
import re

import pytest
import torch
from test_preprocessing import bomb

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
hypothesis = pytest.importorskip("hypothesis")
for package in ("tokenizers", "tqdm"):
    pytest.importorskip(package)
from hypothesis import strategies as st  # noqa: E402

from mmkernels.data import Preprocessing, Table, read_sheet  # noqa: E402
from mmkernels.data.labels import guess_task, sorted_labels  # noqa: E402

SIZE = 12


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, 0.png to 9.png, some broken files, and links that lead out."""
    root = tmp_path / "folder"
    (root / "inner").mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (SIZE, SIZE), (25 * number, 0, 255)).save(root / f"{number}.png")
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    (root / "half.png").write_bytes((root / "whole.png").read_bytes()[:2000])
    (root / "bomb.png").write_bytes(bomb())
    (root / "text.png").write_text("no picture")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "up").symlink_to(tmp_path)
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "inside.png").symlink_to(root / "1.png")
    os.mkfifo(root / "pipe.png")
    return root


def table(folder, lines, header="path,text,label", **options):
    content = "\n".join([header, *lines]) + "\n"
    (folder / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    preprocessing = options.pop("preprocessing", None) or Preprocessing(size=SIZE)
    return Table(folder / "rows.csv", preprocessing=preprocessing, **options)


GOOD = ["0.png,a red cat,no", "1.png,a blue cat,yes", "2.png,a green cat,no", "3.png,a cat,yes"]
BAD = {
    "nowhere.png,a cat,no": "nowhere.png does not exist",
    "inner,a cat,no": "is no file",
    "half.png,a cat,no": "half.png can't be read: .*truncated",
    "bomb.png,a cat,no": "bomb.png can't be read: .*pixels",
    "text.png,a cat,no": "text.png is no image",
    "../outside.png,a cat,no": "leaves the folder",
    "up/outside.png,a cat,no": "leaves the folder",
    "link.png,a cat,no": "leaves the folder",
    "/etc/hostname,a cat,no": "leaves the folder",
    "{folder}/0.png,a cat,no": "leaves the folder",
    "circle.png,a cat,no": "circle.png",
    "pipe.png,a cat,no": "is no file",
    f"{'x' * 300}.png,a cat,no": "can't be looked up",
    "0.png, ,no": "its text is empty",
    ",a cat,no": "its path is empty",
    "0.png,a cat,": "its label is empty",
    "0.png,a cat": "2 cells, but 3 columns",
    "0.png,a cat,no,more": "4 cells, but 3 columns",
    "0.png,a\0cat,no": "zero byte",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_rows_are_named(folder):
    """All of them between good ones: each with its line and the reason, and the good ones remain."""
    bad = [line.format(folder=folder) for line in BAD]
    found = table(folder, [*GOOD[:2], *bad, *GOOD[2:], 'inside.png,"ein ""Text""",yes'])
    assert [row.line for row in found.problems] == list(range(4, 4 + len(bad)))
    for row, reason in zip(found.problems, BAD.values()):
        assert re.search(reason, row.problem), row
    assert len(found) == 5 and found.samples[4].text == 'ein "Text"' and found[4][0].shape == (3, SIZE, SIZE)
    assert len(found.report(3).splitlines()) == 5 and found.report(3).endswith(f"and {len(bad) - 3} more")
    with pytest.raises(ValueError, match=f"{len(bad)} of {len(bad) + 5} rows"):
        table(folder, [*GOOD, *bad, GOOD[0]], strict=True)


def test_bytes_that_are_not_utf8(folder):
    (folder / "rows.csv").write_bytes(b"path,text,label\n0.png,caf\xe9,no\n1.png,caf\xc3\xa9,yes\n2.png,x,no\n")
    found = Table(folder / "rows.csv", preprocessing=Preprocessing(size=SIZE))
    assert [(row.line, row.problem) for row in found.problems] == [(2, "it isn't UTF-8")]
    assert [sample.text for sample in found.samples] == ["café", "x"]


def test_an_open_quote(folder):
    found = table(folder, [*GOOD, '4.png,"a cat,no', *GOOD])
    assert [row.line for row in found.problems] == [6] and "up to line 10: is a quote" in found.problems[0].problem


def test_lines_are_counted_with_those_inside_quotes(folder):
    found = table(folder, ['0.png,"a\nred\ncat",no', "", "1.png,a cat,yes", "nowhere.png,a,no"])
    assert [sample.row.line for sample in found.samples] == [2, 6]
    assert [row.line for row in found.problems] == [7]


def test_a_cell_that_is_too_long_for_csv(folder):
    found = table(folder, [f"4.png,{'word ' * 40_000},no", *GOOD])
    assert [row.line for row in found.problems] == [2] and "field limit" in found.problems[0].problem
    assert len(found) == 4


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_dialects(delimiter, end, mark, folder):
    lines = ["Path,Text,Label", *GOOD]
    (folder / "rows.csv").write_bytes(mark + end.join(line.replace(",", delimiter) for line in lines).encode())
    found = Table(folder / "rows.csv", preprocessing=Preprocessing(size=SIZE))
    assert [sample.text for sample in found.samples] == ["a red cat", "a blue cat", "a green cat", "a cat"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("path,text,label\n".encode("utf-16"), "UTF-8"),
        (b"path,text\n0.png,a\n", "label is missing"),
        (b"picture,words,label\n0.png,a,no\n", "path, text or sound is missing"),
        (b"path,text,text,label\n", "text is there twice"),
        (b"path,text,label\n", "has no rows"),
        (b"path,text,label\nnowhere.png,a,no\n", "1 of 1 rows"),
        (b"path,text,label\n0.png,a,no\n1.png,a,no\n", "label"),
    ],
)
def test_files_that_are_refused(content, message, folder):
    (folder / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Table(folder / "rows.csv", preprocessing=Preprocessing(size=SIZE))
    assert "rows.csv" in str(caught.value)


# Labels


@pytest.mark.parametrize(
    "labels, task, names",
    [
        (["yes", "no", "no"], "binary", ("no", "yes")),
        (["1", "0"], "binary", ("0", "1")),
        (["1.0", "10", "2"], "multiclass", ("1.0", "2", "10")),
        (["cat", "dog", "bird"], "multiclass", ("bird", "cat", "dog")),
        (["cat|dog", "cat", "|"], "multilabel", ("cat", "dog")),
        (["0.5", "1", "2"], "regression", ()),
        ([str(number) for number in range(30)] + ["?"], "regression", ()),
    ],
)
def test_the_task_is_guessed(labels, task, names):
    assert guess_task(labels) == task and sorted_labels(labels, task) == names


def targets(found):
    return found.collate([found[index] for index in range(len(found))]).target


def test_targets(folder):
    def lines(*labels):
        return [f"{number}.png,a cat,{label}" for number, label in enumerate(labels)]

    assert torch.equal(targets(table(folder, lines("no", "yes", "no"))), torch.tensor([0.0, 1, 0]))
    assert torch.equal(targets(table(folder, lines("b", "a", "c"))), torch.tensor([1, 0, 2]))
    several = torch.tensor([[1.0, 1], [0, 1], [0, 0]])
    assert torch.equal(targets(table(folder, lines("a|b", "b", "|"))), several)
    regression = Preprocessing(size=SIZE, task="regression")
    numbers = table(folder, lines("1.5", "2.5", "none", "2.5", "1.5"), preprocessing=regression)
    assert [row.line for row in numbers.problems] == [4] and "no number" in numbers.problems[0].problem
    numbers.learn()
    assert targets(numbers).tolist() == [-1, 1, 1, -1] and numbers.preprocessing.number(-1.0) == 1.5


def test_labels_that_a_model_does_not_know(folder):
    first = table(folder, GOOD)
    found = table(folder, [*GOOD, "4.png,a,maybe"], preprocessing=first.preprocessing)
    assert [(row.line, row.problem) for row in found.problems] == [(6, "its label 'maybe' is none of no, yes")]


# Batches


def test_batch(folder):
    found = table(folder, GOOD)
    preprocessing = found.learn(min_frequency=1)
    batch = found.collate([found[0], found[1]])
    assert set(batch.inputs) == {"image", "text"} and len(batch) == 2
    assert batch.inputs["image"].shape == (2, 3, SIZE, SIZE)
    assert batch.inputs["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.inputs["image"][1], preprocessing.image(folder / "1.png"))
    assert torch.equal(batch.inputs["text"], preprocessing.text(["a red cat", "a blue cat"]))


def test_missing_modalities(folder):
    lines = ["0.png,,no", ",a cat,yes", "1.png,a cat,yes", ",,yes"]
    found = table(folder, lines, preprocessing=Preprocessing(size=SIZE, allow_missing=True))
    assert [(row.line, row.problem) for row in found.problems] == [(5, "no path and no text")]
    found.learn()
    inputs = found.collate([found[index] for index in range(3)]).inputs
    assert inputs["image_present"].tolist() == [True, False, True]
    assert inputs["text_present"].tolist() == [False, True, True]
    assert not inputs["text"][0].any() and torch.isfinite(inputs["image"]).all()


def test_without_a_column(folder):
    for header, modalities in (("path,label", ("image",)), ("text,label", ("text",))):
        lines = [",".join(line.split(",")[slice(None, None, 2) if "path" in header else slice(1, 3)]) for line in GOOD]
        found = table(folder, lines, header)
        assert found.learn().modalities == modalities
        assert set(found.collate([found[0]]).inputs) == set(modalities)
    with pytest.raises(ValueError, match="path is missing"):
        table(folder, GOOD).learn() and table(folder, lines, header, preprocessing=table(folder, GOOD).learn())


def test_without_labels(folder):
    found = table(folder, [line.rsplit(",", 1)[0] for line in GOOD], "path,text", labelled=False)
    found.learn()
    assert found.collate([found[0]]).target is None


def test_a_file_is_read_once(folder, monkeypatch):
    """Rows that share a picture share its pixels; and what was checked is what is trained on, whatever becomes of the
    files."""
    found = table(folder, [*GOOD, *GOOD])
    assert len(found._store) == 4
    before = [found[index][0] for index in range(8)]
    for number in range(4):
        (folder / f"{number}.png").unlink()
    assert all(torch.equal(found[index][0], image) for index, image in enumerate(before))


def test_split(folder):
    lines = [f"{number}.png,text {part},{'yes' if number < 5 else 'no'}" for number in range(10) for part in range(3)]
    found = table(folder, lines)
    training, validation = found.split(0.2, seed=1)
    assert len(training) == 24 and len(validation) == 6
    assert not {sample.image for sample in training.samples} & {sample.image for sample in validation.samples}
    assert sorted(sample.label for sample in validation.samples) == ["no"] * 3 + ["yes"] * 3
    again, other = found.split(0.2, seed=1)[1], found.split(0.2, seed=3)[1]
    assert again.samples == validation.samples != other.samples
    training.learn()
    assert validation.preprocessing.mean == training.preprocessing.mean is not None
    assert found.negatives_per_positive() == 1
    with pytest.raises(ValueError, match="one side empty"):
        found.split(0.0)


# Any file


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    """A file is refused by name, or read; never anything else."""
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_sheet(path)
    path.write_bytes(b"path,text,label\n" + content)
    sheet = read_sheet(path)
    starts = [row.line for row in sheet.rows]
    assert starts == sorted(set(starts)) and all(line > 1 for line in starts)
    assert all(row.problem or len(row.cells) == 3 for row in sheet.rows)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        assert any(row.problem for row in sheet.rows)
    else:
        plain = [cells for cells in csv.reader(io.StringIO(text, newline="")) if cells]
        assert [row.cells for row in sheet.rows] == plain


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@hypothesis.given(st.lists(st.lists(CELL, min_size=1, max_size=5).filter(lambda row: row != [""]), max_size=6))
def test_any_cells(tmp_path_factory, rows):
    """What csv writes is read as it was, with its lines; rows of another length are named; and writing it again with a
    column more keeps every row."""
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "text", "label"], *rows])
    sheet = read_sheet(path)
    assert [row.cells for row in sheet.rows] == rows
    assert [bool(row.problem) for row in sheet.rows] == [len(row) != 3 for row in rows]
    sheet.write(path, {"predicted": [str(number) for number in range(len(rows))]})
    again = read_sheet(path)
    assert again.header == ["path", "text", "label", "predicted"]
    for number, (row, cells) in enumerate(zip(again.rows, rows, strict=True)):
        assert row.cells[3] == str(number) and row.cells[:3] == (cells + ["", ""])[:3]


ROWS = st.sampled_from([*((line, None) for line in GOOD), *BAD.items()])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(ROWS, max_size=8))
def test_any_mixture(folder, rows):
    found = table(folder, [*GOOD, *(line.format(folder=folder) for line, _ in rows)])
    expected = [number for number, (_, reason) in enumerate(rows, 6) if reason]
    assert [row.line for row in found.problems] == expected and len(found) == 4 + len(rows) - len(expected)
    found.learn()
    assert len(found.collate([found[index] for index in range(len(found))])) == len(found)
