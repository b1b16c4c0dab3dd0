"""An operation with the layer that its ``bias_hidden`` comes from, both as one node of autograd's graph.

In a training step of a small call the layer's own nodes, and those of slices of its weight, cost half as much as all of
the operation. In plain eager calls, where nobody else looks at them, one Function computes what they would.
"""

import torch
from torch.overrides import has_torch_function

from .. import torch_private
from ..reference.precision import without_autocast
from .common import accumulate_dtype, cast, linear, needs_gradient
from .operation import Implementation
from .registration import carries_tangent


class Projected:
    """``operation`` where ``bias_hidden`` is ``text @ layer.T + bias``.

    Args:
        operation: the operation.
        joint: the name of the input whose first columns act on the image and whose last are the layer. None: the layer
            comes apart.
    """

    def __init__(self, operation, joint=None):
        self.operation = operation
        self.place = operation.names.index("bias_hidden")
        self.joint = None if joint is None else operation.names.index(joint)
        self.Function = _function(self)

    def __call__(self, run, layer, inputs, options, plain):
        """The operation's outputs.

        Args:
            run: the operation on a backend.
            layer: text ``[B, E]``, the layer ``[A, E]`` (None where it is joint) and its bias ``[A]`` or None.
            inputs: the operation's, None in ``bias_hidden``'s place, and the joint weight whole.
            options: the operation's.
            plain: whether it is an eager call with plain tensors, without autocast.
        """
        if plain and _one_node(run, (*layer, *inputs)):
            return torch_private.apply(self.Function, *layer, *inputs, *options, run)
        operands, _ = self._operands(*layer, inputs)
        return run(*operands, *options)[: self.operation.outputs]

    def _operands(self, text, layer, bias, inputs, bias_hidden=None):
        """What the operation takes, and the layer."""
        operands = list(inputs)
        if self.joint is not None:
            whole = inputs[self.joint]
            channels = inputs[0].shape[-1]
            # One node of the graph, where slices would be two.
            operands[self.joint], layer = torch.split_with_sizes(whole, [channels, whole.shape[1] - channels], 1)
        if bias_hidden is None:
            accumulate = accumulate_dtype(text)
            bias_hidden = linear(cast(text, accumulate), cast(layer, accumulate), cast(bias, accumulate))
        operands[self.place] = bias_hidden
        return operands, layer

    def _forward(self, ctx, text, layer, bias, *arguments):
        *arguments, run = arguments
        inputs, options = arguments[: self.operation.inputs], arguments[self.operation.inputs :]
        with torch_private.BelowAutograd():
            operands, _ = self._operands(text, layer, bias, inputs)
            results = run.forward(*operands, *options)
        ctx.run = run
        ctx.options = options
        saved = operands[self.place], *self.operation.keep(operands, results)
        ctx.save_for_backward(text, layer, bias, *inputs, *saved)
        ctx.set_materialize_grads(False)
        return results[: self.operation.outputs]

    @without_autocast
    def _backward(self, ctx, *output_grads):
        count = self.operation.inputs
        text, layer, bias, *saved = ctx.saved_tensors
        inputs, bias_hidden, kept = saved[:count], saved[count], saved[count + 1 :]
        if torch.is_grad_enabled():
            bias_hidden = None  # second derivatives follow it to the text
        operands, layer = self._operands(text, layer, bias, inputs, bias_hidden)

        need_text, need_layer, need_bias, *needs = ctx.needs_input_grad[: count + 3]
        if self.joint is not None:
            need_layer = needs[self.joint]
        needs[self.place] = need_text or need_layer or need_bias
        found = self.operation.input_grads(ctx.run, output_grads, operands, kept, ctx.options, needs)

        of_text = of_layer = of_bias = None
        grad = found[self.place]
        found[self.place] = None
        if grad is not None:
            if need_text:
                of_text = cast(grad @ cast(layer, grad.dtype), text.dtype)
            if need_layer:
                of_layer = cast(grad.T @ cast(text, grad.dtype), layer.dtype)
            if need_bias:
                of_bias = cast(grad.sum(0), bias.dtype)
            if self.joint is not None and need_layer:
                found[self.joint] = torch.cat([found[self.joint], of_layer], 1)
                of_layer = None
        return of_text, of_layer, of_bias, *found, *(None,) * (len(ctx.options) + 1)


def _one_node(run, tensors):
    """Whether autograd, and nobody else, follows a call."""
    return (
        type(run) is Implementation
        and needs_gradient(*tensors)
        and not torch_private.transforms_active()
        and not has_torch_function(tensors)
        and not carries_tangent(*tensors)
    )


def _function(projected):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            return projected._forward(ctx, *arguments)

        @staticmethod
        def backward(ctx, *output_grads):
            return projected._backward(ctx, *output_grads)

    return type(f"Projected{projected.operation.Function.__name__}", (Function,), {})
