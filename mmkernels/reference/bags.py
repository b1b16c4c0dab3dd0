"""Packed bags in plain PyTorch. Nobody looks at the offsets' values, so it can be traced, and differentiated as often
as one likes."""

from typing import NamedTuple

import torch


def bag_bounds(offsets, image):
    """``offsets``, also a list or an array, as a tensor."""
    if offsets is None or isinstance(offsets, torch.Tensor):
        return offsets
    return torch.as_tensor(list(offsets), device=image.device)


class Bags(NamedTuple):
    """The bags of packed rows."""

    of_row: torch.Tensor  # the number of the bag that each row is in, [rows]
    count: int

    @staticmethod
    def of(offsets, rows):
        each = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
        return Bags(torch.searchsorted(offsets.contiguous(), each, right=True) - 1, offsets.shape[0] - 1)

    def spread(self, values):
        """To each row its bag's: ``[count, ...] -> [rows, ...]``."""
        # Not index_select: its second derivative under torch.func takes no symbolic sizes in torch 2.10 and 2.11.
        of_element = self.of_row.view(-1, *(1,) * (values.dim() - 1)).expand(-1, *values.shape[1:])
        return values.gather(0, of_element)

    def sums(self, values):
        """Over each bag's rows: ``[rows, ...] -> [count, ...]``."""
        return values.new_zeros(self.count, *values.shape[1:]).index_add(0, self.of_row, values)

    def softmax(self, scores, part):
        """Over those rows of each bag that take part, 0 in the others: ``[rows, H] -> [rows, H]``, ``part`` bool
        ``[rows]``."""
        absent = ~part[:, None]
        scores = scores.masked_fill(absent, float("-inf"))
        known = scores.detach()  # the largest score cancels, and so does its derivative
        none = known.new_full((self.count, known.shape[1]), float("-inf"))
        largest = none.scatter_reduce(0, self.of_row[:, None].expand_as(known), known, "amax")
        # What is absent gets finite numbers, so that nothing is NaN there, forward or backward.
        exponentials = (scores - self.spread(largest).masked_fill(absent, 0)).exp()
        sums = self.spread(self.sums(exponentials)).masked_fill(absent, 1)
        return (exponentials / sums).masked_fill(absent, 0)
