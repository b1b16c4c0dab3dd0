"""Runs a script in a process of its own, which can fork: one that has gone backward, as pytest's has, can't."""

import os
import subprocess
import sys
from pathlib import Path

BEGIN = """
import os, sys
import torch
torch.set_num_threads(1)
from support.samples import Samples, Toy
from mmkernels import training
# What is imported on first use, once for all children.
import safetensors.torch, tqdm.auto, torch.utils.checkpoint
training.evaluate(Toy(), Samples())
torch.optim.AdamW(Toy().parameters()).zero_grad()

def child(job):
    if pid := os.fork():
        return pid
    status = 1
    try:
        job()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)
"""


def run(script, *arguments):
    """What it printed; tests' modules can be imported, and there is `child`, which calls a function in a fork."""
    tests = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", BEGIN + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout
