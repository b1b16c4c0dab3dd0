"""A stacked attention network: a question looks at the image several times."""

import torch
from torch import nn

from .. import checks
from ..modules import AdditiveAttention
from ..modules.common import check_features
from .common import where_taking_part


class StackedAttentionNetwork(nn.Module):
    """Answers a question about an image by attending to it in several layers, each for what those before saw.

    ::

        v_n = tanh(W_I image_n + b_I),  u_0 = query
        u_k = u_(k-1) + sum_n softmax_n(w_k . tanh(W_k v_n + Q_k u_(k-1) + b_k)) v_n,  k = 1 to num_layers
        logits = W_u u_K + b_u

    A layer is one call of :func:`mmkernels.additive_attention`: its hidden vectors, ``N x hidden_dim``, are never
    written. (The paper's bias of the scores is left out: it cancels in the softmax.)

    Args:
        image_dim: D, channels of the image features (512 of VGG's 14 x 14 positions in the paper).
        query_dim: E, size of the question's vector, which the image is brought to.
        num_answers: classes.
        hidden_dim: A, size of the attention's hidden vector.
        num_layers: K, how often the question looks at the image.
        backend: as in :func:`mmkernels.additive_attention`.

    Shape:
        image ``[B, N, D]``, query ``[B, E]``, mask bool ``[B, N]`` (True = takes part) -> logits ``[B, num_answers]``;
        with ``need_weights`` also the layers' weights ``[B, K, N]``. What a masked position holds reaches nothing.

    Source: Yang et al. 2016, Stacked Attention Networks (arXiv:1511.02274), section 3.3.
    """

    def __init__(
        self, image_dim, query_dim, num_answers, *, hidden_dim=512, num_layers=2, backend=None, device=None, dtype=None
    ):
        super().__init__()
        self.image_dim = checks.dimension("image_dim", image_dim)
        self.query_dim = checks.dimension("query_dim", query_dim)
        num_answers = checks.dimension("num_answers", num_answers)
        options = {"device": device, "dtype": dtype}
        self.image_projection = nn.Linear(self.image_dim, self.query_dim, **options)
        self.layers = nn.ModuleList(
            AdditiveAttention(self.query_dim, hidden_dim, self.query_dim, backend=backend, **options)
            for _ in range(checks.dimension("num_layers", num_layers))
        )
        self.classifier = nn.Linear(self.query_dim, num_answers, **options)

    def forward(self, image, query, *, mask=None, need_weights=False):
        check_features("image", image, ("B", None), ("N", None), ("D", self.image_dim))
        check_features("query", query, ("B", image.shape[0]), ("E", self.query_dim))
        features = self.image_projection(where_taking_part("image", image, mask)).tanh()
        weights = []
        for layer in self.layers:
            seen, weight = layer(features, query, mask=mask, need_weights=True)
            query = query + seen[:, 0]
            weights.append(weight)
        logits = self.classifier(query)
        return (logits, torch.cat(weights, 1)) if need_weights else logits
