"""Two processes train what one does on the same samples. Needs mmkernels[demo]."""

import pytest
import torch
from support.attention_tests import assert_rule
from support.forked import run
from support.samples import Samples, Toy

for package in ("tqdm", "torchmetrics", "safetensors"):
    pytest.importorskip(package)

from mmkernels import training  # noqa: E402

# 11 samples in steps of 5, in two or four parts, all uneven; 3 in validation's last batch, and an odd number of them.
FITTED = {"epochs": 2, "batch_size": 5, "modality_dropout": 0.3, "learning_rate": 0.01, "progress": True}
VALIDATION = {"count": 13, "seed": 1}

PROCESSES = """
import socket
from pathlib import Path
from test_distributed_training import FITTED, VALIDATION

folder = Path(sys.argv[1])

def train(rank, port, kind, options):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    model = Toy()
    data = Samples(count=11)
    there = folder / f"{kind}-{options}"
    history = training.fit(
        model, data, validation=Samples(**VALIDATION), distributed=kind, checkpoint_dir=there, **FITTED, **options
    )
    assert type(model) is Toy and training.is_first() == (not rank)
    told = [dict(model.state_dict()), history.losses, history.accuracies, history.validation]
    torch.save(told, folder / f"{kind}-{options}-{rank}")

for kind, options in eval(sys.argv[2]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = [child(lambda: train(rank, port, kind, options)) for rank in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0], (kind, options)
"""


def alone(dtype=torch.float32, **options):
    data = Samples(count=11)
    if dtype == torch.float64:
        collate = data.collate
        data.collate = lambda items: wide(collate(items))
    model = Toy().to(dtype)
    history = training.fit(model, data, **{**FITTED, "progress": False}, **options)
    return model, history


def wide(batch):
    batch.inputs["image"] = batch.inputs["image"].double()
    batch.target = batch.target.double()
    return batch


def test_two_processes_are_one(tmp_path):
    """With DDP and FSDP2, also in micro-batches with activations computed again; and whole checkpoints."""
    cases = [(kind, {**more}) for kind in ("ddp", "fsdp") for more in ({}, {"accumulate": 2, "recompute": True})]
    run(PROCESSES, tmp_path, cases)
    truth = alone(torch.float64)[0]
    peer, history = alone()
    found = training.evaluate(peer, Samples(**VALIDATION))
    for kind, options in cases:
        ends = [torch.load(tmp_path / f"{kind}-{options}-{rank}") for rank in range(2)]
        assert all(map(torch.equal, ends[0][0].values(), ends[1][0].values())) and ends[0][1:] == ends[1][1:]
        parameters, losses, accuracies, validation = ends[0]
        assert_rule(list(parameters.values()), list(truth.state_dict().values()), list(peer.state_dict().values()))
        assert losses == pytest.approx(history.losses) and accuracies == history.accuracies
        assert validation[-1].pop("confusion") == found["confusion"]
        assert validation[-1] == pytest.approx({k: v for k, v in found.items() if k != "confusion"})
        # What several wrote, one can go on with: here there is nothing left to do.
        model, again = alone(checkpoint_dir=tmp_path / f"{kind}-{options}", **options)
        assert again.losses == losses
        assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_mistakes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="distributed must be None in a single process, got 'ddp': start it with"):
        alone(distributed="ddp")
    with pytest.raises(ValueError, match="distributed must be one of 'ddp', 'fsdp', got 'horovod'"):
        alone(distributed="horovod")
