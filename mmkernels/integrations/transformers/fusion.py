"""The fusion layer of Grounding DINO and MM-Grounding DINO: image and text attend to each other, absorbed."""

from ...modules.bidirectional_attention import BidirectionalAttention
from ..patching import Replacement, exported, plain
from .weights import encoder_forward, weights_wanted


def convert(module):
    if module.training and module.dropout:
        return f"it trains with dropout {module.dropout} of attention weights, which are never written"
    return Replacement("bidirectional_attention", forward, companion=encoder_forward)


def convert_encoder(module):
    return Replacement(None, encoder_forward)


def forward(module, vision_features, text_features, vision_attention_mask=None, text_attention_mask=None):
    """Masks are True where padded."""
    if (module.training and module.dropout) or weights_wanted(module) or exported():
        return plain(module, vision_features, text_features, vision_attention_mask, text_attention_mask)
    vision, text = Projections(module).forward(
        vision_features,
        text_features,
        image_mask=None if vision_attention_mask is None else ~vision_attention_mask.bool(),
        text_mask=None if text_attention_mask is None else ~text_attention_mask.bool(),
    )
    return (vision, None), (text, None)


class Projections:
    """A module's projections under the names of :class:`mmkernels.BidirectionalAttention`, which computes with them.
    Looked up in each call: they may be exchanged meanwhile."""

    absorb = None
    backend = None
    forward = BidirectionalAttention.forward
    _projected = BidirectionalAttention._projected
    _absorbs = BidirectionalAttention._absorbs
    _absorbed = BidirectionalAttention._absorbed

    def __init__(self, module):
        self.embed_dim = module.embed_dim
        self.num_heads = module.num_heads
        self.scale = module.scale
        self.image_query_projection = module.vision_proj
        self.text_key_projection = module.text_proj
        self.image_value_projection = module.values_vision_proj
        self.text_value_projection = module.values_text_proj
        self.image_out_projection = module.out_vision_proj
        self.text_out_projection = module.out_text_proj
