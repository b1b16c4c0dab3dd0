"""What models share."""

from .. import checks


def where_taking_part(name, tensor, mask):
    """[B, N, C], 0 where the mask [B, N] is False: what stands there, NaN included, then reaches no projection's
    gradient, either."""
    if mask is None:
        return tensor
    checks.boolean_mask("mask", mask, name, tensor, ("B", tensor.shape[0]), ("N", tensor.shape[1]))
    return tensor.where(mask[..., None], 0)
