"""Types: stubs beside the code say what users may call; a type checker reads them, and the code agrees with them."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.compiling import ROOT

import mmkernels
from mmkernels import functional

STUBS = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mmkernels").rglob("*.pyi"))
KINDS = inspect.Parameter
# Of data and training, which have no stubs, and of packages that have none.
UNTYPED = {"customer_service", "driving", "medicine", "private_training", "teaching"}


@pytest.mark.slow
def test_a_type_checker_reads_what_users_write(tmp_path):
    """A program with what is right and what is wrong, the README's example, and examples/ of what has
    types."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    installed = Path(mmkernels.__file__).parent.parent
    environment = dict(os.environ, MYPY_CACHE_DIR=str(tmp_path / "cache"))
    if installed.name != "site-packages":  # where mypy looks by itself
        environment["MYPYPATH"] = str(installed)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command.append("--untyped-calls-exclude=torch")  # its own backward() has no types
    untyped = UNTYPED | (set() if importlib.util.find_spec("keras") else {"keras_article"})
    examples = [file for file in (ROOT / "examples").glob("*.py") if file.stem not in untyped]
    files = [ROOT / "tests/support/typed_user.py", *examples, tmp_path / "readme.py"]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stub", STUBS, ids=str)
def test_signatures_are_those_of_the_code(stub):
    """Names, order, kinds and defaults; every overload has them all."""
    name = ".".join(stub.parts).removesuffix(".__init__")
    assert (ROOT / stub).with_suffix(".py").is_file(), "a stub lies beside the code that it is of"
    tree = ast.parse((ROOT / stub.with_suffix(".pyi")).read_text(encoding="utf-8"))
    _compare(tree.body, importlib.import_module(name), name)


@pytest.mark.parametrize("operation", functional.__all__)
def test_everything_public_has_a_type(operation):
    """A stub beside each of an operation's files that users see."""
    function = "".join(part.title() for part in operation.split("_")) + "Function"
    modules = importlib.import_module(f"mmkernels.modules.{operation}").__all__
    for package, names in {"ops": [operation, function], "reference": [operation], "modules": modules}.items():
        tree = ast.parse((ROOT / "mmkernels" / package / f"{operation}.pyi").read_text(encoding="utf-8"))
        assert {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} == set(names), package


def _compare(body, runtime, where):
    for node in body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
            bases = ["tuple" if base == "NamedTuple" else base for base in bases]  # which is no class
            found = [base.__name__ for base in getattr(runtime, node.name).__mro__]
            assert set(bases) <= set(found), f"{where}.{node.name}"
            _compare(node.body, getattr(runtime, node.name), f"{where}.{node.name}")
        if isinstance(node, ast.FunctionDef) and node.name != "apply":  # torch's own takes anything
            function = getattr(runtime, node.name)
            function = function.fget if isinstance(function, property) else function
            actual = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            assert _same(_declared(node), actual), f"{where}.{node.name}"


def _declared(node):
    """(name, kind, default) of each parameter, as inspect tells them."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(plain) - len(arguments.defaults))
    found = [(a.arg, KINDS.POSITIONAL_OR_KEYWORD, _value(d)) for a, d in zip(plain, [*missing, *arguments.defaults])]
    if arguments.vararg:
        found.append((arguments.vararg.arg, KINDS.VAR_POSITIONAL, KINDS.empty))
    found += [(a.arg, KINDS.KEYWORD_ONLY, _value(d)) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, KINDS.VAR_KEYWORD, KINDS.empty))
    return found


def _value(default):
    return KINDS.empty if default is None else ast.literal_eval(default)


def _same(declared, actual):
    """Of overloads some want what by default isn't there: they tell what comes back where it is."""
    return len(declared) == len(actual) and all(
        found[:2] == expected[:2] and found[2] in (expected[2], KINDS.empty)
        for found, expected in zip(declared, actual)
    )
