"""Triton kernels compiled for real GPUs, without one: registers, spills and shared memory of every launch.

The operations' own launch code runs, and Triton compiles where it would launch: what is measured here is what a GPU
gets. What is launched is in triton_problems/. It needs Triton's compiler where tests need its interpreter, so it runs
in a process of its own.
``python tests/test_triton_compile.py docs/generated/triton.md`` writes the table.

The oldest Triton that is supported compiles them, too, where MMKERNELS_OLDEST_TRITON names a folder that holds one
(``make test-triton-oldest`` puts it into build/): for one target of each maker, in the configuration that is tried
first.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from triton_problems import OPERATIONS

import mmkernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PAGE = Path(__file__).parents[1] / "docs" / "generated" / "triton.md"
OLDEST = "3.6."
OLDEST_TARGETS = ("sm_90", "gfx942")


def compile_all(operations, targets, every_configuration, compiled=True):
    """A row for each launch: compiled with the arguments' own strides, alignment and constants; or the launch alone."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows = []

    class Driver:
        """Enough of a driver to compile; each target is a device, so that each gets its own kernels."""

        def __init__(self, index, target):
            self.index = index
            self.target = GPUTarget(*target)

        def get_current_device(self):
            return self.index

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return self.target

    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        if warmup:
            return run(kernel, *arguments, grid=grid, warmup=True, **options)
        row = {
            "operation": operation,
            "kernel": kernel.__name__,
            "problem": problem,
            "target": target,
            "block": blocks(options),
            "warps": options.get("num_warps", 4),
            "triton": triton.__version__,
        }
        rows.append(row | (resources(kernel.warmup(*arguments, grid=grid, **options)) if compiled else {}))

    JITFunction.run = compile_only
    for operation in operations:
        module = importlib.import_module(f"mmkernels.triton.{operation}")
        for place in (module, importlib.import_module("mmkernels.triton.heads")):
            place.processors = lambda tensor: 132
        for index, target in enumerate(targets):
            driver.set_active(Driver(index, TARGETS[target]))
            for problem, (shape, dtype, options) in OPERATIONS[operation].PROBLEMS.items():
                chosen = [0, 0]

                def tuned(key, configurations, tensor, run):
                    chosen[1:] = [
                        max([len(configurations), *chosen[1:]])
                    ]  # forward and backward have as many as they have
                    return configurations[min(chosen[0], len(configurations) - 1)]

                module.tuned = tuned
                while True:
                    OPERATIONS[operation].launch(module, shape, dtype, **options)
                    chosen[0] += 1
                    if not every_configuration or chosen[0] >= max(chosen[1:], default=1):
                        break
    return rows


def blocks(options):
    """Rows (or chunks) x columns x channels, those that a kernel has."""
    return [
        options[name]
        for name in ("BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_D", "BLOCK_V", "BLOCK_C", "BLOCK", "OUT_D", "OUT_V")
        if name in options
    ]


def resources(compiled):
    """Shared memory, registers a thread, and what was spilled to memory."""
    return {
        "shared": compiled.metadata.shared,
        "contracted": compiled.metadata.enable_fp_fusion,
        **registers(compiled),
    }


