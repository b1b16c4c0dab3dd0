"""Multi-scale deformable attention as transformers' detection models have it, in one call: softmax, mask, sampling.

Three kinds of module compute the same with other names: Deformable DETR's and its copies', Mask2Former's (whose mask is
True where an image is padded), and RT-DETRv2's and D-FINE's (with as many points a level as they like).
"""

import torch

from ... import functional
from ...modules.common import given, is_plain
from ...ops.common import accumulate_dtype
from ...reference.precision import autocast_is_on, without_autocast
from ..patching import Replacement, exported, plain
from .weights import weights_wanted


def convert(module):
    return _convert(module, detr_forward)


def convert_always_weights(module):
    return _convert(module, always_weights_forward)


def convert_padding_mask(module):
    return _convert(module, padding_mask_forward)


def convert_uneven(module):
    method = getattr(module, "method", None) or getattr(module, "decoder_method", None)
    if method != "default":
        return f"it samples by the method {method!r}, not bilinearly"
    return _convert(module, uneven_forward)


def _convert(module, forward):
    core = getattr(module, "attn", None)
    if core is not None and given(core, "forward") is not None:
        return "what samples inside of it was replaced by somebody else"
    return Replacement("deformable_attention", forward)


def detr_forward(module, hidden_states, attention_mask=None, encoder_hidden_states=None, **named):
    """Deformable DETR's, Grounding DINO's, RT-DETR's, ..."""
    return _forward(module, detr_locations, hidden_states, attention_mask, encoder_hidden_states, attention_mask, named)


def always_weights_forward(module, hidden_states, attention_mask=None, encoder_hidden_states=None, **named):
    """OmDet-Turbo's, whose decoder returns weights for which it never asked. They are few beside what is sampled."""
    named.setdefault("output_attentions", True)
    return detr_forward(module, hidden_states, attention_mask, encoder_hidden_states, **named)


def padding_mask_forward(module, hidden_states, attention_mask=None, encoder_hidden_states=None, **named):
    """Mask2Former's and OneFormer's."""
    mask = None if attention_mask is None else ~attention_mask
    return _forward(module, detr_locations, hidden_states, mask, encoder_hidden_states, attention_mask, named)


def uneven_forward(module, hidden_states, attention_mask=None, *arguments, **named):
    """RT-DETRv2's, D-FINE's and DEIMv2's."""
    reference = named.get("reference_points")
    if arguments or reference is None or reference.shape[-1] != 4:
        return plain(module, hidden_states, attention_mask, *arguments, **named)
    states = named.pop("encoder_hidden_states", None)
    return _forward(module, uneven_locations, hidden_states, attention_mask, states, attention_mask, named)


def _forward(module, locate, hidden_states, mask, states, attention_mask, named):
    """`mask` True = takes part; `attention_mask` as it came; `named` the other arguments."""
    shapes = named.get("spatial_shapes_list")
    reference = named.get("reference_points")
    core = getattr(module, "attn", None)
    fits = shapes is not None and states is not None and reference is not None and reference.shape[-1] in (2, 4)
    fits = fits and (mask is None or mask.dim() == 2)
    if not fits or exported() or (core is not None and not is_plain(core, type(core))):
        return plain(module, hidden_states, attention_mask, encoder_hidden_states=states, **named)
    position = named.get("position_embeddings")
    if position is not None:
        hidden_states = hidden_states + position
    value = module.value_proj(states) if hasattr(module, "value_proj") else states
    heads = module.n_heads
    offsets = module.sampling_offsets(hidden_states)
    scores = module.attention_weights(hidden_states)
    points = _points(module)
    offsets = offsets.unflatten(-1, (heads, sum(points), 2))
    scores = scores.unflatten(-1, (heads, sum(points)))
    mask = None if mask is None else mask.bool()
    locations = locate(module, offsets, reference, shapes, points)
    attended = _attend(value.unflatten(-1, (heads, -1)), shapes, locations, scores, points, mask)
    if hasattr(module, "output_proj"):
        attended = module.output_proj(attended)
    elif autocast_is_on(attended.device.type):
        attended = attended.to(accumulate_dtype(attended))
    weights = None
    if named.get("output_attentions") or weights_wanted(module):
        weights = scores.softmax(-1)
        if locate is detr_locations:
            weights = weights.unflatten(-1, (module.n_levels, module.n_points))
    return attended, weights


@without_autocast
def _attend(value, shapes, locations, scores, points, mask):
    """As in plain PyTorch, whose ``grid_sample`` autocast runs in float32: a wide value stays so."""
    return functional.deformable_attention(value, shapes, locations, scores.to(value.dtype), points=points, mask=mask)


def _points(module):
    for name in ("n_points_list", "num_points_list"):
        if hasattr(module, name):
            return tuple(getattr(module, name))
    return (module.n_points,) * module.n_levels


def detr_locations(module, offsets, reference, shapes, points):
    """``[B, Q, H, K, 2]``, in float32 at least. Offsets are in pixels of a level, or, of boxes, in halves of the box
    over the number of points."""
    dtype = accumulate_dtype(offsets)

    def row(of_levels):  # [..., L, 2] -> [..., 2 K]: repeated for pairs of numbers PyTorch computes one at a time
        of_levels = of_levels.to(dtype).unsqueeze(-2)
        return of_levels.expand(*of_levels.shape[:-3], module.n_levels, module.n_points, 2).flatten(-3)

    offsets = offsets.to(dtype).flatten(3)
    reference = reference[:, :, None]
    if reference.shape[-1] == 2:
        sizes = offsets.new_tensor([(x, y) for y, x in shapes])
        locations = torch.addcdiv(row(reference), offsets, row(sizes))
    else:
        box = reference[..., 2:].to(dtype) * (0.5 / module.n_points)
        locations = torch.addcmul(row(reference[..., :2]), offsets, row(box))
    return locations.unflatten(3, (-1, 2))


def uneven_locations(module, offsets, reference, shapes, points):
    """The same of boxes, where levels have points of different numbers and a scale is given."""
    dtype = accumulate_dtype(offsets)
    reference = reference.to(dtype)[:, :, None]
    share = offsets.new_tensor([1 / n for n in points for _ in range(n)], dtype=dtype)[:, None]
    box = reference[..., 2:] * (share * module.offset_scale)
    return torch.addcmul(reference[..., :2], offsets.to(dtype), box)
