"""gated_cross_attention: with and without a gate; masks of tokens, of pairs, and such as are added."""

import functools

import torch
from support.mistakes import Form, of_layouts

from . import Variant, no_second, of_tokens, some

SHAPES = {"query": "B H N d", "key": "B H T d", "value": "B H T dv"}
GATED = SHAPES | {"gate": "B H N dv"}
SIZES = {"B": 2, "H": 2, "N": 4, "T": 3, "d": 5, "dv": 6, "one": 1}
TINY = {"d": 3, "dv": 2}
LARGE = {"H": 3, "N": 13, "T": 11, "d": 24, "dv": 18}
make = functools.partial(Variant, "gated_cross_attention", sizes=SIZES, tiny=TINY, large=LARGE)
HIDDEN = {"key": ("attn_mask", of_tokens), "value": ("attn_mask", of_tokens)}


def pairs(s):
    """For each query; one of them has nothing to attend to."""
    mask = some(1, 1, s.N, s.T).clone()
    mask[:, :, 2] = False
    return mask


VARIANTS = {
    "gated": make(GATED, options=lambda s: {"attn_mask": no_second(s.B, s.T)}, hidden=HIDDEN, main=True),
    "gated plain": make(GATED, options=lambda s: {"scale": 0.3}),
    "gated pairs": make(GATED, options=lambda s: {"attn_mask": pairs(s), "need_weights": True}),
    "gated bias": make(GATED | {"attn_mask": "B one N T"}),
    "no gate": make(SHAPES, options=lambda s: {"need_weights": True}),
    "no gate, tokens": make(
        SHAPES, options=lambda s: {"attn_mask": some(s.B, s.T), "need_weights": True}, hidden=HIDDEN
    ),
    "no gate, bias": make(SHAPES | {"attn_mask": "one one N T"}),
}


# The mistakes that callers make -----------------------------------------------------------------------------------------

FORM_SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "d": 8, "dv": 6}
POSITIONAL = 4
OPTIONAL = ("gate",)

INPUTS = {"query": "B, H, N, d", "key": "B, H, T, d", "value": "B, H, T, dv", "gate": "B, H, N, dv"}
FORMS = {"gated": Form(FORM_SIZES, INPUTS)}
GIVEN = FORMS["gated"].arguments
CHANNELLESS = [{name: GIVEN[name][..., :0] for name in names} for names in (("query", "key"), ("value", "gate"))]


def attn_mask(*size, dtype=torch.bool):
    return {"attn_mask": torch.ones(size, dtype=dtype)}


MISTAKES = {
    "gated": {
        "query without channels": (
            CHANNELLESS[0],
            ValueError,
            ["query must have at least one channel (d), got shape [2, 3, 5, 0]"],
        ),
        "value without channels": (
            CHANNELLESS[1],
            ValueError,
            ["value must have at least one channel (dv), got shape [2, 3, 4, 0]"],
        ),
        "attn_mask a list": ({"attn_mask": [True]}, TypeError, ["attn_mask must be a torch.Tensor, got list"]),
        **{what: mistake for what, *mistake in of_layouts("attn_mask", torch.ones(2, 4))},
        "attn_mask elsewhere": (
            {"attn_mask": torch.ones(2, 4, device="meta")},
            ValueError,
            ["attn_mask must be on query's device cpu, got meta"],
        ),
        **{
            f"attn_mask of {dtype}": (
                attn_mask(2, 4, dtype=dtype),
                ValueError,
                ["attn_mask must be bool (True = attend) or floating point (added to the scores)", f"got {dtype}"],
            )
            for dtype in (torch.int64, torch.uint8, torch.complex64)
        },
        **{
            f"attn_mask of {dtype}, of zeros and ones": (
                attn_mask(2, 4, dtype=dtype),
                ValueError,
                [f"got {dtype}: attn_mask.bool() makes zeros and ones a mask"],
            )
            for dtype in (torch.int64, torch.int32, torch.uint8)
        },
        **{
            f"attn_mask {size} {dtype}": (
                attn_mask(*size, dtype=dtype),
                ValueError,
                [
                    "attn_mask must have shape [B, T] = [2, 4] or broadcast to [B, H, N, T] = [2, 3, 5, 4]",
                    f"got {list(size)}",
                ],
            )
            for dtype in (torch.bool, torch.float32)
            for size in (
                (3,),
                (0,),
                (2, 3),
                (2, 5),
                (3, 4),
                (0, 4),
                (4, 2),
                (2, 5, 4),
                (1, 2, 5, 4),
                (3, 3, 5, 4),
                (2, 3, 4, 4),
                (2, 3, 5, 5),
                (2, 3, 5, 0),
                (1, 2, 3, 5, 4),
            )
        },
        **{
            f"attn_mask {size} per query": (
                attn_mask(*size),
                ValueError,
                [f"got {list(size)}: a mask per query is [1, 1, N, T], attn_mask[None, None]"],
            )
            for size in ((5, 4), (5, 1))
        },
        # SDPA's fourth argument is the mask.
        **{
            f"gate a mask {list(value.shape)} {value.dtype}": (
                {"gate": value},
                ValueError,
                [f"gate must {told}", "did you mean attn_mask=?"],
            )
            for value, told in (
                (torch.ones(2, 4, dtype=torch.bool), "be float32"),
                (torch.ones(2, 1, 1, 4, dtype=torch.bool), "be float32"),
                (torch.ones(2, 3, 5, 6, dtype=torch.bool), "be float32"),
                (torch.ones(2, 4, dtype=torch.int64), "be float32"),
                (torch.ones(2, 4), "have shape [B, H, N, dv] = [2, 3, 5, 6], got [2, 4]"),
                (torch.ones(1, 1, 5, 4), "have shape"),
                (torch.ones(5, 4), "have shape"),
                (torch.ones(2, 3, 5, 4), "have shape"),
                (torch.ones(2, 1, 1, 4).double(), "have query's dtype"),
            )
        },
    }
}

KEPT = {"_backward": {"grad_result": "B, H, N, dv", "attended": "B, H, N, dv", "softmax": "B, H, 2, N"}}
KERNELS = {
    "tokens": (
        Form(FORM_SIZES, INPUTS | {"tokens": "B, H, T"}, pairs=None, bias=None, scale=0.5, need_attended=True),
        KEPT,
    ),
    "pairs": (
        Form(
            FORM_SIZES, INPUTS | {"tokens": "B, H, T", "pairs": "B, H, N, T"}, bias=None, scale=0.5, need_attended=True
        ),
        KEPT,
    ),
    "bias": (
        Form(FORM_SIZES, INPUTS | {"bias": "B, H, N, T"}, tokens=None, pairs=None, scale=0.5, need_attended=True),
        KEPT,
    ),
}
TOKENS, PAIRS, BIAS = ({name: form.tensors[name]} for name, (form, _) in KERNELS.items())
WRONG = {
    "tokens": {
        "queries without channels": CHANNELLESS[0],
        "values without channels": CHANNELLESS[1],
        "bias, too": BIAS,
    },
    "pairs": {"no tokens": {"tokens": None}, "bias, too": BIAS, "bias for tokens": {"tokens": None} | BIAS},
    "bias": {"tokens, too": TOKENS, "pairs, too": PAIRS, "tokens and pairs, too": TOKENS | PAIRS},
}
