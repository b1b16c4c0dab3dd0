"""tools/gpu_check.py, with steps that need no GPU: it goes on, it skips with a word, and its report has everything."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from support.compiling import ROOT

from mmkernels import functional

FACTS = {"gpus": [], "torch": "2.11", "commit": "abc", "driver": ""}
CARD = {"name": "a card", "capability": "9.0"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check():
    yield load("gpu_check")
    del sys.modules["gpu_check"]


def python(code):
    return [sys.executable, "-c", code]


def report(path):
    found = json.loads(path.read_text())
    return found["facts"], {step["name"]: step for step in found["steps"]}


def test_it_goes_on_after_a_failure(check, tmp_path, capsys):
    steps = [
        check.Step("wrong", [python("print('what went wrong'); raise SystemExit(3)")]),
        check.Step("without", [python("")], ("gpu",)),
        check.Step("right", [python("import sys; open(sys.argv[1], 'w').write('{\"found\": NaN}')") + ["{json}"]]),
    ]
    assert check.run(steps, FACTS, tmp_path / "report.json", limit=60) == 1
    facts, found = report(tmp_path / "report.json")
    assert facts == FACTS
    assert {name: step["status"] for name, step in found.items()} == {
        "wrong": "failed",
        "without": "skipped",
        "right": "passed",
    }
    assert (
        found["wrong"]["commands"][0]["exit_code"] == 3 and "what went wrong" in found["wrong"]["commands"][0]["tail"]
    )
    right = found["right"]["commands"][0]
    assert right["results"] == {"found": "NaN"} and right["seconds"] >= 0  # told to a tenth, and Python starts faster
    assert found["without"]["reason"] == "there is no GPU that torch can use"
    said = capsys.readouterr().out
    assert "what went wrong" in said and "1 failed: wrong; 1 skipped: without" in said


def test_nothing_failed(check, tmp_path):
    assert check.run([check.Step("right", [python("")])], FACTS, tmp_path / "report.json", limit=60) == 0


@pytest.mark.parametrize(
    "codes, passing, passed",
    [
        ((0, 0), (0,), True),
        ((0, 5), (0,), False),
        ((0, 5), (0, 5), True),
        ((5, 5), (0, 5), False),
        ((0, 1), (0, 5), False),
    ],
)
def test_every_command_counts(check, codes, passing, passed):
    step = check.Step("several", [python(f"raise SystemExit({code})") for code in codes], passing=passing)
    (found,) = check.run_together([step], limit=60)
    assert [command["exit_code"] for command in found["commands"]] == list(codes)
    assert (found["status"] == "passed") is passed


def test_a_step_out_of_time_is_ended(check, tmp_path, monkeypatch):
    """With everything that it started; what came after it in the step never starts."""
    monkeypatch.setattr(check, "cores", lambda: 1)
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    (found,) = check.run_together([check.Step("endless", [python(parent), python("")])], limit=4)
    assert found["status"] == "failed" and found["seconds"] < 30
    assert [command["exit_code"] for command in found["commands"]] == [check.OUT_OF_TIME] * 2
    assert "begun" in found["commands"][0]["tail"] and "never started" in found["commands"][1]["tail"]
    assert gone(int((tmp_path / "pid").read_text()))


def test_steps_run_beside_each_other(check, tmp_path, monkeypatch):
    """Each waits for what another leaves; one that is to be alone comes when all have ended."""
    monkeypatch.setattr(check, "cores", lambda: 2)
    meet = "import pathlib, time, sys\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)"
    files = [str(tmp_path / name) for name in ("a", "b")]
    count = f"import pathlib; assert len(list(pathlib.Path({str(tmp_path)!r}).glob('[ab]'))) == 2"
    steps = [
        check.Step("a", [[*python(meet), *files]]),
        check.Step("b", [[*python(meet), *reversed(files)]]),
        check.Step("alone", [python(count)], alone=True),
    ]
    assert [[step.name for step in group] for group in check.side_by_side(steps)] == [["a", "b"], ["alone"]]
    assert check.run(steps, FACTS, tmp_path / "report.json", limit=60) == 0


def gone(process, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.startswith(
            "Z"
        ):
            return True  # dead; whoever adopted it hasn't looked yet
        time.sleep(0.1)
    return False


def test_a_later_run_adds_to_the_report(check, tmp_path):
    path = tmp_path / "report.json"
    check.run([check.Step("a", [python("raise SystemExit(1)")]), check.Step("b", [python("")])], FACTS, path, limit=60)
    assert check.run([check.Step("a", [python("")])], FACTS, path, limit=60) == 0
    assert {name: step["status"] for name, step in report(path)[1].items()} == {"a": "passed", "b": "passed"}
    check.run([check.Step("a", [python("")])], {**FACTS, "commit": "another"}, path, limit=60)
    assert set(report(path)[1]) == {"a"}, "what another commit gave is no part of this one's report"


def test_steps(check, monkeypatch):
    monkeypatch.delenv("MMKERNELS_CUDA_ARCHS", raising=False)
    found = {step.name: step for step in check.steps({**FACTS, "gpus": [CARD, CARD]})}
    assert len(found) == len(list(check.steps(FACTS)))
    assert found["build"].environment == {"MMKERNELS_CUDA": "1", "MMKERNELS_CUDA_ARCHS": "9.0"}
    assert sorted(functional.__all__) == check.OPERATIONS
    assert {name.removesuffix("-cuda") for name in found if "check-" in name and name.endswith("-cuda")} == {
        "memcheck",
        "racecheck",
        "synccheck",
        "initcheck",
    }
    order = list(found)
    assert order[:2] == ["build", "info"] and order.index("tests-cuda") < order.index("memcheck-cuda") < order.index(
        "bench-spatial_attention-bfloat16"
    )
    alone = [name for name, step in found.items() if step.alone]
    assert alone == [name for name in found if name in ("build", "info") or name.startswith("bench-")]
    for step in found.values():
        assert not any("pip" in word for command in step.commands for word in command), "nothing is installed"


def test_what_is_missing_is_named(check, monkeypatch):
    machine = {**FACTS, "gpus": [CARD]}
    monkeypatch.setattr(check.shutil, "which", lambda *_, **__: None)
    assert check.lacking(("gpu", "compute-sanitizer"), machine) == "compute-sanitizer isn't installed"
    assert check.lacking(("gpu", "no_such_module"), machine) == "no_such_module isn't installed"
    assert check.lacking(("gpu", "pytest"), machine) is None


def test_the_environment_of_a_step(check, monkeypatch):
    """Triton runs for real, whatever a test module would set, and this checkout is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = check.environment()
    assert found["TRITON_INTERPRET"] == "0" and found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]


