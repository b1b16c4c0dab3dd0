"""What all tests share: fresh memory full of NaN, few threads, the backend of the emulator, and a record of what
ran."""

import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads don't spin: many times faster on a busy machine

import coverage_table
import pytest
import ran
import torch
from support import emulated, interpreter  # noqa: F401  (the backend "cuda-emulated"; a faster interpreter of Triton's)
from torch.utils import deterministic

from mmkernels import backends, cases

try:
    from hypothesis import settings
except ModuleNotFoundError:
    pass
else:
    # The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=60, database=None)
    settings.register_profile("explore", deadline=None, max_examples=2000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

UNBUILT_ALLOWED = os.environ.get("MMKERNELS_TEST_ALLOW_UNBUILT") == "1"
# Where it is told what became of each test, a line a test: tests/ran.py reads it.
RECORD = os.environ.get("MMKERNELS_TEST_RECORD")
# When no more tests are started, in seconds since 1970.
UNTIL = float(os.environ.get("MMKERNELS_TEST_UNTIL", "inf"))


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request):
    """`empty` returns NaN, so that an element that nobody wrote shows. Virtual memory must stay untouched, though."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = "virtual_memory" not in request.keywords
    yield
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads(request):
    """Two threads where work is divided: large cases, and tests marked `threads`. One elsewhere: beside each other,
    tests use the cores."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    divided = "threads" in request.keywords or (isinstance(case, cases.Case) and not case.small)
    torch.set_num_threads(2 if divided else 1)


@pytest.fixture
def own_backends(monkeypatch):
    """Backends that a test adds, refuses or takes away are gone after it, and what was chosen before isn't kept."""
    monkeypatch.setattr(backends, "_reasons", dict(backends._reasons))
    monkeypatch.setattr(backends, "_operations", dict(backends._operations))
    monkeypatch.setattr(backends, "_chosen", {})


@pytest.fixture
def extension():
    """The compiled extension; without it a test fails, unless MMKERNELS_TEST_ALLOW_UNBUILT=1."""
    if backends.extension is None:
        (pytest.skip if UNBUILT_ALLOWED else pytest.fail)(backends.extension_error)
    return backends.extension


# Under pytest-xdist the process that starts the workers gets their reports; each worker collects, and one of them
# tells.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")


def record(test, outcome, reason="", seconds=0.0, shown=()):
    if RECORD:
        row = {"test": test, "outcome": outcome, "reason": reason, "seconds": seconds, "shown": shown}
        with open(RECORD, "a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What a test shows goes with its report, also from another process; what all show is kept, before any is left
    out."""
    collected = config.stash.setdefault(coverage_table.COLLECTED, {})
    for item in items:
        cells = coverage_table.shown(item)
        item.user_properties.append(("shown", cells))
        collected.setdefault(item.path.name, []).extend(cells)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A machine that is too slow for all tests tells which it left out, instead of being cut off without a word."""
    if time.time() > UNTIL:
        pytest.skip(f"{ran.LATE}: MMKERNELS_TEST_UNTIL")


def pytest_runtest_logreport(report):
    if WORKER is None and (report.when == "call" or report.outcome != "passed"):
        shown = dict(report.user_properties).get("shown", ())
        record(report.nodeid, report.outcome, _reason(report), report.duration, shown)


def pytest_collectreport(report):
    if WORKER in (None, "gw0") and report.skipped:
        record(report.nodeid, "skipped", _reason(report))


def pytest_deselected(items):
    if WORKER in (None, "gw0"):
        for item in items:
            record(item.nodeid, "deselected", shown=coverage_table.shown(item))


def _reason(report):
    return report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
