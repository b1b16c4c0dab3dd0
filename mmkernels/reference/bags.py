"""Packed bags in plain PyTorch. Nobody looks at the offsets' values, so it can be traced, and differentiated as often as one likes."""

import torch


def bag_bounds(offsets, image):
    """``offsets``, also a list or an array, as a tensor."""
    if offsets is None or isinstance(offsets, torch.Tensor):
        return offsets
    return torch.as_tensor(list(offsets), device=image.device)


def bag_of_rows(offsets, rows):
    """The number of the bag that each row is in, ``[rows]``."""
    each = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets.contiguous(), each, right=True) - 1


def bag_sums(values, bags, count):
    """The sums over each bag's rows: ``[rows, ...] -> [count, ...]``."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, bags, values)


def bag_softmax(scores, part, bags, count):
    """softmax over those rows of each bag that take part, 0 in the others: ``[rows, H] -> [rows, H]``, ``part`` bool ``[rows]``."""
    absent = ~part[:, None]
    scores = scores.masked_fill(absent, float("-inf"))
    known = scores.detach()                       # the largest score cancels, and so does its derivative
    largest = known.new_full((count, known.shape[1]), float("-inf")).scatter_reduce(0, bags[:, None].expand_as(known), known, "amax")
    # What is absent gets finite numbers, so that nothing is NaN there, forward or backward.
    exponentials = (scores - largest.index_select(0, bags).masked_fill(absent, 0)).exp()
    sums = bag_sums(exponentials, bags, count).index_select(0, bags).masked_fill(absent, 1)
    return (exponentials / sums).masked_fill(absent, 0)
