"""The CUDA emulator finds the bugs that it is there for, and none in a kernel without."""

import os
import re
import subprocess

import pytest
from support import compiling, emulated

BUGS = {
    "none": 0,
    "missing barrier": 1,
    "divergent barrier": 2,
    "early return": 3,
    "wrong wait count": 4,
    "missing trailing barrier": 5,
    "overrun of dynamic shared memory": 6,
    "overrun of static shared memory": 7,
    "forgotten wait": 8,
    "shuffle that not all reach": 9,
    "shuffle from two places": 10,
    "missing cluster barrier": 11,
    "block ends while peers read": 12,
    "cluster barrier without a block": 13,
    "cluster wait without an arrival": 14,
    "missing warp barrier": 15,
    "unaligned matrix": 16,
    "divergent product": 17,
    "matrix not transposed": 18,
}
ORDERS = list(emulated.ORDERS)

pytestmark = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))


def planted(bug, order="ascending", late=True, mode="plain"):
    """Exit status and output of the planted kernel."""
    jobs = [
        *emulated.emulator_jobs(mode),
        (emulated.EMULATOR / "planted.cu", [*emulated.KERNEL, *emulated.MODES[mode]]),
    ]
    program = compiling.program(f"planted-{mode}", jobs, emulated.MODES[mode])
    environment = os.environ | {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}
    command = [program, str(BUGS[bug]), str(emulated.ORDERS[order]), str(int(late))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.slow if m != "plain" else ()) for m in emulated.MODES]
)
def test_no_bug(mode, order, late):
    assert planted("none", order, late, mode) == (0, "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "bug, told",
    [
        ("divergent barrier", r"divergent barrier: .*planted.cu:\d+ and .*planted.cu:\d+"),
        ("early return", r"deadlock: thread \d+ waits at .*planted.cu:\d+"),
        ("shuffle that not all reach", r"divergent shuffle: .*planted.cu:\d+ and .*planted.cu:\d+"),
        ("shuffle from two places", r"divergent shuffle: .*planted.cu:\d+ and .*planted.cu:\d+"),
        ("divergent product", r"divergent mma: .*planted.cu:\d+ and .*planted.cu:\d+"),
        ("unaligned matrix", r"row isn't aligned at .*planted.cu:\d+"),
        ("forgotten wait", "ends with copies that it hasn't waited for"),
        (
            "block ends while peers read",
            "ends without a cluster barrier since a peer read its block's memory|peer that may have ended",
        ),
        ("cluster barrier without a block", r"divergent cluster barrier: .*planted.cu:\d+ and .*planted.cu:\d+"),
        ("cluster wait without an arrival", r"didn't arrive at: .*planted.cu:\d+"),
    ],
)
def test_refused(bug, told, order):
    status, output = planted(bug, order)
    assert status == 3 and re.search(told, output)


@pytest.mark.parametrize(
    "bug, late",
    [
        ("missing barrier", True),
        ("missing cluster barrier", True),
        ("wrong wait count", True),
        ("missing trailing barrier", False),
    ],
)
def test_wrong_sums(bug, late):
    """Wrong results in at least one order; a late or an early copy each finds what the other misses."""
    assert any(planted(bug, order, late)[0] == 2 for order in ORDERS)
    if bug == "wrong wait count":
        assert planted(bug, "ascending", False)[0] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_wrong_products(order):
    assert planted("matrix not transposed", order)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug, late, mode, told",
    [
        ("missing warp barrier", True, "tsan", "data race"),
        ("missing barrier", True, "tsan", "data race"),
        ("missing trailing barrier", False, "tsan", "data race"),
        ("missing cluster barrier", True, "tsan", "data race"),
        ("overrun of dynamic shared memory", True, "asan", "heap-buffer-overflow"),
        ("overrun of static shared memory", True, "asan", "out of bounds|global-buffer-overflow"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers(bug, late, mode, told, order):
    """A race shows under ThreadSanitizer whatever the order; an overrun under AddressSanitizer; both with the line."""
    status, output = planted(bug, order, late, mode)
    assert status not in (0, 2, 3) and re.search(told, output) and "planted.cu:" in output