def test_command_line(check, tmp_path, capsys):
    assert check.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("build", "verify-triton", "racecheck-cuda", "bench-channel_attention"))
    assert check.main(["--list", "--only", "bench-", "info"]) == 0
    listed = capsys.readouterr().out
    assert "bench-spatial_attention" in listed and "info" in listed and "verify" not in listed
    with pytest.raises(SystemExit):
        check.main(["--only", "velify"])
    assert "velify: no step begins so" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="this system has no make")
def test_make(tmp_path):
    """The target itself."""
    told = subprocess.run(
        ["make", "-s", "gpu-check", f"PYTHON={sys.executable}", f"ONLY=info --json {tmp_path / 'report.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    facts, found = report(tmp_path / "report.json")
    assert told.returncode == 0, told.stdout + told.stderr
    assert (
        list(found) == ["info"]
        and found["info"]["status"] == "passed"
        and found["info"]["commands"][0]["results"]["backends"]
    )
    assert facts["torch"] and facts["cores"] and facts["packages"]["pytest"]


def test_times_without_a_gpu():
    """tools/gpu_times.py: every benchmark's rows are planned; it says what is wrong, and begins nothing."""
    times = load("gpu_times")
    planned = {operation for operation, *_ in times.plan(functional.__all__)}
    assert planned == set(functional.__all__)
    names = {name for _, _, part, _ in times.plan(functional.__all__, ["sdpa"]) for name in part.contestants}
    assert "ours" in names and not names & {"sdpa", "compile"}
    with pytest.raises(SystemExit):
        times.main(["spatial"])
    if not torch.cuda.is_available():
        assert times.main([]) == 1
