"""libmmkernels.so: the operations for who has torch without Python, or without importing mmkernels."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import compiling
from torch.utils import cpp_extension

import mmkernels as mmk

LIBRARY = Path(mmk.__file__).parent / "libmmkernels.so"
needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
needs_compiler = pytest.mark.skipif(shutil.which(compiling.COMPILER) is None, reason="no C++ compiler")


@needs_binutils
def test_no_symbol_of_python():
    asked = subprocess.run(["nm", "-D", LIBRARY], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in asked.splitlines()}
    assert any("aoti_torch" in name for name in symbols)
    assert not {name for name in symbols if name.startswith(("Py", "_Py"))}


def test_load_library():
    """In a process that doesn't import mmkernels."""
    code = (
        f"import sys, torch; torch.ops.load_library({str(LIBRARY)!r}); "
        "image = torch.ones(1, 4, 8); "
        "result, weights = torch.ops.mmkernels.spatial_attention(image, torch.ones(1, 8), None, None, 1., 1, False, "
        "False); "
        "assert torch.equal(result, image / 4) and 'mmkernels' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


class Pooled(torch.nn.Module):
    def forward(self, image, text):
        return mmk.spatial_attention(2 * image, text, combine="pool", backend="cpu")


@needs_compiler
@pytest.mark.slow
def test_a_program_without_python(tmp_path):
    """AOTInductor's package, run by C++, gives what Python gives."""
    inputs = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8), torch.linspace(-2, 3, 2 * 8).reshape(2, 8)
    expected = Pooled()(*inputs)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Pooled(), inputs), package_path=str(tmp_path / "pooled.pt2")
    )
    folders = cpp_extension.library_paths()
    flags = ["-std=c++20", "-O0", *(f"-I{path}" for path in cpp_extension.include_paths())]
    link = [*(f"-L{path}" for path in folders), *(f"-Wl,-rpath,{path}" for path in folders)]
    program = compiling.program(
        "operators",
        [(compiling.ROOT / "tests/native/operators.cpp", flags)],
        [*link, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"],
    )
    found = subprocess.run([program, LIBRARY, package], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    result = torch.tensor([float.fromhex(line) for line in found.stdout.split()]).reshape(expected.shape)
    assert torch.equal(result, expected)
