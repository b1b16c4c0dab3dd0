"""gated_cross_attention: with and without a gate; masks of tokens, of pairs, and such as are added."""

import functools

from . import Variant, no_second, of_tokens, some

SHAPES = {"query": "B H N d", "key": "B H T d", "value": "B H T dv"}
GATED = SHAPES | {"gate": "B H N dv"}
SIZES = {"B": 2, "H": 2, "N": 4, "T": 3, "d": 5, "dv": 6, "one": 1}
TINY = {"N": 3, "d": 2, "dv": 2}
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
