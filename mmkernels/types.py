"""The names of types in the public signatures."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch

Activation: TypeAlias = Literal["tanh", "relu", "gelu"]
Combine: TypeAlias = Literal["multiply", "pool"]
Device: TypeAlias = torch.device | str | int | None
Layout: TypeAlias = Literal["bnd", "bdhw"]


class Array(Protocol):
    """Of NumPy, which is no dependency."""

    def __array__(self, *arguments: Any, **options: Any) -> Any: ...


Offsets: TypeAlias = torch.Tensor | Sequence[int] | Array
