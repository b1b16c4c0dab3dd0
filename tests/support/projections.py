"""The modules that project, each with its definition in plain PyTorch, and what tests ask of them."""

import copy
import functools

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk
from mmkernels import reference
from mmkernels.reference.additive_attention import ACTIVATIONS

from .attention_tests import assert_rule, draw

B, N, T, D, E = 3, 6, 4, 8, 5
MASK = torch.arange(B * N).view(B, N) % 4 > 0
OFFSETS = torch.tensor([0, 4, 4, B * N])

# The definitions. What the projections give in their own dtype goes on in `dtype`.


def spatial(module, image, vector, dtype):
    return reference.spatial_attention(image.to(dtype), module.text_projection(vector).to(dtype), num_heads=2)


def _heads(tensor, dtype):
    return tensor.to(dtype).unflatten(-1, (2, -1)).transpose(1, 2)


def _joined(tensor, image):
    return tensor.transpose(1, 2).flatten(2).to(image.dtype)


def gated(module, image, tokens, dtype):
    query, key, value, gate = (
        _heads(t, dtype)
        for t in (
            module.query_projection(image),
            module.key_projection(tokens),
            module.value_projection(tokens),
            module.gate_projection(image).relu(),
        )
    )
    return module.out_projection(_joined(reference.gated_cross_attention(query, key, value, gate), image))


def bidirectional(module, image, tokens, dtype):
    projected = (
        module.image_query_projection(image),
        module.text_key_projection(tokens),
        module.image_value_projection(image),
        module.text_value_projection(tokens),
    )
    image_out, text_out = reference.bidirectional_attention(*(_heads(t, dtype) for t in projected))
    return module.image_out_projection(_joined(image_out, image)), module.text_out_projection(_joined(text_out, image))


def pooling(module, image, query, dtype):
    projected = module.query_projection(query), module.key_projection(image), module.value_projection(image)
    result = reference.gated_cross_attention(*(_heads(t, dtype) for t in projected))
    return module.out_projection(_joined(result, image))


LEVELS, POINTS = ((2, 2), (1, 2)), (2, 1)
REFERENCE_POINTS = torch.rand(1, T, 2, 2, generator=torch.Generator().manual_seed(3)).expand(B, -1, -1, -1)


class Deformable(mmk.DeformableAttention):
    """Called as the others are."""

    def forward(self, image, tokens):
        return super().forward(tokens, image, REFERENCE_POINTS[: len(image)], LEVELS)


def deformable_layer():
    """Its offsets and scores depend on the queries, as they do after some training."""
    module = Deformable(D, 2, 2, POINTS)
    nn.init.normal_(module.offset_projection.weight)
    nn.init.normal_(module.score_projection.weight)
    return module


def deformable(module, image, tokens, dtype):
    heads = lambda t, *sizes: t.to(dtype).unflatten(-1, (2, *sizes))
    sizes = torch.tensor([(2, 2), (2, 2), (2, 1)])
    offsets = heads(module.offset_projection(tokens), 3, 2) / sizes
    locations = REFERENCE_POINTS.to(dtype)[:, :, None, [0, 0, 1]] + offsets
    value, scores = heads(module.value_projection(image), -1), heads(module.score_projection(tokens), 3)
    result = reference.deformable_attention(value, LEVELS, locations, scores, points=POINTS)
    return module.out_projection(result.to(image.dtype))


def channel(module, image, vector, dtype):
    both = torch.cat([image, vector[:, None].expand(-1, N, -1)], -1)
    return image.to(dtype) * module.score_projection(both).to(dtype).softmax(-1)


def _additive_scores(module, image, rows_of_vector, dtype):
    hidden = ACTIVATIONS[module.activation](module.image_projection(image) + rows_of_vector(module.query_projection))
    return module.score_projection(hidden * module.gate_projection(image).sigmoid()).to(dtype)


def additive(module, image, vector, dtype):
    image = image.where(MASK[..., None], 0)
    scores = _additive_scores(module, image, lambda project: project(vector)[:, None], dtype)
    weights = scores.masked_fill(~MASK[..., None], float("-inf")).softmax(1).mT
    return weights @ image.to(dtype), weights


