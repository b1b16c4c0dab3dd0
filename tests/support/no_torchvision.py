"""Importing packages that import torchvision for their pictures, where there is none for this torch: what is tested of
them doesn't use it."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from unittest import mock


class _Pretender(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


class _Anything(types.ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {}) if name[0].isupper() else mock.MagicMock(name=name)


class _AnyClass(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


@contextlib.contextmanager
def pretended():
    """Any name can be imported from torchvision; afterwards it is as if that had never been."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    with contextlib.suppress(ImportError):  # it asks once, and remembers
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()
    finder = _Pretender()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
