"""The torch-free layers alone, compiled here: SIMD for every instruction set that this machine can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiling

from mmkernels import backends, functional

HERE = Path(__file__).parent / "native"
FLAGS = {
    "baseline": ["-DMMK_VECTOR_BYTES=16"],
    "avx2": ["-DMMK_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    # Vectors of 16 floats on a machine without AVX-512: the compiler splits them.
    "avx2-wide": ["-DMMK_VECTOR_BYTES=64", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"],
    "avx512": [
        "-DMMK_VECTOR_BYTES=64",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ],
}
ORDER = ("baseline", "avx2", "avx512")


def run_simd(isa, step):
    program = compiling.program(f"simd-{isa}", [(HERE / "simd.cpp", ["-O2", "-std=c++17", *FLAGS[isa]])])
    found = subprocess.run([program, str(step)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    return found.stdout


def needs(isa):
    best = backends.extension.cpu_best_isa
    if best not in ORDER or ORDER.index(isa.removesuffix("-wide")) > ORDER.index(best):
        pytest.skip(f"this machine has {best} at best")


@pytest.mark.parametrize("isa", FLAGS)
def test_simd(isa):
    needs(isa)
    run_simd(isa, 1009)


@pytest.mark.slow
def test_functions_of_every_float():
    run_simd(backends.extension.cpu_best_isa, 1)


@pytest.mark.slow
@pytest.mark.parametrize("operation", functional.__all__)
def test_kernels_under_sanitizers(operation):
    """Random shapes, strides, masks and bags, in memory that ends where the tensors do."""
    isa = backends.extension.cpu_best_isa
    watched = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags = ["-O1", "-g1", "-std=c++17", *watched, "-DMMK_ISA=baseline", *FLAGS[isa]]
    program = compiling.program(f"fuzz-{operation}", [(HERE / f"fuzz_{operation}.cpp", flags)], watched)
    found = subprocess.run([program, "500"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("isa", ORDER)
def test_every_instruction_set_gives_the_same(isa):
    """The operation under each instruction set, in a process of its own."""
    needs(isa)
    code = (
        "import mmkernels.backends as b; from mmkernels import verify; assert b.extension.cpu_isa == %r; "
        "rows = verify.run(None, ['cpu'], small=True); assert rows and verify.passed(rows)" % isa
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MMKERNELS_CPU_ISA": isa}
    )
    assert found.returncode == 0, found.stderr[-2000:]


def test_unknown_instruction_set_is_refused():
    found = subprocess.run(
        [sys.executable, "-c", "import mmkernels; print(mmkernels.backends.extension_error)"],
        capture_output=True,
        text=True,
        env={**os.environ, "MMKERNELS_CPU_ISA": "avx3"},
    )
    assert "MMKERNELS_CPU_ISA must be baseline, avx2 or avx512, got avx3" in found.stdout + found.stderr
