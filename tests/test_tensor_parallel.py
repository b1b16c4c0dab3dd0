"""The modules under Colwise and Rowwise plans, on two processes: what one process computes, or an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tensor_parallel
from support.attention_tests import assert_rule

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, tensor_parallel.__file__, str(rank), str(folder)],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(tensor_parallel.RANKS)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(tensor_parallel.RANKS)]


@pytest.mark.parametrize("name", tensor_parallel.RIGHT)
def test_right(ranks, name):
    make, inputs, options, _ = tensor_parallel.RIGHT[name]
    module, tensors = tensor_parallel.build(make, inputs)
    module.backend = "reference"
    peer = tensor_parallel.compute(module, tensors, options)
    truth = tensor_parallel.compute(module.double(), [t.double() for t in tensors], options)
    for found in ranks:
        assert not isinstance(found[name], str), found[name]
        assert_rule(found[name], truth, peer)


@pytest.mark.parametrize("name", tensor_parallel.REFUSED)
def test_refused(ranks, name):
    for found in ranks:
        assert isinstance(found[name], str), "computed something"
        assert found[name].startswith("ValueError") and tensor_parallel.REFUSED[name][-1] in found[name]
