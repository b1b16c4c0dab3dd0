"""spatial_attention: layouts, bags, both ways to combine."""

import functools

import torch

from . import Variant, no_second, of_planes, of_rows, some

ROWS = {"image": "B N D", "text": "B D"}
PLANES = {"image": "B D Y X", "text": "B D"}
BAGS = {"image": "N D", "text": "bags D"}
SIZES = {"B": 2, "N": 4, "D": 6, "Y": 2, "X": 3, "bags": 3}
LARGE = {"B": 3, "N": 30, "D": 24, "Y": 5, "X": 6}

make = functools.partial(Variant, "spatial_attention", sizes=SIZES, tiny={"D": 4, "X": 2}, large=LARGE)
rows = functools.partial(make, ROWS, hidden={"image": ("mask", of_rows)})
planes = functools.partial(make, PLANES, hidden={"image": ("mask", of_planes)})
packed = functools.partial(make, BAGS, sizes=SIZES | {"N": 8}, hidden={"image": ("mask", of_rows)})


def bags(s):
    """The second is empty."""
    return torch.tensor([0, 3, 3, s.N])


VARIANTS = {
    "spatial": rows(
        options=lambda s: {"num_heads": 2, "mask": some(s.B, s.N), "need_weights": True},
        main=True,
    ),
    "spatial plain": rows(hidden={}),
    "spatial pool": rows(options=lambda s: {"combine": "pool", "mask": no_second(s.B, s.N), "need_weights": True}),
    "spatial scale": rows(options=lambda s: {"scale": 0.7, "combine": "pool"}, hidden={}),
    "spatial planes": planes(options=lambda s: {"layout": "bdhw", "rescale": True, "mask": no_second(s.B, s.Y, s.X)}),
    "spatial planes pool": planes(
        options=lambda s: {"layout": "bdhw", "combine": "pool", "num_heads": 2, "rescale": True}, hidden={}
    ),
    "spatial packed": packed(options=lambda s: {"offsets": bags(s), "mask": some(s.N), "need_weights": True}),
    "spatial packed pool": packed(
        main=True, options=lambda s: {"offsets": bags(s), "combine": "pool", "num_heads": 2, "mask": some(s.N)}
    ),
}
