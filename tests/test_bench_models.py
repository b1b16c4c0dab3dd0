"""``mmkernels bench --models``, on a model that takes no time."""

import json

import pytest
import torch
from torch import nn

from mmkernels.bench import models
from mmkernels.cli import main

pytest.importorskip("click")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, query, image):
        return self.dropout(self.attention(query, image, image, need_weights=False)[0])


def toy(quick):
    return Toy(), {"query": torch.randn(1, 1, 32), "image": torch.randn(1, 10 if quick else 50, 32)}


MODELS = (
    models.Model("Toy", "torch", toy, lambda output: output, 0.0, memory=1e9),
    models.Model("Toy, training step", "torch", toy, lambda output: output, 1e9, training=True),
    models.Model("Other", "a_package_that_is_not_there", toy, lambda output: output, 1.0),
)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(models, "MODELS", MODELS)


def test_rows():
    found = models.run(quick=True, threads=1)
    infer, train, left_out = found["models"]
    for row in (infer, train):
        assert row["replaced"] == 1
        assert 0 < row["least"] <= row["faster"] <= row["most"]
        assert row["outputs differ by"] < 1e-5
    assert 0 < infer["share of the model"] <= 1
    assert infer["layers faster"] > 0
    assert left_out == {"model": "Other", "left out": "a_package_that_is_not_there isn't installed"}
    assert [(f["name"], f["passed"]) for f in found["figures"] if "memory" not in f["name"]] == [
        ("Toy", True),
        ("Toy, training step", False),
    ]


def test_what_differs_has_no_figure(monkeypatch):
    """A model whose fused self computes something else isn't faster."""
    monkeypatch.setattr(models, "MODELS", (models.Model("Toy", "torch", toy, lambda o: o * torch.rand(()), 0.0),))
    (row,) = models.run(quick=True)["models"]
    assert "wrong" in row
    assert "faster" not in row


def test_command(tmp_path):
    from click.testing import CliRunner

    file = tmp_path / "models.json"
    done = CliRunner().invoke(main, ["bench", "--model", "toy,", "--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert [row["model"] for row in json.loads(file.read_text())["models"]] == ["Toy, training step"]
    done = CliRunner().invoke(main, ["bench", "--model", "nothing"])
    assert done.exit_code == 2
    assert "known: Toy, Toy, training step, Other" in done.output
    done = CliRunner().invoke(main, ["bench", "--models", "--operation", "spatial_attention"])
    assert done.exit_code == 2
    assert "--models goes without --operation" in done.output
