"""pytest bench/   times the operations and their peers with pytest-benchmark, a group a kind of call and shape.

What competes, on which shapes, and whether it is right, is told by mmkernels/bench/, a module an operation; so is what
``mmkernels bench`` prints. That command times all contestants in turn, so that what else the machine does hits all
alike: its ratios are the ones to trust. Here each is timed on its own: to compare commits (``--benchmark-save``,
``--benchmark-compare``), or to look at one (``-k "spatial and pool and ours"``).
"""

import functools
import sys

import pytest
import torch

from mmkernels.bench import benchmark_of, contests, default_device, report, timing

_operations = set()  # of the collected files


def pytest_addoption(parser):
    group = parser.getgroup("mmkernels")
    group.addoption("--quick", action="store_true", help="Few shapes, those of `mmkernels bench --quick`.")
    group.addoption("--device", choices=("cpu", "cuda"), default=default_device(), help="Default: a GPU if there is.")
    group.addoption("--threads", type=int, help="CPU threads; default: torch's setting.")


def pytest_configure(config):
    timing.keep_freed_memory()
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config, machine_info):
    """The commit is told by pytest-benchmark's own commit_info: comparing two on one machine gives no warning."""
    machine_info["mmkernels"] = report.machine(config.getoption("--device"))


def pytest_terminal_summary(terminalreporter):
    """Peers that aren't there are no skipped tests."""
    for operation in sorted(_operations):
        for line in report.left_out_lines(operation, contests.left_out(benchmark_of(operation))):
            terminalreporter.write_line(line)


def pytest_generate_tests(metafunc):
    """An item a contestant: its kind of call, shape and name."""
    quick = metafunc.config.getoption("--quick")
    _operations.add(metafunc.module.OPERATION)
    found = _contests(metafunc.module.OPERATION, quick, metafunc.config.getoption("--device"))
    metafunc.parametrize(
        ("kind", "shape", "contestant"),
        [(*key, name) for key, (_, contest) in found.items() for name in contest.names],
        ids=str,
    )


@pytest.fixture
def measure(request, benchmark, kind, shape, contestant):
    """Times one contestant, after ours was compared with float64 on the very arguments."""
    option = request.config.getoption
    operation = request.module.OPERATION
    size, contest = _contests(operation, option("--quick"), option("--device"))[kind, shape]

    def run():
        arguments, problems = _prepared(contest, size, option("--device"))
        assert not problems, f"{operation} {shape} is wrong, so it isn't timed: {problems}"
        benchmark.group = f"{operation}: {kind}, {shape}"
        with contest.mode():
            call = contest.call(contestant, arguments)
            call()  # compiles
            benchmark(call if option("--device") == "cpu" else _waited_for(call))

    return run


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    yield
    _prepared.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@functools.cache
def _contests(operation, quick, device):
    """(kind without its unit, shape's name) -> (shape, contest)"""
    return {
        (part.kind.rpartition(", ")[0], contests.shape_name(shape)): (shape, part)
        for shape, part in contests.plan(benchmark_of(operation), quick, device)
        if isinstance(part, contests.Contest)
    }


@functools.lru_cache(maxsize=1)
def _prepared(contest, shape, device):
    """The arguments of all contestants, which come one after another, and what is wrong with ours."""
    arguments = contest.inputs(shape, device)
    return arguments, contest.wrong(arguments)


def _waited_for(call):
    def waited():
        call()
        torch.cuda.synchronize()

    return waited
