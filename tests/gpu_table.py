"""Writes docs/generated/gpu.md: what the CUDA kernels move, as the emulator counts it, and the time that this predicts.

python tests/gpu_table.py            writes the file
"""

import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from support import compiling, emulated
from support.traffic import all_moved, attention_least, attention_moved, least

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "generated" / "gpu.md"
PEAKS = {"A100": 2.04e12, "H100": 3.35e12, "MI300X": 5.3e12}  # bytes a second
# (B, N, D, dtype): the shapes of docs/architecture.md. A tenth of its largest: of that, ten times as much moves.
SHAPES = [
    (32, 2916, 64, torch.float32),
    (32, 196, 768, torch.float32),
    (32, 196, 768, torch.bfloat16),
    (8, 576, 1024, torch.float32),
    (64, 49, 2048, torch.float32),
    (64, 49, 2048, torch.bfloat16),
    (256, 36, 2048, torch.bfloat16),
    (1, 10_000, 512, torch.float32),
]
ARCHITECTURES = ("80", "90", "100")
# (B, H, N, T, d, dv, dtype): shapes of docs/architecture.md's kind, cut down so that the emulator takes seconds.
ATTENTION_SHAPES = [
    (1, 12, 576, 77, 64, 64, torch.bfloat16),
    (1, 8, 1600, 20, 64, 64, torch.bfloat16),
    (2, 12, 196, 32, 64, 64, torch.bfloat16),
    (1, 1, 2048, 256, 256, 256, torch.bfloat16),
    (1, 4, 1024, 77, 40, 40, torch.bfloat16),
    (1, 4, 576, 32, 64, 64, torch.float32),
]
# (B, H, N, T, D, Dv, dtype), Dv 0: pooled only. Grounding DINO's fusion, cut down; SigLIP's and CLIP's pooling heads.
ABSORBED_SHAPES = [
    (1, 4, 1024, 16, 256, 256, torch.bfloat16),
    (1, 4, 1024, 64, 256, 256, torch.bfloat16),
    (1, 4, 512, 256, 256, 256, torch.bfloat16),
    (1, 4, 512, 16, 256, 256, torch.float32),
    (1, 12, 257, 8, 1408, 0, torch.bfloat16),
    (1, 16, 729, 1, 1152, 0, torch.bfloat16),
    (2, 32, 50, 1, 2048, 0, torch.bfloat16),
]


def attention_rows():
    rows = []
    shapes = {
        "gated_cross_attention": ATTENTION_SHAPES,
        "bidirectional_attention": ATTENTION_SHAPES,
        "absorbed_attention": ABSORBED_SHAPES,
    }
    for operation in shapes:
        for shape in shapes[operation]:
            for which in ("forward", "backward"):
                found = attention_moved(operation, which, *shape)
                minimum = attention_least(operation, which, *shape)
                total = found.loaded + found.stored
                times = " | ".join(f"{1e6 * minimum / PEAKS[gpu]:.1f}" for gpu in ("A100", "H100"))
                rows.append(
                    f"| {operation.split('_')[0]} | {', '.join(map(str, shape[:6]))} | {str(shape[6]).removeprefix('torch.')} | {which} | "
                    f"{minimum / 1e6:.2f} | {total / 1e6:.2f} | {total / minimum:.2f} | {found.launches} | {found.blocks} | "
                    f"{found.shared / 1024:.0f} | {times} |"
                )
    return rows


def setup(folder=ROOT):
    """setup.py of a checkout, for its functions and flags."""
    spec = importlib.util.spec_from_file_location("mmkernels_setup", folder / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_jobs():
    """{file: how setup.py compiles it}; ptxas tells what each kernel needs."""
    module = setup()
    flags = [*module.nvcc_flags(), "-Xptxas", "-v"]
    return {path.stem: (path, flags, module.find_nvcc()) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))}


def resources(architecture, operation="spatial_attention"):
    """{kernel: registers, spilled bytes, static shared memory, stack}"""
    _, said = compiling.compiled(*kernel_jobs()[operation])
    found = {}
    for part in said.split("Compiling entry function")[1:]:
        name, target = re.match(r" '(\w+)' for 'sm_(\d+)'", part).groups()
        if target == architecture:
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)]
            static = re.search(r"(\d+) bytes smem", part)
            found[name] = SimpleNamespace(
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                spilled=sum(spills),
                static=int(static[1]) if static else 0,
                stack=int(re.search(r"(\d+) bytes stack frame", part)[1]),
            )
    return found


