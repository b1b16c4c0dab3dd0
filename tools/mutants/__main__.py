"""Plants one bug after another in a copy of this tree and runs the tests: whatever none of them notices is a hole.

    python tools/mutants [--only cuda | --only cuda:additive] [--json FILE]        (make mutants ONLY=cuda)

The tables are cpu_mutants.py, cuda_mutants.py and triton_mutants.py. Exits 1 where a mutant survives that isn't listed
as equivalent, or where one can't be planted or built.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutant import ROOT, SOURCES, mutants, mutated

FOLDER = ROOT / "build" / "mutants"
COPY = FOLDER / "tree"
COMPILER = FOLDER / "g++"
LIMIT = 900  # seconds of one run of tests: a mutant may hang
NAMES = {"cpu": "cpu-cpu", "cuda": "cuda-emulated", "triton": "triton"}  # as tests' names have them
# The cases of an operation on one backend, as `mmkernels verify` has them: the small ones where it is slow.
CASES = """
import sys, torch
from support import emulated
from mmkernels import verify
rows = verify.run([sys.argv[1]], [sys.argv[2]], dtypes=[torch.float32])
for row in rows:
    for failure in row.failures:
        print("FAILED", failure)
sys.exit(not verify.passed(rows))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a backend, or backend:text of an operation or a name")
    parser.add_argument("--json", type=Path, help="where the table is written as well")
    asked = parser.parse_args()
    chosen = list(select(asked.only))
    if not chosen:
        parser.error(f"no mutant is called {asked.only!r}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was planted is taken out again
    copy_tree()
    write_compiler()
    rows = []
    with_cpu = any(backend == "cpu" for backend, _ in chosen)
    extension = Extension() if with_cpu or not list(COPY.glob("mmkernels/_C*.so")) else None
    for backend, mutant in chosen:
        before = time.monotonic()
        verdict, told = try_out(backend, mutant, extension)
        rows.append(
            {
                "backend": backend,
                "operation": mutant.operation,
                "mutant": mutant.name,
                "verdict": verdict,
                "told": mutant.equivalent or told,
                "seconds": round(time.monotonic() - before, 1),
            }
        )
        print(line(rows[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")
    wrong = [row for row in rows if row["verdict"] not in ("caught", "equivalent")]
    print(f"{len(rows)} mutants, {len(wrong)} not caught")
    for row in wrong:
        print(line(row))
    return 1 if wrong else 0


def select(only):
    backend, _, word = (only or "").partition(":")
    for name in SOURCES:
        if backend in ("", name):
            for mutant in mutants(name):
                if word in f"{mutant.operation}: {mutant.name}":
                    yield name, mutant


def line(row):
    name = f"{row['operation']}: {row['mutant']}"
    return f"{row['backend']:7}{row['verdict']:11}{row['seconds']:6.1f} s  {name}  [{row['told']}]"


def copy_tree():
    """What git knows of, and what it doesn't ignore, as it lies here now. What hasn't changed keeps its time."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {Path(name) for name in listed if (ROOT / name).is_file()}
    wanted |= {path.relative_to(ROOT) for path in ROOT.glob("mmkernels/*.so")}
    for path in [p for p in COPY.rglob("*") if p.is_file()]:
        name = path.relative_to(COPY)
        if name not in wanted and name.parts[0] != "build" and path.suffix != ".so":
            path.unlink()
    for name in wanted:
        source, target = ROOT / name, COPY / name
        if target.exists() and target.read_bytes() == source.read_bytes():
            continue
        if target.suffix == ".so" and target.exists():
            continue  # built there
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def write_compiler():
    """g++ that optimises little: a mutant is compiled once and runs for seconds."""
    COMPILER.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O1\n')
    COMPILER.chmod(0o755)


def environment(backend):
    own = {
        "PYTHONPATH": str(COPY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MMKERNELS_TEST_CACHE": str(FOLDER / "compiled"),
        "MMKERNELS_TEST_EMULATOR": "1" if backend == "cuda" else "0",
        "OMP_WAIT_POLICY": "passive",
        "CXX": str(COMPILER),
    }
    return os.environ | own | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})


class Extension:
    """The copy's compiled extension; a mutant is built for this machine's instruction set alone."""

    def __init__(self):
        run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, check=True, stdout=subprocess.DEVNULL)
        self.graph = next(COPY.glob("build/*/build.ninja"))
        code = "import mmkernels.backends as b; print(b.extension.cpu_best_isa)"
        self.isa = subprocess.check_output([sys.executable, "-c", code], cwd=COPY, env=environment("cpu"), text=True)
        self.isa = self.isa.strip()

    def ninja(self, *arguments):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = [shutil.which("ninja", path=path), "-f", str(self.graph), *arguments]
        return subprocess.check_output(command, cwd=COPY, text=True)

    def build(self):
        """Compiles what is out of date and links it, beside ninja's back. Returns {file: its copy from before}."""
        stale = re.findall(r"^\[\d+/\d+\] (.*)$", self.ninja("-n", "-v"), re.M)
        saved = {}
        for command in stale:
            target = re.search(r" -o (\S+)", command)[1]
            if "/csrc/cpu/" in command or " csrc/cpu/" in command:
                if f"/{self.isa}/" not in target:
                    continue
                command += " -O1"
            self.save(saved, COPY / target)
            run(command, cwd=COPY, shell=True, check=True)
            installed = COPY / "mmkernels" / Path(target).name
            if installed.exists():
                self.save(saved, installed)
                shutil.copy2(COPY / target, installed)
        return saved

    def save(self, saved, path):
        saved[path] = FOLDER / "before" / path.relative_to(COPY)
        saved[path].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, saved[path])


def try_out(backend, mutant, extension):
    """(verdict, by what)"""
    path, text = mutated(backend, mutant, COPY)
    kept = FOLDER / "before" / path.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, kept)
    saved = {}
    try:
        path.write_text(text)
        if backend == "cpu":
            saved = extension.build()
            if not saved:
                return "broken", "nothing was built"
        return judge(backend, mutant)
    except subprocess.CalledProcessError as error:
        return "broken", f"doesn't build: {(error.stderr or '')[-300:]}"
    finally:
        shutil.copy2(kept, path)
        for file, before in saved.items():
            shutil.copy2(before, file)


def judge(backend, mutant):
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    steps = [[*pytest, *shlex.split(mutant.tests)]] if mutant.tests else []
    steps.append([sys.executable, "-c", CASES, mutant.operation, NAMES[backend].replace("cpu-cpu", "cpu")])
    steps.append([*pytest, "test_cuts.py", "-k", NAMES[backend] if backend != "cuda" else "test"])
    for command in steps:
        try:
            done = run(command, cwd=COPY / "tests", env=environment(backend), timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "caught", "it hangs"
        failed = re.search(r"^FAILED (.*?)( - .*)?$", done.stdout, re.M)
        if failed:
            return "caught", failed[1][:110]
        if done.returncode < 0 or done.returncode > 128:
            return "caught", f"it crashes ({done.returncode})"
        if done.returncode:
            return "broken", (done.stdout + done.stderr)[-600:]
    return ("equivalent" if mutant.equivalent else "survived"), ""


def run(command, **options):
    return subprocess.run(command, **{"capture_output": "stdout" not in options, "text": True} | options)


if __name__ == "__main__":
    sys.exit(main())
