"""Activation checkpointing: what layers compute forward is thrown away, and computed again backward."""

import functools
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputation(model, wanted=True):
    """While this lasts, each of the model's layers (its encoders, fusions, ...) keeps its arguments alone.

    Results and gradients are the same to the bit, dropout included.
    """
    layers = list(layers_of(model)) if wanted else []
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        contexts = functools.partial(_contexts, layer)
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def layers_of(model):
    """The model's own layers that have parameters; lists of layers are none."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from layers_of(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _contexts(layer):
    """Of a layer's forward, and of its repetition, which must not count a batch for the second time."""
    return nullcontext(), _other_buffers(layer)


@contextmanager
def _other_buffers(layer):
    """Copies in place of what a layer keeps track of, as batch normalisation does."""
    before = [
        (module, name, buffer) for module in layer.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in before:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in before:
            setattr(module, name, buffer)
