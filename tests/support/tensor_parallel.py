"""One rank of the modules under tensor parallelism: ``python tensor_parallel.py RANK FOLDER``."""

import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mmkernels as mmk

RANKS = 2
B, N, T, D, E = 3, 5, 4, 8, 6

IN, OUT = ColwiseParallel, RowwiseParallel
WHOLE = {"output_layouts": Replicate()}  # a rank computes a part of the channels and gets all


def image():
    return torch.randn(B, N, D)


def tokens():
    return torch.randn(B, T, E)


def vector():
    return torch.randn(B, E)


def heads(*projections):
    return {name: (OUT if "out_" in name else IN, {}) for name in projections}


GATED = heads("query_projection", "key_projection", "value_projection", "gate_projection", "out_projection")
BIDIRECTIONAL = heads(
    "image_query_projection",
    "text_key_projection",
    "image_value_projection",
    "text_value_projection",
    "image_out_projection",
    "text_out_projection",
)
POOLING = heads("query_projection", "key_projection", "value_projection", "out_projection")
ADDITIVE = {
    "image_projection": (IN, {}),
    "query_projection": (IN, {}),
    "gate_projection": (IN, {}),
    "score_projection": (OUT, {}),
}

# What is right: (module, inputs, options of the call, plan)
RIGHT = {
    "gated": (
        lambda: mmk.GatedCrossAttention(D, E, 2, embed_dim=12, value_dim=20),
        (image, tokens),
        {"mask": torch.arange(B * T).view(B, T) % 3 > 0},
        GATED,
    ),
    "bidirectional": (
        lambda: mmk.BidirectionalAttention(D, E, 12, 4),
        (image, tokens),
        {"image_mask": torch.arange(B * N).view(B, N) % 4 > 0, "text_mask": torch.arange(B * T).view(B, T) % 3 > 0},
        BIDIRECTIONAL,
    ),
    "pooling": (lambda: mmk.AttentionPooling(D, 2, query_dim=E, embed_dim=12), (image, tokens), {}, POOLING),
    "pooling of learned queries": (
        lambda: mmk.AttentionPooling(D, 4, 3, embed_dim=12, out_dim=6),
        (image,),
        {"image_mask": torch.arange(B * N).view(B, N) % 4 > 0},
        POOLING,
    ),
    "additive": (lambda: mmk.AdditiveAttention(D, 10, E, num_queries=2, gated=True), (image, vector), {}, ADDITIVE),
    "channel": (lambda: mmk.ChannelAttention(D, E), (image, vector), {}, {"score_projection": (IN, WHOLE)}),
    "spatial": (lambda: mmk.SpatialAttention(D, E, num_heads=4), (image, vector), {}, {"text_projection": (IN, WHOLE)}),
}

# What is refused: the same, and the message.
REFUSED = {
    "half a head": (
        lambda: mmk.BidirectionalAttention(D, E, 12, 1),
        (image, tokens),
        {},
        BIDIRECTIONAL,
        "whole heads of 12 channels, got 6",
    ),
    "half a gate": (
        lambda: mmk.GatedCrossAttention(D, E, 1),
        (image, tokens),
        {},
        GATED,
        "whole heads of 8 channels, got 4",
    ),
    "half a pooling head": (
        lambda: mmk.AttentionPooling(D, 1, 2),
        (image,),
        {},
        POOLING,
        "query_projection must give whole heads of 8 channels, got 4",
    ),
    "absorbed on request": (
        lambda: mmk.AttentionPooling(D, 2, 2, absorb=True),
        (image,),
        {},
        POOLING,
        "absorb must be None or False where key_projection isn't a plain nn.Linear",
    ),
    "keys of all heads": (
        lambda: mmk.GatedCrossAttention(D, E, 2),
        (image, tokens),
        {},
        GATED | {"key_projection": (IN, WHOLE)},
        "key must have shape",
    ),
    "a norm of a part": (
        lambda: mmk.GatedCrossAttention(D, E, 2, norm=torch.nn.Softmax(-1)),
        (image, tokens),
        {},
        GATED,
        "must give 8 channels for norm, got 4",
    ),
    "a part of the text": (
        lambda: mmk.SpatialAttention(D, E, num_heads=2),
        (image, vector),
        {},
        {"text_projection": (IN, {})},
        "text must have shape",
    ),
    "a part of text and image": (
        lambda: mmk.SpatialAttention(D, E, num_heads=2),
        (lambda: image()[..., : D // RANKS], vector),
        {},
        {"text_projection": (IN, {})},
        "image must have shape [B, N, D] = [any, any, 8], got [3, 5, 4]",
    ),
    # One channel of two would broadcast.
    "channels": (
        lambda: mmk.ChannelAttention(2, E),
        (lambda: image()[..., :2], vector),
        {},
        {"score_projection": (IN, {})},
        "score_projection must give 2 channels, got 1",
    ),
    "hidden": (
        lambda: mmk.AdditiveAttention(D, 2, E),
        (image, vector),
        {},
        {"image_projection": (IN, {})},
        "query_projection must give 1 channels like image_projection, got 2",
    ),
    "hidden gate": (
        lambda: mmk.AdditiveAttention(D, 2, gated=True),
        (image,),
        {},
        {"gate_projection": (IN, {})},
        "gate_projection must give 2 channels like image_projection, got 1",
    ),
    "maps": (
        lambda: mmk.AdditiveAttention(D, 6, num_queries=2),
        (image,),
        {},
        {"score_projection": (IN, {})},
        "score_projection must give 2 channels, got 1",
    ),
}


def build(make, inputs):
    """The same on every rank, and in the process that has all."""
    torch.manual_seed(0)
    return make(), [draw() for draw in inputs]


def compute(module, tensors, options):
    """Results, and the gradients of inputs and parameters."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    module.zero_grad()
    results = module(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results).backward()
    grads = [t.grad for t in (*leaves, *module.parameters())]
    return [
        (t.full_tensor() if isinstance(t, DTensor) else t).clone() for t in (*(r.detach() for r in results), *grads)
    ]


def parallel(module, plan):
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    return parallelize_module(module, mesh, {name: style(**layouts) for name, (style, layouts) in plan.items()})


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    for name, (make, inputs, options, plan, *_) in (RIGHT | REFUSED).items():
        module, tensors = build(make, inputs)
        try:
            found[name] = compute(parallel(module, plan), tensors, options)
        except Exception as error:  # told by its type and message
            found[name] = repr(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
