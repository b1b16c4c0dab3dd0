from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

@dataclass(frozen=True)
class Replacement:
    operation: str | None
    value: Any
    attribute: str = "forward"
    note: str = ""
    companion: Any = None

@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    operation: str | None
    reason: str

class PatchReport:
    rows: tuple[Row, ...]
    dry_run: bool
    @property
    def replaced(self) -> list[str]: ...
    @property
    def left_alone(self) -> dict[str, str]: ...
    def __len__(self) -> int: ...

def register(cls: type[nn.Module], convert: Callable[[Any], Replacement | str]) -> None: ...
def patch(model: nn.Module, *, dry_run: bool = False) -> PatchReport: ...
def unpatch(model: nn.Module) -> list[str]: ...
def plain(module: nn.Module, *arguments: Any, **named: Any) -> Any: ...
def exported() -> bool: ...
