"""What the tests say of a mutant.

caught: a test fails that passes without the mutant, by an assertion or a crash. survived: none fails. broken: it
doesn't compile, or a test fails in another way, or fails without the mutant, too. hangs: after LIMIT seconds tests
still run.
"""

import re
import shlex
import signal
import subprocess
import sys

from tree import run

LIMIT = 900  # seconds of one run of tests
NAMES = {"cpu": "cpu-cpu-float32", "cuda": "cuda-emulated", "triton": "triton"}  # as tests' names have them
PYTEST = [sys.executable, "-m", "pytest", "-vv", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
FILES = {  # of a backend's own tests
    "cpu": [],
    "cuda": ["test_cuda.py"],
    "triton": ["test_triton.py", "test_triton_attention.py", "test_triton_rows.py", "test_triton_rows_memory.py"],
}
CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL, -signal.SIGTRAP}


def judge(tree, backend, mutant):
    """(verdict, test, message) of the tests that are named, then the operation's, those of cuts, the backend's."""
    name = NAMES[backend]
    steps = [shlex.split(mutant.tests)] if mutant.tests else []
    steps += [
        [f"test_{mutant.operation}.py", "-k", name],
        ["test_cuts.py", "-k", "test" if backend == "cuda" else name],
    ]
    if FILES[backend]:
        steps.append([*FILES[backend], "-m", "not slow"])
    for tests in steps:
        try:
            done = pytest(tree, backend, "-x", *tests)
        except subprocess.TimeoutExpired as late:
            return "hangs", running((late.stdout or b"").decode()), f"after {LIMIT} s"
        if done.returncode in CRASHES and running(done.stdout):
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
    """The tests that caught a mutant are still there, and pass without it."""
    for backend in NAMES:
        caught = [row for row in rows if row["backend"] == backend and row["verdict"] == "caught"]
        tests = {row["test"] for row in caught}
        if not tests:
            continue
        files = {test.split("::")[0] for test in tests}
        listed = pytest(tree, backend, "--collect-only", "-q", "-q", *sorted(files)).stdout.splitlines()
        tests &= {test.removeprefix("tests/") for test in listed}  # pytest runs none where one isn't there
        output = pytest(tree, backend, *sorted(tests)).stdout if tests else ""
        passed = set(re.findall(r"^(\S+?::.*?) PASSED", output, re.M))
        for row in caught:
            if row["test"] not in passed:
                row.update(verdict="broken", told="without the mutant this test doesn't pass, or isn't there")
