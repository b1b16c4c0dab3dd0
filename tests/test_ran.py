"""What .ci/run says of all its tests, from the record: which ran nowhere, were skipped, or came too late."""

import json

import pytest
import ran

PASSED = {"test": "tests/test_a.py::x", "outcome": "passed", "reason": "", "shown": [["masks", "a", "cpu"]]}
SHOWS = [["masks", "a", "triton"]]
LATE = f"Skipped: {ran.LATE}: MMKERNELS_TEST_UNTIL"


def row(outcome, reason="", test="tests/test_b.py::y", shown=SHOWS):
    return {"test": test, "outcome": outcome, "reason": reason, "shown": shown}


@pytest.mark.parametrize(
    "rows, failed, told",
    [
        ([row("passed")], 0, "2 of 2 properties"),
        ([row("deselected"), row("passed")], 0, "2 passed"),
        ([row("deselected", shown=())], 1, "run by no target: tests/test_b.py::y"),
        ([row("skipped", "Skipped: no package", shown=())], 1, "skipped for no good reason: tests/test_b.py::y"),
        ([row("skipped", "Skipped: there is no GPU", shown=())], 0, "1 skipped everywhere: Skipped: there is no GPU"),
        ([row("skipped", "Skipped: there is no GPU")], 1, "no test that shows it passed: masks x a x triton"),
        ([row("skipped", LATE)], 0, "1 late: left out, as this machine is too slow for all: test_b.py 1"),
        ([row("skipped", LATE)], 0, "1 of 2 properties"),
        ([row("skipped", "Skipped: not interpreted"), row("skipped", LATE)], 0, "1 late"),
        ([row("passed"), row("skipped", LATE)], 0, "2 passed"),
    ],
)
def test_what_is_told(tmp_path, capsys, rows, failed, told):
    record = tmp_path / "tests.jsonl"
    record.write_text("".join(json.dumps({"seconds": 1.0} | r) + "\n" for r in [PASSED, *rows]))
    assert ran.main(record) == failed
    assert told in capsys.readouterr().out


def test_nothing_ran(tmp_path):
    record = tmp_path / "tests.jsonl"
    record.write_text("")
    assert ran.main(record) == 1


def test_no_time_left(pytestconfig, monkeypatch):
    """conftest.py's hook skips with what ran.py looks for, once the time has come."""
    conftest = pytestconfig.pluginmanager.getplugin(str(pytestconfig.rootpath / "tests" / "conftest.py"))
    conftest.pytest_runtest_setup(None)
    monkeypatch.setattr(conftest, "UNTIL", 0.0)
    with pytest.raises(pytest.skip.Exception, match=ran.LATE):
        conftest.pytest_runtest_setup(None)
