"""Whether somebody wants a module's attention weights, which public modules return always and mostly throw away."""

import threading

import torch

from ...torch_private import has_hooks
from ..patching import plain

# Threads that run an encoder with output_attentions, in each of its modules.
WANTED = "_mmkernels_weights_wanted"


def weights_wanted(module):
    """Asked for with ``output_attentions`` of an encoder above, or recorded by transformers' own hooks."""
    threads = module.__dict__.get(WANTED)
    if threads and (torch.compiler.is_compiling() or threading.get_ident() in threads):
        return True
    return _recorded(module)


def _recorded(module):
    """Whether transformers collects attentions during this call (transformers/utils/output_capturing.py). A version
    that doesn't tell has them computed, and so has a module that is compiled by itself below a model that may ask: its
    hooks come with the first who does."""
    try:
        from transformers.utils.output_capturing import _active_collector as collector
    except ImportError:
        return True
    if not torch.compiler.is_compiling():
        collected = collector.get()
    elif collector.compiling:
        collected = collector.global_var
    else:
        return has_hooks(module)
    return collected is not None and any(key.endswith("attentions") for key in collected)


def encoder_forward(module, *arguments, output_attentions=None, **named):
    """A companion: tells what is inside of an encoder that its weights are wanted."""
    wanted = module.config.output_attentions if output_attentions is None else output_attentions
    if not wanted:
        return plain(module, *arguments, output_attentions=output_attentions, **named)
    thread = None if torch.compiler.is_compiling() else threading.get_ident()
    inside = list(module.modules())
    for part in inside:
        part.__dict__.setdefault(WANTED, []).append(thread)
    try:
        return plain(module, *arguments, output_attentions=output_attentions, **named)
    finally:
        for part in inside:
            part.__dict__[WANTED].remove(thread)
