"""The tables of tools/mutants fit the kernels as they are. (`make mutants` plants every one, which takes long.)"""

import collections
import importlib
import sys

import pytest
from support.compiling import ROOT

from mmkernels import functional

sys.path.append(str(ROOT / "tools" / "mutants"))
mutant = importlib.import_module("mutant")
ALL = [(backend, each) for backend in mutant.SOURCES for each in mutant.mutants(backend)]


@pytest.mark.parametrize("backend, each", ALL, ids=lambda value: getattr(value, "name", value))
def test_its_place_is_found_once(backend, each):
    """Where code moved or was renamed, `find` is to be mended in the table."""
    path, text = mutant.mutated(backend, each)
    assert text != path.read_text()


def test_every_operation_and_backend_has_some():
    count = collections.Counter((backend, each.operation) for backend, each in ALL)
    assert len(ALL) >= 40 and len(set(ALL)) == len(ALL)
    assert set(count) == {(backend, name) for backend in mutant.SOURCES for name in functional.__all__}


@pytest.mark.parametrize("text", ["no such text", "int64_t"])
def test_a_place_that_is_not_found_once_is_told(text):
    with pytest.raises(mutant.NotFound, match="must be found once"):
        mutant.locate("cpu", mutant.Mutant("spatial_attention", "unknown", text, ""))
