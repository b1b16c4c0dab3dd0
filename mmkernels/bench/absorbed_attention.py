"""Absorbed attention next to the same in plain PyTorch, eager and compiled, and the modules that absorb their
projections next to whole layers: Hugging Face's fusion layer as installed, nn.MultiheadAttention, SDPA with
projections."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from .. import modules
from . import report
from .contests import Contest, Memory, contestants, installed, shape_name, small_calls
from .rows import least, most, share_of_library, values
from .rows import small_calls as small_call_figures

# B, H, N, T, D: Grounding DINO's fusion layer on 800 x 1333 pixels.
SHAPES = ((1, 4, 17_821, 16, 256), (1, 4, 17_821, 64, 256), (1, 4, 17_821, 256, 256))
QUICK = ((1, 4, 1600, 16, 64),)
BUDGET = 10.0
OPERATION = "absorbed_attention"
WANTED = ("image", "key", "value", "key_bias")


def inputs(shape, device):
    b, h, n, t, d = shape
    draw = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=draw).to(device)
    return {
        "image": normal(b, n, d),
        "key": normal(b, h, t, d) * d**-0.5,
        "value": normal(b, h, t, d),
        "key_bias": normal(b, h, t),
    }


# The fusion layer ----------------------------------------------------------------------------------------------------


def layer_inputs(shape, device):
    b, _, n, t, d = shape
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(b, size, d, generator=draw).to(device) for name, size in (("image", n), ("text", t))}


def _layer(kind):
    """A module with D channels a head."""

    def make(arguments):
        torch.manual_seed(0)
        channels = arguments["image"].shape[2]
        return kind(channels, channels, 4 * channels, 4).to(arguments["image"].device)

    return make


class _TwoSDPA(modules.BidirectionalAttention):
    """The same layer as people write it with PyTorch's fused attention, once each way."""

    def forward(self, image, text):
        heads = lambda t: t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        query, value = heads(self.image_query_projection(image)), heads(self.image_value_projection(image))
        text_key, text_value = heads(self.text_key_projection(text)), heads(self.text_value_projection(text))
        image_out = scaled_dot_product_attention(query, text_key, text_value).transpose(1, 2).flatten(2)
        text_out = scaled_dot_product_attention(text_key, query, value).transpose(1, 2).flatten(2)
        return self.image_out_projection(image_out), self.text_out_projection(text_out)


def _hugging_face(image_dim, text_dim, embed_dim, num_heads):
    from transformers import GroundingDinoConfig
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

    class Layer(GroundingDinoBiMultiHeadAttention):
        def forward(self, image, text):
            (image_out, _), (text_out, _) = super().forward(image, text)
            return image_out, text_out

    config = GroundingDinoConfig(
        d_model=image_dim,
        encoder_ffn_dim=2 * embed_dim,
        encoder_attention_heads=2 * num_heads,
        fusion_dropout=0.0,
    )
    return Layer(config)


def _layer_checked(arguments):
    b, n, d = arguments["image"].shape
    return [inputs((b, 4, n, arguments["text"].shape[1], d), arguments["image"].device)]


NEEDS = {"hugging face": "transformers"}
LAYERS = installed(
    {
        "ours": _layer(modules.BidirectionalAttention),
        "sdpa": _layer(_TwoSDPA),
        "hugging face": _layer(_hugging_face),
    },
    NEEDS,
)


# Pooling heads -------------------------------------------------------------------------------------------------------

# B, N, D, heads, channels of all heads, queries and their channels: SigLIP's head, CLIP's attention pool, Q-Former's
# cross-attention, Perceiver's.
POOLINGS = (
    (8, 729, 1152, 16, 1152, 1, 1152),
    (32, 50, 2048, 32, 2048, 1, 2048),
    (16, 257, 1408, 12, 768, 32, 768),
    (1, 50_176, 261, 1, 261, 512, 1024),
)
# What the README's table calls the shapes.
WHOSE = {
    **{shape: f"{shape[3]} tokens" for shape in SHAPES},
    **dict(zip(POOLINGS, ("SigLIP's", "CLIP's", "Q-Former's", "Perceiver's"))),
}


def _pooling_inputs(shape, device):
    b, n, d, heads, embed, queries, query_dim = shape
    draw = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=draw).to(device)
    return {"image": normal(b, n, d), "query": normal(b, queries, query_dim), "embed": embed, "heads": heads}


class _Pooling(modules.AttentionPooling):
    def forward(self, image, query, embed, heads):
        return super().forward(image, query)


class _SDPAPooling(_Pooling):
    def forward(self, image, query, embed, heads):
        split = lambda t: t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        query, key = split(self.query_projection(query)), split(self.key_projection(image))
        pooled = scaled_dot_product_attention(query, key, split(self.value_projection(image)))
        return self.out_projection(pooled.transpose(1, 2).flatten(2))


