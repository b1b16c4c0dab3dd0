"""bench/, as its users run it: pytest-benchmark's groups and JSON, and no time of what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.compiling import ROOT

from mmkernels import functional
from mmkernels.bench import report

pytest.importorskip("pytest_benchmark")

# Loaded as a plugin before anything is measured.
PLANTED = """
from mmkernels import functional

true = functional.spatial_attention
functional.spatial_attention = lambda *args, **options: true(*args, **options) * 1.001
"""


def test_every_operation_has_a_file():
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert files == set(functional.__all__)


def test_pytest_benchmark(tmp_path):
    """Of two operations one is wrong by a thousandth: it gets no time, nor does any peer beside it."""
    (tmp_path / "planted.py").write_text(PLANTED)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    selected = ["-p", "planted", "-k", "small and (spatial or channel)", "--benchmark-json", tmp_path / "found.json"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quick", "--threads", "1", "--benchmark-max-time", "0.01", *selected],
        cwd=ROOT / "bench",
        env={**inherited, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "6 failed, 6 passed" in done.stdout, done.stdout + done.stderr
    assert "spatial_attention 1x4x8 is wrong, so it isn't timed" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["group"] for row in found["benchmarks"]} == {
        "channel_attention: small call, 1x4x8x8",
        "channel_attention: small call, forward + backward, 1x4x8x8",
    }
    names = {row["params"]["contestant"] for row in found["benchmarks"]}
    assert names == {"ours", "sdpa", "five operations"}
    assert all(row["stats"]["min"] > 0 for row in found["benchmarks"])
    machine = found["machine_info"]["mmkernels"]
    assert machine["threads"] == 1 and {"processor", "cpu_isa", "torch", "device"} <= machine.keys()
    assert {"id", "dirty"} <= found["commit_info"].keys()


def test_the_commit_is_told():
    found = report.environment("cpu", quick=True)
    assert found["cpu_isa"] and found["processor"] and found["threads"]
    if Path(report.__file__).is_relative_to(ROOT / "mmkernels") and (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(found["commit"].removesuffix("-dirty"))
    else:
        assert found["commit"] is None, "an installed package is in no checkout"
