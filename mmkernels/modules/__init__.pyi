# Written by make docs.
from .absorbed_attention import *  # noqa: F403
from .additive_attention import *  # noqa: F403
from .bidirectional_attention import *  # noqa: F403
from .channel_attention import *  # noqa: F403
from .deformable_attention import *  # noqa: F403
from .gated_cross_attention import *  # noqa: F403
from .spatial_attention import *  # noqa: F403
