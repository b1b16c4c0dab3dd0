"""Writes docs/gpu.md: what the CUDA kernels move, as the emulator counts it, and the time that this predicts.

    python tests/gpu_table.py            writes the file
"""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "gpu.md"
PEAKS = {"A100": 2.04e12, "H100": 3.35e12, "MI300X": 5.3e12}          # bytes a second
# (B, N, D, dtype): the shapes of design.md. A tenth of its largest: of that, ten times as much moves.
SHAPES = [(32, 2916, 64, torch.float32), (32, 196, 768, torch.float32), (32, 196, 768, torch.bfloat16),
          (8, 576, 1024, torch.float32), (64, 49, 2048, torch.float32), (64, 49, 2048, torch.bfloat16),
          (256, 36, 2048, torch.bfloat16), (1, 10_000, 512, torch.float32)]
PASSES = ("multiply", "multiply backward", "pool", "pool backward")
ARCHITECTURES = ("80", "90", "100")


def least(batch, positions, channels, dtype, which):
    """Bytes that must move (design.md): features once, results once; text, weights, and vectors once."""
    size = dtype.itemsize
    features, vectors, weights = batch * positions * channels * size, batch * channels * size, 4 * batch * positions
    return {"multiply": 2 * features + vectors + weights, "pool": features + 2 * vectors + weights,
            "multiply backward": 3 * features + 2 * vectors + weights,
            "pool backward": 2 * features + 3 * vectors + weights}[which]


def moved(batch, positions, channels, dtype, which):
    """What the emulator counts for one call: loaded, stored, launches, blocks, shared."""
    import emulated

    image, text = torch.randn(batch, positions, channels).to(dtype), torch.randn(batch, channels).to(dtype)
    pool = which.startswith("pool")
    arguments = (image, text, None, None, channels ** -0.5, 1, pool, False)
    result, weights = torch.ops.mmkernels.spatial_attention_emulated(*arguments)
    if which.endswith("backward"):
        emulated.counts()
        torch.ops.mmkernels.spatial_attention_emulated_backward(
            torch.ones_like(result), None, image, text, weights, *arguments[2:], True, True)
    return emulated.counts() if which.endswith("backward") else _again(emulated, arguments)


def _again(emulated, arguments):
    emulated.counts()
    torch.ops.mmkernels.spatial_attention_emulated(*arguments)
    return emulated.counts()


def resources(architecture):
    """{kernel: registers, spilled bytes, static shared memory} as ptxas tells."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([shutil.which("nvcc"), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v",
                               str(ROOT / "csrc/cuda/spatial_attention.cu"), "-o", f"{folder}/x.cubin"],
                              capture_output=True, text=True, check=True)
    found = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)]
        static = re.search(r"(\d+) bytes smem", part)
        found[re.search(r"'(\w+)'", part)[1]] = SimpleNamespace(
            registers=int(re.search(r"Used (\d+) registers", part)[1]), spilled=sum(spills),
            static=int(static[1]) if static else 0)
    return found


def movement_rows():
    rows = []
    for shape in SHAPES:
        batch, positions, channels, dtype = shape
        for which in PASSES:
            found, minimum = moved(*shape, which), least(*shape, which)
            total = found.loaded + found.stored
            times = " | ".join(f"{1e6 * minimum / peak:.1f}" for peak in PEAKS.values())
            rows.append(f"| {batch}, {positions}, {channels} | {str(dtype).removeprefix('torch.')} | {which} | {minimum / 1e6:.2f} | "
                        f"{total / 1e6:.2f} | {total / minimum:.2f} | {found.launches} | {found.shared / 1024:.0f} | {times} |")
    return rows


def cluster_rows():
    """What an H100 would move without clusters, and with them."""
    import emulated

    rows = []
    for shape in SHAPES:
        batch, positions, channels, dtype = shape
        for which in PASSES:
            row = f"| {batch}, {positions}, {channels} | {str(dtype).removeprefix('torch.')} | {which} |"
            for cluster in (1, emulated.H100["cluster"]):
                with emulated.configured(**emulated.H100 | {"cluster": cluster}):
                    found, minimum = moved(*shape, which), least(*shape, which)
                total = found.loaded + found.stored
                row += f" {total / 1e6:.2f} | {total / minimum:.2f} | {found.launches} |"
            rows.append(row + f" {found.cluster} | {found.shared / 1024:.0f} |")
    return rows


def resource_rows(found):
    return [f"| `{name}` | " + " | ".join(f"{found[a][name].registers}, {found[a][name].spilled}" for a in ARCHITECTURES) + " |"
            for name in sorted(found[ARCHITECTURES[0]])]


def main():
    with ThreadPoolExecutor(1) as pool:                                   # one compiler at a time
        found = dict(zip(ARCHITECTURES, pool.map(resources, ARCHITECTURES)))
    FILE.write_text(f"""# What the CUDA kernels move and need

Generated by `python tests/gpu_table.py`; none of this was measured on a GPU. Bytes are counted by the tests' emulator, with
an A100's shared memory and number of processors. "Least" is what must move (image and gradient once, results once, text and
weights). A sample that fits in shared memory is read once. Of a larger one, what multiplies is read twice, which counts as 1.5
times the least (backward 1.33): the second read comes from L2 as far as that holds it (40 MB on an A100, 50 MB on an H100). One launch: the
same block reads its sample again at once; two: the second goes backwards, so that it meets first what was read last.
Microseconds are the least bytes over the peak bandwidth ({', '.join(f'{n} {p / 1e12:.2f} TB/s' for n, p in PEAKS.items())}): the
time that no kernel can beat. A launch costs 2 to 4 µs beside that. (An MI300X runs the Triton kernels; its column is the same arithmetic.)

| B, N, D | dtype | pass | least, MB | counted, MB | ratio | launches | shared, KiB | {' | '.join(f'{n}, µs' for n in PEAKS)} |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(movement_rows())}

## What clusters save on an H100

Counted with an H100's shared memory and number of processors, without and with thread-block clusters (compute capability 9.0). A sample that
fits in the shared memories of 2, 4 or 8 blocks is read once, in one launch. Too large for that, or one block enough, or so few samples that
clusters would leave more than half of the processors idle: 1 block, the same as without.

| B, N, D | dtype | pass | without, MB | ratio | launches | with, MB | ratio | launches | blocks of a cluster | shared, KiB |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(cluster_rows())}

## Registers and bytes spilled, by `ptxas -v`

Blocks of 256 threads, or 512 where the tile takes most of a processor's shared memory; no static shared memory. The budget that the
tests hold the kernels to is 128 registers and nothing spilled.

| kernel | {' | '.join(f'sm_{a}' for a in ARCHITECTURES)} |
|---|{'---|' * len(ARCHITECTURES)}
{chr(10).join(resource_rows(found))}
""")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
