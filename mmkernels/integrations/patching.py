"""Swapping what instances do: a module keeps its class, its parameters and its name, and gets another ``forward``.

Which class gets what stands in a table beside the code of each package, by the class's full name, so that a package
that nobody has imported isn't imported here either.
"""

import functools
import importlib
import re
import sys
import types
from dataclasses import dataclass

import torch
from torch import nn

from ..modules.common import given
from ..torch_private import symbolic

# Packages whose classes are known, and where their table `CONVERTERS` stands.
TABLES = {
    "diffusers": f"{__package__}.diffusers",
    "monai": f"{__package__}.monai",
    "open_clip": f"{__package__}.open_clip",
    "timm": f"{__package__}.timm",
    "torch": f"{__package__}.multihead",
    "torchmil": f"{__package__}.torchmil",
    "transformers": f"{__package__}.transformers.converters",
}
# (Replacement, value before or MISSING, value now) of a swapped module: with it, so that copies can be undone, too.
SWAPPED = "_mmkernels_swapped"
LOOKS_LIKE_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
COMPANION_MISSING = "a module above it tells whether its weights are wanted: patch that one, or the whole model"
_own = {}


class MISSING:
    """The class's own, before a swap."""


@dataclass(frozen=True)
class Replacement:
    """What a module gets.

    Args:
        operation: the operation's name; None for a companion that computes nothing, which no report lists.
        value: in place of the attribute; of a method: a function that a file has by its name, ``(module, *arguments)``.
        attribute: which one.
        note: for the report: what of its calls it is for, where not all.
        companion: the value of a companion, without which above it the module is left alone.
    """

    operation: str | None
    value: object
    attribute: str = "forward"
    note: str = ""
    companion: object = None


@dataclass(frozen=True)
class Row:
    """A module: replaced by an operation (``reason``: for which of its calls, if not all), or left alone (why)."""

    name: str
    kind: str
    operation: str | None
    reason: str


