"""Bytes that the CUDA kernels move, as the emulator counts them, and the least that must move."""

import torch

from . import emulated

PASSES = ("multiply", "multiply backward", "pool", "pool backward")
# operation, pass, shape, launches, and how often the least may move.
_SHORT = (4, 8, 1024, 32, 64, 64, torch.bfloat16)
_LONG = (1, 4, 512, 200, 64, 64, torch.bfloat16)
ATTENTION_LIMITS = [
    ("gated_cross_attention", "forward", _SHORT, 1, 1.35),
    ("gated_cross_attention", "backward", _SHORT, 3, 1.85),
    ("bidirectional_attention", "forward", _SHORT, 2, 1.55),
    ("bidirectional_attention", "backward", _SHORT, 4, 1.65),
    ("gated_cross_attention", "forward", _LONG, 1, 2.5),
    ("gated_cross_attention", "backward", _LONG, 4, 6.3),
    ("absorbed_attention", "forward", (1, 4, 1024, 16, 64, 64, torch.bfloat16), 3, 4.4),
    ("absorbed_attention", "backward", (1, 4, 1024, 16, 64, 64, torch.bfloat16), 4, 7.5),
    ("absorbed_attention", "forward", (1, 4, 320, 100, 64, 64, torch.bfloat16), 4, 16.5),
    ("absorbed_attention", "backward", (1, 4, 320, 100, 64, 64, torch.bfloat16), 5, 20.7),
    ("absorbed_attention", "forward", (1, 16, 300, 1, 640, 0, torch.bfloat16), 3, 9.8),
]


def least(batch, positions, channels, dtype, which):
    """Bytes that must move (docs/architecture.md): features once, results once; text, weights, and vectors once."""
    size = dtype.itemsize
    features = batch * positions * channels * size
    vectors = batch * channels * size
    weights = 4 * batch * positions
    return {
        "multiply": 2 * features + vectors + weights,
        "pool": features + 2 * vectors + weights,
        "multiply backward": 3 * features + 2 * vectors + weights,
        "pool backward": 2 * features + 3 * vectors + weights,
    }[which]


def moved(batch, positions, channels, dtype, which):
    """What the emulator counts for one pass: loaded, stored, launches, blocks, shared."""
    combine = which.partition(" ")[0]
    return next(found for each, found in _passes(batch, positions, channels, dtype, combine) if each == which)


def all_moved(batch, positions, channels, dtype):
    """The same of each of PASSES, by name."""
    return {
        which: found
        for combine in ("multiply", "pool")
        for which, found in _passes(batch, positions, channels, dtype, combine)
    }


def _passes(batch, positions, channels, dtype, combine):
    image = torch.randn(batch, positions, channels).to(dtype)
    text = torch.randn(batch, channels).to(dtype)
    arguments = (image, text, None, None, channels**-0.5, 1, combine == "pool", False)
    emulated.counts()
    result, weights = torch.ops.mmkernels.spatial_attention_emulated(*arguments)
    yield combine, emulated.counts()
    torch.ops.mmkernels.spatial_attention_emulated_backward(
        torch.ones_like(result), None, image, text, *arguments[2:4], weights, *arguments[4:], True, True
    )
    yield f"{combine} backward", emulated.counts()


def attention_least(operation, which, batch, heads, positions, tokens, d, dv, dtype):
    """Bytes that must move: queries, keys, values and gate once, results once, 8 bytes a row for its softmax; gradients
    likewise."""
    if operation == "absorbed_attention":
        return absorbed_least(which, batch, heads, positions, tokens, d, dv, dtype)
    rows = batch * heads
    image, text = rows * positions, rows * tokens
    inputs = (image + text) * d + text * dv + image * dv  # the last: the gate, or the image's values
    results, softmax = image * dv, 8 * image
    if operation == "bidirectional_attention":
        results = results + text * dv
        softmax = softmax + 8 * text
    if which == "forward":
        return (inputs + results) * dtype.itemsize + softmax
    return (2 * inputs + 2 * results) * dtype.itemsize + softmax  # results: before the gate, and their gradient


def absorbed_least(which, batch, heads, positions, tokens, d, dv, dtype):
    """Bytes that must move: image, keys and values once, results once, 8 bytes a row for its softmax; gradients
    likewise."""
    image = batch * positions
    text = batch * heads * tokens
    softmax = 8 * text + (8 * heads * image if dv else 0)
    if which == "forward":
        return (image * (d + dv) + text * (2 * d + dv)) * dtype.itemsize + softmax
    return (image * (2 * d + dv) + text * (4 * d + 2 * dv)) * dtype.itemsize + softmax


def absorbed_moved(which, batch, heads, positions, tokens, d, dv, dtype):
    """What the emulator counts for one call, all gradients."""
    image = torch.randn(batch, positions, d).to(dtype)
    key = (torch.randn(batch, heads, tokens, d) * d**-0.5).to(dtype)
    value = torch.randn(batch, heads, tokens, dv).to(dtype) if dv else None
    inputs = (image, key, None, value, None, None)
    emulated.counts()
    image_out, text_out, *softmax, unrounded = torch.ops.mmkernels.absorbed_attention_emulated(*inputs, True)
    if which == "forward":
        return emulated.counts()
    grads = (torch.ones_like(image_out) if dv else None, torch.ones_like(text_out))
    exact = text_out if dtype == torch.float32 else unrounded
    needs = (True, True, False, bool(dv))
    emulated.counts()
    torch.ops.mmkernels.absorbed_attention_emulated_backward(*grads, *inputs, exact, *softmax, True, *needs)
    return emulated.counts()


def attention_moved(operation, which, batch, heads, positions, tokens, d, dv, dtype):
    """What the emulator counts for one call. Backward: all gradients, the result before the gate was kept."""
    if operation == "absorbed_attention":
        return absorbed_moved(which, batch, heads, positions, tokens, d, dv, dtype)
    make = lambda rows, channels: torch.randn(batch, heads, rows, channels).to(dtype)
    query = make(positions, d)
    key = make(tokens, d)
    value = make(tokens, dv)
    other = make(positions, dv)
    run, back = (getattr(torch.ops.mmkernels, f"{operation}_emulated{suffix}") for suffix in ("", "_backward"))
    if operation == "gated_cross_attention":
        inputs = (query, key, value, other, None, None, None)
        emulated.counts()
        result, attended, softmax = run(*inputs, d**-0.5, which == "backward")
        if which == "forward":
            return emulated.counts()
        emulated.counts()
        back(torch.ones_like(result), *inputs, attended, softmax, d**-0.5, True, True, True, True, True, False)
        return emulated.counts()
    inputs = (query, key, other, value, None, None)
    emulated.counts()
    image_out, text_out, *softmax, unrounded = run(*inputs, d**-0.5)
    if which == "backward":
        exact = text_out if dtype == torch.float32 else unrounded
        emulated.counts()
        back(
            torch.ones_like(image_out),
            torch.ones_like(text_out),
            *inputs,
            image_out,
            exact,
            *softmax,
            d**-0.5,
            True,
            True,
            True,
            True,
        )
    return emulated.counts()
