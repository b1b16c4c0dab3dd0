"""The tables of tools/mutants fit the kernels as they are, and verdicts tell apart why a test fails. (`make mutants`
plants every one, which takes long.)"""

import collections
import importlib
import re
import subprocess
import sys

import pytest
from support.compiling import ROOT

from mmkernels import functional

sys.path.append(str(ROOT / "tools" / "mutants"))
mutant = importlib.import_module("mutant")
table = importlib.import_module("table")
verdicts = importlib.import_module("verdicts")
ALL = [(backend, each) for backend in mutant.SOURCES for each in mutant.mutants(backend)]


@pytest.mark.parametrize("backend, each", ALL, ids=lambda value: getattr(value, "name", value))
def test_its_place_is_found_once(backend, each):
    """Where code moved or was renamed, `find` is to be mended in the table."""
    path, text = mutant.mutated(backend, each)
    assert text != path.read_text()


def test_every_operation_and_backend_has_some():
    count = collections.Counter((backend, each.operation) for backend, each in ALL)
    assert len(ALL) >= 40 and len(set(ALL)) == len(ALL)
    assert set(count) == {(backend, name) for backend in mutant.SOURCES for name in functional.__all__}


def test_the_tests_that_are_named_exist():
    named = [word for _, each in ALL for word in each.tests.split() if word.endswith(".py")]
    named += [name for names in verdicts.FILES.values() for name in names]
    assert named and not [name for name in named if not (ROOT / "tests" / name).is_file()]


@pytest.mark.parametrize("text", ["no such text", "int64_t"])
def test_a_place_that_is_not_found_once_is_told(text):
    with pytest.raises(mutant.NotFound, match="must be found once"):
        mutant.locate("cpu", mutant.Mutant("spatial_attention", "unknown", text, ""))


def answering(monkeypatch, *answers):
    """The tests' process ends with one after another of (code, output), or hangs."""
    answers = iter(answers)

    def pytest(*arguments):
        code, output = next(answers)
        if code is None:
            raise subprocess.TimeoutExpired("pytest", verdicts.LIMIT, output.encode())
        return subprocess.CompletedProcess(arguments, code, output, "")

    monkeypatch.setattr(verdicts, "pytest", pytest)


PASSED = (0, "test_a.py::test_b[1] PASSED")
ENDS = {
    "assertion": ((1, "FAILED test_a.py::test_b[1 x] - AssertionError: wrong"), "caught", "test_a.py::test_b[1 x]"),
    "exception": ((1, "FAILED test_a.py::test_b[1] - NameError: name 'x'"), "broken", "test_a.py::test_b[1]"),
    "import": ((4, "ImportError while loading conftest"), "broken", ""),
    "collection": ((2, "ERROR test_a.py - SyntaxError: invalid"), "broken", ""),
    "fixture": ((1, "ERROR test_a.py::test_b - AssertionError: wrong"), "broken", ""),
    "no tests": ((5, "no tests ran"), "broken", ""),
    "crash": ((-11, "test_a.py::test_a PASSED [50%]\ntest_a.py::test_b[1 x] "), "caught", "test_a.py::test_b[1 x]"),
    "crash of an import": ((-11, ""), "broken", ""),
    "killed": ((-9, "test_a.py::test_b[1] "), "broken", ""),
    "hangs": ((None, "test_a.py::test_b[1] "), "hangs", "test_a.py::test_b[1]"),
    "nothing": (PASSED, "survived", ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_only_a_test_that_fails_by_its_assertion_catches(end, monkeypatch):
    answer, verdict, test = ENDS[end]
    answering(monkeypatch, PASSED, answer, PASSED)
    each = mutant.Mutant("spatial_attention", "some", "a", "b", "test_a.py")
    assert verdicts.judge(None, "cpu", each)[:2] == (verdict, test)


def test_what_fails_without_the_mutant_or_is_gone_catches_nothing(monkeypatch):
    listed = (0, "tests/test_a.py::test_b[1]\ntests/test_a.py::test_c")
    answering(monkeypatch, listed, (1, "test_a.py::test_b[1] PASSED [50%]\ntest_a.py::test_c FAILED [100%]"))
    names = ("test_b[1]", "test_c", "test_gone[x]")
    rows = [{"backend": "cpu", "verdict": "caught", "test": f"test_a.py::{name}"} for name in names]
    verdicts.confirm(None, rows)
    assert [row["verdict"] for row in rows] == ["caught", "broken", "broken"]


def test_the_page_has_all_of_them():
    """A mutant that was added, or has another name, is to be planted: `make mutants RESUME=1` writes the page."""
    rows = re.findall(r"^\| (\w+_attention) \| (.*?) \| ", table.PAGE.read_text(), re.M)
    assert rows == [(each.operation, each.name) for _, each in ALL]
