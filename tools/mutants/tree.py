"""A copy of this tree, in which mutants are planted, compiled and tested. What it was built from stays as it was."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mutant import ROOT, mutated

FOLDER = ROOT / "build" / "mutants"
LIBRARY = "libmmkernels.so"
TOLD = "import mmkernels, mmkernels.backends as b; print(mmkernels.__file__, b.extension.cpu_best_isa)"


class Unbuilt(Exception):
    """The mutant doesn't compile, or nothing is compiled from where it was planted."""


class Tree:
    """Files that git knows of, and what it doesn't ignore, as they lie here now. What hasn't changed keeps its time,
    so that little is compiled again.
    """

    def __init__(self):
        self.root = FOLDER / "tree"
        self.compiler = FOLDER / "g++"
        self.copy()
        # It optimises little: a mutant is compiled once and runs for seconds.
        self.compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O1\n')
        self.compiler.chmod(0o755)
        run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=self.root, check=True, capture_output=False)
        self.graph = next(self.root.glob("build/*/build.ninja"))
        self.take_out()
        told = run([sys.executable, "-c", TOLD], cwd=FOLDER, env=self.environment("cpu"), check=True).stdout
        loaded, self.isa = told.split()
        if not Path(loaded).is_relative_to(self.root):
            raise SystemExit(f"tests would load {loaded}, not what lies in {self.root}")

    def copy(self):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = run(command, cwd=ROOT, check=True).stdout.splitlines()
        wanted = {Path(name) for name in listed if (ROOT / name).is_file()}
        for path in [p for p in self.root.rglob("*") if p.is_file()]:
            name = path.relative_to(self.root)
            if name not in wanted and name.parts[0] != "build" and path.suffix != ".so":
                path.unlink()
        for name in wanted:
            source, target = ROOT / name, self.root / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def environment(self, backend):
        own = {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MMKERNELS_TEST_CACHE": str(FOLDER / "compiled"),
            "MMKERNELS_TEST_EMULATOR": "1" if backend == "cuda" else "0",
            "OMP_WAIT_POLICY": "passive",
            "CXX": str(self.compiler),
            "COLUMNS": "400",  # failures' messages
        }
        return os.environ | own | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})

    @contextlib.contextmanager
    def planted(self, backend, mutant):
        """The mutant's file, with the mutant in it, and in the library where that is made of the file."""
        path, text = mutated(backend, mutant, self.root)
        before = path.read_text(), path.stat()
        path.write_text(text)
        try:
            if backend == "cpu":
                self.build()
            yield path
        finally:
            path.write_text(before[0])
            os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
            self.take_out()

    def take_out(self):
        """The library without any mutant, of the objects that no mutant touches."""
        shutil.copy2(self.graph.parent / LIBRARY, self.root / "mmkernels" / LIBRARY)

    def build(self):
        """What is out of date is compiled beside its object, for this machine's instruction set alone, and linked."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        ninja = [shutil.which("ninja", path=path), "-f", str(self.graph), "-n", "-v"]
        objects = {}
        for command in re.findall(r"^\[\d+/\d+\] (.*)$", run(ninja, cwd=self.root, check=True).stdout, re.M):
            words = shlex.split(command)
            target = words[words.index("-o") + 1]
            if Path(target).name == LIBRARY:
                words = [objects.get(word, word) for word in words]
                words[words.index("-o") + 1] = f"mmkernels/{LIBRARY}"
            elif f"/{self.isa}/" in target:
                objects[target] = f"{target}.mutant.o"
                words = [word.replace(target, objects[target]) for word in words] + ["-O1"]
            else:
                continue  # for other instructions, or not of the library
            done = run(words, cwd=self.root)
            if done.returncode:
                raise Unbuilt(done.stderr[-300:])
        if not objects:
            raise Unbuilt("nothing is compiled from it")


def run(command, **options):
    return subprocess.run(command, **{"capture_output": True, "text": True} | options)
