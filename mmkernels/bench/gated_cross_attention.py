"""Gated cross-attention next to SDPA with a multiplication, eager PyTorch, torch.compile, and the rate of torch.mm."""

import torch

from .. import functional, peers
from . import report
from .rows import against_the_best, compare, least, library_gflops, values, wrong
from .timing import peak_memory, race

# B, H, N, T, d (and dv): detection, segmentation, classification features against short texts.
SHAPES = (
    (8, 12, 576, 77, 64),
    (4, 8, 1600, 20, 64),
    (32, 12, 196, 32, 64),
    (1, 4, 22_000, 256, 256),
    (8, 8, 4096, 77, 40),
    (64, 1, 49, 16, 512),
)
QUICK = ((8, 12, 576, 77, 64), (64, 1, 49, 16, 512))
PEERS = ("sdpa", "eager", "compile")
LONG_TEXT = 77  # from so many tokens on, a share of torch.mm's rate is a target
LONG_IMAGE = (1, 1, 100_000, 77, 64)


def run(device, *, quick=False, progress):
    """Rows and figures."""
    shapes = QUICK if quick else SHAPES
    options = {"device": device, "rounds": 5 if quick else 12, "budget": 1.0 if quick else 6.0}
    library, rows = library_gflops(device), []
    for i, shape in enumerate(shapes):
        for j, step in enumerate((_forward, _training)):
            progress(f"{_name(shape)} {step.__name__.strip('_')}", 2 * i + j, 2 * len(shapes))
            rows.append(step(shape, device, library, options))
        torch._dynamo.reset()  # the compiled peers of this shape
    if not quick:
        rows.append(_memory(LONG_IMAGE, device))
    progress("done", 2 * len(shapes), 2 * len(shapes))
    return {"rows": rows, "figures": [figure.as_json() for figure in _figures(rows)]}


def _name(shape):
    return "x".join(map(str, shape))


def _inputs(shape, device):
    b, h, n, t, d = shape
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(b, h, length, d, generator=generator).to(device)
        for name, length in (("query", n), ("key", t), ("value", t), ("gate", n))
    }


def _contestants():
    return {
        "ours": functional.gated_cross_attention,
        "sdpa": peers.gated_cross_attention_sdpa,
        "eager": peers.gated_cross_attention,
        "compile": peers.compiled(peers.gated_cross_attention),
    }


def _forward(shape, device, library, options):
    inputs = _inputs(shape, device)
    with torch.inference_mode():
        times = race({name: lambda f=f: f(**inputs) for name, f in _contestants().items()}, **options)
    return _row("forward, ms", shape, times, library, 4, wrong("gated_cross_attention", inputs))


def _training(shape, device, library, options):
    inputs = _inputs(shape, device)
    tensors = [t.requires_grad_() for t in inputs.values()]
    upstream = torch.randn_like(inputs["gate"])
    times = race(
        {name: lambda f=f: torch.autograd.grad(f(**inputs), tensors, upstream) for name, f in _contestants().items()},
        **options,
    )
    detached = {name: t.detach() for name, t in inputs.items()}
    # Forward two products, backward five.
    return _row(
        "forward + backward, ms", shape, times, library, 14, wrong("gated_cross_attention", detached, gradients=True)
    )


def _row(kind, shape, times, library, flops, problems):
    b, h, n, t, d = shape
    row = {"kind": kind, "shape": _name(shape), "T": t, "ours": times["ours"].median * 1e3}
    row = compare(row, times, "ours", PEERS, problems)
    if not problems:
        rate = flops * b * h * n * t * d / times["ours"].median / 1e9
        row |= {"GFLOP/s": rate, "share of torch.mm": rate / library}
    return row


def _memory(shape, device):
    """What a call needs beyond its inputs and its result, in MB."""
    inputs = _inputs(shape, device)
    row = {
        "kind": "memory beyond the result, MB",
        "shape": _name(shape),
        "image": inputs["query"].nbytes / 1e6,
        "scores": shape[0] * shape[1] * shape[2] * shape[3] * 4 / 1e6,
    }
    with torch.inference_mode():
        for name, function in (("ours", functional.gated_cross_attention), ("eager", peers.gated_cross_attention)):
            peak = peak_memory(lambda: function(**inputs), device)
            row[name] = None if peak is None else max(0, peak - inputs["gate"].nbytes) / 1e6
    return row


def _figures(rows):
    yield from against_the_best(rows, "forward", 2.0)
    shares = values(rows, "forward,", "share of torch.mm", only=lambda row: row["T"] >= LONG_TEXT)
    yield report.Figure(f"forward, share of torch.mm's rate where T >= {LONG_TEXT}, least", 0.7, least(shares))
    yield from against_the_best(rows, "forward + backward", 1.8)