def movement_rows():
    rows = []
    for shape in SHAPES:
        batch, positions, channels, dtype = shape
        for which, found in all_moved(*shape).items():
            minimum = least(*shape, which)
            total = found.loaded + found.stored
            times = " | ".join(f"{1e6 * minimum / peak:.1f}" for peak in PEAKS.values())
            rows.append(
                f"| {batch}, {positions}, {channels} | {str(dtype).removeprefix('torch.')} | {which} | {minimum / 1e6:.2f} | "
                f"{total / 1e6:.2f} | {total / minimum:.2f} | {found.launches} | {found.shared / 1024:.0f} | {times} |"
            )
    return rows


def cluster_rows():
    """What an H100 would move without clusters, and with them."""
    rows = []
    for shape in SHAPES:
        batch, positions, channels, dtype = shape
        counted = []
        for cluster in (1, emulated.H100["cluster"]):
            with emulated.configured(**emulated.H100 | {"cluster": cluster}):
                counted.append(all_moved(*shape))
        for which in counted[0]:
            row = f"| {batch}, {positions}, {channels} | {str(dtype).removeprefix('torch.')} | {which} |"
            minimum = least(*shape, which)
            for found in (each[which] for each in counted):
                total = found.loaded + found.stored
                row += f" {total / 1e6:.2f} | {total / minimum:.2f} | {found.launches} |"
            rows.append(row + f" {found.cluster} | {found.shared / 1024:.0f} |")
    return rows


def resource_rows(found):
    return [
        f"| `{name}` | "
        + " | ".join(f"{found[a][name].registers}, {found[a][name].spilled}" for a in ARCHITECTURES)
        + " |"
        for name in sorted(found[ARCHITECTURES[0]])
    ]


def resource_table(found):
    return "\n".join(
        [
            "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
            "|---|" + "---|" * len(ARCHITECTURES),
            *resource_rows(found),
        ]
    )


def attention_section():
    return f"""## Attention over heads

Least: queries, keys, values and gate (bidirectional: the image's values) once, results and sums once; backward the same, the
upstream gradient, the kept result, and all gradients. Counted is every load of every thread: what blocks read again comes from L2 on a
GPU (keys and values in each block of 64 rows; the longer the text, the more), and so do masks and sums that neighbouring
threads read together. Backward is one launch over the image where the text has up to 64 tokens and channels fit a class, beside
the rows' deltas (and a merge where the stream is split); else one launch a side, each of which takes the scores again.

Absorbed attention (B, H, N, T, D, Dv; Dv 0: pooled only) packs its keys and values first, which are read again with every tile of
positions. Up to 256 channels (float32: 128) a block holds its tile of the image from the scores to what they gather; above, each chunk of
so many channels has blocks of its own, which read the whole image for the scores and their chunk of it once more: D / 256 + 1 times,
and beside each tile of 64 positions 64 packed keys, which are as large. The last rows, pooling heads, show what that costs; their keys
fill a quarter to all of the 64 columns, but zeros are read, too.

| operation | B, H, N, T, d, dv | dtype | pass | least, MB | counted, MB | ratio | launches | blocks | shared, KiB | A100, µs | H100, µs |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(attention_rows())}
"""


def deformable_rows():
    from support import gpu_deformable

    return gpu_deformable.table([PEAKS["A100"], PEAKS["H100"]])


def deformable_section(found):
    from support import gpu_deformable

    return f"""{gpu_deformable.SECTION}

{chr(10).join(deformable_rows())}

{gpu_deformable.RESOURCES}

{resource_table(found)}
"""


def row_rows():
    """What the kernels of channel and additive attention count beside the library's products."""
    rows = []
    for operation, shape, hidden, dtype in (
        ("channel", (2, 196, 256), 256, torch.float32),
        ("channel", (2, 196, 256), 256, torch.bfloat16),
        ("additive", (1, 2000, 256), 64, torch.float32),
        ("additive", (1, 2000, 256), 64, torch.bfloat16),
    ):
        image = torch.randn(shape).to(dtype)
        layer = lambda *size: (torch.randn(size) * size[-1] ** -0.5).to(dtype)
        run, back = (
            getattr(torch.ops.mmkernels, f"{operation}_attention_emulated{suffix}") for suffix in ("", "_backward")
        )
        inputs = (
            (image, layer(shape[0], 64), layer(256, 256 + 64), None)
            if operation == "channel"
            else (
                image,
                layer(1, 64),
                layer(hidden, 256),
                layer(hidden, 64),
                layer(1, hidden),
                None,
                layer(hidden, 256),
                layer(hidden),
                None,
                None,
                None,
            )
        )
        options = (False, 0) if operation == "channel" else (0, True, 0.0, False, 0)
        emulated.counts()
        result, weights, *_, kept = run(*inputs, *options)
        forward = emulated.counts()
        needs = [True, True, True, False] if operation == "channel" else [True] * 8
        back(
            torch.ones_like(result),
            *([None] if operation == "channel" else [None, None]),
            *inputs,
            *((kept,) if operation == "channel" else (weights, kept)),
            *options,
            *needs,
        )
        backward = emulated.counts()
        panel = image.numel() // 256 * hidden * 4
        for which, found in (("forward", forward), ("backward", backward)):
            rows.append(
                f"| {operation} | {', '.join(map(str, (*shape, hidden)))} | {str(dtype).removeprefix('torch.')} | {which} | {image.nbytes / 1e6:.2f} | "
                f"{panel / 1e6:.2f} | {found.loaded / 1e6:.2f} | {found.stored / 1e6:.2f} | {found.launches} |"
            )
    return rows


