"""The command line: it answers, its JSON is complete, and `verify` and `bench` notice what is wrong."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.attention_tests import assert_rule, draw

import mmkernels as mmk
from mmkernels import backends, cases, functional, peers, reference, verify

click_testing = pytest.importorskip("click.testing")
pytest.importorskip("rich")

from mmkernels import bench, cli  # noqa: E402
from mmkernels.bench import contests, gated_cross_attention, report, timing  # noqa: E402
from mmkernels.cli import common  # noqa: E402


def call(*arguments):
    return click_testing.CliRunner().invoke(cli.main, [str(a) for a in arguments])


@pytest.fixture
def planted(own_backends):
    """`planted(function)` registers a backend "planted" that runs it."""

    def plant(function):
        backends.register("planted", lambda device_type, dtype: None)
        backends.implement("planted", "spatial_attention", function)

    return plant


def right(image, text, mask, offsets, scale, num_heads, pool, rescale):
    return reference.spatial_attention(
        image,
        text,
        mask=mask,
        offsets=offsets,
        scale=scale,
        num_heads=num_heads,
        combine="pool" if pool else "multiply",
        rescale=rescale,
        layout="bdhw" if image.dim() == 4 else "bnd",
        need_weights=True,
    )


def test_python_dash_m():
    """The real command, in a process of its own, without a terminal."""
    done = subprocess.run([sys.executable, "-m", "mmkernels", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("info", "verify", "bench", "patch", "demo", "train", "evaluate", "predict", "compare"):
        assert command in done.stdout


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(missing):
    """A friendly line instead of a traceback."""
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None\n"
        "runpy.run_module('mmkernels', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install mmkernels[cli]" in done.stderr and missing in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["info", "verify", "bench", "patch", "demo", "compare"])
def test_help(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--json FILE" in result.output and len(result.output.splitlines()) > 5


def test_version():
    assert mmk.__version__ in call("--version").output


def test_unknown_command():
    assert call("velify").exit_code == 2


def test_demo_without_the_kernels(monkeypatch, tmp_path):
    """As from a checkout that wasn't built: refused before anything is trained, with the place to look at."""
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "the compiled extension can't be loaded")
    result = call("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert (
        "plain PyTorch with itself: the compiled extension can't be loaded" in told
        and str(Path(mmk.__file__).parent) in told
    )
    assert not (tmp_path / "out").exists()


