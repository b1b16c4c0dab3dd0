"""The backend "cuda-emulated": the CUDA kernels and their binding, run on the CPU by tests/cuda_emulator.

Importing this module registers it, so that every test that runs on all backends runs on this one, too.
"""

import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

from mmkernels import backends

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
CACHE = Path(os.environ.get("MMKERNELS_TEST_CACHE") or Path(tempfile.gettempdir()) / f"mmkernels-tests-{os.getuid()}")
COMPILER = os.environ.get("CXX", "g++")
# Type punning between vectors and their elements is fine for nvcc, so it has to be here.
KERNEL = ["-x", "c++", "-std=c++17", "-DMMK_EMULATED", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC",
          "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{EMULATOR}"]
# The scheduler itself is never built with ThreadSanitizer; under AddressSanitizer it stays plain, too.
MODES = {"plain": ["-O2"], "tsan": ["-O1", "-g", "-fsanitize=thread"],
         "asan": ["-O1", "-g", "-fsanitize=address,bounds-strict,alignment", "-fno-sanitize-recover=bounds-strict,alignment"]}


def why_not_here():
    """None where the emulator can be built."""
    if sysconfig.get_platform() != "linux-x86_64":
        return "the CUDA emulator runs on x86-64 Linux only"
    if shutil.which(COMPILER) is None:
        return f"the CUDA emulator needs a C++ compiler ({COMPILER})"
    return None


def build(name, jobs, link):
    """Compiles (source, flags) jobs and links them to a file in CACHE; does nothing where the same was built before."""
    sources = sorted(path for pattern in ("csrc/**/*", "tests/cuda_emulator/*") for path in ROOT.glob(pattern) if path.is_file())
    digest = hashlib.sha256(repr((jobs, link, torch.__version__)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    target = CACHE / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        running = []
        for i, (source, flags) in enumerate(jobs):
            if len(running) >= 2:
                _finish(running.pop(0))
            running.append(subprocess.Popen([COMPILER, *flags, "-c", str(source), "-o", f"{folder}/{i}.o"],
                                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for process in running:
            _finish(process)
        _finish(subprocess.Popen([COMPILER, *(f"{folder}/{i}.o" for i in range(len(jobs))), *link, "-o", f"{folder}/{name}"],
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        target.parent.mkdir(exist_ok=True)
        os.replace(f"{folder}/{name}", target)    # whole or not at all, also when several processes build it
    return target


def _finish(process):
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)}\n{output}")


def emulator_jobs(mode="plain"):
    return [(EMULATOR / "emulator.cpp", ["-std=c++17", "-O2", "-fPIC", f"-I{EMULATOR}"]),
            (EMULATOR / "copy.cpp", ["-std=c++17", "-fPIC", *MODES[mode]])]


def kernel_jobs(mode="plain"):
    return [(path, [*KERNEL, *MODES[mode]]) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]


def operations():
    """Names of the operations that have CUDA kernels."""
    return [path.stem for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if (ROOT / f"csrc/torch/{path.stem}.cpp").exists()]


@functools.lru_cache(maxsize=None)
def library():
    """The shared object with kernels, emulator and binding, loaded."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    bindings = [(ROOT / "csrc/torch" / f"{name}.cpp",
                 ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DMMK_EMULATED", "-DTORCH_STABLE_ONLY",
                  "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]) for name in operations()]
    path = build("emulated.so", [*emulator_jobs(), *kernel_jobs(), *bindings],
                 ["-shared", *(f"-L{p}" for p in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"])
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


# Bytes that a block may have of shared memory, processors, blocks of a cluster.
A100 = dict(shared=163 << 10, processors=108, cluster=1)
H100 = dict(shared=227 << 10, processors=132, cluster=8)


@contextmanager
def configured(order="ascending", seed=1, late_copies=True, shared=A100["shared"], processors=A100["processors"], cluster=1):
    """How threads are scheduled, when copies arrive, and what the device has."""
    configure = library().emulator_configure
    configure(ORDERS[order], seed, int(late_copies), *map(ctypes.c_int64, (shared, processors, cluster)))
    try:
        yield
    finally:
        configure(0, 1, 1, *map(ctypes.c_int64, A100.values()))


def counts():
    """What was counted since the last call: bytes loaded and stored, launches, blocks, most shared memory, largest cluster."""
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
        module = importlib.import_module(f"mmkernels.ops.{name}")
        register = module.OPERATION.register if hasattr(module, "OPERATION") else module.register_operations
        register(f"{name}_emulated", "cuda-emulated")
