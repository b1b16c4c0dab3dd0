"""What the suite shows, and of what: property x operation x backend, as the tests themselves say.

    python tests/coverage_table.py     prints the table, and exits 1 where it has a hole (make coverage-table)

A test says what it shows with ``@pytest.mark.property("vmap")``; the operation and the backend are those that it is
parametrised with. A test without a backend among its parameters shows its property on the CPU's if it takes the fixture
`extension`, else on all: what it looks at lies before a backend is chosen. What a cell can't have stands below with the
reason. Collected is what could run here; tests/ran.py asks whether it did.
"""

import collections
import fnmatch
import itertools
import sys

import pytest

from mmkernels import backends, functional

# Where conftest.py keeps the cells of each file's tests.
COLLECTED = pytest.StashKey()

# What every operation has to show on every backend.
PROPERTIES = {
    "values in float32": "results and gradients of every case against float64, under the rule of tolerance.py",
    "values in bfloat16": "the same",
    "values in float16": "the same",
    "values in float64": "the same",
    "values of any arguments": "the same, for arguments that hypothesis draws: sizes, options, memory layouts",
    "gradients of any arguments": "of some tensors, or none, the same bits as of all, for arguments that are drawn",
    "empty sizes": "cases without samples, positions, tokens, channels or bags",
    "masks": "cases with masks of every kind",
    "views": "cases of tensors that are transposed, sliced, expanded, unaligned",
    "packed bags": "cases of bags of different sizes",
    "extreme values": "cases, and calls, near the ends of a dtype's range",
    "NaN and Inf come out": "what isn't finite and isn't masked comes out where it does in plain PyTorch",
    "NaN stays in its sample": "no other sample's result or gradient changes",
    "masked values reach nothing": "NaN and Inf at masked positions change no bit of results or gradients",
    "nothing takes part": "what is masked completely gives exactly 0, gradients included",
    "a single element": "a softmax over one element gives its scores no gradient, exactly",
    "weights": "what need_weights gives, and its gradient",
    "each gradient alone": "is what it is beside the others",
    "gradients that come in": "may be expanded, strided, transposed, or cut out of larger ones",
    "gradcheck": "first derivatives against differences of values",
    "second derivatives": "gradients of gradients",
    "forward mode": "every way to push tangents",
    "vmap": "over samples, and over everything",
    "torch.func.grad": "of single samples, under vmap",
    "compile": "one graph, and one compilation for all sizes",
    "inductor": "through the default compiler, between other operations",
    "opcheck": "torch.library.opcheck of the forward operation",
    "opcheck backward": "torch.library.opcheck of the backward operation",
    "meta and fake": "shapes, dtypes and strides without data",
    "autocast": "low precision in, low precision out; gradients in the inputs' dtypes",
    "inference mode": "the same bits",
    "checkpoint": "torch.utils.checkpoint: the same bits",
    "the autograd Function": "by itself, for those who build on it",
    "out=": "is written completely, nothing beside it is, and it counts as a change",
    "negative views": "as inputs and as gradients that come in",
    "huge strides": "beyond 2^31 elements, along every dimension",
    "strided offsets": "a column of a table",
    "inputs stay as they are": "values and version counters",
    "saved tensors are watched": "a change in place before backward is an error, not a wrong gradient",
    "same bits twice": "results and gradients of two runs",
    "same bits for any number of threads": "results and gradients",
    "many callers at once": "Python threads share nothing",
    "bounded memory": "no temporary of the image's or the scores' size",
    "mistakes": "every wrong argument has its message",
    "mistakes of a kernel's caller": "the registered operations refuse what would not be safe",
    "a forced backend is never replaced": "it runs, or raises and lists all with their reasons",
    "numbers, flags and offsets of other types": "NumPy's, lists",
    "the module": "is the article's formula, with its parameters' gradients",
    "the module's projections": "are used as submodules: hooks, pruning, quantisation, opacus",
    "copies of the module": "deepcopy, pickle and state_dict give the same bits",
}

SLOW = ("cuda-emulated", "triton")
HEADS = ("gated_cross_attention", "bidirectional_attention", "absorbed_attention")
SAMPLED = "deformable_attention"
ANY = "*"
# property, operations, backends, why not. Patterns as in fnmatch; the first that fits counts.
NOT_APPLICABLE = (
    ("values in float64", ANY, SLOW, "it has no float64"),
    (
        "gradcheck",
        ANY,
        SLOW,
        "it has no float64: its gradients are those of `values`, and second derivatives are shown",
    ),
    (
        "gradients of any arguments",
        ANY,
        ("reference", "triton"),
        "plain PyTorch multiplies in another way where a gradient is wanted, and the interpreter takes too long: "
        "`each gradient alone` shows it of a few",
    ),
    (
        ("values in bfloat16", "values in float16", "values in float64"),
        ANY,
        "reference",
        "it is the truth: it is compared in float32 alone, with itself in float64",
    ),
    (("masks", "masked values reach nothing", "nothing takes part"), "channel_attention", ANY, "it has no mask"),
    ("packed bags", ("channel_attention", SAMPLED, *HEADS), ANY, "it has no offsets"),
    ("strided offsets", ("channel_attention", SAMPLED, *HEADS), ANY, "it has no offsets"),
    ("weights", ("bidirectional_attention", "absorbed_attention", SAMPLED), ANY, "it has no need_weights"),
    ("out=", ("channel_attention", "additive_attention", SAMPLED, *HEADS), ANY, "it has no out"),
    (("opcheck*", "mistakes of a kernel's caller"), ANY, "reference", "it is no registered operation"),
    (
        ("same bits for any number of threads", "bounded memory"),
        ANY,
        "reference",
        "it is plain PyTorch: threads and memory are PyTorch's affair",
    ),
    (
        "NaN and Inf come out",
        ("channel_attention", "additive_attention", SAMPLED, *HEADS),
        "reference",
        "it is what the others are compared with",
    ),
    ("*the module*", ANY, ("reference", *SLOW), "modules call the public functions, which show the rest"),
    (
        "same bits for any number of threads",
        ("additive_attention", *HEADS),
        "cpu",
        "not promised: sums over positions are divided as the threads are",
    ),
    ("same bits for any number of threads", ANY, SLOW, "one thread executes it here, whatever the number"),
    ("bounded memory", ANY, SLOW, "what it allocates on a GPU isn't what PyTorch's profiler sees here"),
)


