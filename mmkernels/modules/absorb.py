"""Absorbing projections: what would project the image stands on the text's side, which is small.

Attention is linear around its softmax. The scores of projected features are those of the features themselves with other
keys, ``(x W_q + b_q) . k = x . (W_q k) + b_q . k``; what projects the image's result may project the values before;
what projects features that are pooled may project the few that result. Exact but for the order of roundings: what is
absorbed stays in float32 (float64), whatever the image's dtype.
"""

import torch

from .. import backends, checks, functional
from ..ops.common import accumulate_dtype, cast
from ..reference.precision import without_autocast
from ..torch_private import known_true
from .common import check_absorb, is_plain_linear, meet, reaching


def absorb_pays(positions, tokens, image_dim, embed_dim, num_heads, *, out_dim=None, pool=True, attend=True):
    """Whether attention between image and text takes fewer operations with the image's projections absorbed.

    With ``absorb=None`` modules choose by it. Multiply-adds of a sample, for N positions of D channels, T tokens, H
    heads over E channels, and C channels of the image's result::

                 with projections    absorbed
        scores   N D E + N E T       N D H T + T D E
        attend   N E T + N E C       N H T C + T E C
        pool     N D E + N E T       N D H T + T D E

    With a long image and ``C = D`` it pays where ``T (D - d) < D d``, of d channels a head: always where a head has as
    many channels as the image, else for few tokens.

    Args:
        positions: N, of the image.
        tokens: T, of the text, or learned queries.
        image_dim: D, channels of the image's features.
        embed_dim: E, channels of all heads together.
        num_heads: H, divides ``embed_dim``.
        out_dim: C, channels of the image's result; default ``image_dim``.
        pool: whether the text attends to the image.
        attend: whether the image attends to the text.

    Raises:
        TypeError, ValueError: a size isn't an int of at least 1, or neither result is wanted.
    """
    positions = checks.dimension("positions", positions)
    tokens = checks.dimension("tokens", tokens)
    image_dim = checks.dimension("image_dim", image_dim)
    embed_dim = checks.dimension("embed_dim", embed_dim)
    num_heads = checks.heads("num_heads", num_heads, ("embed_dim", embed_dim))
    out_dim = image_dim if out_dim is None else checks.dimension("out_dim", out_dim)
    pool = checks.flag("pool", pool)
    attend = checks.flag("attend", attend)
    if not (pool or attend):
        raise ValueError("attend must be True with pool=False, got False: no result is wanted")
    out_dim = out_dim if attend else None
    projected, absorbed = multiply_adds(positions, tokens, image_dim, embed_dim, num_heads, out_dim, pool)
    return absorbed < projected


def multiply_adds(positions, tokens, image_dim, embed_dim, num_heads, out_dim, pool):
    """(with projections, absorbed), as :func:`absorb_pays` counts them; without attending where `out_dim` is None."""
    scores = 2 if pool else 1  # pooling takes as many again
    projected = scores * positions * embed_dim * (image_dim + tokens)
    absorbed = scores * tokens * image_dim * (positions * num_heads + embed_dim)
    if out_dim is not None:
        projected += positions * embed_dim * (tokens + out_dim)
        absorbed += tokens * out_dim * (positions * num_heads + embed_dim)
    return projected, absorbed


def absorbs(module, image, text, counted, **projections):
    """Whether `module` absorbs its projections of the image, by name (projection, shape of its weight) with None for
    any size, into `text` ``[B, H, T, d]``: as it was asked to, or where that takes fewer of the operations `counted`,
    (with projections, absorbed).

    Not where a projection has to be called: with ``absorb=True`` that is an error. Nor where something doesn't fit or
    is empty: the plain way says so, or knows the result.
    """
    absorb = check_absorb(module.absorb)
    if absorb is False:
        return False
    for name, (projection, _) in projections.items():
        if is_plain_linear(projection):
            continue
        if absorb is None:
            return False
        raise ValueError(
            f"absorb must be None or False where {name} isn't a plain nn.Linear without hooks (it is "
            f"{type(projection).__name__}): it has to be called, got True"
        )
    if image.shape[1] == 0 or text.shape[2] == 0:
        return False
    if not all(_fits(image, text, projection.weight, *shape) for projection, shape in projections.values()):
        return False
    if absorb:
        return True
    if module.backend is not None:
        if backends.why_not(module.backend, "absorbed_attention", image.device.type, image.dtype) is not None:
            return False
    projected, absorbed = counted
    return known_true(absorbed < projected)


