"""All that a training has come to, in one file, so that a killed one goes on as if nothing had happened."""

import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import torch

from ..data.extras import require
from .distributed import Processes, put, whole
from .history import History

FILE = "training.safetensors"
_STEPWISE = ("losses", "accuracies", "step_seconds")


@dataclasses.dataclass
class State:
    """What changes while training; `epoch` and `step` tell the next one."""

    model: torch.nn.Module
    processes: Processes
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: History
    epoch: int = 0
    step: int = 0


def save(folder, state, settings):
    """Writes the file in place of the one there; whenever it is killed, there is a whole one, old or new.

    Args:
        folder: made where it is missing.
        state: a :class:`State`.
        settings: a dict that JSON can hold, without which the training would be another one.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    for name in _STEPWISE:
        tensors[f"history.{name}"] = torch.tensor(getattr(state.history, name), dtype=torch.float64)
    random_states = state.processes.of_each(_random_state(state.model))
    for rank, (drawn, _) in enumerate(random_states):
        tensors |= {f"random.{rank}.{name}": tensor for name, tensor in drawn.items()}
    told = {
        "settings": settings,
        "epoch": state.epoch,
        "step": state.step,
        "groups": [_without_parameters(group) for group in state.optimizer.param_groups],
        "schedule": state.schedule.state_dict(),
        "validation": state.history.validation,
        "random": [other for _, other in random_states],
    }
    # Copies: what shares memory, or isn't contiguous, safetensors refuses.
    tensors = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}
    state.processes.of_first(lambda: _write(Path(folder), tensors, told))


def _write(folder, tensors, told):
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{FILE}.unfinished"
    require("safetensors.torch").save_file(tensors, unfinished, {"training": json.dumps(told)})
    _on_disk(unfinished)
    os.replace(unfinished, folder / FILE)
    _on_disk(folder)


def restore(folder, state, settings):
    """Brings the state to what the folder's file says; leaves it where there is none.

    Raises:
        ValueError: the file can't be read, or is of a training with other settings or another model.
    """
    path = Path(folder) / FILE
    found = state.processes.of_first(lambda: _read(path, settings) if path.exists() else None)
    if found is None:
        return
    tensors, told = found
    parts = {"model": {}, "optimizer": {}, "history": {}, "random": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    _restore_model(state.model, parts["model"], path)
    for name, parameter in state.model.named_parameters():
        found = {
            key.rpartition(".")[2]: value for key, value in parts["optimizer"].items() if key.rpartition(".")[0] == name
        }
        if found:
            state.optimizer.state[parameter] = {key: _like(parameter, value) for key, value in found.items()}
    for group, saved in zip(state.optimizer.param_groups, told["groups"]):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    state.schedule.load_state_dict(told["schedule"])
    for name in _STEPWISE:
        getattr(state.history, name)[:] = parts["history"][name].tolist()
    state.history.validation[:] = told["validation"]
    rank = state.processes.rank
    if rank < len(told["random"]):  # else there are more processes than there were
        _restore_random_state(state.model, parts["random"], told["random"][rank], rank)
    state.epoch, state.step = told["epoch"], told["step"]


def _read(path, settings):
    """The file's tensors, and what else it tells."""
    try:
        with require("safetensors").safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (require("safetensors").SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint_dir has a file that can't be read, {path}: {error}") from error
    _same(settings, told["settings"], path)
    return tensors, told


def _restore_model(model, saved, path):
    there = model.state_dict()
    for name in there.keys() | saved.keys():
        sizes = [list(tensors[name].shape) if name in tensors else "none" for tensors in (saved, there)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"checkpoint_dir has the training of another model, {path}: {name} is {sizes[0]} there, {sizes[1]} here"
            )
    for name, tensor in there.items():
        put(tensor, saved[name])


def _same(settings, saved, path):
    for name in settings | saved:
        if settings.get(name) != saved.get(name):
            raise ValueError(
                f"checkpoint_dir has a training with {name}={saved.get(name)!r}, {path}, got "
                f"{settings.get(name)!r}: only the same training can go on"
            )


def _without_parameters(group):
    return {key: value for key, value in group.items() if key != "params"}


def _like(parameter, value):
    """Of a parameter's size with its strides, too: the next update then runs in the same order. Else as it is."""
    if value.shape != parameter.shape:
        return value
    found = torch.empty_like(parameter, requires_grad=False)
    put(found, value)
    return found


def _random_state(model):
    """Where all generators stand that a data set or a model may draw from: tensors, and what JSON can hold."""
    tensors = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, numbers, normal = random.getstate()
    other = {"python": [version, list(numbers), normal]}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        other["numpy"] = [name, keys.tolist(), *rest]
    return tensors, other


def _restore_random_state(model, tensors, other, rank):
    torch.set_rng_state(tensors[f"{rank}.cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and f"{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{rank}.cuda"], device)
    version, numbers, normal = other["python"]
    random.setstate((version, tuple(numbers), normal))
    if "numpy" in other:
        require("numpy").random.set_state(tuple(other["numpy"]))


def _on_disk(path):
    """Waits until it is there also if the machine stops."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
