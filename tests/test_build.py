"""setup.py: its graph rebuilds what an edit changes and nothing else. No compiler does its work here."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
if shutil.which("g++") is None or sys.platform != "linux":
    pytest.skip("g++ on Linux finds the headers", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
# Each stands for a compiler, reads what that would read (the emulator has a file for nvcc's headers), and writes no object.
COMPILER = """#!/bin/sh
for word in "$@"; do
  [ "$before" = -o ] && object="$word"
  before="$word"
done
exec g++ "$@" -E -MT "$object"
"""
NVCC = f"""#!/bin/sh
while [ "$1" != -MMD ]; do shift; done
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
    spec = importlib.util.spec_from_file_location("mmkernels_setup", copy / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Graph:
    """The graph with compilers that do nothing; `plan` tells what ninja would make."""

    def __init__(self, setup, folder, monkeypatch):
        self.setup, self.folder, self.root = setup, setup.ROOT / "build", setup.ROOT
        self.compiler = program(folder / "compiler", COMPILER)
        self.linker = program(folder / "linker", LINKER)
        nvcc = program(folder / "nvcc", NVCC.format(compiler=self.compiler))
        monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(setup, "cuda_library_folders", lambda: [])
        self.folder.mkdir()
        self.write()

    def write(self):
        includes = [*self.setup.cpp_extension.include_paths(), self.setup.pybind11.get_include()]
        includes.append(sysconfig.get_path("include"))
        text = self.setup.graph(self.folder, self.folder / "_C.so", [self.compiler], [self.linker], includes, cuda_reason=None)
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


def test_an_edit_rebuilds_what_reads_it(setup, tmp_path, monkeypatch):
    graph = Graph(setup, tmp_path / "programs", monkeypatch)
    sources = [path for pattern in ("csrc/cuda/*.cu", "csrc/torch/*.cpp", "csrc/*.cpp") for path in ROOT.glob(pattern)]
    kernels = list(ROOT.glob("csrc/cpu/*.cpp"))
    assert len(graph.plan()) == len(sources) + len(setup.ISAS) * len(kernels) + 1

    built = graph.ninja()
    assert built.returncode == 0, built.stdout + built.stderr
    assert graph.plan() == set()

    def on_cpu(*names):
        return {f"{isa}/{name}.o" for isa in setup.ISAS for name in names}

    expected = {
        "csrc/cpu/gated_cross_attention.cpp": on_cpu("gated_cross_attention"),
        "csrc/cpu/activation.h": on_cpu("additive_attention"),
        "csrc/cuda/rows.cu": {"cuda/rows.o"},
        "csrc/cuda/attention_forward.h": {"cuda/gated_cross_attention.o", "cuda/bidirectional_attention.o"},
        "csrc/torch/heads.h": {"gated_cross_attention.o", "bidirectional_attention.o"},
        "csrc/channel_attention.h": {*on_cpu("channel_attention"), "cuda/channel_attention.o", "channel_attention.o"}}
    for path, objects in expected.items():
        assert graph.plan_after_edit(path) == {*objects, "_C.so"}, path

    monkeypatch.setattr(setup, "nvcc_flags", lambda: ["-O0"])
    graph.write()
    assert graph.plan() == {*(f"cuda/{path.stem}.o" for path in ROOT.glob("csrc/cuda/*.cu")), "_C.so"}


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