def _fits(image, text, weight, outputs, inputs):
    """Whether a projection could be called."""
    one_kind = meet(image, weight) and meet(image, text)
    return one_kind and outputs in (None, weight.shape[0]) and inputs == weight.shape[1]


# Text is [B, H, T, d], a projection of the image has a weight [H d, D], the result's [C, H d].


@without_autocast
def absorb_heads(text, weight, scale=1):
    """``[B, H, T, D]``: what scores the features as `text` scores their projection."""
    text = scale * cast(text, accumulate_dtype(text))
    return torch.einsum("bhtd,hdc->bhtc", text, _of_heads(weight, text, text.shape[3]))


@without_autocast
def absorb_bias(text, bias, scale=1):
    """``[B, H, T]``: what the projection's bias adds to the scores."""
    if bias is None:
        return None
    text = scale * cast(text, accumulate_dtype(text))
    return torch.einsum("bhtd,hd->bht", text, _of_heads(bias, text, text.shape[3]))


@without_autocast
def absorb_result(value, weight, bias):
    """``[B, H, T, C]``, whose attended sum over heads is the projection of value's, joined.

    Each head has a part of the bias, since a softmax's weights add up to 1: added afterwards it would be a pass over
    the result. It needs a token that takes part: see :func:`with_stand_in`.
    """
    value = cast(value, accumulate_dtype(value))
    weight = cast(weight, value.dtype).unflatten(1, (value.shape[1], value.shape[3]))
    value = torch.einsum("bhtd,chd->bhtc", value, weight)
    return value if bias is None else value + cast(bias, value.dtype) / value.shape[1]


@without_autocast
def project_pooled(pooled, weight, bias, width, image_mask):
    """``[B, H, T, d]``, of pooled features ``[B, H, T, D]``; 0, without the bias, where no position took part."""
    text = cast(pooled, accumulate_dtype(pooled))
    result = torch.einsum("bhtc,hdc->bhtd", text, _of_heads(weight, text, width))
    if bias is not None:
        result = result + _of_heads(bias, text, width)[:, None]
        if image_mask is not None:
            result = result.where(image_mask.any(1)[:, None, None, None], 0)
    return result.to(pooled.dtype)


def absorbed_pooling(
    image, query, key_weight, value_weight, value_bias, scale, *, image_mask=None, key_bias=None, backend=None
):
    """``softmax(scale query key(image)^T) value(image)``, ``[B, H, T, d]``, with the image ``[B, N, D]`` read once as
    it is.

    Args:
        query: ``[B, H, T, d]``, or ``[1, H, T, d]`` for all samples, projected.
        key_weight, value_weight: ``[H d, D]``. value_bias: ``[H d]`` or None.
        key_bias: adds the same to a query's scores of all positions, which cancels in the softmax; only given so that
            it gets its gradient, 0.
    """
    key = absorb_heads(query, key_weight, scale).expand(image.shape[0], -1, -1, -1)
    _, pooled = functional.absorbed_attention(image, key, image_mask=image_mask, backend=backend)
    return project_pooled(pooled, value_weight, reaching(value_bias, key_bias), query.shape[3], image_mask)


def _of_heads(parameter, text, width):
    """A parameter ``[H d, ...]`` as ``[H, d, ...]``, in text's dtype."""
    return cast(parameter, text.dtype).unflatten(0, (text.shape[1], width))


def side_by_side(value):
    """``[B, H, T, H d]``: each head's values in channels of their own, 0 elsewhere."""
    heads = value.shape[1]
    if heads == 1:
        return value
    own = torch.eye(heads, dtype=torch.bool, device=value.device)[:, None, :, None]
    return value[:, :, :, None].where(own, 0).flatten(3)


def scale_of(scale, width):
    return width**-0.5 if scale is None else scale


def without_hidden(key, value, text_mask):
    """NaN or Inf of tokens that are masked out would reach the gradients of what they are absorbed with."""
    if text_mask is None:
        return key, value
    part = text_mask[:, None, :, None]
    return key.where(part | key.isfinite(), 0), value.where(part, 0)


def with_stand_in(text_mask):
    """Where no token takes part the first one does: its value is 0, and the bias that it was given remains. A softmax
    over one token has no gradient."""
    first = torch.arange(text_mask.shape[1], device=text_mask.device) == 0
    return text_mask | (first & ~text_mask.any(1, keepdim=True))
