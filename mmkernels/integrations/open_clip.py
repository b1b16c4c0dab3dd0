"""open_clip: the attention pool of CLIP's ResNets. CoCa's pooler holds an ``nn.MultiheadAttention``, which is known by
itself (:mod:`.multihead`)."""

import torch
from torch.nn.functional import linear

from ..modules.common import is_plain_linear
from .patching import Replacement, plain
from .pooling import attend, pays, plain_linears


def convert(module):
    return plain_linears(module.q_proj, module.k_proj, module.v_proj, module.c_proj) or Replacement(
        "absorbed_attention", forward
    )


def forward(module, x):
    """The mean is the query. open_clip computes every position's, and keeps the first."""
    image = x.flatten(2).mT
    heads = module.num_heads
    projections = module.q_proj, module.k_proj, module.v_proj, module.c_proj
    width = module.q_proj.weight.shape[0] // heads
    weights = [projection.weight for projection in projections]
    if not all(map(is_plain_linear, projections)) or not pays(image, 1, heads, width, *weights):
        return plain(module, x)
    image = torch.cat([image.mean(1, keepdim=True), image], dim=1)
    image = image + module.positional_embedding.to(x.dtype)
    biases = [projection.bias for projection in projections]
    pooled = attend(image, image[:, :1], weights[:3], biases[:3], heads, width**-0.5)
    return linear(pooled[:, 0], module.c_proj.weight, module.c_proj.bias)


CONVERTERS = {"open_clip.modified_resnet.AttentionPool2d": convert}
