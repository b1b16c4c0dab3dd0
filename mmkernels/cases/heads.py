"""What the operations over heads share: views of `[B, H, N, C]`, and sizes."""

from .common import SMALL
from .layouts import (
    batch_first_last,
    every_second_channel,
    every_second_row,
    same_channel,
    same_for_all,
    same_row,
    transposed,
    unaligned,
    window,
)


def heads_last(draw, batch, heads, positions, channels):
    """A view of [B, N, H * C], as a projection gives it."""
    return draw.normal(batch, positions, heads, channels).transpose(1, 2)


def heads_slice(draw, batch, heads, positions, channels):
    """One of three slices of [B, N, 3 * H * C], as a joint projection gives it."""
    return draw.normal(batch, positions, 3, heads, channels)[:, :, 1].transpose(1, 2)


HEADS = (
    heads_last,
    heads_slice,
    transposed,
    every_second_row,
    every_second_channel,
    window,
    unaligned,
    batch_first_last,
    same_for_all,
    same_row,
    same_channel,
)

# B, H, N, T, d, dv: sizes that fit no vector, tile or block.
HEAD_SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 1, 1, 3),
    (1, 2, 1, 3, 3, 1),
    (2, 3, 7, 5, 8, 8),
    (1, 2, 33, 17, 13, 21),
    (1, 1, 113, 20, 16, 16),
    (1, 1, 50, 77, 40, 24),
    (3, 1, 16, 16, 32, 32),
    (1, 1, 3, 113, 17, 7),
    (1, 1, 65, 33, 64, 48),
    (1, 2, 130, 31, 3, 5),
)
HEAD_SIZES_LARGE = (
    (1, 2, 113, 203, 64, 64),
    (1, 1, 1023, 77, 113, 97),
    (2, 1, 97, 1023, 40, 72),
    (1, 1, 203, 256, 256, 256),
    (1, 1, 65, 33, 300, 257),
    (1, 2, 20_011, 20, 16, 16),
    (1, 1, 3, 5001, 24, 24),
    (5, 3, 61, 64, 64, 64),
)


# Sizes for rows that have a large part in common. Scores are kept small: a softmax that chooses one has no gradient.
IN_COMMON_SIZES = ((2, 2, 21, 5, 16, 12), (1, 2, 40, 60, 24, 16), (1, 1, 3, 113, 17, 7), (1, 1, 130, 600, 24, 16))
IN_COMMON_SCALE = 0.02


def heads_small(shape):
    batch, heads, positions, tokens, d, dv = shape
    return batch * heads * positions * tokens * (d + dv) <= 40 * SMALL
