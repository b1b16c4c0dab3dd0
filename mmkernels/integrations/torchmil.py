"""torchmil: attention-based pooling of bags."""

from torch import nn

from .. import functional
from ..modules.common import is_plain
from .patching import Replacement, exported, plain
from .pooling import plain_linears

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def convert(module):
    return _reason(module) or Replacement("additive_attention", forward)


def _reason(module):
    from torchmil.nn import LazyLinear

    wrappers = [module.fc1, *([module.fc_gated] if module.gated else [])]
    if not all(is_plain(wrapper, LazyLinear) for wrapper in wrappers):
        return "what projects its features was replaced, or has hooks"
    if any(isinstance(wrapper.module, nn.LazyLinear) for wrapper in wrappers):
        return "its parameters aren't made yet: call it once, and patch then"
    activation = module.act_layer
    if not is_plain(activation, ACTIVATIONS[module.act]) or getattr(activation, "approximate", "none") != "none":
        return f"its activation isn't {module.act} as it was made, without hooks"
    if module.gated and not is_plain(module.act_gated, nn.Sigmoid):
        return "its gate's activation isn't a sigmoid without hooks"
    return plain_linears(module.fc2, *(wrapper.module for wrapper in wrappers))


def forward(module, X, mask=None, return_att=False):
    """``AttentionPool``. Scores before the softmax are returned its own way, as is a score with a bias."""
    if return_att or exported() or _reason(module) is not None or module.fc2.bias is not None:
        return plain(module, X, mask, return_att)
    hidden, score = module.fc1.module, module.fc2
    gate = module.fc_gated.module if module.gated else None
    pooled = functional.additive_attention(
        X,
        None,
        hidden.weight,
        None,
        score.weight,
        bias=hidden.bias,
        w_gate=None if gate is None else gate.weight,
        bias_gate=None if gate is None else gate.bias,
        activation=module.act,
        mask=None if mask is None else mask != 0,
    )
    return pooled.squeeze(1)


CONVERTERS = {"torchmil.nn.attention.attention_pool.AttentionPool": convert}
