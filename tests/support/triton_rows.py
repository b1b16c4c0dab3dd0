"""What the tests of channel and additive attention's Triton kernels share."""

import torch

from .attention_tests import assert_rule
from .triton_tests import draw

CHANNEL = "channel_attention"
ADDITIVE = "additive_attention"
VIEWS = {
    "contiguous": lambda t: t,
    "rows apart": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels apart": lambda t: t.repeat_interleave(2, 2)[..., 1::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 1, 2, 2), value=77.0)[:, 2:-2, 1:-1],
    "transposed": lambda t: t.mT.contiguous().mT,
    "one sample for all": lambda t: t[:1].expand(t.shape),
    "one row for all": lambda t: t[:, :1].expand(t.shape),
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}
ADDITIVE_OPTIONS = {
    "pool": ((3, 37, 11), None, {}),
    "multiply": ((3, 37, 11), None, {"combine": "multiply"}),
    "packed": ((111, 11), (0, 40, 40, 41, 111), {}),
    "packed multiply": ((111, 11), (0, 40, 40, 41, 111), {"combine": "multiply"}),
}


def channel(shape, dtype=torch.float32, text=5):
    """image, text, weight, bias"""
    B, _, D = shape
    return [
        draw(*shape, dtype=dtype),
        draw(B, text, dtype=dtype, seed=1),
        draw(D, D + text, dtype=dtype, seed=2) * D**-0.5,
        draw(D, dtype=dtype, seed=3),
    ]


NAMES = ("image", "query", "w_image", "w_query", "v", "bias", "w_gate", "bias_gate")


def additive(shape, hidden, maps=1, bags=None, dtype=torch.float32):
    """The tensors of NAMES."""
    B, D = bags or shape[0], shape[-1]
    sizes = (shape, (B, 5), (hidden, D), (hidden, 5), (maps, hidden), (hidden,), (hidden, D), (hidden,))
    return [
        draw(*size, dtype=dtype, seed=i) * (size[1] ** -0.5 if i in (2, 3, 4, 6) else 1) for i, size in enumerate(sizes)
    ]


def assert_formula(formula, tensors, found):
    """`found` is ``formula(*tensors)`` in float64, as near as it is in float32."""
    assert_rule(found, truth=formula(*(t.double() for t in tensors)), peer=formula(*tensors))


def panels_of(monkeypatch, values):
    """Panels of so many float32 values, at least 16 rows: they begin and end within samples."""
    from mmkernels.triton import rows

    monkeypatch.setattr(rows, "PANEL_BYTES", values * 4)


def processors(monkeypatch, count):
    """A device of so many: samples of 256 rows and more are split, and their sums merged."""
    from mmkernels.triton import additive_attention

    monkeypatch.setattr(additive_attention, "processors", lambda tensor: count)
