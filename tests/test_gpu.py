"""Graphs, streams and threads on a GPU: what no emulator has. Without a GPU the same code runs on the CPU, where a
replay is another call."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from support.compiling import ROOT
from support.gpu_calls import Call, chosen

import mmkernels as mmk
from mmkernels import backends, cases, functional

DTYPES = (torch.float32, torch.bfloat16)
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU")
on_every_operation = pytest.mark.parametrize("operation", functional.__all__)


def places(*found):
    """(backend, device) as parameters; a GPU's are skipped without one."""
    return pytest.mark.parametrize(
        "backend, device",
        [pytest.param(*place, id="-".join(place), marks=[needs_gpu] if place[1] == "cuda" else []) for place in found],
    )


def skip_unless_it_runs(backend, operation, device):
    reason = (
        backends.why_not(backend, operation, device, torch.float32)
        if backend in backends.names()
        else "it isn't registered"
    )
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def same(found, expected):
    """Every element equals, or both are NaN: what overflows stays what it is."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def replayed(function, device, warm=True):
    """(replay, outputs): the function's tensors, computed anew by each replay(), in the same memory."""
    if device == "cpu":
        outputs = function()
        return lambda: [output.copy_(new) for output, new in zip(outputs, function())], outputs

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2 * warm):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


def assert_replays(call, device, gradients=True, warm=True):
    """Replays give what a plain call gives, bit by bit, after the inputs have changed where they lie."""
    replay, outputs = replayed(lambda: call(gradients), device, warm)
    replay()
    before = None
    for seed in (1, 2):
        call.change(seed)
        replay()
        expected = call(gradients)
        assert len(outputs) == len(expected)
        assert all(map(same, outputs, expected)), f"{call}, values {seed}"
        if before is not None and outputs[0].nan_to_num().count_nonzero():
            assert not same(outputs[0], before), f"{call}: the inputs' new values change nothing"
        before = outputs[0].clone()


@places(("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
@on_every_operation
def test_replays(operation, gradients, backend, device):
    skip_unless_it_runs(backend, operation, device)
    for case in chosen(operation, small=device == "cpu"):
        for dtype in DTYPES:
            assert_replays(Call(operation, case, dtype, device, backend), device, gradients)


@places(("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))
def test_a_replay_drops_anew(backend, device):
    """Every replay takes another seed from the generator, and its backward pass drops what its forward pass did."""
    skip_unless_it_runs(backend, "additive_attention", device)
    image, layer = torch.ones(1, 50, 3, device=device), torch.ones(40, 3, device=device)
    maps = torch.eye(40, device=device).requires_grad_()
    options = {"activation": "relu", "dropout_p": 0.25, "need_scores": True, "backend": backend}

    def run():
        _, scores = mmk.additive_attention(image, None, layer, None, maps, **options)
        return scores.detach(), *torch.autograd.grad(scores.sum(), maps)

    replay, (scores, grad) = replayed(run, device)
    found = []
    for _ in range(2):
        replay()
        assert torch.equal(scores.unique(), scores.new_tensor([0, 4]))
        assert torch.equal(grad.diagonal(), scores[0].sum(1))
        found.append(scores.clone())
    assert not torch.equal(*found)


@places(("cpu", "cpu"), ("cuda", "cuda"))
@on_every_operation
def test_first_call_in_a_capture(operation, backend, device):
    """In a process that has only seen a small call, a large one of the same kernels is captured at once: whatever a
    kernel has to be told about its shared memory is told without a synchronisation. (Triton compiles and loads with the
    first call: it has to be warm.)"""
    skip_unless_it_runs(backend, operation, device)
    if device == "cpu":
        capture_first_call(operation, backend, device)
        return
    code = f"import test_gpu; test_gpu.capture_first_call({operation!r}, {backend!r}, {device!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[1:], os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr


def capture_first_call(operation, backend, device):
    torch.use_deterministic_algorithms(True, warn_only=True)  # in a process of its own, no fixture does it
    small, *_ = chosen(operation, small=True)
    large = next(case for case in chosen(operation) if case.group == "large")
    Call(operation, small, torch.float32, device, backend)()
    assert_replays(Call(operation, large, torch.float32, device, backend), device, warm=False)


@places(("cpu", "cpu"), ("cuda-emulated", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))
@on_every_operation
def test_two_threads_with_different_shapes(operation, backend, device):
    """Each on a stream of its own, through the same calls in opposite orders: what one call asks of a kernel doesn't
    reach the other's."""
    skip_unless_it_runs(backend, operation, device)
    slow = cases.is_slow(backend, device)
    picked = chosen(operation, small=device == "cpu")
    calls = [
        Call(operation, case, dtype, device, backend)
        for case in picked[:: 3 if slow else 1]
        for dtype in DTYPES[: 1 if slow else 2]
    ]
    alone = [call() for call in calls]
    start, wrong = threading.Barrier(2), []

    def work(order):
        torch.set_num_threads(1)  # of this thread's products: PyTorch tells MKL with its first call only
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
            start.wait(60)
            for _ in range(20 if device == "cuda" else 1):
                for i in order:
                    found = calls[i]()
                    wrong.extend(str(calls[i]) for a, b in zip(found, alone[i]) if not same(a, b))

    raised = run_in_threads(work, range(len(calls)), range(len(calls))[::-1])
    assert not raised and not wrong


def run_in_threads(work, *arguments):
    """What was raised in ``work(argument)``, each in a thread."""
    raised = []

    def guarded(argument):
        try:
            work(argument)
        except Exception as error:
            raised.append(error)

    if GPU:
        torch.cuda.synchronize()  # other streams read what this one made
    threads = [threading.Thread(target=guarded, args=[argument]) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@needs_gpu
def test_triton_is_not_interpreted_here():
    """TRITON_INTERPRET=1, from wherever, would run its kernels on the CPU and test nothing of the GPU."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1" and not backends.INTERPRETED:
        pytest.fail("a test module set TRITON_INTERPRET=1: set TRITON_INTERPRET=0 before pytest starts")


@pytest.mark.skipif(backends._triton_installed is False, reason="triton isn't installed")
def test_what_a_gpu_is_not_given(own_backends, monkeypatch):
    """Kernels that were wrong on one are refused with the reason; what was found slower is there for who asks."""
    for (backend, operation, dtype), reason in backends.REFUSED.items():
        monkeypatch.setitem(backends._reasons, backend, lambda device_type, dtype: None)
        assert backends.why_not(backend, operation, "cuda", dtype) == reason
        assert backends.why_not(backend, operation, "cuda", torch.bfloat16) is None
    for backend, operation, dtype in backends.ONLY_WHEN_ASKED:
        asked = backends._choose(operation, "cuda", dtype, backend)
        found = backends._choose(operation, "cuda", dtype, None)
        assert asked is backends._function(backend, operation) and found is not asked