class _MultiheadPooling(nn.Module):
    """nn.MultiheadAttention, whose result has the queries' channels: they are projected where heads have others."""

    def __init__(self, image_dim, num_heads, query_dim, embed_dim):
        super().__init__()
        same = query_dim == embed_dim
        self.before, self.after = (
            nn.Identity() if same else nn.Linear(*sizes) for sizes in ((query_dim, embed_dim), (embed_dim, query_dim))
        )
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, kdim=image_dim, vdim=image_dim, batch_first=True)

    def forward(self, image, query, embed, heads):
        return self.after(self.attention(self.before(query), image, image, need_weights=False)[0])


def _pooling(kind):
    def make(arguments):
        torch.manual_seed(0)
        image, query = arguments["image"], arguments["query"]
        if kind is _MultiheadPooling:
            module = kind(image.shape[2], arguments["heads"], query.shape[2], arguments["embed"])
        else:
            module = kind(
                image.shape[2],
                arguments["heads"],
                query_dim=query.shape[2],
                out_dim=query.shape[2],
                embed_dim=arguments["embed"],
            )
        return module.to(image.device)

    return make


def _pooling_checked(arguments):
    image, query = arguments["image"], arguments["query"]
    b, n, d = image.shape
    draw = torch.Generator().manual_seed(1)  # keys that are no rows of the image
    key = torch.randn(b, arguments["heads"], query.shape[1], d, generator=draw) * d**-0.5
    return [{"image": image, "key": key.to(image.device)}]


POOLS = {"ours": _pooling(_Pooling), "sdpa": _pooling(_SDPAPooling), "multihead": _pooling(_MultiheadPooling)}
PEERS = contestants(OPERATION, "eager", "compile")


def _pooling_contests(shapes, quick):
    common = {"shapes": shapes, "checked": _pooling_checked, "quick": quick}
    yield Contest(OPERATION, "pooling head, ms", _pooling_inputs, POOLS, **common)
    yield Contest(
        OPERATION, "pooling head, forward + backward, ms", _pooling_inputs, POOLS, wanted=("image",), **common
    )


PARTS = (
    Contest(
        OPERATION,
        "forward, ms",
        inputs,
        PEERS,
        columns=share_of_library(lambda b, h, n, t, d: 6 * b * h * n * t * d),
    ),
    Contest(
        OPERATION,
        "forward + backward, ms",
        inputs,
        PEERS,
        wanted=WANTED,
        columns=share_of_library(lambda b, h, n, t, d: 20 * b * h * n * t * d),
    ),
    Contest(OPERATION, "fusion layer, ms", layer_inputs, LAYERS, checked=_layer_checked),
    Contest(
        OPERATION,
        "fusion layer, forward + backward, ms",
        layer_inputs,
        LAYERS,
        wanted=("image",),
        checked=_layer_checked,
    ),
    Memory(
        "fusion layer's memory beyond the results, MB",
        layer_inputs,
        LAYERS,
        known=lambda arguments: sum(t.nbytes for t in arguments.values()),
    ),
    *_pooling_contests(POOLINGS, quick=False),
    *small_calls(OPERATION, inputs, (1, 2, 4, 4, 8), WANTED),
)


def figures(rows):
    """Targets of the fusion layer by its tokens, and of the pooling heads."""
    for shape, layer, forward in zip(SHAPES, (20, 9, 4), (1.5, 1.5, 2.5)):
        name = shape_name(shape)
        of_shape = lambda row, name=name: row["shape"] == name
        tokens = f"{shape[3]} tokens"
        for kind, column, target in (
            ("fusion layer, ms", "vs hugging face", layer),
            ("forward, ms", "speed-up", forward),
            ("forward + backward, ms", "speed-up", 1.4),
        ):
            if found := values(rows, kind, column, only=of_shape):
                title = f"{kind.removesuffix(', ms')}, {tokens}, against {_peer(column)}"
                yield report.Figure(title, target, least(found))
    heads = (10, "vs multihead"), (3, "vs multihead"), (1.5, "vs multihead"), (1, "vs sdpa")
    for shape, (target, column) in zip(POOLINGS, heads):
        name = shape_name(shape)
        if found := values(rows, "pooling head, ms", column, only=lambda row, name=name: row["shape"] == name):
            yield report.Figure(f"{WHOSE[shape]} pooling head, against {_peer(column)}", target, least(found))
    few = [row["ours"] for row in rows if "memory" in row["kind"] and row["shape"] == shape_name(SHAPES[0])]
    if few and few[0] is not None:
        yield report.Figure("fusion layer's memory, 16 tokens, MB", 12, most(few), at_most=True, unit=" MB")
    yield from small_call_figures(rows)


def _peer(column):
    return {"speed-up": "the best of plain PyTorch"}.get(column, column.removeprefix("vs "))
