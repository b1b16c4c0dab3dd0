"""Times the kernels on a GPU in about two minutes, and tells which kernels a call consists of and what each takes.

    python tools/gpu_times.py [--json FILE] [--seconds S] [OPERATION ...]

The contests are those of `mmkernels bench`, in bfloat16 and float32, as CUDA graphs on more data than the L2 cache
holds, a row after the other until the seconds are spent. That command checks every result and compiles peers; this one
does neither, for a GPU that is there for minutes. Peers are plain PyTorch and its fused attention. Two ceilings come
first: a copy in the GPU's memory, and products of 8192 x 8192 matrices.
"""

import argparse
import collections
import functools
import sys
import time
from pathlib import Path

import torch

from mmkernels import functional
from mmkernels.bench import benchmark_of, contests, report, timing

OPTIONS = {"rounds": 7, "budget": 0.5, "burst": 0.002}
WITHOUT = ("compile", "compiled flex", "torchmil", "hugging face", "split")
DTYPES = (torch.bfloat16, torch.float32)


def ceilings():
    """What the card gives to a copy (bytes read and written) and to torch.mm, a second."""
    source = torch.randn(1 << 28, device="cuda")
    to = torch.empty_like(source)
    wide = torch.randn(8192, 8192, device="cuda")
    narrow = wide.bfloat16()
    jobs = {"copy": lambda: to.copy_(source), "bfloat16": lambda: narrow @ narrow, "float32": lambda: wide @ wide}
    seconds = {name: timing.race({name: job}, device="cuda", rounds=7)[name].median for name, job in jobs.items()}
    flops = 2 * 8192**3 / 1e12
    return {
        "copy, TB/s": 2 * source.nbytes / seconds["copy"] / 1e12,
        "bfloat16, TFLOP/s": flops / seconds["bfloat16"],
        "float32, TFLOP/s": flops / seconds["float32"],
    }


def kernels(call):
    """[(name, launches a call, microseconds each)]"""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:160]].append(event.device_time)
    return [(name, len(times), sum(times) / len(times)) for name, times in found.items()]


def timed(part):
    """Whether a part of a benchmark is timed here: kernels, and not modules around them or ours in another way."""
    if not isinstance(part, contests.Contest) or part.of_calls:
        return False
    return not any(word in part.kind for word in ("layer", "head", "layouts", "bfloat16"))


def plan(operations, without=()):
    for operation in operations:
        for shape, part in contests.plan(benchmark_of(operation), False, "cuda", without=(*WITHOUT, *without)):
            if timed(part):
                yield from ((operation, shape, part, dtype) for dtype in DTYPES)


@functools.lru_cache(maxsize=2)
def inputs(part, shape):
    return part.inputs(shape, "cuda")


def measure(operation, shape, part, dtype):
    arguments = contests.in_dtype(inputs(part, shape), dtype)
    if dtype == torch.float32 and operation != "spatial_attention":
        part = part.without((contests.TRITON,))  # has no tensor cores to its products: slow, and slow to compile
    with part.mode():
        times = part.race(arguments, "cuda", OPTIONS)
        of_ours = kernels(part.call("ours", arguments))
    return {
        "operation": operation,
        "kind": part.kind.removesuffix(", ms"),
        "shape": contests.shape_name(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "us": {name: found.median * 1e6 for name, found in times.items()},
        "kernels": of_ours,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no row begins; default: %(default)s")
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTESTANT", help="sdpa, eager, or ours in Triton")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.operations if name not in functional.__all__]
    if unknown:
        parser.error(f"OPERATION must be of {', '.join(functional.__all__)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use", file=sys.stderr)
        return 1

    stop = time.monotonic() + options.seconds
    found = {"environment": report.machine("cuda"), "commit": report.commit(), "ceilings": ceilings(), "rows": []}
    print(found["environment"]["processor"], found["ceilings"], flush=True)
    for job in plan(options.operations or functional.__all__, options.without):
        if time.monotonic() > stop:
            print("the seconds are spent")
            break
        row = measure(*job)
        found["rows"].append(row)
        times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
        print(row["operation"], row["kind"], row["shape"], row["dtype"], "us:", times, flush=True)
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(report.as_json(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
