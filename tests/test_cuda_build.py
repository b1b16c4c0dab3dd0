"""The CUDA kernels as nvcc compiles them: what they need, that they build and link, and that the page says so."""

import os
import shutil
import subprocess
import sysconfig

import gpu_table
import pybind11
import pytest
from support import compiling, emulated
from torch.utils import cpp_extension

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc isn't installed")
needs_emulator = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu_table.ARCHITECTURES)
def test_resources(architecture):
    """No spills, and registers for a block of 512 threads: 65,536 / 512 = 128."""
    found = gpu_table.resources(architecture)
    assert len(found) == 18
    wrong = {name: vars(r) for name, r in found.items() if r.registers > 128 or r.spilled or r.static}
    assert not wrong


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu_table.ARCHITECTURES)
@pytest.mark.parametrize(
    "operation, kernels",
    [
        ("gated_cross_attention", 33),
        ("bidirectional_attention", 22),
        ("absorbed_attention", 24),
        ("deformable_attention", 21),
    ],
)
def test_attention_resources(architecture, operation, kernels):
    """No spills, no stack; registers for two blocks of 128 threads a processor forward and one of 256 backward
    (of absorbed attention one of 512), which is all that shared memory has room for."""
    found = gpu_table.resources(architecture, operation)
    assert len(found) == kernels
    most = 128 if operation == "absorbed_attention" else 255
    wrong = {name: vars(r) for name, r in found.items() if r.registers > most or r.spilled or r.static or r.stack}
    assert not wrong


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu_table.ARCHITECTURES)
@pytest.mark.parametrize(
    "file, kernels, most",
    [("channel_attention", 9, 128), ("additive_attention", 31, 80), ("rows", 7, 80), ("spatial_rows", 57, 255)],
)
def test_row_resources(architecture, file, kernels, most):
    """No spills, no stack, registers for three blocks of 256 threads a processor; two where a warp holds a row, and of
    spatial attention's 128 threads as many as a row takes."""
    found = gpu_table.resources(architecture, file)
    assert len(found) == kernels
    wrong = {name: vars(r) for name, r in found.items() if r.registers > most or r.spilled or r.static or r.stack}
    assert not wrong


@needs_nvcc
@pytest.mark.slow
def test_builds_and_links():
    """The very sources, flags and libraries of setup.py, against the headers of whatever torch is here."""
    setup = gpu_table.setup()
    includes = [
        f"-I{path}" for path in (*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include"))
    ]
    bindings = [*emulated.ROOT.glob("csrc/torch/*.cpp"), emulated.ROOT / "csrc/isa.cpp"]
    jobs = list(gpu_table.kernel_jobs().values())
    jobs += [(source, [*setup.binding_flags(None), *includes]) for source in bindings]
    folders = [f"-L{path}" for path in [*cpp_extension.library_paths(), *setup.cuda_library_folders()]]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", *(f"-l{name}" for name in setup.CUDA_LIBRARIES)]
    target = compiling.program(setup.LIBRARY, jobs, ["-shared", *folders, *libraries])
    missing = subprocess.run(
        ["nm", "-DC", "--undefined-only", target], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in missing
    assert "cudaLaunchKernel" not in missing and "mmk::cuda" not in missing  # the runtime and the kernels are in it


@needs_nvcc
@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        gpu_table.movement_rows,
        gpu_table.cluster_rows,
        gpu_table.attention_rows,
        gpu_table.deformable_rows,
        gpu_table.row_rows,
    ],
)
def test_table_is_up_to_date(rows):
    """docs/generated/gpu.md says what is counted now. (test_resources has a budget for registers.)"""
    written = gpu_table.FILE.read_text()
    assert all(row in written for row in rows())
