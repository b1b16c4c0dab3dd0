"""A training that is killed, at any moment, goes on with the same bits. Needs mmkernels[demo]."""

import pytest
import torch
from support.forked import run
from support.samples import Samples, Toy

for package in ("tqdm", "torchmetrics", "safetensors"):
    pytest.importorskip(package)

from mmkernels import training  # noqa: E402
from mmkernels.training import checkpoint  # noqa: E402

FITTED = {"epochs": 3, "batch_size": 4, "checkpoint_every": 2, "modality_dropout": 0.3, "progress": False}

# Children that are killed; the data set's draws stand for augmentation's.
KILLER = """
import random, signal, time
from test_resumed_training import FITTED

die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class Augmented(Samples):
    taken = 0
    kill_at = None

    def __getitem__(self, index):
        Augmented.taken += 1
        if Augmented.taken == Augmented.kill_at:
            die()
        return index

    def collate(self, items):
        batch = super().collate(items)
        batch.inputs["image"] = batch.inputs["image"] + random.random() + torch.rand(1)
        return batch

def train(folder):
    random.seed(0)
    data = Augmented(count=22)
    model = Toy(dropout=0.5)
    history = training.fit(model, data, validation=Samples(count=8), checkpoint_dir=folder, **FITTED)
    told = [history.losses, history.accuracies, history.validation]
    torch.save([list(model.state_dict().values()), *told], folder / "end")

def in_samples(folder, count):
    Augmented.kill_at = count
    train(folder)

def while_writing(folder, count):
    from safetensors import torch as files
    write, written = files.save_file, []
    def half(tensors, path, metadata):
        written.append(path)
        write(tensors, path, metadata)
        if len(written) == count:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    files.save_file = half
    train(folder)

def around_renaming(folder, count, after):
    replace, replaced = os.replace, []
    def renamed(*names):
        replaced.append(names)
        if after:
            replace(*names)
        if len(replaced) == count:
            die()
        if not after:
            replace(*names)
    os.replace = renamed
    train(folder)
"""


def test_killed_at_any_moment(tmp_path):
    """By data's samples, in the midst of a file's writing, before and after it takes the other's place, and by the
    clock; time and again in the same training."""
    told = run(
        KILLER
        + """
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "whole").mkdir()
start = time.monotonic()
os.waitpid(child(lambda: train(folder / "whole")), 0)
seconds = time.monotonic() - start
whole = torch.load(folder / "whole" / "end")
at = lambda kill, *where: lambda folder: kill(folder, *where)
jobs = [
    [at(in_samples, 1), at(in_samples, 7), at(in_samples, 13), at(in_samples, 26)],
    [at(while_writing, 1), at(while_writing, 2), at(while_writing, 3)],
    [at(around_renaming, 2, True), at(around_renaming, 3, False), at(around_renaming, 1, True)],
]
killed = 0
for i, kills in enumerate([*jobs, None]):
    there = folder / str(i)
    there.mkdir()
    for kill in kills or [None] * 5:
        pid = child(lambda: kill(there) if kill else train(there))
        if kill is None:
            time.sleep(random.random() * seconds / 2)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or kill is None, (i, status)
        killed += os.WIFSIGNALED(status)
    pid = child(lambda: train(there))
    assert os.waitpid(pid, 0)[1] == 0 and (there / "end").exists(), i
    end = torch.load(there / "end")
    assert all(map(torch.equal, end[0], whole[0])), i
    assert end[1:] == whole[1:], i
print("killed", killed)
""",
        tmp_path,
    )
    assert int(told.split()[-1]) >= 10


def test_finished_training_is_read_back(tmp_path):
    data = Samples()
    model, again = Toy(), Toy(seed=1)
    history = training.fit(model, data, checkpoint_dir=tmp_path / "new", **FITTED)
    assert training.fit(again, data, checkpoint_dir=tmp_path / "new", **FITTED) == history
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [checkpoint.FILE]


def test_another_training(tmp_path):
    training.fit(Toy(), Samples(), checkpoint_dir=tmp_path, **FITTED)
    with pytest.raises(ValueError, match="checkpoint_dir has a training with batch_size=4.*got 5: only the same"):
        training.fit(Toy(), Samples(), checkpoint_dir=tmp_path, **{**FITTED, "batch_size": 5})
    with pytest.raises(ValueError, match="checkpoint_dir has a training with samples=20.*got 21"):
        training.fit(Toy(), Samples(count=21), checkpoint_dir=tmp_path, **FITTED)
    with pytest.raises(ValueError, match="checkpoint_dir has the training of another model"):
        training.fit(Toy("multiclass"), Samples("multiclass"), checkpoint_dir=tmp_path, **FITTED)
    (tmp_path / checkpoint.FILE).write_bytes(b"not whole")
    with pytest.raises(ValueError, match="checkpoint_dir has a file that can't be read"):
        training.fit(Toy(), Samples(), checkpoint_dir=tmp_path, **FITTED)
