"""The backend "cuda-emulated": the CUDA kernels and their binding, run on the CPU by tests/cuda_emulator.

Importing this module registers it, so that every test that runs on all backends runs on this one, too.
"""

import ctypes
import functools
import importlib
import os
import shutil
import sysconfig
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

from mmkernels import backends

from . import compiling
from .compiling import COMPILER, ROOT

EMULATOR = ROOT / "tests" / "cuda_emulator"
# Type punning between vectors and their elements is fine for nvcc, so it has to be here.
KERNEL = [
    "-x",
    "c++",
    "-std=c++17",
    "-DMMK_EMULATED",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{EMULATOR}",
]
# The machine itself is never built with ThreadSanitizer; under AddressSanitizer it stays plain, too. A report tells
# lines, which takes -g1.
MODES = {
    "plain": ["-O2"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "asan": [
        "-O1",
        "-g1",
        "-fsanitize=address,bounds-strict,alignment",
        "-fno-sanitize-recover=bounds-strict,alignment",
    ],
}


def why_not_here():
    """None where the emulator can be built."""
    if os.environ.get("MMKERNELS_TEST_EMULATOR") == "0":
        return "MMKERNELS_TEST_EMULATOR=0 leaves the CUDA emulator out"
    if sysconfig.get_platform() != "linux-x86_64":
        return "the CUDA emulator runs on x86-64 Linux only"
    if shutil.which(COMPILER) is None:
        return f"the CUDA emulator needs a C++ compiler ({COMPILER})"
    return None


def emulator_jobs(mode="plain"):
    machine = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    return [
        *((EMULATOR / f"{part}.cpp", machine) for part in ("emulator", "fiber", "device")),
        (EMULATOR / "copy.cpp", ["-std=c++17", "-fPIC", *MODES[mode]]),
    ]


def kernel_jobs(mode="plain"):
    return [(path, [*KERNEL, *MODES[mode]]) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]


def operations():
    """Names of the operations that have CUDA kernels."""
    return [
        path.stem for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if (ROOT / f"csrc/torch/{path.stem}.cpp").exists()
    ]


@functools.cache
def library():
    """The shared object with kernels, emulator and binding, loaded."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    bindings = [
        (
            ROOT / "csrc/torch" / f"{name}.cpp",
            [
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-fvisibility=hidden",
                "-DMMK_EMULATED",
                "-DTORCH_STABLE_ONLY",
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
                *includes,
            ],
        )
        for name in operations()
    ]
    path = compiling.program(
        "emulated.so",
        [*emulator_jobs(), *kernel_jobs(), *bindings],
        ["-shared", *(f"-L{p}" for p in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2, "warps": 3, "warps_descending": 4}


# Bytes that a block may have of shared memory, processors, blocks of a cluster.
A100 = dict(shared=163 << 10, processors=108, cluster=1)
H100 = dict(shared=227 << 10, processors=132, cluster=8)


@contextmanager
def configured(
    order="ascending",
    seed=1,
    late_copies=True,
    shared=A100["shared"],
    processors=A100["processors"],
    cluster=1,
    tiles=False,
):
    """How threads are scheduled, when copies arrive, and what the device has; `tiles`: spatial attention takes no other
    way, whatever its features' layout."""
    configure = library().emulator_configure
    configure(ORDERS[order], seed, int(late_copies), *map(ctypes.c_int64, (shared, processors, cluster)), int(tiles))
    try:
        yield
    finally:
        configure(0, 1, 1, *map(ctypes.c_int64, A100.values()), 0)


def counts():
    """What was counted since the last call: bytes loaded and stored, launches, blocks, most shared memory, largest
    cluster."""
    found = (ctypes.c_uint64 * 6)()
    library().emulator_counts(found, 1)
    return SimpleNamespace(**dict(zip(("loaded", "stored", "launches", "blocks", "shared", "cluster"), found)))


def _why_not(device_type, dtype):
    if device_type not in ("cpu", "meta"):
        return f"the tensors are on {device_type}, not on the CPU"
    if dtype == torch.float64:
        return "it has no float64"
    return None


if backends.extension is not None and why_not_here() is None:
    library()
    backends.register("cuda-emulated", _why_not)
    for name in operations():
        importlib.import_module(f"mmkernels.ops.{name}").OPERATION.register(f"{name}_emulated", "cuda-emulated")
