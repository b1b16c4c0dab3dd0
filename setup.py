"""Builds two libraries. The rest of the package's description is in pyproject.toml.

libmmkernels.so registers the operations as it is loaded and knows nothing of Python: torch.ops.load_library takes it,
and so does dlopen in a C++ program beside libtorch. mmkernels._C, which is linked to it, tells Python what was built.

Every file of csrc/cpu is compiled once per instruction set; the choice is made at run time, so a wheel built on one
machine runs on another. The bindings use LibTorch's stable ABI: one build runs on every torch from 2.10 on.

The CUDA kernels are built where torch has CUDA and nvcc of the same major version is found; where not, `mmkernels info`
tells why.
MMKERNELS_CUDA=0 leaves them out, MMKERNELS_CUDA=1 fails where they can't be built (with a torch without CUDA it
compiles and links, but can't be loaded: a check that the code isn't broken). MMKERNELS_CUDA_ARCHS chooses the
architectures, "8.0;9.0+PTX"; by default those of 8.0, 9.0 and 10.0 that nvcc knows. PTX, for newer GPUs, is of those
with +PTX, else of the last.

What is compiled is written as one graph, build/PLATFORM-PYTHON/build.ninja, and ninja makes what is older than what it
is made
from: after an edit, the files that include it. MAX_JOBS compilers run at a time, by default one for each core.
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
LIBRARY = "libmmkernels.so"
OPERATORS, MODULE = "mmkernels.libmmkernels", "mmkernels._C"  # as setuptools names them
# The kernels write out their vectors and unroll by pragma: -O3 makes them no faster, and takes three times as long.
# -fpeel-loops: loops over a constant count disappear even where that makes the code longer.
COMMON = [
    *("-std=c++17", "-O2", "-fpeel-loops", "-g0", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
]
ISAS = {"baseline": (16, [])}  # namespace -> vector bytes, flags
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    ISAS["avx512"] = (64, [*ISAS["avx2"][1], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"])
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
TORCH_TARGET = "2.10"
CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
# The first nvcc that compiles for it: for an nvcc that doesn't list what it can.
FIRST_NVCC = {
    "7.5": (10, 0),
    "8.0": (11, 0),
    "8.6": (11, 1),
    "8.7": (11, 5),
    "8.9": (11, 8),
    "9.0": (11, 8),
    "10.0": (12, 8),
    "12.0": (12, 8),
    "10.3": (12, 9),
    "12.1": (12, 9),
    "11.0": (13, 0),
}


def find_nvcc():
    """nvcc under CUDA_HOME or on PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


@functools.cache
def answer(nvcc, question):
    """What nvcc prints when it is asked; nothing where it doesn't know the question."""
    done = subprocess.run([nvcc, question], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def nvcc_version():
    """(major, minor), or None where nvcc doesn't tell."""
    told = re.search(r"release (\d+)\.(\d+)", answer(find_nvcc(), "--version"))
    return tuple(map(int, told.groups())) if told else None


def known_architectures():
    """Those that nvcc can compile for, as ["8.0", ...]: what it lists, or else what its version is known to have."""
    listed = re.findall(r"sm_(\d+)(\d)\b", answer(find_nvcc(), "--list-gpu-code"))
    if listed:
        return [f"{major}.{minor}" for major, minor in sorted(set(listed), key=lambda found: (int(found[0]), found[1]))]
    version = nvcc_version() or (0, 0)
    return [architecture for architecture, since in FIRST_NVCC.items() if version >= since]


def cuda_architectures():
    """{architecture: whether also as PTX}, from MMKERNELS_CUDA_ARCHS or the default."""
    asked = re.split(r"[;,\s]+", os.environ.get("MMKERNELS_CUDA_ARCHS", "").strip(";, "))
    if asked == [""]:
        asked = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture in known_architectures()]
    chosen = {}
    for word in asked:
        found = re.fullmatch(r"(\d+\.\d)(\+PTX)?", word)
        if found is None:
            raise SystemExit(
                f"MMKERNELS_CUDA_ARCHS must be architectures like 9.0 or 9.0+PTX, separated by ';', got {word!r} "
                "(no kernel uses what only the variants a and f of an architecture have)"
            )
        if found[1] not in known_architectures():
            raise SystemExit(
                f"MMKERNELS_CUDA_ARCHS names {found[1]}, but this nvcc ({'.'.join(map(str, nvcc_version() or ()))}) "
                f"compiles for {', '.join(known_architectures())}"
            )
        chosen[found[1]] = chosen.get(found[1], False) or found[2] is not None
    if chosen and not any(chosen.values()):
        chosen[list(chosen)[-1]] = True
    return chosen


