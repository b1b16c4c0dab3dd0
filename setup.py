"""Builds mmkernels._C. The rest of the package's description is in pyproject.toml.

Every file of csrc/cpu is compiled once per instruction set; the choice is made at run time, so a wheel built on one machine
runs on another. The bindings use LibTorch's stable ABI: one build runs on every torch from 2.10 on.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
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
CUDA_REASON = "this version has CPU kernels only"


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
        flags = [*COMMON, *TORCH, f'-DMMK_CUDA_REASON="{CUDA_REASON}"', "-Wno-unused-parameter"]
        includes = [*cpp_extension.include_paths(), pybind11.get_include()]
        jobs += [(source, temp, flags, includes)
                 for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")])]

        def compile(job):
            source, folder, flags, includes = job
            return self.compiler.compile([str(source.relative_to(ROOT))], output_dir=str(folder), include_dirs=[
                *includes, *self.compiler.include_dirs], extra_postargs=flags)

        with ThreadPoolExecutor(self.parallel or None) as pool:
            objects = [o for produced in pool.map(compile, jobs) for o in produced]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), libraries=["torch", "torch_cpu", "c10"],
            library_dirs=cpp_extension.library_paths(), extra_postargs=["-Wl,--as-needed"], target_lang="c++")


setup(
    ext_modules=[Extension("mmkernels._C", sources=[], depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*")])],
    cmdclass={"build_ext": Build},
)
