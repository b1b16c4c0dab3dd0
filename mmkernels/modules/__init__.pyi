# Written by make docs.
# ruff: noqa: F403
from .absorbed_attention import *
from .additive_attention import *
from .bidirectional_attention import *
from .channel_attention import *
from .deformable_attention import *
from .gated_cross_attention import *
from .spatial_attention import *
