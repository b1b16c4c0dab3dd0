"""How CUDA kernels are started: from several threads at once, and grids that no device takes."""

import subprocess
from pathlib import Path

import pytest
import torch
from support import compiling, emulated

import mmkernels as mmk

NATIVE = Path(__file__).parent / "native"

needs_emulator = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))


@pytest.mark.parametrize("sanitizer", [[], ["-fsanitize=thread"]], ids=["plain", "tsan"])
def test_threads_share_a_kernels_state(sanitizer):
    """Its shared memory is set once a device, to the most that the device gives: no thread takes from another what it
    needs."""
    flags = ["-pthread", "-g", *sanitizer]
    source = (NATIVE / "launch.cpp", ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{NATIVE / 'runtime'}", *flags])
    program = compiling.program("launch", [source], flags)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_emulator
def test_what_no_device_takes_is_refused():
    """By number, before a launch; the emulator, too, is a device that has limits."""
    jobs = [
        *emulated.emulator_jobs(),
        (emulated.ROOT / "csrc/cuda/rows.cu", [*emulated.KERNEL, *emulated.MODES["plain"]]),
        (emulated.EMULATOR / "sizes.cpp", [*emulated.KERNEL, *emulated.MODES["plain"]]),
    ]
    found = subprocess.run([compiling.program("sizes", jobs)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    beyond = "the sizes are beyond the CUDA kernels: "
    grid = "a grid has 1 to 2147483647 x 65535 x 65535 blocks, not "
    assert found.stdout.splitlines() == [
        beyond + "65536 blocks along y, at most 65535",
        *[beyond + "2147483648 blocks along x, at most 2147483647"] * 2,
        beyond + "17179869184 positions, at most 2147483647",
        beyond + "2147483648 blocks along x, at most 2147483647",
        grid + "1 x 65536 x 1",
        grid + "2147483648 x 1 x 1",
        grid + "0 x 1 x 1",
    ]


@needs_emulator
def test_an_operation_tells_which_size():
    image = torch.ones(1, 1, 1)
    layer = torch.ones(1, 1)
    v = torch.ones(1 << 16, 1)
    with pytest.raises(RuntimeError, match="65536 blocks along y"):
        mmk.additive_attention(image, None, layer, None, v, backend="cuda-emulated")
