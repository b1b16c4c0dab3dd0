"""Triton kernels compiled for real GPUs, without one: registers, spills and shared memory of every launch.

The operations' own launch code runs, and Triton compiles where it would launch: what is measured here is what a GPU
gets.
It needs Triton's compiler where tests need its interpreter, so it runs in a process of its own.
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

import mmkernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OLDEST = "3.6."
OLDEST_TARGETS = ("sm_90", "gfx942")
# Shared memory that a program may take: room for four on a multiprocessor; attention's tiles: all that gfx942 has.
SHARED_BUDGET = {
    "spatial_attention": 32 << 10,
    "gated_cross_attention": 64 << 10,
    "bidirectional_attention": 64 << 10,
    "channel_attention": 32 << 10,
    "additive_attention": 32 << 10,
}

# operation -> {problem: (shape, dtype, options)}. Spatial attention: image's shape, its options, and `bags` for packed
# ones;
# attention over heads: B, H, N, T, d, dv; channel attention: image's shape; additive: image's shape and A. Few rows:
# the libraries' products run.
PROBLEMS = {
    "spatial_attention": {
        "one sample of 100,000 x 512, bf16": ((1, 100_000, 512), "bfloat16", {"masked": True}),
        "12 heads of 196 x 64, fp32": ((32, 196, 768), "float32", {"num_heads": 12}),
        "bags, 1024 channels, bf16, pool": ((100_000, 1024), "bfloat16", {"bags": 8, "pool": True, "masked": True}),
        "bdhw 64 x 54 x 54, fp32": ((32, 64, 54, 54), "float32", {}),
        "bdhw 2048 x 7 x 7, fp16, pool": ((64, 2048, 7, 7), "float16", {"pool": True}),
    },
    "gated_cross_attention": {
        "8 x 12 heads of 64, 576 x 77, bf16": ((8, 12, 576, 77, 64, 64), "bfloat16", {"mask": "tokens"}),
        "4 heads of 256, 22,000 x 256, fp16": ((1, 4, 22_000, 256, 256, 256), "float16", {"gated": False}),
        "1 head of 40, 4,096 x 77, bf16, bias": ((1, 1, 4096, 77, 40, 40), "bfloat16", {"mask": "bias"}),
        "8 heads of 64, 1,600 x 20, fp32": ((4, 8, 1600, 20, 64, 64), "float32", {"mask": "tokens"}),
        "1 head of 512, 49 x 5,000, fp32, pairs": ((1, 1, 49, 5000, 512, 512), "float32", {"mask": "pairs"}),
    },
    "bidirectional_attention": {
        "4 heads of 256, 17,821 x 256, bf16": ((1, 4, 17_821, 256, 256, 256), "bfloat16", {"masked": True}),
        "8 heads of 64, 2,916 x 40, fp16": ((8, 8, 2916, 40, 64, 64), "float16", {"masked": True}),
        "4 heads of 256, 17,821 x 256, fp32": ((1, 4, 17_821, 256, 256, 256), "float32", {"masked": True}),
        "1 head of 40 and 24, 100,000 x 77, fp32": ((1, 1, 100_000, 77, 40, 24), "float32", {}),
    },
    "channel_attention": {
        "196 x 768, bf16": ((2, 196, 768), "bfloat16", {}),
        "49 x 64, fp32, weights": ((2, 49, 64), "float32", {"need_weights": True}),
        "49 x 5,000, fp16": ((1, 49, 5000), "float16", {}),
    },
    "additive_attention": {
        "a bag of 1024 channels, A = 256, gated, bf16": (
            (1, 2000, 1024, 256),
            "bfloat16",
            {"gated": True, "masked": True},
        ),
        "packed bags of 512 channels, A = 128, gelu, 4 maps, fp16": (
            (2000, 512, 128),
            "float16",
            {"bags": 8, "activation": 2, "maps": 4},
        ),
        "36 x 2048, A = 512, relu, multiplied, fp32": ((4, 36, 2048, 512), "float32", {"activation": 1, "pool": False}),
    },
}


def spatial_attention(torch, module, shape, dtype, masked=False, bags=None, num_heads=1, pool=False):
    image = torch.empty(shape, dtype=getattr(torch, dtype))
    batch = bags or shape[0]
    channels = shape[2] if len(shape) == 3 else shape[1]
    text = image.new_empty(batch, channels)
    grid = shape[:1] if bags else (shape[0], *shape[2:]) if len(shape) == 4 else shape[:2]
    mask = torch.empty(grid, dtype=torch.bool) if masked else None
    offsets = torch.empty(bags + 1, dtype=torch.int64) if bags else None
    options = (mask, offsets, 1.0, num_heads, pool, False)
    result, weights = module.forward(image, text, *options)
    module.backward(result, weights, image, text, *options[:2], weights, *options[2:], True, True)


def heads_of(torch, dtype, batch, heads):
    """A view of [B, N, H * C], as a projection gives it."""
    return lambda rows, channels: torch.empty(batch, rows, heads, channels, dtype=getattr(torch, dtype)).transpose(1, 2)


def gated_cross_attention(torch, module, shape, dtype, mask=None, gated=True):
    B, H, N, T, d, dv = shape
    draw = heads_of(torch, dtype, B, H)
    tokens = torch.empty(B, 1, T, dtype=torch.bool).expand(B, H, T) if mask in ("tokens", "pairs") else None
    pairs = torch.empty(1, 1, N, T, dtype=torch.bool).expand(B, H, N, T) if mask == "pairs" else None
    bias = torch.empty(1, H, N, T).expand(B, H, N, T) if mask == "bias" else None
    inputs = (draw(N, d), draw(T, d), draw(T, dv), draw(N, dv) if gated else None, tokens, pairs, bias)
    result, _, log_sum = module.forward(*inputs, 1.0, True)
    module.backward(result, *inputs, result, log_sum, 1.0, True, True, True, True, True, True)


def bidirectional_attention(torch, module, shape, dtype, masked=False):
    B, H, N, T, d, dv = shape
    draw = heads_of(torch, dtype, B, H)
    masks = [torch.empty(B, size, dtype=torch.bool) if masked else None for size in (N, T)]
    inputs = (draw(N, d), draw(T, d), draw(N, dv), draw(T, dv), *masks)
    image_out, text_out, *sums = module.forward(*inputs, 1.0)
    module.backward(image_out, text_out, *inputs, image_out, text_out, *sums, 1.0, True, True, True, True)


def channel_attention(torch, module, shape, dtype, need_weights=False):
    image = torch.zeros(shape, dtype=getattr(torch, dtype))
    inputs = (image, torch.zeros(shape[0], shape[2]), image.new_zeros(shape[2], shape[2]))
    result, weights, kept = module.forward(*inputs, need_weights, 0)
    module.backward(result, weights if need_weights else None, *inputs, kept, need_weights, 0, True, True, True)


def additive_attention(
    torch, module, shape, dtype, bags=None, gated=False, masked=False, activation=0, maps=1, pool=True
):
    *image, hidden = shape
    image = torch.zeros(image, dtype=getattr(torch, dtype))
    layer = lambda rows, columns: image.new_zeros(rows, columns)
    mask = torch.ones(image.shape[:-1], dtype=torch.bool) if masked else None
    offsets = torch.linspace(0, len(image), bags + 1).long() if bags else None
    inputs = (
        image,
        torch.zeros(bags or len(image), hidden),
        layer(hidden, image.shape[-1]),
        layer(maps, hidden),
        layer(hidden, image.shape[-1]) if gated else None,
        torch.zeros(hidden) if gated else None,
        mask,
        offsets,
    )
    result, *kept = module.forward(*inputs, activation, pool, 0)
    module.backward(result, kept[0], *inputs, *kept, activation, pool, 0, *[True] * 6)


def compile_all(operations, targets, every_configuration):
    """A row for each launch: compiled with the arguments' own strides, alignment and constants."""
    import torch
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
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        rows.append(
            {
                "operation": operation,
                "kernel": kernel.__name__,
                "problem": problem,
                "target": target,
                "block": blocks(options),
                "warps": options.get("num_warps", 4),
                "shared": compiled.metadata.shared,
                "contracted": compiled.metadata.enable_fp_fusion,
                "triton": triton.__version__,
                **resources(compiled),
            }
        )

    JITFunction.run = compile_only
    for operation in operations:
        module = importlib.import_module(f"mmkernels.triton.{operation}")
        for place in (module, importlib.import_module("mmkernels.triton.heads")):
            place.processors = lambda tensor: 132
        for index, target in enumerate(targets):
            driver.set_active(Driver(index, TARGETS[target]))
            for problem, (shape, dtype, options) in PROBLEMS[operation].items():
                chosen = [0, 0]

                def tuned(key, configurations, tensor, run):
                    chosen[1:] = [
                        max([len(configurations), *chosen[1:]])
                    ]  # forward and backward have as many as they have
                    return configurations[min(chosen[0], len(configurations) - 1)]

                module.tuned = tuned
                while True:
                    globals()[operation](torch, module, shape, dtype, **options)
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
    """Registers a thread, and what was spilled to memory: bytes (NVIDIA), or vector registers (AMD; scalar registers
    spill into lanes of vector registers, and are no memory's traffic)."""
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
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spills": stack + local}


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
    assert {row["kernel"] for row in rows} == KERNELS[operation]
    budget = SHARED_BUDGET[operation]
    wrong = [
        row for row in rows if row["spills"] or row["shared"] > budget or row["registers"] == 0 or row["contracted"]
    ]
    assert not wrong, "\n".join(map(str, wrong))


