"""Triton kernels compiled for real GPUs, without one: registers, spills and shared memory of every launch.

The operations' own launch code runs, with a launcher that compiles instead: what is measured here is what a GPU gets.
It needs Triton's compiler where tests need its interpreter, so it runs in a process of its own.
``python tests/test_triton_compile.py docs/triton.md`` writes the table.
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

ROOT = Path(__file__).parent.parent
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
# Shared memory is all that a program of one of these kernels may take and leave room for four on a multiprocessor.
SHARED_BUDGET = 32 << 10

# operation -> {problem: (image's shape, dtype, options)}; the options of spatial_attention, and `bags` for packed ones.
PROBLEMS = {
    "spatial_attention": {
        "one sample of 100,000 x 512, bf16": ((1, 100_000, 512), "bfloat16", {"masked": True}),
        "12 heads of 196 x 64, fp32": ((32, 196, 768), "float32", {"num_heads": 12}),
        "bags, 1024 channels, bf16, pool": ((100_000, 1024), "bfloat16", {"bags": 8, "pool": True, "masked": True}),
        "bdhw 64 x 54 x 54, fp32": ((32, 64, 54, 54), "float32", {}),
        "bdhw 2048 x 7 x 7, fp16, pool": ((64, 2048, 7, 7), "float16", {"pool": True}),
    },
}


def spatial_attention(torch, module, shape, dtype, masked=False, bags=None, num_heads=1, pool=False):
    image = torch.empty(shape, dtype=getattr(torch, dtype))
    batch, channels = (bags or shape[0]), shape[2] if len(shape) == 3 else shape[1]
    text = image.new_empty(batch, channels)
    grid = shape[:1] if bags else (shape[0], *shape[2:]) if len(shape) == 4 else shape[:2]
    mask = torch.empty(grid, dtype=torch.bool) if masked else None
    offsets = torch.empty(bags + 1, dtype=torch.int64) if bags else None
    options = (mask, offsets, 1.0, num_heads, pool, False)
    result, weights = module.forward(image, text, *options)
    module.backward(result, weights, image, text, weights, *options, True, True)


def compile_all(operations, targets, every_configuration):
    """A row for each launch: compiled with the arguments' own strides, alignment and constants."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    rows = []

    class Driver:
        """Enough of a driver to compile; each target is a device, so that each gets its own kernels."""

        def __init__(self, index, target):
            self.index, self.target = index, GPUTarget(*target)

        def get_current_device(self):
            return self.index

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return self.target

    for operation in operations:
        module = importlib.import_module(f"mmkernels.triton.{operation}")
        for index, target in enumerate(targets):
            driver.set_active(Driver(index, TARGETS[target]))
            for problem, (shape, dtype, options) in PROBLEMS[operation].items():
                chosen = [0]

                def launch(kernel, programs, *arguments, **options):
                    grid = programs if isinstance(programs, tuple) else (programs,)
                    if all(grid):
                        compiled = kernel.warmup(*arguments, grid=grid, **options)
                        rows.append({"operation": operation, "kernel": kernel.__name__, "problem": problem, "target": target,
                                     "block": [options.get("BLOCK_N", options.get("BLOCK_K")), options["BLOCK_C"]],
                                     "warps": options["num_warps"], "shared": compiled.metadata.shared, **resources(compiled)})

                def tuned(key, configurations, tensor, run):
                    chosen[1:] = [max([len(configurations), *chosen[1:]])]       # forward and backward have as many as they have
                    return configurations[min(chosen[0], len(configurations) - 1)]

                module.launch, module.tuned = launch, tuned
                while True:
                    globals()[operation](torch, module, shape, dtype, **options)
                    chosen[0] += 1
                    if not every_configuration or chosen[0] >= chosen[1]:
                        break
    return rows


def resources(compiled):
    """Registers a thread, and what was spilled: bytes of local memory (NVIDIA), or registers (AMD)."""
    if "hsaco" in compiled.asm:
        found = re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"])
        numbers = {name: int(value) for name, value in found}
        return {"registers": numbers["vgpr_count"], "spills": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]}
    from triton.knobs import nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spills": stack + local}


def in_own_process(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def check(rows, kernels):
    assert {row["kernel"] for row in rows} == kernels
    wrong = [row for row in rows if row["spills"] or row["shared"] > SHARED_BUDGET or row["registers"] == 0]
    assert not wrong, "\n".join(map(str, wrong))


KERNELS = {"spatial_attention": {f"{way}_{kernel}" for way in ("forward", "backward") for kernel in ("whole", "chunks", "merge", "apply")}}
by_operation_and_target = [pytest.param(operation, target, id=f"{operation}-{target}") for operation in PROBLEMS for target in TARGETS]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("operation, target", by_operation_and_target)
def test_no_spills(operation, target):
    check(in_own_process("--json", operation, target), KERNELS[operation])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("operation, target", by_operation_and_target)
def test_no_spills_in_any_configuration(operation, target):
    """Whatever a GPU finds fastest."""
    check(in_own_process("--json", operation, target, "--all"), KERNELS[operation])


def table(rows):
    lines = ["# What the Triton kernels need", "",
             "Written by `python tests/test_triton_compile.py docs/triton.md`: each kernel as the operation launches it in its first",
             "configuration, compiled without a GPU. Registers a thread (AMD: vector registers); shared memory in bytes a program;",
             "spills: bytes of local memory (AMD: registers). `block`: positions (merge: chunks) x channels that a program holds.", ""]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        lines += [f"## {operation}", "", "| problem | kernel | block | warps | " + " | ".join(f"{t}: registers, shared, spills" for t in TARGETS) + " |",
                  "|---|---|---|---|" + "---|" * len(TARGETS)]
        for problem in PROBLEMS[operation]:
            group = [row for row in rows if row["problem"] == problem]
            for row in group:
                if row["target"] == next(iter(TARGETS)):
                    same = [next(r for r in group if (r["kernel"], r["target"]) == (row["kernel"], t)) for t in TARGETS]
                    lines.append(f"| {problem} | {row['kernel']} | {' x '.join(map(str, row['block']))} | {row['warps']} | "
                                 + " | ".join(f"{r['registers']}, {r['shared']}, {r['spills']}" for r in same) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--json":
        print(json.dumps(compile_all(sys.argv[2:3], sys.argv[3:4], "--all" in sys.argv)))
    else:
        Path(sys.argv[1]).parent.mkdir(exist_ok=True)
        Path(sys.argv[1]).write_text(table(compile_all(PROBLEMS, TARGETS, False)))
