"""torchmil: attention-based pooling of bags."""

from torch import nn

from .. import functional
from ..modules.common import is_plain_linear
from ..torch_private import has_hooks
from .patching import Replacement, exported, plain
from .pooling import plain_linears


def convert(module):
    linears = _linears(module)
    if any(isinstance(linear, nn.LazyLinear) for linear in linears):
        return "its parameters aren't made yet: call it once, and patch then"
    return plain_linears(*linears) or Replacement("additive_attention", forward)


def forward(module, X, mask=None, return_att=False):
    """``AttentionPool``. Scores before the softmax are returned its own way."""
    linears = _linears(module)
    wrappers = [module.fc1, *([module.fc_gated] if module.gated else [])]
    if return_att or exported() or not all(map(is_plain_linear, linears)) or any(map(has_hooks, wrappers)):
        return plain(module, X, mask, return_att)
    hidden, score, *gate = linears
    pooled = functional.additive_attention(
        X,
        None,
        hidden.weight,
        None,
        score.weight,
        bias=hidden.bias,
        w_gate=gate[0].weight if gate else None,
        bias_gate=gate[0].bias if gate else None,
        activation=module.act,
        mask=None if mask is None else mask != 0,
    )
    return pooled.squeeze(1)


def _linears(module):
    """Hidden, score, and the gate where there is one."""
    return [module.fc1.module, module.fc2, *([module.fc_gated.module] if module.gated else [])]


CONVERTERS = {"torchmil.nn.attention.attention_pool.AttentionPool": convert}
