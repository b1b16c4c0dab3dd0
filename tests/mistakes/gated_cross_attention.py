"""gated_cross_attention: see the package."""

import torch

from . import Form, of_layouts

SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "d": 8, "dv": 6}
POSITIONAL = 4
OPTIONAL = ("gate",)

INPUTS = {"query": "B, H, N, d", "key": "B, H, T, d", "value": "B, H, T, dv", "gate": "B, H, N, dv"}
FORMS = {"gated": Form(SIZES, INPUTS)}
GIVEN = FORMS["gated"].arguments
CHANNELLESS = [{name: GIVEN[name][..., :0] for name in names} for names in (("query", "key"), ("value", "gate"))]


def mask(*size, dtype=torch.bool):
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
                mask(2, 4, dtype=dtype),
                ValueError,
                ["attn_mask must be bool (True = attend) or floating point (added to the scores)", f"got {dtype}"],
            )
            for dtype in (torch.int64, torch.uint8, torch.complex64)
        },
        **{
            f"attn_mask of {dtype}, of zeros and ones": (
                mask(2, 4, dtype=dtype),
                ValueError,
                [f"got {dtype}: attn_mask.bool() makes zeros and ones a mask"],
            )
            for dtype in (torch.int64, torch.int32, torch.uint8)
        },
        **{
            f"attn_mask {size} {dtype}": (
                mask(*size, dtype=dtype),
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
                mask(*size),
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
    "tokens": (Form(SIZES, INPUTS | {"tokens": "B, H, T"}, pairs=None, bias=None, scale=0.5, need_attended=True), KEPT),
    "pairs": (
        Form(SIZES, INPUTS | {"tokens": "B, H, T", "pairs": "B, H, N, T"}, bias=None, scale=0.5, need_attended=True),
        KEPT,
    ),
    "bias": (
        Form(SIZES, INPUTS | {"bias": "B, H, N, T"}, tokens=None, pairs=None, scale=0.5, need_attended=True),
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