def test_info(tmp_path):
    result = call("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    told = {(row["operation"], row["backend"], row["device"]): row["reason"] for row in found["backends"]}
    for operation in functional.__all__:
        for name in backends.names():
            assert told[operation, name, "cpu"] == backends.why_not(name, operation, "cpu", torch.float32)
    assert [row["backend"] for row in found["backends"] if row["default"] and row["device"] == "cpu"] == [
        "cpu" if backends.extension is not None else "reference"
    ] * len(functional.__all__)
    for name in backends.names():
        assert name in result.output


def test_info_of_the_extension(extension, tmp_path):
    call("info", "--json", tmp_path / "info.json")
    built = json.loads((tmp_path / "info.json").read_text())["extension"]
    assert built["cpu_isa"] in built["cpu_isas"] and built["file"] == extension.__file__
    assert built["compiler"] and built["torch_target"]
    assert built["cuda_architectures"] or built["cuda_reason"]


def test_info_without_the_extension(own_backends, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "the compiled extension was taken away by this test")
    result = call("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0
    assert "taken away" in json.loads((tmp_path / "info.json").read_text())["extension"]["missing"]


def test_progress_without_a_terminal(capsys):
    """A line now and then, into a log, too."""
    with common.progress_bar("bench") as progress:
        for done in range(50):
            progress(f"row {done}", done, 50)
    assert capsys.readouterr().err == "row 0 (0 of 50 done)\n"


# verify


def test_verify(tmp_path):
    result = call("verify", "--small", "--dtype", "float32", "--json", tmp_path / "verify.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["passed"] is True
    expected = {b for b in backends.names() if backends.why_not(b, "spatial_attention", "cpu", torch.float32) is None}
    assert {row["backend"] for row in found["rows"] if row["device"] == "cpu"} == expected
    for backend in expected:
        count = sum(row["cases"] for row in found["rows"] if row["backend"] == backend and row["device"] == "cpu")
        assert count == sum(
            len(cases.selected(operation, small=True))
            for operation in functional.__all__
            if backends.why_not(backend, operation, "cpu", torch.float32) is None
        )
        assert backend in result.output
    for row in found["rows"]:
        assert row["passed"] and not row["failures"] and row["error"] <= row["allowed"] and row["dtype"] == "float32"


def test_verify_accepts_a_right_backend(planted):
    planted(right)
    rows = verify.run(["spatial_attention"], ["planted"], dtypes=[torch.float32], small=True)
    assert verify.passed(rows), [row.failures for row in rows if row.failures]


WRONG = {
    "scale forgotten": lambda *a: right(*a[:4], 1.0, *a[5:]),
    "mask forgotten": lambda *a: right(*a[:2], None, *a[3:]),
    "rescale forgotten": lambda *a: right(*a[:7], False, *a[8:]),
    "heads forgotten": lambda *a: right(*a[:5], 1, *a[6:]),
    "a thousandth off": lambda *a: tuple(t * 1.001 for t in right(*a)),
    "rounded to bfloat16": lambda *a: tuple(t.bfloat16().to(t.dtype) for t in right(*a)),
    "gradient of text lost": lambda image, text, *a: right(image, text.detach(), *a),
    "gradient of image lost": lambda image, text, *a: right(image.detach(), text, *a),
    "gradient a hundredth off": lambda image, text, *a: right(image, text + 0.01 * (text - text.detach()), *a),
    "NaN where nothing takes part": lambda *a: tuple(t / (t.abs().sum() > 0) for t in right(*a)),
    "raises": lambda *a: 1 / 0,
}


@pytest.mark.parametrize("mistake", WRONG)
def test_verify_catches_a_wrong_backend(planted, mistake, tmp_path):
    planted(WRONG[mistake])
    result = call(
        "verify",
        "--operation",
        "spatial_attention",
        "--backend",
        "planted",
        "--small",
        "--dtype",
        "float32",
        "--json",
        tmp_path / "verify.json",
    )
    assert result.exit_code == 1, result.output
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["passed"] is False and any(row["failures"] for row in found["rows"])
    assert "failed" in result.output and "planted" in result.output


def test_verify_of_a_backend_that_cannot_run(planted):
    planted(right)
    backends.register("planted", lambda device_type, dtype: "it was never built")
    result = call("verify", "--operation", "spatial_attention", "--backend", "planted", "--small", "--dtype", "float32")
    assert result.exit_code == 1 and "it was never built" in result.output
    assert call("verify", "--backend", "no such thing").exit_code == 2


def test_verify_of_a_backend_that_runs_some_dtypes(planted):
    """The GPU's backends have no float64, and nothing on the CPU: where they can't run they aren't wrong."""
    planted(right)
    backends.register("planted", lambda device_type, dtype: None if dtype == torch.float32 else "it has no such dtype")
    result = call("verify", "--operation", "spatial_attention", "--backend", "planted", "--small")
    assert result.exit_code == 0, result.output
    rows = verify.run(["spatial_attention"], ["planted"], small=True)
    assert verify.passed(rows) and {row.dtype for row in rows} == {"float32"}
    rows = verify.run(["spatial_attention"], ["planted"], small=True, dtypes=[torch.float64])
    assert rows and not any(row.passed for row in rows)


def test_verify_of_nothing_is_no_success():
    assert not verify.passed([])


# bench


@pytest.mark.parametrize("operation", functional.__all__)
def test_peers_agree_with_the_reference(operation):
    for case in cases.selected(operation, small=True):
        arguments = case.build(torch.float64)
        results = []
        for module in (peers, reference):
            torch.manual_seed(0)  # dropout draws the same
            results.append(getattr(module, operation)(**arguments))
        found, truth = results
        assert_rule(found, truth, peer=truth)  # no more than another order of sums in float64


@pytest.mark.parametrize("mask", [None, torch.arange(10).view(2, 5) % 3 > 0, torch.arange(5.0).expand(2, 3, 7, 5)])
def test_attention_peers_of_pytorch(mask):
    """SDPA's and FlexAttention's calls are the operation."""
    tensors = [draw(2, 3, n, d, seed=i) for i, (n, d) in enumerate(((7, 8), (5, 8), (5, 4), (7, 4)))]
    wide = [t.double() for t in tensors]
    truth = reference.gated_cross_attention(*wide, attn_mask=mask)
    plain = peers.gated_cross_attention(*tensors, attn_mask=mask)
    for name in ("sdpa", "flex"):
        assert_rule(getattr(peers, f"gated_cross_attention_{name}")(*tensors, attn_mask=mask), truth, plain)


@pytest.mark.slow
def test_compiled_flex():
    """As the benchmark calls it, with a gate and without."""
    arguments = {name: draw(1, 2, 4, 16, seed=i) for i, name in enumerate(("query", "key", "value", "gate"))}
    contestant = gated_cross_attention.PEERS[gated_cross_attention.FLEX](arguments)
    for given in (arguments, {name: arguments[name] for name in ("query", "key", "value")}):
        truth = reference.gated_cross_attention(**{name: t.double() for name, t in given.items()})
        assert_rule(contestant(**given), truth, peers.gated_cross_attention(**given))


def test_race():
    """The slower one is slower, about as much as it is, and everything ran equally often."""
    counts = {"fast": 0, "slow": 0}

    def contestant(name, seconds):
        def run():
            counts[name] += 1
            time.sleep(seconds)

        return run

    times = timing.race({"fast": contestant("fast", 0.004), "slow": contestant("slow", 0.016)}, rounds=4)
    assert len(times["fast"].rounds) == len(times["slow"].rounds) == 4 and counts["fast"] == counts["slow"]
    assert 2 < times["slow"].over(times["fast"]) < 5
    assert 0.004 <= times["fast"].best <= times["fast"].median < 0.016 <= times["slow"].best


def test_race_stops_at_its_budget():
    times = timing.race({"slow": lambda: time.sleep(0.02)}, rounds=1000, budget=0.2)
    assert 3 <= len(times["slow"].rounds) < 20


def test_peak_memory():
    peak = timing.peak_memory(lambda: torch.ones(20 << 20, dtype=torch.uint8))
    if peak is None:
        pytest.skip("this system can't tell")
    assert 18 << 20 < peak < 30 << 20


def test_figures():
    assert report.Figure("a", 1.5, 1.6).passed and not report.Figure("a", 1.5, 1.4).passed
    assert report.Figure("a", 1.2, 1.1, at_most=True).passed and not report.Figure("a", 1.2, 1.3, at_most=True).passed
    assert not report.Figure("a", 1.5, float("nan")).passed
    assert (
        report.mean([1, 4]) == pytest.approx(2)
        and math.isnan(report.mean([]))
        and math.isnan(report.mean([1, float("nan")]))
    )


TINY = {
    "absorbed_attention": (1, 2, 12, 5, 16),
    "spatial_attention": (2, 12, 16),
    "gated_cross_attention": (2, 2, 12, 5, 16),
    "bidirectional_attention": (2, 2, 12, 5, 16, 3),
    "channel_attention": (2, 12, 16, 8),
    "additive_attention": (1, 40, 16, 8),
    "deformable_attention": (1, 10, 2, 8, 2, "one"),
}


@pytest.fixture
def tiny_shapes(monkeypatch):
    """The benchmark with shapes that take no time; what it measures means nothing."""
    for operation in functional.__all__:
        monkeypatch.setattr(importlib.import_module(f"mmkernels.bench.{operation}"), "QUICK", (TINY[operation],))


@pytest.fixture
def tiny_bench(tiny_shapes, monkeypatch):
    monkeypatch.setattr(peers, "compiled", lambda function, **_: function)


def test_bench(tiny_bench, tmp_path):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    result = call(
        "bench",
        "--quick",
        "--threads",
        1,
        "--device",
        "cpu",
        "--json",
        tmp_path / "b.json",
        "--plot",
        tmp_path / "b.png",
    )
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["environment"]["threads"] == 1 and found["environment"]["quick"] is True
    result_of = found["operations"]["spatial_attention"]
    assert len({row["kind"] for row in result_of["rows"]}) == 8
    forward = next(row for row in result_of["rows"] if row["kind"].startswith("forward,"))
    for name in (
        "copy_",
        "ours",
        "ours out=",
        "eager",
        "compile",
        "vs eager",
        "vs compile",
        "speed-up",
        "share of copy_",
        "GB/s",
    ):
        assert forward[name] > 0, name
    assert forward["speed-up"] == min(forward["vs eager"], forward["vs compile"])
    assert forward["MB to move"] == pytest.approx(2 * 2 * 12 * 16 * 4 / 1e6)
    for figure in result_of["figures"]:
        assert figure["name"] in result.output and isinstance(figure["passed"], bool)
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_peers_that_are_not_installed(tiny_bench, monkeypatch, tmp_path):
    """Left out, and said so."""
    missing = contests.installed({"a": 1, "b": 2, "c": 3}, {"b": "torch", "c": "no_such_package"})
    assert missing == {"a": 1, "b": 2}
    monkeypatch.setattr(bench.benchmark_of("channel_attention"), "NEEDS", {"c": "no_such_package"}, raising=False)
    result = call("bench", "--quick", "--operation", "channel_attention", "--json", tmp_path / "b.json")
    told = "channel_attention: the peer 'c' is left out, no_such_package isn't installed (pip install mmkernels[bench])"
    assert told in result.output
    assert json.loads((tmp_path / "b.json").read_text())["operations"]["channel_attention"]["left out"] == {
        "c": "no_such_package"
    }


def test_bench_reports_no_speed_up_of_a_wrong_result(tiny_bench, monkeypatch):
    """Fast and wrong is worth nothing."""
    true = functional.spatial_attention
    monkeypatch.setattr(functional, "spatial_attention", lambda *a, out=None, **k: true(*a, **k) * 1.1)
    found = bench.run(["spatial_attention"], quick=True, device="cpu")["operations"]["spatial_attention"]
    checked = [row for row in found["rows"] if not row["kind"].startswith("memory")]
    assert checked and all(row["wrong"] for row in checked)
    assert not any(
        {"speed-up", "vs eager", "share of copy_", "bdhw / bnd", "float32 / bfloat16"} & row.keys() for row in checked
    )
    assert not any(figure["passed"] for figure in found["figures"])


@pytest.mark.slow
def test_bench_for_real(tiny_shapes, tmp_path):
    """Against the true torch.compile."""
    result = call("bench", "--quick", "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert not any("wrong" in row for row in found["operations"]["spatial_attention"]["rows"])
