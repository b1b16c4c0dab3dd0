"""setup.py: its graph rebuilds what an edit changes and nothing else; which nvcc it takes, and for which GPUs. No
compiler works here."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

pytest.importorskip("pybind11")

import gpu_table

ROOT = gpu_table.ROOT
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no g++ on Linux, which finds the headers"
)
# Each stands for a compiler, reads what that would read (the emulator has a file for nvcc's headers), and writes no
# object.
COMPILER = """#!/bin/sh
for word in "$@"; do
  [ "$before" = -o ] && object="$word"
  before="$word"
done
exec g++ "$@" -E -MT "$object"
"""
NVCC = f"""#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -MMD ]; do shift; done
exec {{compiler}} -x c++ -std=c++17 -DMMK_EMULATED -I{ROOT}/tests/cuda_emulator "$@"
"""
LINKER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def setup(tmp_path):
    """setup.py, imported from a copy of it and of the sources."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copy(ROOT / "setup.py", copy)
    return gpu_table.setup(copy)


class Graph:
    """The graph with compilers that do nothing; `plan` tells what ninja would make."""

    def __init__(self, setup, folder, monkeypatch):
        self.setup, self.folder, self.root = setup, setup.ROOT / "build", setup.ROOT
        self.compiler = program(folder / "compiler", COMPILER)
        self.linker = program(folder / "linker", LINKER)
        nvcc = program(folder / "nvcc", NVCC.format(compiler=self.compiler))
        monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(setup, "cuda_library_folders", list)
        self.folder.mkdir()
        self.write()

    def write(self):
        includes = [self.setup.pybind11.get_include(), *self.setup.cpp_extension.include_paths()]
        includes.append(sysconfig.get_path("include"))
        text = self.setup.graph(
            self.folder, self.folder / "_C.so", [self.compiler], [self.linker], includes, cuda_reason=None
        )
        (self.folder / "build.ninja").write_text(text)

    def ninja(self, *options):
        command = [self.setup.find_ninja(), "-f", self.folder / "build.ninja", *options]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True)

    def plan(self):
        lines = self.ninja("-n").stdout.splitlines()
        return {line.split("build/", 1)[1] for line in lines if line.startswith("[")}

    def plan_after_edit(self, path):
        path = self.root / path
        before = path.stat()
        path.touch()
        plan = self.plan()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return plan


@needs_compiler
def test_an_edit_rebuilds_what_reads_it(setup, tmp_path, monkeypatch):
    graph = Graph(setup, tmp_path / "programs", monkeypatch)
    patterns = ("csrc/cuda/*.cu", "csrc/torch/*.cpp", "csrc/python/*.cpp", "csrc/*.cpp")
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    kernels = list(ROOT.glob("csrc/cpu/*.cpp"))
    libraries = {"libmmkernels.so", "_C.so"}
    assert len(graph.plan()) == len(sources) + len(setup.ISAS) * len(kernels) + len(libraries)

    built = graph.ninja()
    assert built.returncode == 0, built.stdout + built.stderr
    assert graph.plan() == set()

    def on_cpu(*names):
        return {f"{isa}/{name}.o" for isa in setup.ISAS for name in names}

    expected = {
        "csrc/cpu/gated_cross_attention.cpp": on_cpu("gated_cross_attention"),
        "csrc/cpu/activation.h": on_cpu("additive_attention"),
        "csrc/cuda/rows.cu": {"cuda/rows.o"},
        "csrc/cuda/heads_forward.h": {"cuda/gated_cross_attention.o", "cuda/bidirectional_attention.o"},
        "csrc/torch/heads.h": {"gated_cross_attention.o", "bidirectional_attention.o", "absorbed_attention.o"},
        "csrc/channel_attention.h": {*on_cpu("channel_attention"), "cuda/channel_attention.o", "channel_attention.o"},
    }
    for path, objects in expected.items():
        assert graph.plan_after_edit(path) == {*objects, *libraries}, path
    assert graph.plan_after_edit("csrc/python/module.cpp") == {"module.o", "_C.so"}

    monkeypatch.setattr(setup, "nvcc_flags", lambda: ["-O0"])
    graph.write()
    assert graph.plan() == {*(f"cuda/{path.stem}.o" for path in ROOT.glob("csrc/cuda/*.cu")), *libraries}


