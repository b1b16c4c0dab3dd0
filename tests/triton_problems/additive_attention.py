"""Shapes: image's, and A. Few rows: the libraries' products run."""

import torch

KERNELS = {
    "activate",
    "normalise",
    "pool",
    "spread",
    "differentiate_weights",
    "differentiate_scores",
    "differentiate",
    "combine",
    "add_columns",
}
SHARED_BUDGET = 32 << 10
PROBLEMS = {
    "a bag of 1024 channels, A = 256, gated, bf16": (
        (1, 2000, 1024, 256),
        "bfloat16",
        {"gated": True, "masked": True, "need_scores": True},
    ),
    "packed bags of 512 channels, A = 128, gelu, 4 maps, fp16": (
        (2000, 512, 128),
        "float16",
        {"bags": 8, "activation": 2, "maps": 4},
    ),
    "a bag of 512 channels, A = 256, gated, dropout, fp32": (
        (1, 500, 512, 256),
        "float32",
        {"gated": True, "dropout_p": 0.25},
    ),
    "a bag of 64 channels, A = 40, gelu, dropout, bf16": (
        (1, 500, 64, 40),
        "bfloat16",
        {"activation": 2, "dropout_p": 0.5},
    ),
    "36 x 2048, A = 512, relu, multiplied, fp32": ((4, 36, 2048, 512), "float32", {"activation": 1, "pool": False}),
}


def launch(
    module,
    shape,
    dtype,
    bags=None,
    gated=False,
    masked=False,
    activation=0,
    maps=1,
    pool=True,
    dropout_p=0.0,
    need_scores=False,
):
    *image, hidden = shape
    image = torch.zeros(image, dtype=getattr(torch, dtype))
    layer = lambda rows, columns: image.new_zeros(rows, columns)
    mask = torch.ones(image.shape[:-1], dtype=torch.bool) if masked else None
    offsets = torch.linspace(0, len(image), bags + 1).long() if bags else None
    inputs = (
        image,
        layer(bags or len(image), 8),
        layer(hidden, image.shape[-1]),
        layer(hidden, 8),
        layer(maps, hidden),
        image.new_zeros(hidden),
        layer(hidden, image.shape[-1]) if gated else None,
        image.new_zeros(hidden) if gated else None,
        mask,
        offsets,
        torch.tensor(0) if dropout_p else None,
    )
    options = activation, pool, dropout_p, need_scores, 0
    result, weights, scores, kept = module.forward(*inputs, *options)
    module.backward(result, weights, scores if need_scores else None, *inputs, weights, kept, *options, *[True] * 8)
