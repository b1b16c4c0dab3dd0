"""Where tensors can lie in memory, and masks of every kind."""

import torch

# Where a tensor can lie. Each takes the draw and the logical shape and returns a view of that shape.


def contiguous(draw, *shape):
    return draw.normal(*shape)


def transposed(draw, *shape):
    """The last two dimensions are swapped in memory."""
    return draw.normal(*shape[:-2], shape[-1], shape[-2]).mT


def every_second_row(draw, *shape):
    return draw.normal(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :]


def every_second_channel(draw, *shape):
    return draw.normal(*shape[:-1], 2 * shape[-1])[..., 1::2]


def window(draw, *shape):
    """A crop out of the middle of a larger tensor."""
    base = draw.normal(*(n + 2 for n in shape))
    return base[(slice(1, -1),) * len(shape)]


def unaligned(draw, *shape):
    """Contiguous, but one element past the start of its storage."""
    return draw.normal(torch.Size(shape).numel() + 1)[1:].view(shape)


def batch_first_last(draw, *shape):
    """The batch is the innermost dimension in memory."""
    return draw.normal(*shape[1:], shape[0]).movedim(-1, 0)


def same_for_all(draw, *shape):
    """One sample expanded over the batch: stride 0."""
    return draw.normal(1, *shape[1:]).expand(shape)


def same_row(draw, *shape):
    """One row expanded over the positions: stride 0."""
    return draw.normal(*shape[:-2], 1, shape[-1]).expand(shape)


def same_channel(draw, *shape):
    return draw.normal(*shape[:-1], 1).expand(shape)


def channels_last(draw, batch, channels, height, width):
    return draw.normal(batch, height, width, channels).permute(0, 3, 1, 2)


def channels_last_window(draw, batch, channels, height, width):
    return draw.normal(batch, height + 3, width + 2, channels)[:, 2:-1, 1:-1].permute(0, 3, 1, 2)


def channels_last_some(draw, batch, channels, height, width):
    """Channels-last, and the channels are a slice of more."""
    return draw.normal(batch, height, width, channels + 5)[..., 2:-3].permute(0, 3, 1, 2)


def near_largest(draw, *shape):
    """Products with what is drawn normally reach up to the dtype's largest number, and not beyond."""
    return (draw.normal(*shape).double() * (draw.largest / 20)).to(draw.dtype)


DENSE = (
    contiguous,
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
PLANES = (
    contiguous,
    transposed,
    every_second_row,
    every_second_channel,
    window,
    unaligned,
    same_for_all,
    channels_last,
    channels_last_window,
    channels_last_some,
)
PACKED = (contiguous, transposed, every_second_row, every_second_channel, window, unaligned, same_row)


def reaching(sign):
    """A scale that depends on queries and keys: with it the scores come near the largest number that they can be
    computed in, and in base 2 beyond it."""

    def scale(query, key):
        limit = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).max
        return sign * 0.9 * limit / float((query.double() @ key.double().mT).abs().max())

    return scale


# Masks: each takes the draw and the mask's shape, batch (or rows) first.


def mask_all(draw, *shape):
    return torch.ones(shape, dtype=torch.bool, device=draw.device)


def mask_none(draw, *shape):
    return ~mask_all(draw, *shape)


def mask_one(draw, *shape):
    """A single position, the last, takes part."""
    mask = mask_none(draw, *shape).flatten(1)
    mask[:, -1] = True
    return mask.view(shape)


def mask_random(draw, *shape):
    return draw.mask(*shape)


def mask_whole_sample(draw, *shape):
    """The first sample has no position at all."""
    mask = draw.mask(*shape)
    mask[0] = False
    return mask


def mask_strided(draw, *shape):
    """Neither dense nor aligned."""
    return draw.mask(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]


def mask_transposed(draw, *shape):
    return draw.mask(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def mask_shared(draw, *shape):
    """One mask for all samples: stride 0."""
    return draw.mask(1, *shape[1:]).expand(shape)


MASKS = {
    "all": mask_all,
    "none": mask_none,
    "one": mask_one,
    "random": mask_random,
    "whole sample": mask_whole_sample,
    "strided": mask_strided,
    "transposed": mask_transposed,
    "shared": mask_shared,
}
