"""Bidirectional attention next to two SDPA calls, the same steps in eager PyTorch, and torch.compile."""

import torch

from .. import functional, peers
from . import report
from .rows import compare, least, library_gflops, values, wrong
from .timing import peak_memory, race

# B, H, N, T, d (and dv), and how many tokens are real: Grounding DINO's fusion layer, GLIP's, a small one.
SHAPES = ((1, 4, 17_821, 256, 256, 40), (1, 8, 13_294, 256, 256, 256), (8, 8, 1600, 32, 64, 20))
QUICK = ((8, 8, 1600, 32, 64, 20),)
PEERS = ("sdpa", "eager", "compile")


def run(device, *, quick=False, progress):
    """Rows and figures."""
    shapes = QUICK if quick else SHAPES
    options = {"device": device, "rounds": 5 if quick else 8, "budget": 1.0 if quick else 10.0}
    library, rows = library_gflops(device), []
    for i, shape in enumerate(shapes):
        for j, step in enumerate((_forward, _training, _memory)):
            progress(f"{_name(shape)} {step.__name__.strip('_')}", 3 * i + j, 3 * len(shapes))
            rows.append(step(shape, device, library, options))
        torch._dynamo.reset()
    progress("done", 3 * len(shapes), 3 * len(shapes))
    return {"rows": rows, "figures": [figure.as_json() for figure in _figures(rows)]}


def _name(shape):
    return "x".join(map(str, shape))


def _inputs(shape, device):
    b, h, n, t, d, real = shape
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(b, h, length, d, generator=generator).to(device)
        for name, length in (("image_query", n), ("text_key", t), ("image_value", n), ("text_value", t))
    }
    if real < t:
        inputs["text_mask"] = (torch.arange(t, device=device) < real).expand(b, t)
    return inputs


def _contestants():
    return {
        "ours": functional.bidirectional_attention,
        "sdpa": peers.bidirectional_attention_sdpa,
        "eager": peers.bidirectional_attention,
        "compile": peers.compiled(peers.bidirectional_attention),
    }


def _forward(shape, device, library, options):
    inputs = _inputs(shape, device)
    with torch.inference_mode():
        times = race({name: lambda f=f: f(**inputs) for name, f in _contestants().items()}, **options)
    b, h, n, t, d, real = shape
    return _row(
        "forward, ms",
        shape,
        times,
        library,
        2 * b * h * n * d * (2 * t + real),
        wrong("bidirectional_attention", inputs),
    )


def _training(shape, device, library, options):
    inputs = _inputs(shape, device)
    tensors = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    upstream = torch.randn_like(inputs["image_value"]), torch.randn_like(inputs["text_value"])
    times = race(
        {name: lambda f=f: torch.autograd.grad(f(**inputs), tensors, upstream) for name, f in _contestants().items()},
        **options,
    )
    b, h, n, t, d, real = shape
    detached = {name: tensor.detach() for name, tensor in inputs.items()}
    return _row(
        "forward + backward, ms",
        shape,
        times,
        library,
        2 * b * h * n * d * (7 * t + 3 * real),
        wrong("bidirectional_attention", detached, gradients=True),
    )


def _row(kind, shape, times, library, flops, problems):
    row = {"kind": kind, "shape": _name(shape), "ours": times["ours"].median * 1e3}
    row = compare(row, times, "ours", PEERS, problems)
    if not problems:
        rate = flops / times["ours"].median / 1e9
        row |= {"GFLOP/s": rate, "share of torch.mm": rate / library}
    return row


def _memory(shape, device, library, options):
    """What a call needs beyond its inputs and its results, in MB."""
    inputs = _inputs(shape, device)
    b, h, n, t, d, _ = shape
    results = inputs["image_value"].nbytes + inputs["text_value"].nbytes
    row = {"kind": "memory beyond the results, MB", "shape": _name(shape), "scores": b * h * n * t * 4 / 1e6}
    with torch.inference_mode():
        for name in ("ours", "eager"):
            function = _contestants()[name]
            peak = peak_memory(lambda: function(**inputs), device)
            row[name] = None if peak is None else max(0, peak - results) / 1e6
    if row["ours"] is not None and row["scores"]:
        row["ours / scores"] = row["ours"] / row["scores"]
    return row


def _figures(rows):
    """Targets at the large shape; the others are never to be slower."""
    for kind, target_sdpa, target_eager in (("forward", 2.0, 3.0), ("forward + backward", 1.0, 1.0)):
        large = lambda row: row["shape"] == _name(SHAPES[0])
        if found := values(rows, f"{kind},", "vs sdpa", only=large):
            yield report.Figure(f"{kind}, against two SDPA calls, {_name(SHAPES[0])}", target_sdpa, least(found))
            yield report.Figure(
                f"{kind}, against eager, {_name(SHAPES[0])}",
                target_eager,
                least(values(rows, f"{kind},", "vs eager", only=large)),
            )
        yield report.Figure(f"{kind}, against the best peer, least", 1.0, least(values(rows, f"{kind},", "speed-up")))
    shares = values(rows, "memory", "ours / scores", only=lambda row: row["shape"] == _name(SHAPES[0]))
    if shares:
        yield report.Figure(
            f"memory beyond the results, share of the score matrix, {_name(SHAPES[0])}", 0.1, max(shares), at_most=True
        )
