"""Writes docs/api.md from the signatures and docstrings of what is public, and the stubs of packages that find their
files by the list of functions.

python tools/api_reference.py      (make docs)
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Shape|Item|Source):\s*(.*)$")
OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x\w+>")
LISTS = ("Args", "Attributes", "Raises")
ITEM = re.compile(r"^ {4}(\w+(?:, \w+)*): ")
HEAD = """# API

Written by `make docs` from the docstrings; types are in the stubs beside the code (`*.pyi`). The functions are also in
`mmkernels.functional`. `mmkernels.reference` has the same functions in plain PyTorch, without `backend` and `out`.
"""
AROUND = """# Data, training, pictures

Written by `make docs` from the docstrings: what is around the [kernels, modules and models](api.md), to train on your
own data. It needs `pip install mmkernels[demo]`. The command line does the same: `python -m mmkernels train | predict |
evaluate | compare | demo --help`.
"""
PACKAGES = ("tasks", "data", "training", "saving", "plot", "faithfulness", "compare", "limits")
FUNCTIONS = """## Autograd Functions and registered operations

Each function's `torch.autograd.Function` is `mmkernels.NAMEFunction` (`SpatialAttentionFunction`, ...), its registered
operations are `torch.ops.mmkernels.NAME` and `NAME_backward`. They take tensors and options by position, without checks
that explain, and return every output; `apply` takes a backend's name, or None, last.
"""


def page():
    import mmkernels
    from mmkernels import functional, models

    modules = [name for name in mmkernels.__all__ if is_module_class(getattr(mmkernels, name))]
    parts = [HEAD, "## Functions\n"]
    parts += [entry(f"mmkernels.{name}", getattr(functional, name)) for name in functional.__all__]
    parts += ["## Modules\n"]
    parts += [entry(f"mmkernels.{name}", getattr(mmkernels, name)) for name in modules]
    parts += [entry("mmkernels.absorb_pays", mmkernels.absorb_pays)]
    parts += ["## Models\n"]
    parts += [entry(f"mmkernels.models.{name}", getattr(models, name)) for name in models.__all__]
    parts += ["## Errors\n", entry("mmkernels.BackendError", mmkernels.BackendError, called=False), FUNCTIONS]
    return "\n".join(parts)


def around():
    parts = [AROUND]
    for name in PACKAGES:
        package = importlib.import_module(f"mmkernels.{name}")
        parts += [f"## mmkernels.{name}\n", markdown(inspect.getdoc(package)), ""]
        for each in public(package):
            value = getattr(package, each)
            error = inspect.isclass(value) and issubclass(value, Exception)
            parts.append(entry(f"mmkernels.{name}.{each}", value, called=not error))
    return "\n".join(parts)


def public(package):
    """Functions and classes: those it names, or all of its own."""
    named = getattr(package, "__all__", None) or [
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package.__name__
    ]
    return [name for name in named if callable(getattr(package, name))]


def stub(line):
    """Of a package that finds its files by the list of functions: type checkers don't run it. `line` is of a file."""
    from mmkernels import functional

    return "\n".join(["# Written by make docs.", *map(line, functional.__all__), ""])


def functions_stub():
    def line(operation):
        name = "".join(part.title() for part in operation.split("_")) + "Function"
        return f"from .{operation} import {name} as {name}"

    return stub(line)


def modules_stub():
    return stub(lambda operation: f"from .{operation} import *  # noqa: F403")


def reference_stub():
    return stub(lambda operation: f"from .{operation} import {operation} as {operation}")


def is_module_class(value):
    from torch import nn

    return inspect.isclass(value) and issubclass(value, nn.Module)


def entry(name, value, called=True):
    """A heading, how it is called, and what its docstring says."""
    lines = [f"### {name}", ""]
    if called:
        lines += ["```python", *signature(name, value), "```", ""]
    return "\n".join([*lines, markdown(inspect.getdoc(value)), ""])


def signature(name, value):
    """`name(arguments)`, an argument a line where one line is too short."""
    parameters = inspect.signature(value).parameters.values()
    words = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(OBJECT.sub(r"\1()", str(parameter).replace("'", '"').replace("<factory>", "...")))
    line = f"{name}({', '.join(words)})"
    return [line] if len(line) <= 100 else [f"{name}(", *(f"    {word}," for word in words), ")"]


def markdown(docstring):
    """A docstring with sections as Markdown: what it lists becomes a list."""
    lines = []
    section = None
    for line in docstring.splitlines():
        found = SECTION.match(line)
        if found:
            section = found[1]
            lines += [f"**{section}**: {found[2]}"] if found[2] else [f"**{section}**:", ""]
        elif section in LISTS and ITEM.match(line):
            lines.append(ITEM.sub(lambda m: f"- **{m[1].replace(', ', '**, **')}**: ", line))
        elif section in LISTS and line.strip():
            lines.append(f"  {line.strip()}")
        elif section:
            lines.append(line.strip())
        else:
            lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"(?<!`)``(?!`)(.+?)``(?!`)", r"`\1`", text, flags=re.S)
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
    text = re.sub(r"::\n\n((?: {4}.*\n|\n)+)", lambda m: f"\n\n```\n{inspect.cleandoc(m[1])}\n```\n\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


WRITTEN = {
    "docs/api.md": page,
    "docs/api-training.md": around,
    "mmkernels/modules/__init__.pyi": modules_stub,
    "mmkernels/ops/__init__.pyi": functions_stub,
    "mmkernels/reference/__init__.pyi": reference_stub,
}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for file, text in WRITTEN.items():
        (ROOT / file).write_text(text(), encoding="utf-8")
