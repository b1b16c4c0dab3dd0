"""The table of coverage has no holes, and what it excuses isn't covered after all."""

from pathlib import Path

import coverage_table
import pytest
from support.runnable import runnable

BACKENDS = [p.values[0] for p in runnable("spatial_attention") if p.values[1] == "cpu"]
MARKED = {path.name for path in Path(__file__).parent.glob("test_*.py") if "mark.property(" in path.read_text()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_holes(request, backend):
    collected = request.config.stash[coverage_table.COLLECTED]
    if not MARKED - {Path(__file__).name} <= collected.keys():
        pytest.skip("only some of the files were collected")
    missing, excused = coverage_table.holes([cell for cells in collected.values() for cell in cells], [backend])
    assert not missing, f"no test shows {missing[0]}, and {len(missing) - 1} more"
    assert not excused, f"a test shows {excused[0]}, which can't be"


def test_a_hole_shows():
    """Without one of its cells the table isn't whole."""
    cells = [
        (name, operation, "cpu")
        for name in coverage_table.PROPERTIES
        for operation in coverage_table.functional.__all__
        if coverage_table.why_not(name, operation, "cpu") is None
    ]
    assert coverage_table.holes(cells, ["cpu"]) == ([], [])
    assert coverage_table.holes(cells[1:], ["cpu"]) == (cells[:1], [])
    excused = ("masks", "channel_attention", "cpu")
    assert coverage_table.holes([*cells, excused], ["cpu"]) == ([], [excused])
