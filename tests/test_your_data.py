"""What docs/your-data.md shows runs as printed. Needs mmkernels[cli,demo]."""

import json
import re
import shlex

import pytest
from support.compiling import ROOT
from test_cli import call

for package in ("PIL", "tokenizers", "tqdm", "torchmetrics", "safetensors", "matplotlib"):
    pytest.importorskip(package)

PAGE = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, python = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(folder, "your-data.md", "exec"), {})
    commands = re.findall(r"^python -m mmkernels (.*)$", PAGE, re.M)
    assert [line.split()[0] for line in commands] == ["train", "evaluate", "predict"]
    outputs = []
    for line in commands:
        done = call(*shlex.split(line))
        assert done.exit_code == 0, done.output
        outputs.append(done.output)
    assert "line 12: lost.png does not exist" in outputs[0] and "179 of 180 rows predicted" in outputs[2]
    assert json.loads((tmp_path / "shapes-model/metrics.json").read_text())["validation"]["accuracy"] >= 0.9
    names = {}
    exec(compile(python, "your-data.md", "exec"), names)
    assert names["probability"].shape == (1,)


def test_every_option_is_one():
    """The page names no option that isn't there."""
    known = "".join(call(command, "--help").output for command in ("train", "evaluate", "predict"))
    named = set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - {"--nproc-per-node"}
    assert len(named) > 10 and not {option for option in named if option not in known}
