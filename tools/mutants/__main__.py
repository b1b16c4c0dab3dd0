"""Plants one bug after another in a copy of this tree and runs the tests: whatever none of them notices is a hole.

    python tools/mutants [--only cuda | --only cuda:additive] [--resume]        (make mutants ONLY=cuda)

The tables are cpu_mutants.py, cuda_mutants.py and triton_mutants.py. What was found is kept in build/mutants.json:
--resume leaves out what was caught before, unless its entry has changed. When all have a verdict, it is written to
docs/generated/mutants.md. Exits 1 where a mutant isn't caught and isn't listed as equivalent.

Verdicts: caught: a test fails that passes without the mutant, by an assertion or a crash. survived: none fails.
broken: it doesn't compile, or a test fails in another way, or fails without the mutant, too. hangs: after LIMIT seconds
tests still run.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import table
from mutant import ROOT, SOURCES, NotFound, mutants
from tree import Tree, Unbuilt, run

FOUND = ROOT / "build" / "mutants.json"
LIMIT = 600  # seconds of one run of tests
GOOD = ("caught", "equivalent")
NAMES = {"cpu": "cpu-cpu-float32", "cuda": "cuda-emulated", "triton": "triton"}  # as tests' names have them
PYTEST = [sys.executable, "-m", "pytest", "-vv", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL, -signal.SIGTRAP}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a backend, or backend:text of an operation or a name")
    parser.add_argument("--resume", action="store_true", help="leave out what was caught before")
    asked = parser.parse_args()
    everything = [(backend, mutant) for backend in SOURCES for mutant in mutants(backend)]
    chosen = [each for each in everything if is_asked_for(asked.only, *each)]
    if not chosen:
        parser.error(f"no mutant is called {asked.only!r}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was planted is taken out again
    kept = {key(row): row for row in json.loads(FOUND.read_text())} if FOUND.exists() else {}
    before = time.monotonic()
    tree = Tree()
    print(f"copied and built in {time.monotonic() - before:.0f} s", flush=True)
    for backend, mutant in chosen:
        row = {"backend": backend, **vars(mutant)}
        if asked.resume and kept.get(key(row), {}).get("verdict") in GOOD:
            continue
        kept[key(row)] = row | try_out(tree, backend, mutant)
        keep(kept.values())
        print(line(kept[key(row)]), flush=True)

    rows = [kept[key({"backend": backend, **vars(mutant)})] for backend, mutant in chosen]
    confirm(tree, rows)
    keep(kept.values())
    found = [kept.get(key({"backend": backend, **vars(mutant)})) for backend, mutant in everything]
    if all(found):
        table.write(found)
    wrong = [row for row in rows if row["verdict"] not in GOOD]
    print(f"{len(rows)} mutants, {len(wrong)} not caught, {sum(row['seconds'] for row in rows):.0f} s")
    for row in wrong:
        print(line(row))
    return 1 if wrong else 0


def is_asked_for(only, backend, mutant):
    wanted, _, word = (only or "").partition(":")
    return wanted in ("", backend) and word in f"{mutant.operation}: {mutant.name}"


def key(row):
    """An entry of a table: another one must be tried out anew."""
    return tuple(row[name] for name in ("backend", "operation", "name", "find", "put", "tests", "equivalent"))


def keep(rows):
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(list(rows), indent=2) + "\n")


def line(row):
    name = f"{row['operation']}: {row['name']}"
    told = " ".join(f"{row['test']} {row['told']}".split())
    return f"{row['backend']:7}{row['verdict']:11}{row['seconds']:6.1f} s  {name}  [{told[:300]}]"


def try_out(tree, backend, mutant):
    """What becomes of it: its file, verdict, the test that failed, the test's message, seconds."""
    before = time.monotonic()
    file, test = "", ""
    try:
        with tree.planted(backend, mutant) as path:
            file = str(path.relative_to(tree.root))
            verdict, test, told = judge(tree, backend, mutant)
    except (Unbuilt, NotFound) as error:
        verdict, told = "broken", str(error)
    if verdict == "survived" and mutant.equivalent:
        verdict, told = "equivalent", mutant.equivalent
    seconds = round(time.monotonic() - before, 1)
    return {"file": file, "verdict": verdict, "test": test, "told": told, "seconds": seconds}


def judge(tree, backend, mutant):
    """(verdict, test, message) of the tests that are named, then of the operation's and those of cuts."""
    name = NAMES[backend]
    steps = [shlex.split(mutant.tests)] if mutant.tests else []
    steps += [
        [f"test_{mutant.operation}.py", "-k", name],
        ["test_cuts.py", "-k", "test" if backend == "cuda" else name],
    ]
    for tests in steps:
        try:
            done = pytest(tree, backend, "-x", *tests)
        except subprocess.TimeoutExpired as late:
            return "hangs", running((late.stdout or b"").decode()), f"after {LIMIT} s"
        if done.returncode in CRASHES:
            return "caught", running(done.stdout), f"crash: {signal.Signals(-done.returncode).name}"
        if done.returncode:
            failed = re.search(r"^FAILED (\S+?::.*?)(?: - (.*))?$", done.stdout, re.M)
            if failed is None:
                return "broken", "", (done.stdout + done.stderr)[-600:]
            test, message = failed[1], failed[2] or ""
            asserted = re.match(r"(AssertionError|assert |Failed: )", message)
            return "caught" if asserted else "broken", test, message
    return "survived", "", ""


def pytest(tree, backend, *arguments):
    return run([*PYTEST, *arguments], cwd=tree.root / "tests", env=tree.environment(backend), timeout=LIMIT)


def running(output):
    """The test that had begun when the process ended."""
    begun = re.findall(r"^(\S+?::.*?) *$", output, re.M)
    return begun[-1] if begun else ""


def last(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def confirm(tree, rows):
    """The tests that caught a mutant pass without it."""
    for backend in SOURCES:
        caught = [row for row in rows if row["backend"] == backend and row["verdict"] == "caught"]
        if caught:
            output = pytest(tree, backend, *sorted({row["test"] for row in caught})).stdout
            passed = set(re.findall(r"^(\S+?::.*?) PASSED", output, re.M))
            for row in caught:
                if row["test"] not in passed:
                    row.update(verdict="broken", told=f"without the mutant this test doesn't pass: {last(output)}")


if __name__ == "__main__":
    sys.exit(main())
