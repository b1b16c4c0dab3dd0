"""Builds mmkernels._C. The rest of the package's description is in pyproject.toml.

Every file of csrc/cpu is compiled once per instruction set; the choice is made at run time, so a wheel built on one machine
runs on another. The bindings use LibTorch's stable ABI: one build runs on every torch from 2.10 on.

The CUDA kernels are built where torch has CUDA and nvcc is found. MMKERNELS_CUDA=0 leaves them out, MMKERNELS_CUDA=1 asks for
them (with a torch without CUDA it compiles and links, but can't be loaded: a check that the code isn't broken).
MMKERNELS_CUDA_ARCHS, default "8.0;9.0;10.0", chooses the architectures; the last one also as PTX, for newer ones.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
ISAS = {"baseline": (16, [])}            # namespace -> vector bytes, flags
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    ISAS["avx512"] = (64, [*ISAS["avx2"][1], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"])
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DMMK_TORCH_TARGET=2.10"]
CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]
CUDA_ARCHS = os.environ.get("MMKERNELS_CUDA_ARCHS", "8.0;9.0;10.0").replace(",", ";").split(";")


def find_nvcc():
    """nvcc on PATH or under CUDA_HOME, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def why_no_cuda():
    """None where the CUDA kernels are to be built, else the reason."""
    asked = os.environ.get("MMKERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"MMKERNELS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        return "it was built with MMKERNELS_CUDA=0"
    if asked != "1" and torch.version.cuda is None:
        return f"it was built with torch {torch.__version__}, which has no CUDA"
    if find_nvcc() is None:
        if asked == "1":
            raise SystemExit("MMKERNELS_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
        return "nvcc was neither on PATH nor under CUDA_HOME when it was built"
    return None


def nvcc_flags():
    """One machine code an architecture; the last as PTX, too."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for arch in (a.replace(".", "") for a in CUDA_ARCHS):
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    last = CUDA_ARCHS[-1].replace(".", "")
    return [*flags, "-gencode", f"arch=compute_{last},code=compute_{last}"]


def binding_flags(cuda_reason):
    if cuda_reason is None:
        told = ",".join(f'"{arch}"' for arch in CUDA_ARCHS)
        cuda = ["-DUSE_CUDA", "-DMMK_CUDA", f"-DMMK_CUDA_ARCHITECTURES={told}"]
    else:
        cuda = [f'-DMMK_CUDA_REASON="{cuda_reason}"']
    return [*COMMON, *TORCH, *cuda, "-Wno-unused-parameter"]


def cuda_library_folders():
    """Where nvcc itself would look: it may be a wrapper that lies elsewhere."""
    told = subprocess.run([find_nvcc(), "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    line = next(line for line in told.splitlines() if "LIBRARIES=" in line)
    return re.findall(r'-L([^" ]+)', line)


class Build(build_ext):
    """Compiles each (file, instruction set) on its own, as many at a time as there are cores."""

    def build_extension(self, extension):
        temp = Path(self.build_temp)
        jobs = []
        for isa, (width, flags) in ISAS.items():
            flags = [*COMMON, *flags, f"-DMMK_ISA={isa}", f"-DMMK_VECTOR_BYTES={width}"]
            if isa == "baseline":
                flags.append("-DMMK_DEFINE_ENTRY")
            jobs += [(source, temp / isa, flags, []) for source in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
        cuda_reason = why_no_cuda()
        flags = binding_flags(cuda_reason)
        includes = [*cpp_extension.include_paths(), pybind11.get_include()]
        jobs += [(source, temp, flags, includes)
                 for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")])]

        def compile(job):
            source, folder, flags, includes = job
            return self.compiler.compile([str(source.relative_to(ROOT))], output_dir=str(folder), include_dirs=[
                *includes, *self.compiler.include_dirs], extra_postargs=flags)

        def compile_cuda(source):
            target = temp / "cuda" / f"{source.stem}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([find_nvcc(), *nvcc_flags(), "-c", str(source), "-o", str(target)])
            return [str(target)]

        libraries, folders = ["torch", "torch_cpu", "c10"], cpp_extension.library_paths()
        with ThreadPoolExecutor(self.parallel or None) as pool:
            produced = [] if cuda_reason else [pool.submit(compile_cuda, s) for s in sorted(ROOT.glob("csrc/cuda/*.cu"))]
            produced += [pool.submit(compile, job) for job in jobs]
            objects = [o for one in produced for o in one.result()]
        if cuda_reason is None:                   # the static runtime: it suits whichever CUDA torch was built with
            libraries += CUDA_LIBRARIES
            folders = [*folders, *cuda_library_folders()]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), libraries=libraries,
            library_dirs=folders, extra_postargs=["-Wl,--as-needed"], target_lang="c++")


if __name__ == "__main__":                        # tests import the flags from here
    setup(
        ext_modules=[Extension("mmkernels._C", sources=[], depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*")])],
        cmdclass={"build_ext": Build},
    )