def registers(compiled):
    """A thread's, and what was spilled to memory: bytes (NVIDIA), or vector registers (AMD; scalar registers spill into
    lanes of vector registers, and are no memory's traffic)."""
    if "hsaco" in compiled.asm:
        found = re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]
        )
        numbers = {name: int(value) for name, value in found}
        return {
            "registers": numbers["vgpr_count"],
            "spills": max(numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"]),
        }
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    count, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": count, "spills": stack + local}


def in_own_process(*arguments, path=()):
    """The rows, of the package that this process has; modules in the folders of `path` come before those that are
    installed."""
    path = [*map(str, path), str(Path(mmkernels.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, "--json", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_oldest_triton = pytest.mark.skipif(
    "MMKERNELS_OLDEST_TRITON" not in os.environ, reason="MMKERNELS_OLDEST_TRITON isn't set: make test-triton-oldest"
)


def check(rows, operation):
    """No spills, within the budget, and nothing contracted: threads that hold the same sum must hold the same bits, so
    that the result is the same whichever of them writes it."""
    assert {row["kernel"] for row in rows} == OPERATIONS[operation].KERNELS
    budget = OPERATIONS[operation].SHARED_BUDGET
    wrong = [
        row for row in rows if row["spills"] or row["shared"] > budget or row["registers"] == 0 or row["contracted"]
    ]
    assert not wrong, "\n".join(map(str, wrong))


on_every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@needs_triton
@pytest.mark.slow
@on_every_operation
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(operation, target):
    """In any configuration: whatever a GPU finds fastest."""
    check(in_own_process(operation, target, "--all"), operation)


@needs_triton
@pytest.mark.slow
def test_the_page_lists_what_is_launched():
    """Kernels, blocks and warps of every problem. ``python tests/test_triton_compile.py docs/generated/triton.md``
    writes the page anew."""
    rows = in_own_process(",".join(OPERATIONS), next(iter(TARGETS)), "--launches")
    launched = [f"## {rows[0]['operation']}"]
    for before, row in zip([rows[0], *rows], rows):
        launched += [f"## {row['operation']}"] * (row["operation"] != before["operation"]) + [columns_of(row)]
    listed = re.findall(r"^(?:## \w+|\| [^|]+ \| \w+ \| [\dx ]+ \| \d+ \|)", PAGE.read_text(), re.M)
    assert listed == launched


@needs_oldest_triton
@pytest.mark.slow
@on_every_operation
@pytest.mark.parametrize("target", OLDEST_TARGETS)
def test_oldest_triton(operation, target):
    rows = in_own_process(operation, target, path=[os.environ["MMKERNELS_OLDEST_TRITON"]])
    assert {row["triton"][: len(OLDEST)] for row in rows} == {OLDEST}
    check(rows, operation)


def columns_of(row):
    """What a line of the table begins with: which launch it is."""
    return f"| {row['problem']} | {row['kernel']} | {' x '.join(map(str, row['block']))} | {row['warps']} |"


def table(rows):
    lines = [
        "# What the Triton kernels need",
        "",
        "Written by `python tests/test_triton_compile.py docs/generated/triton.md`: each kernel as the operation launches it in its first",
        "configuration, compiled without a GPU. Registers a thread (AMD: vector registers); shared memory in bytes a program;",
        "spills: bytes of memory that registers were spilled to (AMD's scalar registers spill into vector registers, and aren't counted).",
        "`block`: positions (merge: chunks) x channels that a program holds. Attention over heads: rows x columns of a score tile x",
        "channels multiplied at once (queries', values') x channels of a gradient that a program holds (queries', values');",
        "Channel and additive attention: rows x channels of a program, or scores of a block.",
        "Deformable attention: queries (`add_cells`: positions) x points x channels; `differentiate` with and without the gradient of value.",
        "`differentiate` comes once for each side whose gradients it writes, `attend` (bidirectional) for each side's result.",
        "",
    ]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        lines += [
            f"## {operation}",
            "",
            "| problem | kernel | block | warps | "
            + " | ".join(f"{t}: registers, shared, spills" for t in TARGETS)
            + " |",
            "|---|---|---|---|" + "---|" * len(TARGETS),
        ]
        for problem in OPERATIONS[operation].PROBLEMS:
            group = [row for row in rows if row["problem"] == problem]
            for place, row in enumerate(group):
                if row["target"] == next(iter(TARGETS)):
                    same = [[r for r in group if r["target"] == t][place] for t in TARGETS]
                    numbers = " | ".join(f"{r['registers']}, {r['shared']}, {r['spills']}" for r in same)
                    lines.append(f"{columns_of(row)} {numbers} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--json":
        operations, target, *flags = sys.argv[2:]
        print(json.dumps(compile_all(operations.split(","), [target], "--all" in flags, "--launches" not in flags)))
    else:
        Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[1]).write_text(table(compile_all(OPERATIONS, TARGETS, False)))