# The case groups that are properties of their own.
GROUPS = {
    "empty": "empty sizes",
    "masks": "masks",
    "views": "views",
    "bnd views": "views",
    "bdhw sizes": "views",
    "packed": "packed bags",
    "extremes": "extreme values",
}


def shown(item):
    """The cells (property, operation, backend) that a collected test fills; the backend is None for all."""
    marks = list(item.iter_markers("property"))
    if not marks:
        return []
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    properties = {name.format_map(_Words(parameters)) for mark in marks for name in mark.args}
    if "case" in parameters and hasattr(parameters["case"], "group"):
        properties |= {GROUPS[parameters["case"].group]} if parameters["case"].group in GROUPS else set()
    unknown = properties - PROPERTIES.keys()
    if unknown:
        raise ValueError(f"{item.nodeid}: tests/coverage_table.py knows no property {sorted(unknown)}")
    given = {key: value for mark in marks for key, value in mark.kwargs.items()}
    operations = given.get("operation") or [_operation(item, parameters)]
    backend = given.get("backend") or parameters.get("backend") or ("cpu" if "extension" in item.fixturenames else None)
    return [(name, operation, backend) for name in sorted(properties) for operation in operations]


class _Words(dict):
    """Parameters as they stand in a property's name."""

    def __getitem__(self, key):
        return str(super().__getitem__(key)).removeprefix("torch.")


def _operation(item, parameters):
    """What a parameter names, or the file."""
    from support import calls  # which wants the emulator registered

    for value in parameters.values():
        name = getattr(value, "operation", getattr(value, "__name__", value))
        name = calls.VARIANTS[name].operation if isinstance(name, str) and name in calls.VARIANTS else name
        for operation in functional.__all__:
            if isinstance(name, str) and name.startswith(operation):
                return operation
    if getattr(item.module, "OPERATION", None) in functional.__all__:
        return item.module.OPERATION
    raise ValueError(f"{item.nodeid} shows a property, but of which operation?")


def columns():
    """The backends that can run on the CPU here."""
    return [name for name in backends.names() if name != "cuda"]


def count(cells):
    """How many tests fill each cell (property, operation, backend)."""
    found = collections.Counter()
    for name, operation, backend in cells:
        for each in columns() if backend is None else [backend]:
            found[name, operation, each] += 1
    return found


def why_not(name, operation, backend):
    """None, or why the cell can't be filled."""
    for names, operations, wanted, reason in NOT_APPLICABLE:
        if _fits(name, names) and _fits(operation, operations) and _fits(backend, wanted):
            return reason
    return None


def _fits(name, patterns):
    return any(fnmatch.fnmatch(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def holes(cells, names):
    """Of these backends, what nothing covers and nothing excuses, and what is excused though it is covered."""
    found = count(cells)
    every = list(itertools.product(PROPERTIES, functional.__all__, names))
    missing = [cell for cell in every if not found[cell] and why_not(*cell) is None]
    return missing, [cell for cell in every if found[cell] and why_not(*cell) is not None]


def printed(cells):
    """The table as lines of text."""
    found = count(cells)
    names = columns()
    width = max(map(len, PROPERTIES)) + 2
    yield f"tests of each property, of backends {' / '.join(names)}; - not applicable, NO not covered"
    yield "".ljust(width) + "".join(operation.removesuffix("_attention").rjust(20) for operation in functional.__all__)
    reasons = collections.defaultdict(list)
    for name in PROPERTIES:
        line = name.ljust(width)
        for operation in functional.__all__:
            each = []
            for backend in names:
                reason = why_not(name, operation, backend)
                each.append(str(found[name, operation, backend] or ("NO" if reason is None else "-")))
                if reason is not None:
                    reasons[reason, name].append((operation, backend))
            line += "/".join(each).rjust(20)
        yield line
    yield ""
    yield "not applicable:"
    for (reason, name), where in reasons.items():
        operations = sorted({operation for operation, _ in where})
        on = sorted({backend for _, backend in where})
        yield (
            f"  {name}: {'every operation' if len(operations) == len(functional.__all__) else ', '.join(operations)}"
            + (f", on {', '.join(on)}" if len(on) < len(names) else "")
            + f": {reason}"
        )


class Collected:
    """A plugin of pytest that has the cells of all tests afterwards."""

    def __init__(self):
        self.cells = []

    def pytest_collection_finish(self, session):
        self.cells = [cell for cells in session.config.stash[COLLECTED].values() for cell in cells]


def main():
    collected = Collected()
    code = pytest.main(["--collect-only", "-qqq", "-W", "ignore"], plugins=[collected])
    if code != pytest.ExitCode.OK:
        return code
    print("\n".join(printed(collected.cells)))
    missing, excused = holes(collected.cells, columns())
    for what, found in (("not covered", missing), ("not applicable, but covered", excused)):
        for cell in found:
            print(f"{what}: {' x '.join(cell)}")
    return 1 if missing or excused else 0


if __name__ == "__main__":
    import coverage_table  # the module that conftest.py has

    sys.exit(coverage_table.main())
