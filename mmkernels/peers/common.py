"""What the peers share."""

import torch


def compiled(function, *, dynamic=False):
    """`function` under torch.compile, with default settings and a compilation of its own."""

    def fresh(*args, **kwargs):  # a new code object: peers don't share one cache of graphs
        return function(*args, **kwargs)

    fresh.__code__ = fresh.__code__.replace(co_name=f"compiled_{function.__name__}")
    return torch.compile(fresh, dynamic=dynamic)


def masked_softmax(scores, mask):
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return (scores + mask.to(scores.dtype)).softmax(-1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask.any(-1, keepdim=True)
