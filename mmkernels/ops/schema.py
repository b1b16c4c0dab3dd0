"""An operation's one schema string, and the schemas of its registered functions, which follow from it."""

import re
from collections import namedtuple
from itertools import islice

# What the backward pass is called with, part by part. Each has its names: the outputs', the arguments', what is kept,
# and those of the arguments that have gradients.
BackwardCall = namedtuple("BackwardCall", ("output_grads", "inputs", "kept", "options", "needs"))


class Schema:
    """``(Tensor a, Tensor? b, float c) -> (Tensor result, Tensor extra)``: tensors first, then options, as names with
    their types; what is returned has names, too, the operation's outputs before what only its backward pass wants.

    Args:
        text: the schema, without the operation's name.
        differentiable: names of the arguments that have gradients.
        extras: names of what only the backward pass wants, the last that are returned.
        kept: names of what it gets beside the arguments.
    """

    def __init__(self, text, differentiable, extras, kept):
        arguments, returns = re.fullmatch(r"\((.*)\) -> \((.*)\)", text).groups()
        self.arguments = arguments
        types = {name: kind for kind, name in map(str.split, arguments.split(", "))}
        self.inputs = tuple(name for name, kind in types.items() if kind.startswith("Tensor"))
        self.options = tuple(name for name in types if name not in self.inputs)
        if tuple(types) != self.inputs + self.options:
            raise ValueError(f"tensors come before options, got {text}")
        self.returns = tuple(name for _, name in map(str.split, returns.split(", ")))
        self.outputs = tuple(name for name in self.returns if name not in extras)
        if self.returns != self.outputs + tuple(extras):
            raise ValueError(f"extras {extras} must be the last of what is returned, got {text}")
        unknown = [name for name in differentiable if name not in self.inputs]
        if unknown:
            raise ValueError(f"differentiable {unknown} must be among the tensors {self.inputs}")
        self.differentiable = tuple(differentiable)
        self.kept = tuple(kept)
        self._types = types
        self.Inputs = namedtuple("Inputs", self.inputs)
        self.Returns = namedtuple("Returns", self.returns)
        self._parts = (
            namedtuple("OutputGrads", self.outputs),
            self.Inputs,
            namedtuple("Kept", self.kept),
            namedtuple("Options", self.options),
            namedtuple("Needs", self.differentiable),
        )

    def backward_call(self, arguments):
        """The arguments of ``NAME_backward`` as a :class:`BackwardCall`."""
        rest = iter(arguments)
        return BackwardCall(*(part(*islice(rest, len(part._fields))) for part in self._parts))

    def forward(self, name):
        """The schema of ``NAME``."""
        return f"{name}({self.arguments}) -> {_tensors(len(self.returns))}"

    def into(self, name):
        """Of ``NAME_out``, which writes the first output and returns the second."""
        return f"{name}_out({self.arguments}, Tensor(a!) out) -> {_tensors(1)}"

    def backward(self, name):
        """Of ``NAME_backward``."""
        arguments = [
            *(f"Tensor? grad_{output}" for output in self.outputs),
            *(f"{self._types[i]} {i}" for i in self.inputs),
            *(f"Tensor {kept}" for kept in self.kept),
            *(f"{self._types[o]} {o}" for o in self.options),
            *(f"bool need_{i}_grad" for i in self.differentiable),
        ]
        return f"{name}_backward({', '.join(arguments)}) -> {_tensors(len(self.differentiable))}"


def _tensors(count):
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