@needs_compiler
def test_what_a_failing_compiler_says_is_shown(setup, tmp_path, monkeypatch):
    graph = Graph(setup, tmp_path / "programs", monkeypatch)
    (setup.ROOT / "csrc/cpu/channel_attention.cpp").write_text('#include "nowhere.h"\n')
    failed = graph.ninja("-k", "0")
    assert failed.returncode != 0 and "nowhere.h" in failed.stdout + failed.stderr


def test_as_many_compilers_as_cores(setup, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert setup.jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == 3


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5"])
def test_max_jobs_that_is_no_number(setup, monkeypatch, wrong):
    monkeypatch.setenv("MAX_JOBS", wrong)
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive whole number"):
        setup.jobs()


def test_paths_and_flags_of_any_letters(setup):
    """ninja's and the shell's own signs in a path, a flag, a reason."""
    assert setup.path_of("/a b/c$d:e") == "/a$ b/c$$d$:e"
    assert setup.command_of(['-DMMK_CUDA_REASON="no $(nvcc), sorry"']) == """'-DMMK_CUDA_REASON="no $$(nvcc), sorry"'"""


# Which nvcc, and for which GPUs. A fake one tells a version, and lists what the true one of that version lists.
LISTED = {
    "11.2": None,  # it doesn't know the question
    "12.1": "sm_50 sm_52 sm_60 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90",
    "12.6": "sm_50 sm_52 sm_60 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a",
    "12.8": "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_101 sm_120",
    "13.0": "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121",
    "15.0": "sm_90 sm_100 sm_120",
}  # one day, without the oldest default
TOLD = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.99";;
  --list-gpu-code) [ -n "{listed}" ] || exit 1; echo "{listed}" | tr ' ' '\\n';;
  *) exit 1;;
esac
"""


@pytest.fixture
def nvcc(setup, tmp_path, monkeypatch):
    """`nvcc(version, torch_cuda)` puts a fake one under CUDA_HOME, beside a torch for a CUDA; neither variable of ours
    is set."""

    def install(version, torch_cuda="same"):
        program(
            tmp_path / f"cuda-{version}" / "bin" / "nvcc", TOLD.format(version=version, listed=LISTED[version] or "")
        )
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / f"cuda-{version}"))
        monkeypatch.setattr(torch.version, "cuda", version if torch_cuda == "same" else torch_cuda)
        return setup

    monkeypatch.delenv("MMKERNELS_CUDA", raising=False)
    monkeypatch.delenv("MMKERNELS_CUDA_ARCHS", raising=False)
    return install


def generated(setup):
    """What nvcc is asked for: sm_80, ..., and compute_80, ... for PTX."""
    flags = setup.nvcc_flags()
    return [flag.split("code=")[1] for before, flag in zip(flags, flags[1:]) if before == "-gencode"]


@pytest.mark.parametrize(
    "version, expected",
    [
        ("11.2", "sm_80 compute_80"),
        ("12.1", "sm_80 sm_90 compute_90"),
        ("12.6", "sm_80 sm_90 compute_90"),
        ("12.8", "sm_80 sm_90 sm_100 compute_100"),
        ("13.0", "sm_80 sm_90 sm_100 compute_100"),
        ("15.0", "sm_90 sm_100 compute_100"),
    ],
)
def test_default_architectures_are_what_nvcc_knows(nvcc, version, expected):
    setup = nvcc(version)
    assert setup.why_no_cuda() is None
    assert generated(setup) == expected.split()


@pytest.mark.parametrize(
    "asked, expected, told",
    [
        ("9.0", "sm_90 compute_90", '"9.0+PTX"'),
        ("8.0;9.0", "sm_80 sm_90 compute_90", '"8.0","9.0+PTX"'),
        ("8.0+PTX;9.0", "sm_80 compute_80 sm_90", '"8.0+PTX","9.0"'),
        ("8.6, 8.9", "sm_86 sm_89 compute_89", '"8.6","8.9+PTX"'),
        ("9.0 9.0+PTX", "sm_90 compute_90", '"9.0+PTX"'),
        (" ", "sm_80 sm_90 compute_90", '"8.0","9.0+PTX"'),
    ],
)
def test_architectures_asked_for(nvcc, monkeypatch, asked, expected, told):
    """As in TORCH_CUDA_ARCH_LIST; `info` tells what was made."""
    setup = nvcc("12.6")
    monkeypatch.setenv("MMKERNELS_CUDA_ARCHS", asked)
    assert generated(setup) == expected.split()
    assert f"-DMMK_CUDA_ARCHITECTURES={told}" in setup.binding_flags(None)


@pytest.mark.parametrize(
    "version, asked", [("12.6", "10.0"), ("12.6", "8.0;10.0+PTX"), ("13.0", "7.0"), ("11.2", "9.0")]
)
def test_an_architecture_that_nvcc_does_not_know(nvcc, monkeypatch, version, asked):
    setup = nvcc(version)
    monkeypatch.setenv("MMKERNELS_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit) as caught:
        setup.why_no_cuda()
    unknown = asked.split(";")[-1].removesuffix("+PTX")
    known = ", ".join(setup.known_architectures())
    assert f"names {unknown}, but this nvcc ({version}) compiles for {known}" in str(caught.value) and "8.0" in known


@pytest.mark.parametrize("word", ["9.0a", "10.0f", "90", "sm_90", "Hopper", "native", "9.0+ptx", "9"])
def test_an_architecture_in_another_form(nvcc, monkeypatch, word):
    setup = nvcc("13.0")
    monkeypatch.setenv("MMKERNELS_CUDA_ARCHS", f"8.0;{word}")
    with pytest.raises(SystemExit, match="must be architectures like 9.0 or 9.0.PTX") as caught:
        setup.why_no_cuda()
    assert repr(word) in str(caught.value)


@pytest.mark.parametrize("version, torch_cuda", [("12.8", "13.0"), ("13.0", "12.6"), ("11.2", "12.1")])
def test_an_nvcc_of_another_major_version(nvcc, monkeypatch, version, torch_cuda):
    """A reason for `info` where CUDA wasn't asked for, else a failed build with that reason."""
    setup = nvcc(version, torch_cuda)
    reason = setup.why_no_cuda()
    assert f"nvcc was CUDA {version}'s" in reason and f"torch is CUDA {torch_cuda}'s" in reason
    assert f'-DMMK_CUDA_REASON="{reason}"' in setup.binding_flags(reason)
    monkeypatch.setenv("MMKERNELS_CUDA", "1")
    with pytest.raises(SystemExit) as caught:
        setup.why_no_cuda()
    assert str(caught.value) == f"MMKERNELS_CUDA=1, but {reason}"