def row_section():
    return f"""## Channel and additive attention

Products are the library's, panel by panel (scores or hidden vectors of a third of the L2 cache, at least 4 MB); counted is what our kernels move beside
them, in MB. A panel is read and written there; up to 1,024 channels are held in registers from then on.

| operation | B, N, D, A | dtype | pass | image | all panels | loaded | stored | launches |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(row_rows())}
"""


def attention_resources(found):
    return f"""Of the attention kernels, blocks of 128 threads forward and 256 backward; the number in a name is the class, the columns that it
is made for. Absorbed attention's have 512 threads in both passes; those that pack and merge 128. Nothing is spilled, no static
shared memory. float32 runs in full float32.

{resource_table(found)}
"""


def main():
    with ThreadPoolExecutor(1) as pool:  # one compiler at a time
        found = dict(zip(ARCHITECTURES, pool.map(resources, ARCHITECTURES)))
        attention = {
            architecture: resources(architecture, "gated_cross_attention")
            | resources(architecture, "bidirectional_attention")
            | resources(architecture, "absorbed_attention")
            for architecture in ARCHITECTURES
        }
        deformable = {a: resources(a, "deformable_attention") for a in ARCHITECTURES}
        rows = {
            architecture: {
                name: r
                for file in ("channel_attention", "additive_attention", "rows")
                for name, r in resources(architecture, file).items()
            }
            for architecture in ARCHITECTURES
        }
    FILE.write_text(f"""# What the CUDA kernels move and need

Generated by `python tests/gpu_table.py`; none of this was measured on a GPU. Bytes are counted by the tests' emulator, with
an A100's shared memory and number of processors. "Least" is what must move (image and gradient once, results once, text and
weights). Rows of aligned channels, and planes, go through registers: what multiplies is read twice, backward twice each where the text wants its gradient.
Else a sample that fits in shared memory is read once. Of a larger one, what multiplies is read twice, which counts as 1.5
times the least (backward 1.33): the second read comes from L2 as far as that holds it (40 MB on an A100, 50 MB on an H100). One launch: the
same block reads its sample again at once; two: the second goes backwards, so that it meets first what was read last.
Microseconds are the least bytes over the peak bandwidth ({", ".join(f"{n} {p / 1e12:.2f} TB/s" for n, p in PEAKS.items())}): the
time that no kernel can beat. A launch costs 2 to 4 µs beside that. (An MI300X runs the Triton kernels; its column is the same arithmetic.)

| B, N, D | dtype | pass | least, MB | counted, MB | ratio | launches | shared, KiB | {" | ".join(f"{n}, µs" for n in PEAKS)} |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(movement_rows())}

## What clusters save on an H100

Counted with an H100's shared memory and number of processors, without and with thread-block clusters (compute capability 9.0). A sample that
fits in the shared memories of 2, 4 or 8 blocks is read once, in one launch. Too large for that, or one block enough, or so few samples that
clusters would leave more than half of the processors idle: 1 block, the same as without.

| B, N, D | dtype | pass | without, MB | ratio | launches | with, MB | ratio | launches | blocks of a cluster | shared, KiB |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(cluster_rows())}

{attention_section()}
{deformable_section(deformable)}
{row_section()}
## Registers and bytes spilled, by `ptxas -v`

Blocks of 256 threads, or 512 where the tile takes most of a processor's shared memory; no static shared memory. The budget that the
tests hold the kernels to is 128 registers and nothing spilled.

{resource_table(found)}

{attention_resources(attention)}
Of channel and additive attention, blocks of 256 threads; a warp has a row, or all add up rows.

{resource_table(rows)}
""")


if __name__ == "__main__":
    main()
