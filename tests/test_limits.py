"""What training takes: own processes, limits that are met, table and plot."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

for package in ("matplotlib", "click", "rich"):
    pytest.importorskip(package)

from click.testing import CliRunner  # noqa: E402

from mmkernels import limits  # noqa: E402
from mmkernels.cli import main  # noqa: E402

SMALL = limits.Settings(size=32, tokens=3, rounds=1, threads=1)


def test_a_point_in_its_own_process():
    found = limits.run(SMALL, variants=("fused",), batch_sizes=(2,))
    (point,) = found["points"]
    assert point["milliseconds"] > 0 and point["error"] is None and point["memory_mb"] >= 0
    assert found["settings"]["size"] == 32 and "torch" in found["environment"]
    json.dumps(found)


def test_what_does_not_fit(monkeypatch):
    """Larger batches aren't tried then; any other end of a process is an error."""

    def ends(code, told):
        def run(command, **options):
            size = json.loads(command[-1])["batch_size"]
            if size == 1:
                return subprocess.CompletedProcess(command, 0, '{"milliseconds": 1.0, "memory_mb": 2.0}\n', "")
            return subprocess.CompletedProcess(command, code, "", told)

        monkeypatch.setattr(limits, "subprocess", SimpleNamespace(run=run))
        return limits.run(SMALL, variants=("fused",), batch_sizes=(1, 2, 4))["points"]

    for code, told, error in (
        (-9, "", "killed: the system has no more memory"),
        (1, "...\nRuntimeError: not enough memory: you tried to allocate", "RuntimeError: not enough memory"),
    ):
        first, second = ends(code, told)
        assert first == {"variant": "fused", "batch_size": 1, "milliseconds": 1.0, "memory_mb": 2.0, "error": None}
        assert second["error"].startswith(error) and second["memory_mb"] is None
    with pytest.raises(RuntimeError, match="measuring fused with 2 samples failed: TypeError: wrong"):
        ends(1, "TypeError: wrong")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"variants": ("fast",)}, "variant must be one of"),
        ({"settings": limits.Settings(fusion="concat")}, "fusion must be one of"),
    ],
)
def test_mistakes_are_told_before(options, named, monkeypatch):
    monkeypatch.setattr(limits, "subprocess", None)
    with pytest.raises(ValueError, match=named):
        limits.run(**options)


def test_command(tmp_path, monkeypatch):
    def run(settings, batch_sizes, progress):
        assert (settings.size, settings.device, batch_sizes) == (48, "cpu", (2, 8))
        progress("fused, 2", 0, 1)
        points = [
            {"variant": name, "batch_size": size, "milliseconds": 3.0 * size, "memory_mb": 1234.5, "error": None}
            for size in batch_sizes
            for name in limits.VARIANTS
        ]
        points[-1] |= {"milliseconds": None, "memory_mb": None, "error": "killed: the system has no more memory"}
        return {"settings": limits.asdict(settings), "points": points}

    monkeypatch.setattr(limits, "run", run)
    plot, file = tmp_path / "limits.png", tmp_path / "limits.json"
    options = ["limits", "--size", "48", "--batch-size", "8", "--batch-size", "2", "--device", "cpu", "--plot"]
    done = CliRunner().invoke(main, [*options, str(plot), "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "1,234.5" in done.output and "plain, recomputed, 8 samples: killed" in done.output
    assert len(json.loads(file.read_text())["points"]) == 8
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_measured_step_trains():
    """Here, not in a process of its own: a point's model is the one that was asked for, and its parameters move."""
    seen = []
    before = torch.optim.AdamW.step
    try:
        torch.optim.AdamW.step = lambda self, *args: seen.append(self) or before(self, *args)
        found = limits.measure(SMALL, "plain, recomputed", 2)
    finally:
        torch.optim.AdamW.step = before
    assert len(seen) > 3 and found["milliseconds"] > 0