def why_no_cuda():
    """None where the CUDA kernels are to be built, else the reason."""
    asked = os.environ.get("MMKERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"MMKERNELS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        return "it was built with MMKERNELS_CUDA=0"
    if asked != "1" and torch.version.cuda is None:
        return f"it was built with torch {torch.__version__}, which has no CUDA"
    reason = why_not_this_nvcc()
    if reason is not None and asked == "1":
        raise SystemExit(f"MMKERNELS_CUDA=1, but {reason}")
    return reason


def why_not_this_nvcc():
    """None where there is an nvcc that suits this torch, else the reason."""
    if find_nvcc() is None:
        return "nvcc was neither under CUDA_HOME nor on PATH when it was built"
    version = nvcc_version()
    if version is None:
        return "nvcc didn't tell its version when it was built"
    if torch.version.cuda is not None and version[0] != int(torch.version.cuda.split(".")[0]):
        return (
            f"nvcc was CUDA {version[0]}.{version[1]}'s when it was built, and torch is CUDA {torch.version.cuda}'s: "
            f"their major versions must agree (CUDA_HOME chooses another nvcc)"
        )
    if not cuda_architectures():
        return f"nvcc {version[0]}.{version[1]} knew none of {', '.join(DEFAULT_ARCHITECTURES)} when it was built"
    return None


def nvcc_flags():
    """One machine code an architecture, and PTX, from which the driver makes code for newer ones."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for architecture, ptx in cuda_architectures().items():
        number = architecture.replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def kernel_flags(isa):
    """Of csrc/cpu for an instruction set; one of them also holds what chooses among them."""
    width, flags = ISAS[isa]
    share = "-DMMK_DEFINE_ENTRY" if isa == "baseline" else "-DMMK_WITHOUT_FLOAT64"
    return [*COMMON, *flags, f"-DMMK_ISA={isa}", f"-DMMK_VECTOR_BYTES={width}", share]


def told_flags(cuda_reason):
    """Of what tells what was built."""
    if cuda_reason is None:
        told = ",".join(f'"{architecture}{"+PTX" * ptx}"' for architecture, ptx in cuda_architectures().items())
        cuda = ["-DUSE_CUDA", "-DMMK_CUDA", f"-DMMK_CUDA_ARCHITECTURES={told}"]
    else:
        cuda = [f'-DMMK_CUDA_REASON="{cuda_reason}"']
    return [*COMMON, f"-DMMK_TORCH_TARGET={TORCH_TARGET}", *cuda]


def binding_flags(cuda_reason):
    return [*told_flags(cuda_reason), *TORCH, "-Wno-unused-parameter"]


def link_flags(cuda_reason):
    """Of libmmkernels.so: libraries and where they are. The static CUDA runtime suits whichever CUDA torch was built
    with."""
    libraries = ["torch", "torch_cpu", "c10"]
    folders = cpp_extension.library_paths()
    if cuda_reason is None:
        libraries += CUDA_LIBRARIES
        folders = [*folders, *cuda_library_folders()]
    return [
        f"-Wl,-soname,{LIBRARY},--as-needed",
        *(f"-L{folder}" for folder in folders),
        *(f"-l{library}" for library in libraries),
    ]


def cuda_library_folders():
    """Where nvcc itself would look: it may be a wrapper that lies elsewhere."""
    told = subprocess.run([find_nvcc(), "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    line = next(line for line in told.splitlines() if "LIBRARIES=" in line)
    return re.findall(r'-L([^" ]+)', line)


def compilations(includes, cuda_reason):
    """(object, rule, source, flags) of what libmmkernels.so is made of, what takes longest first."""
    if cuda_reason is None:
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            yield f"cuda/{source.stem}.o", "nvcc", source, nvcc_flags()
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp"), reverse=True):
        for isa in ISAS:
            yield f"{isa}/{source.stem}.o", "cxx", source, kernel_flags(isa)
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")]):
        yield f"{source.stem}.o", "cxx", source, [*binding_flags(cuda_reason), *include_flags(includes)]


def include_flags(folders):
    return [f"-I{folder}" for folder in folders]


def rule(name, *command):
    """A rule of build.ninja. Every compiler here writes down which headers it read, as GCC does."""
    depfile = [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
    return [f"rule {name}", f"  command = {' '.join(command)}", *depfile, "  description = $out", ""]


def path_of(path):
    """A path as build.ninja writes it: relative to the project where it lies in it."""
    path = Path(path)
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return re.sub(r"([$ :])", r"$\1", str(path))


def command_of(words):
    return shlex.join(words).replace("$", "$$")


def graph(folder, module, compiler, linker, includes, cuda_reason):
    """build.ninja: objects and libmmkernels.so in `folder`, and `module` linked to it. Compiler and linker are commands
    (lists) without files."""
    made = "-MMD -MF $out.d -c $in -o $out"
    lines = ["ninja_required_version = 1.5", f"builddir = {path_of(folder)}", ""]
    lines += rule("cxx", command_of(compiler), "$flags", made)
    if cuda_reason is None:
        lines += rule("nvcc", command_of([find_nvcc()]), "$flags", made)
    lines += rule("link", command_of(linker), "$in -o $out", "$flags")

    def build(target, which, inputs, flags):
        lines.append(f"build {path_of(target)}: {which} {' '.join(map(path_of, inputs))}")
        lines.append(f"  flags = {command_of(flags)}")

    objects = []
    for name, which, source, flags in compilations(includes, cuda_reason):
        objects.append(folder / name)
        build(objects[-1], which, [source], flags)
    build(folder / LIBRARY, "link", objects, link_flags(cuda_reason))

    source = ROOT / "csrc/python/module.cpp"
    build(folder / "module.o", "cxx", [source], [*told_flags(cuda_reason), *include_flags(includes)])
    build(module, "link", [folder / "module.o", folder / LIBRARY], ["-Wl,-rpath,$ORIGIN"])
    return "\n".join([*lines, ""])


def find_ninja():
    """The package `ninja`'s program, or the system's."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    found = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else shutil.which("ninja")
    if found is None:
        raise SystemExit("building mmkernels needs ninja: pip install ninja")
    return found


def jobs():
    """How many compilers run at a time: MAX_JOBS, else as many as there are cores for this process."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) == 0:
            raise SystemExit(f"MAX_JOBS must be a positive whole number, got {asked!r}")
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Build(build_ext):
    """Has ninja make both libraries in a folder that outlives this build (an editable install's doesn't), then copies
    them."""

    def get_ext_filename(self, name):
        *package, last = name.split(".")
        return os.path.join(*package, LIBRARY) if last == Path(LIBRARY).stem else super().get_ext_filename(name)

    def build_extensions(self):
        folder = ROOT / "build" / f"{self.plat_name}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        # pybind11 comes first: torch has one of its own, which no file may include that keeps to the stable ABI.
        includes = [pybind11.get_include(), *self.compiler.include_dirs, *cpp_extension.include_paths()]
        text = graph(
            folder,
            folder / Path(self.get_ext_filename(MODULE)).name,
            self.compiler.compiler_so_cxx,
            self.compiler.linker_so_cxx,
            includes,
            why_no_cuda(),
        )
        (folder / "build.ninja").write_text(text)

        ninja = [find_ninja(), "-f", str(folder / "build.ninja"), "-j", str(self.parallel or jobs())]
        status = {"NINJA_STATUS": "[%f/%t, %e s] ", **os.environ}
        if subprocess.run(ninja, cwd=ROOT, env=status).returncode:
            raise SystemExit("mmkernels couldn't be built: what the compiler said stands above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / target.name, target)


if __name__ == "__main__":  # tests import the flags from here
    sources = [str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()]
    extensions = [Extension(name, sources=[], depends=sources) for name in (OPERATORS, MODULE)]
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})