def packed(module, image, vector, dtype):
    image = image.flatten(0, 1)
    sizes = OFFSETS.diff()
    scores = _additive_scores(module, image, lambda project: project(vector).repeat_interleave(sizes, 0), dtype)
    weights = torch.cat([s.softmax(0) for s in scores.split(sizes.tolist())])
    return weights * image.to(dtype), weights.mT


class Kind:
    """A module, how it is called, and its definition."""

    def __init__(self, operation, make, text, define, call=None):
        self.operation = operation
        self.make = make
        self.text = text
        self.define = define
        self.call = call or (lambda module, *tensors: module(*tensors))

    def module(self):
        torch.manual_seed(0)
        return self.make()

    def inputs(self):
        return draw(B, N, D), draw(B, *self.text, seed=1)


KINDS = {
    "spatial": Kind("spatial_attention", lambda: mmk.SpatialAttention(D, E, num_heads=2), (E,), spatial),
    "gated": Kind("gated_cross_attention", lambda: mmk.GatedCrossAttention(D, E, 2), (T, E), gated),
    "bidirectional": Kind(
        "bidirectional_attention", lambda: mmk.BidirectionalAttention(D, E, 12, 2), (T, E), bidirectional
    ),
    "gated, absorbed": Kind(
        "gated_cross_attention", lambda: mmk.GatedCrossAttention(D, E, 2, embed_dim=40), (T, E), gated
    ),
    "pooling, absorbed": Kind(
        "absorbed_attention", lambda: mmk.AttentionPooling(D, 2, query_dim=E, embed_dim=12), (T, E), pooling
    ),
    "deformable": Kind(
        "deformable_attention",
        deformable_layer,
        (T, D),
        deformable,
    ),
    "channel": Kind("channel_attention", lambda: mmk.ChannelAttention(D, E), (E,), channel),
    "additive": Kind(
        "additive_attention",
        lambda: mmk.AdditiveAttention(D, 7, E, num_queries=2, gated=True),
        (E,),
        additive,
        lambda module, *tensors: module(*tensors, mask=MASK, need_weights=True),
    ),
    "packed": Kind(
        "additive_attention",
        lambda: mmk.AdditiveAttention(D, 7, E, activation="gelu", gated=True, combine="multiply"),
        (E,),
        packed,
        lambda module, image, vector: module(image.flatten(0, 1), vector, offsets=OFFSETS, need_weights=True),
    ),
}


def projections(module):
    return {name: child for name, child in module.named_children() if name.endswith("_projection")}


def with_gradients(function, module, tensors):
    """Results, and the gradients of the inputs and of the parameters that have one."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    module.zero_grad()
    results = function(module, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    sum((r.double() * draw(*r.shape, dtype=torch.float64, seed=9 + i)).sum() for i, r in enumerate(results)).backward()
    parameters = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [*(r.detach() for r in results), *(t.grad for t in leaves), *parameters]


def only_results(function, module, tensors):
    results = function(module, *tensors)
    return results if isinstance(results, tuple) else (results,)


def assert_defined(kind, module, tensors):
    """The module computes its definition, forward and backward."""
    with torch.no_grad():
        kind.call(module, *tensors)  # weights that hooks compute have no graph then, and can be copied
    wide = copy.deepcopy(module).double()
    truth = with_gradients(functools.partial(kind.define, dtype=torch.float64), wide, [t.double() for t in tensors])
    peer = with_gradients(functools.partial(kind.define, dtype=torch.float32), module, tensors)
    assert_rule(with_gradients(kind.call, module, tensors), truth, peer)


def assert_results_defined(kind, module, tensors):
    """The results alone, of projections that can't be copied to float64: truth and peer have them as they are."""
    truth, peer = (
        only_results(functools.partial(kind.define, dtype=dtype), module, tensors)
        for dtype in (torch.float64, torch.float32)
    )
    assert_rule(only_results(kind.call, module, tensors), [t.double() for t in truth], peer)


def kernels_of(function, *arguments):
    """Which of our operations ran."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            if called.namespace == "mmkernels":
                found.append(called.name())
            return called(*args, **(kwargs or {}))

    found = []
    with Record():
        function(*arguments)
    return found
