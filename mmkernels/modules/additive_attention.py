from torch import nn

from .. import backends, checks, functional
from ..ops.common import autocast
from ..reference.additive_attention import ACTIVATIONS, combine_positions, drop, wanted
from ..reference.bags import Bags
from ..reference.dropout import GATE, HIDDEN, draw_seed
from .common import check_channels, check_image, check_input, may_be_read

__all__ = ["AdditiveAttention"]


class AdditiveAttention(nn.Module):
    """Attention whose scores come from a small network.

    Over image regions for a question (SAN, bottom-up-top-down), or over the patches of a slide without any query
    (attention-based multiple-instance learning, CLAM).

    A kernel reads the weights of the projections where all are plain ``nn.Linear``. Where one is anything else (it has
    hooks, is wrapped, pruned, parametrized, quantised or sharded) they are called, and plain PyTorch does the rest: the
    hidden matrix exists then.

    Args:
        image_dim: D, channels of the image features.
        hidden_dim: A, size of the hidden vector.
        query_dim: E, size of the query; None: no query.
        num_queries: K, attention maps.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        gated: whether a second projection gates the hidden vector by a sigmoid.
        dropout: the share of hidden units, and of gates, that training drops (where CLAM has it): ``dropout_p`` of
            :func:`mmkernels.additive_attention`.
        combine: ``"pool"`` or ``"multiply"`` (one map only), as in :func:`mmkernels.additive_attention`.
        bias: whether the projections have one.
        backend: as in :func:`mmkernels.additive_attention`.

    Shape:
        image ``[B, N, D]`` (packed: ``[rows, D]`` with ``offsets``), query ``[B, E]`` -> ``[B, K, D]``, or like image
        (``"multiply"``).
    """

    def __init__(
        self,
        image_dim,
        hidden_dim,
        query_dim=None,
        num_queries=1,
        activation="tanh",
        gated=False,
        dropout=0.0,
        *,
        combine="pool",
        bias=True,
        backend=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        backends.check(backend)
        checks.choice("activation", activation, tuple(ACTIVATIONS))
        checks.choice("combine", combine, ("pool", "multiply"))
        image_dim = checks.dimension("image_dim", image_dim)
        hidden_dim = checks.dimension("hidden_dim", hidden_dim)
        query_dim = None if query_dim is None else checks.dimension("query_dim", query_dim)
        num_queries = checks.dimension("num_queries", num_queries)
        if combine == "multiply" and num_queries != 1:
            raise ValueError(f"num_queries must be 1 with combine='multiply', got {num_queries}")
        bias = checks.flag("bias", bias)
        gated = checks.flag("gated", gated)
        dropout = checks.share("dropout", dropout)
        self.image_dim = image_dim
        self.hidden_dim = hidden_dim
        self.query_dim = query_dim
        self.num_queries = num_queries
        self.activation = activation
        self.gated = gated
        self.dropout = dropout
        self.combine = combine
        self.backend = backend
        options = {"device": device, "dtype": dtype}
        self.image_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options)
        self.query_projection = None if query_dim is None else nn.Linear(query_dim, hidden_dim, bias=False, **options)
        self.gate_projection = nn.Linear(image_dim, hidden_dim, bias=bias, **options) if gated else None
        self.score_projection = nn.Linear(
            hidden_dim, num_queries, bias=False, **options
        )  # a bias would cancel in the softmax

    def forward(self, image, query=None, *, mask=None, offsets=None, need_weights=False, need_scores=False):
        check_image(image, self.image_dim, offsets)
        if (query is None) != (self.query_projection is None):
            expected = "a torch.Tensor" if query is None else "None"
            raise ValueError(f"query must be {expected} with query_dim={self.query_dim}, got {type(query).__name__}")
        check_input("image", image, image_projection=self.image_projection, gate_projection=self.gate_projection)
        if query is not None:
            checks.features("query", query)
            check_input("query", query, query_projection=self.query_projection)
        if not may_be_read(
            "additive_attention",
            self.backend,
            image_projection=self.image_projection,
            query_projection=self.query_projection,
            gate_projection=self.gate_projection,
            score_projection=self.score_projection,
        ):
            need_weights = checks.flag("need_weights", need_weights)
            need_scores = checks.flag("need_scores", need_scores)
            result, weights, scores = self._call_projections(image, query, mask, offsets)
            return wanted(result, (weights, need_weights), (scores, need_scores))
        gate = self.gate_projection
        return functional.additive_attention(
            image,
            query,
            self.image_projection.weight,
            None if self.query_projection is None else self.query_projection.weight,
            self.score_projection.weight,
            bias=self.image_projection.bias,
            w_gate=None if gate is None else gate.weight,
            bias_gate=None if gate is None else gate.bias,
            activation=self.activation,
            mask=mask,
            offsets=offsets,
            combine=self.combine,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            need_scores=need_scores,
            backend=self.backend,
        )

    def _call_projections(self, image, query, mask, offsets):
        """(result, weights, scores), in plain PyTorch."""
        image, query = autocast(image, query)
        if offsets is not None:
            offsets = checks.bag_offsets(offsets, image)
        batch, _, grid = checks.image_rows(image, offsets)
        if query is not None:
            checks.shape("query", query, ("B", batch), ("E", None))
        if mask is not None:
            checks.boolean_mask("mask", mask, "image", image, *grid)
            image = image.where(mask[..., None], 0)  # what is masked out may hold NaN
        bags = None if offsets is None else Bags.of(offsets, image.shape[0])
        hidden = self.image_projection(image)
        if query is not None:
            bias_hidden = self.query_projection(query)
            check_channels("query_projection", bias_hidden, hidden.shape[-1], "like image_projection")
            hidden = hidden + (bias_hidden[:, None] if bags is None else bags.spread(bias_hidden))
        seed = draw_seed(image.device) if self.training and self.dropout else None
        hidden = drop(ACTIVATIONS[self.activation](hidden), seed, HIDDEN, self.dropout)
        if self.gate_projection is not None:
            gate = self.gate_projection(image)
            check_channels("gate_projection", gate, hidden.shape[-1], "like image_projection")
            hidden = hidden * drop(gate.sigmoid(), seed, GATE, self.dropout)
        scores = self.score_projection(hidden)
        check_channels("score_projection", scores, self.num_queries)
        return combine_positions(image, scores, mask, bags, self.combine == "pool")

    def extra_repr(self):
        return (
            f"image_dim={self.image_dim}, hidden_dim={self.hidden_dim}, query_dim={self.query_dim}, "
            f"num_queries={self.num_queries}, "
            f"activation={self.activation!r}, gated={self.gated}, dropout={self.dropout}, "
            f"combine={self.combine!r}, backend={self.backend!r}"
        )
