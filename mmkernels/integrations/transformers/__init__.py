"""Hugging Face transformers: what :func:`mmkernels.patch` knows of its classes, and attention by name."""

__all__ = ["register"]


def register():
    """Makes ``model.set_attn_implementation("mmkernels")`` work, of all models that let their attention be chosen.

    Registers both what attends (:func:`mmkernels.gated_cross_attention`, without a gate) and what makes masks: without
    the second, transformers would drop padding without a word. transformers' own ``"sdpa"`` computes what the operation
    doesn't (dropout in training, causal attention without a mask, position bias) and what it computes as fast: anything
    on other devices than CPUs, few queries, few scores, masks of each query's own. Graphs for ONNX get it, too.
    Attention sinks are an error, since it would leave them out. Calling it again changes nothing.
    """
    from . import interface

    interface.register()
