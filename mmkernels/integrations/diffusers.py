"""diffusers: a processor of UNets' attention, ``unet.set_attn_processor(AttnProcessor())``."""

from .. import functional
from .patching import Replacement, exported

__all__ = ["AttnProcessor"]


class AttnProcessor:
    """As diffusers' ``AttnProcessor2_0``, with :func:`mmkernels.gated_cross_attention` on CPUs."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *arguments, **named
    ):
        if hidden_states.device.type != "cpu" or exported():
            return self._own(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *arguments, **named)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).mT
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens = states.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if encoder_hidden_states is None:
            states = hidden_states
        elif attn.norm_cross:
            states = attn.norm_encoder_hidden_states(states)
        heads = lambda projected: projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(states)), heads(attn.to_v(states))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        hidden_states = functional.gated_cross_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = attn.to_out[0](hidden_states.transpose(1, 2).flatten(2))
        hidden_states = attn.to_out[1](hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.mT.reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _own(self, attn, *arguments, **named):
        from diffusers.models.attention_processor import AttnProcessor2_0

        return AttnProcessor2_0()(attn, *arguments, **named)


def convert(module):
    """Known processors only, exactly: others carry norms, rotary embeddings, adapters."""
    kind = type(module.processor)
    if f"{kind.__module__}.{kind.__qualname__}" != "diffusers.models.attention_processor.AttnProcessor2_0":
        return f"its processor is {kind.__name__}, which may compute something else"
    return Replacement("gated_cross_attention", AttnProcessor(), "processor", note="on CPUs")


CONVERTERS = {"diffusers.models.attention_processor.Attention": convert}
