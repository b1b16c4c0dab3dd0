"""MONAI: the attention of ``MILModel``'s three attention modes."""

from torch import nn

from .. import functional
from ..modules.common import is_plain, reaching
from .patching import Replacement, exported
from .pooling import plain_linears


def convert(module):
    return _reason(module) or Replacement("additive_attention", calc_head, "calc_head")


def _reason(module):
    if module.mil_mode not in ("att", "att_trans"):
        kind = "pools without attention" if module.mil_mode in ("mean", "max") else "keeps features of its layers"
        return f"mil_mode={module.mil_mode!r} {kind}"
    attention = module.attention
    kinds = [type(part) for part in attention] if is_plain(attention, nn.Sequential) else []
    if kinds != [nn.Linear, nn.Tanh, nn.Linear] or not is_plain(attention[1], nn.Tanh):
        return "its attention isn't Linear, Tanh, Linear, without hooks"
    return plain_linears(attention[0], attention[2])


def calc_head(module, x):
    """What the score's bias adds cancels in the softmax."""
    if exported() or _reason(module) is not None:
        return type(module).calc_head(module, x)
    if module.mil_mode == "att_trans":
        x = module.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    hidden, _, score = module.attention
    pooled = functional.additive_attention(x, None, hidden.weight, None, score.weight, bias=hidden.bias)[:, 0]
    return module.myfc(reaching(pooled, score.bias))


CONVERTERS = {"monai.networks.nets.milmodel.MILModel": convert}