KERNELS = {
    "spatial_attention": {
        f"{way}_{kernel}" for way in ("forward", "backward") for kernel in ("whole", "chunks", "merge", "apply")
    },
    **dict.fromkeys(
        ("gated_cross_attention", "bidirectional_attention"),
        {"attend", "merge_attend", "prepare", "differentiate", "merge_gradients"},
    ),
    "channel_attention": {"weigh", "differentiate", "add_columns"},
    "additive_attention": {
        "activate",
        "normalise",
        "pool",
        "spread",
        "of_weights",
        "of_scores",
        "differentiate",
        "combine",
        "add_columns",
    },
}
on_every_operation = pytest.mark.parametrize("operation", PROBLEMS)


@needs_triton
@pytest.mark.slow
@on_every_operation
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(operation, target):
    """In any configuration: whatever a GPU finds fastest."""
    check(in_own_process(operation, target, "--all"), operation)


@needs_oldest_triton
@pytest.mark.slow
@on_every_operation
@pytest.mark.parametrize("target", OLDEST_TARGETS)
def test_oldest_triton(operation, target):
    rows = in_own_process(operation, target, path=[os.environ["MMKERNELS_OLDEST_TRITON"]])
    assert {row["triton"][: len(OLDEST)] for row in rows} == {OLDEST}
    check(rows, operation)


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
        for problem in PROBLEMS[operation]:
            group = [row for row in rows if row["problem"] == problem]
            for place, row in enumerate(group):
                if row["target"] == next(iter(TARGETS)):
                    same = [[r for r in group if r["target"] == t][place] for t in TARGETS]
                    lines.append(
                        f"| {problem} | {row['kernel']} | {' x '.join(map(str, row['block']))} | {row['warps']} | "
                        + " | ".join(f"{r['registers']}, {r['shared']}, {r['spills']}" for r in same)
                        + " |"
                    )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--json":
        print(json.dumps(compile_all(sys.argv[2:3], sys.argv[3:4], "--all" in sys.argv)))
    else:
        Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[1]).write_text(table(compile_all(PROBLEMS, TARGETS, False)))
