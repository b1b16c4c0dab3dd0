"""gated_cross_attention: see the package."""

import torch

from . import Form

SIZES = {"B": 2, "H": 3, "N": 5, "T": 4, "d": 8, "dv": 6}
POSITIONAL = 4
OPTIONAL = ("gate",)

INPUTS = {"query": "B, H, N, d", "key": "B, H, T, d", "value": "B, H, T, dv", "gate": "B, H, N, dv"}
FORMS = {"gated": Form(SIZES, INPUTS)}
GIVEN = FORMS["gated"].arguments
CHANNELLESS = [{name: GIVEN[name][..., :0] for name in names} for names in (("query", "key"), ("value", "gate"))]


def mask(*size, dtype=torch.bool):
    return {"attn_mask": torch.ones(size, dtype=dtype)}


MISTAKES = {"gated": {
    "query without channels": (CHANNELLESS[0], ValueError, ["query must have at least one channel (d), got shape [2, 3, 5, 0]"]),
    "value without channels": (CHANNELLESS[1], ValueError, ["value must have at least one channel (dv), got shape [2, 3, 4, 0]"]),
    "attn_mask a list": ({"attn_mask": [True]}, TypeError, ["attn_mask must be a torch.Tensor, got list"]),
    "attn_mask sparse": ({"attn_mask": torch.ones(2, 4).to_sparse()}, ValueError, ["attn_mask must be a dense", "torch.sparse_coo"]),
    "attn_mask elsewhere": ({"attn_mask": torch.ones(2, 4, device="meta")}, ValueError, ["attn_mask must be on query's device cpu, got meta"]),
    **{f"attn_mask of {dtype}": (mask(2, 4, dtype=dtype), ValueError,
                                 ["attn_mask must be bool (True = attend) or floating point (added to the scores)", f"got {dtype}"])
       for dtype in (torch.int64, torch.uint8, torch.complex64)},
    **{f"attn_mask {size} {dtype}": (mask(*size, dtype=dtype), ValueError,
                                     ["attn_mask must have shape [B, T] = [2, 4] or broadcast to [B, H, N, T] = [2, 3, 5, 4]", f"got {list(size)}"])
       for dtype in (torch.bool, torch.float32)
       for size in ((3,), (0,), (2, 3), (2, 5), (3, 4), (0, 4), (4, 2), (2, 5, 4), (1, 2, 5, 4), (3, 3, 5, 4), (2, 3, 4, 4), (2, 3, 5, 5),
                    (2, 3, 5, 0), (1, 2, 3, 5, 4))},
}}

KEPT = {"_backward": {"grad_result": "B, H, N, dv", "attended": "B, H, N, dv", "softmax": "B, H, 2, N"}}
KERNELS = {
    "tokens": (Form(SIZES, INPUTS | {"tokens": "B, H, T"}, pairs=None, bias=None, scale=0.5, need_attended=True), KEPT),
    "pairs": (Form(SIZES, INPUTS | {"tokens": "B, H, T", "pairs": "B, H, N, T"}, bias=None, scale=0.5, need_attended=True), KEPT),
    "bias": (Form(SIZES, INPUTS | {"bias": "B, H, N, T"}, tokens=None, pairs=None, scale=0.5, need_attended=True), KEPT),
}
TOKENS, PAIRS, BIAS = ({name: form.tensors[name]} for name, (form, _) in KERNELS.items())
WRONG = {
    "tokens": {"queries without channels": CHANNELLESS[0], "values without channels": CHANNELLESS[1], "bias, too": BIAS},
    "pairs": {"no tokens": {"tokens": None}, "bias, too": BIAS, "bias for tokens": {"tokens": None} | BIAS},
    "bias": {"tokens, too": TOKENS, "pairs, too": PAIRS, "tokens and pairs, too": TOKENS | PAIRS},
}