@pytest.mark.parametrize("version, torch_cuda", [("12.8", "12.6"), ("13.0", "13.2")])
def test_another_minor_version_is_taken(nvcc, version, torch_cuda):
    assert nvcc(version, torch_cuda).why_no_cuda() is None


def test_a_torch_without_cuda(nvcc, monkeypatch):
    """Nothing is built unless it is asked for; then any nvcc will do, for nothing will run."""
    setup = nvcc("12.8", None)
    assert "has no CUDA" in setup.why_no_cuda()
    monkeypatch.setenv("MMKERNELS_CUDA", "1")
    assert setup.why_no_cuda() is None


def test_an_nvcc_that_tells_nothing(nvcc, tmp_path):
    setup = nvcc("13.0")
    program(tmp_path / "cuda-13.0" / "bin" / "nvcc", "#!/bin/sh\nexit 1\n")
    assert "didn't tell its version" in setup.why_no_cuda()


def test_no_nvcc(nvcc, monkeypatch, tmp_path):
    setup = nvcc("13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither under CUDA_HOME nor on PATH" in setup.why_no_cuda()
    monkeypatch.setenv("MMKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="MMKERNELS_CUDA=1, but nvcc was neither"):
        setup.why_no_cuda()


def test_cuda_home_comes_before_path(nvcc, monkeypatch, tmp_path):
    """Whoever has two chooses by CUDA_HOME, as in PyTorch's own builds."""
    setup = nvcc("12.8")
    nvcc("13.0")
    monkeypatch.setenv("PATH", str(tmp_path / "cuda-12.8" / "bin") + os.pathsep + os.environ["PATH"])
    assert setup.nvcc_version() == (13, 0)
    monkeypatch.delenv("CUDA_HOME")
    assert setup.nvcc_version() == (12, 8)
