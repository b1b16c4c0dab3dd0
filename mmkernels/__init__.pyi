from typing import Any

import torch

from . import functional as functional
from . import reference as reference
from .backends import BackendError as BackendError
from .functional import additive_attention as additive_attention
from .functional import bidirectional_attention as bidirectional_attention
from .functional import channel_attention as channel_attention
from .functional import gated_cross_attention as gated_cross_attention
from .functional import spatial_attention as spatial_attention
from .modules import AdditiveAttention as AdditiveAttention
from .modules import BidirectionalAttention as BidirectionalAttention
from .modules import ChannelAttention as ChannelAttention
from .modules import GatedCrossAttention as GatedCrossAttention
from .modules import SpatialAttention as SpatialAttention

__version__: str

class OperationFunction(torch.autograd.Function):
    """``apply(*inputs, *options, backend)`` gives what the registered operation gives."""
    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]: ...

class AdditiveAttentionFunction(OperationFunction): ...
class BidirectionalAttentionFunction(OperationFunction): ...
class ChannelAttentionFunction(OperationFunction): ...
class GatedCrossAttentionFunction(OperationFunction): ...
class SpatialAttentionFunction(OperationFunction): ...