class PatchReport:
    """What :func:`patch` replaced in a model and what it left alone. ``str()`` gives a table.

    Attributes:
        rows: one for each module that looks like attention: ``name``, ``kind`` (its class), ``operation`` (None where
            it was left alone), ``reason``.
        dry_run: whether nothing was changed.
    """

    def __init__(self, rows, dry_run):
        self.rows = tuple(rows)
        self.dry_run = dry_run

    @property
    def replaced(self):
        """Qualified names of the modules that now compute with an operation of this package."""
        return [row.name for row in self.rows if row.operation is not None]

    @property
    def left_alone(self):
        """``{qualified name: why}``"""
        return {row.name: row.reason for row in self.rows if row.operation is None}

    def __len__(self):
        return len(self.replaced)

    def __str__(self):
        verb = "would be replaced" if self.dry_run else "replaced"
        title = f"{len(self)} of {len(self.rows)} modules that look like attention {verb}"
        if not self.rows:
            return title
        cells = [("module", "class", "now", "note")]
        cells += [(row.name or "(the model)", row.kind, row.operation or "-", row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([title, *lines])

    def __repr__(self):
        return f"<PatchReport: {len(self)} replaced, {len(self.left_alone)} left alone>"


def register(cls, convert):
    """Teaches :func:`patch` a class: exactly this one, not what inherits from it.

    Args:
        cls: a subclass of ``torch.nn.Module``.
        convert: ``(module) ->`` a :class:`Replacement`, or a string that says why this one is left alone.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r}")
    if not callable(convert):
        raise TypeError(f"convert must be callable, got {type(convert).__name__}")
    _own[cls] = convert


def patch(model, *, dry_run=False):
    """Swaps known public modules inside of `model` for fused ones.

    Instances only: classes and packages stay as they are, parameters and submodules where they are (the same
    ``state_dict``). A call that an operation can't do goes the module's own way: training with dropout, weights that
    are returned because somebody asked for them, projections that are hooked, wrapped or quantised, exporting to ONNX,
    ``torch.jit.trace`` and ``torch.fx.symbolic_trace``. Patching twice is once. Copies of a patched model are patched;
    not so ``copy.copy``'s and ``nn.DataParallel``'s, whose ``forward`` stays the original's, and ``torch.jit.script``
    takes none: :func:`unpatch` before.

    Args:
        model: a ``torch.nn.Module``; wrapped by ``torch.compile``, DDP or FSDP, too.
        dry_run: only report.

    Returns:
        :class:`PatchReport`, of every module that looks like attention.
    """
    _check_module(model)
    if not isinstance(dry_run, bool):
        raise TypeError(f"dry_run must be a bool, got {type(dry_run).__name__}")
    rows, companions, inside = [], {}, ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # the module that it is a part of computes without it
        found = _find(module)
        if found is None:
            continue
        if isinstance(found, str):
            rows.append(Row(name, type(module).__name__, None, found))
            continue
        if found.operation is None:
            companions[f"{name}." if name else ""] = module, found
            continue
        if not (found.companion is None or _is_swapped(module) or _beneath(name, companions, found.companion)):
            rows.append(Row(name, type(module).__name__, None, COMPANION_MISSING))
            continue
        if not dry_run:
            _swap(module, found)
        rows.append(Row(name, type(module).__name__, found.operation, found.note))
        if found.attribute == "forward":
            inside += (f"{name}." if name else "",)
    report = PatchReport(rows, dry_run)
    for within, (module, found) in companions.items():
        if not dry_run and any(other.startswith(within) for other in report.replaced):
            _swap(module, found)
    return report


def unpatch(model):
    """Gives every module of `model` back what :func:`patch` took from it, the very same objects.

    Returns:
        The qualified names of the modules, companions included.
    """
    _check_module(model)
    names = []
    for name, module in model.named_modules():
        if SWAPPED in module.__dict__:
            names.append(name)
            found, before, _ = module.__dict__[SWAPPED]
            if not _is_swapped(module):
                pass  # somebody else has replaced it since, and it is no longer ours
            elif before is MISSING:
                del module.__dict__[found.attribute]
            else:
                setattr(module, found.attribute, before)
        for ours in [key for key in module.__dict__ if key.startswith("_mmkernels_")]:
            del module.__dict__[ours]
    return names


def plain(module, *arguments, **named):
    """The module's own way."""
    return type(module).forward(module, *arguments, **named)


def exported():
    """Whether a graph is made for those who don't know this package's operations. Who exports to ONNX has imported what
    does it: nobody else has to."""
    return torch.jit.is_tracing() or ("torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export())


def _check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _find(module):
    """A :class:`Replacement`, why there is none, or None for what is no attention."""
    if _is_swapped(module):
        return module.__dict__[SWAPPED][0]
    cls = _class_of(module)
    convert = _converter(cls)
    if convert is not None:
        if _has_own(module, "forward"):
            return "its forward was replaced by somebody else"
        found = convert(module)
        if isinstance(found, Replacement) and _is_method(found) and _has_own(module, found.attribute):
            return f"its {found.attribute} was replaced by somebody else"
        return found
    known = next((base.__name__ for base in cls.__mro__[1:] if _converter(base) is not None), None)
    if known is not None:
        return f"a subclass of {known}, which may compute something else"
    if _looks_like_attention(module) and not any(_looks_like_attention(p) for p in module.modules() if p is not module):
        return _why_not(cls)  # what only holds others isn't told
    return None


def _beneath(name, companions, value):
    return any(found.value is value and name.startswith(within) for within, (_, found) in companions.items())


def _looks_like_attention(module):
    return LOOKS_LIKE_ATTENTION.search(_class_of(module).__name__) is not None


def _class_of(module):
    """What the user wrote: fully_shard gives each module a class of its own."""
    cls = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(cls, fsdp.FSDPModule):
        return next(base for base in cls.__mro__[1:] if base is not fsdp.FSDPModule)
    return cls


def _converter(cls):
    if cls in _own:
        return _own[cls]
    table = _table(cls)
    return None if table is None else table.CONVERTERS.get(f"{cls.__module__}.{cls.__qualname__}")


def _why_not(cls):
    """As the class's package tells it, where its table has ``why_not(cls)``."""
    told = getattr(_table(cls), "why_not", lambda cls: None)
    return told(cls) or "no operation is known to fit this class"


def _table(cls):
    package = cls.__module__.partition(".")[0]
    return importlib.import_module(TABLES[package]) if package in TABLES else None


def _swap(module, found):
    if _is_swapped(module):
        return
    if _is_method(found):
        before, value = MISSING, functools.partial(_method, module, found)
    else:
        before, value = getattr(module, found.attribute), found.value
    module.__dict__[SWAPPED] = found, before, value
    setattr(module, found.attribute, value)


def _method(module, found, *arguments, **named):
    """In a method's place. Whoever wrapped it, and calls it after :func:`unpatch`, gets the module's own, and so does
    ``torch.fx.symbolic_trace``."""
    if SWAPPED in module.__dict__ and not symbolic((*arguments, *named.values())):
        return found.value(module, *arguments, **named)
    return getattr(type(module), found.attribute)(module, *arguments, **named)


def _is_method(found):
    return isinstance(found.value, types.FunctionType)


def _is_swapped(module):
    """Whether the module still has what :func:`_swap` gave it, not replaced or wrapped by somebody else since."""
    if SWAPPED not in module.__dict__:
        return False
    found, _, value = module.__dict__[SWAPPED]
    return getattr(module, found.attribute) is value


def _has_own(module, method):
    """Whether somebody else gave this instance a method. One of ours may be left, given back by who had wrapped it."""
    value = given(module, method)
    return value is not None and getattr(value, "func", None) is not _method
