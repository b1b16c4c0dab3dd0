"""Several processes that train one model together: each computes its share of every step's samples."""

import copy
import os
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from .. import checks
from .recomputation import layers_of

KINDS = ("ddp", "fsdp")


def is_first():
    """Whether this process is the one that prints and writes: the only one, or the first of those that torchrun
    started."""
    return int(os.environ.get("RANK", 0)) == 0


def own_device():
    """Where this process should have its model: on its own GPU where there are GPUs, else on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


@contextmanager
def joined(kind, device):
    """The :class:`Processes` that train together while this lasts; of ``kind=None`` it is this one alone.

    Raises:
        ValueError: there is no such kind, or nobody told the processes of each other: torchrun does.
    """
    if kind is None:
        yield Processes(None)
        return
    checks.choice("distributed", kind, KINDS)
    theirs = dist.is_initialized()
    if not theirs:
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(f"distributed must be None in a single process, got {kind!r}: start it with torchrun")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(kind)
    finally:
        if not theirs:
            dist.destroy_process_group()


class Processes:
    """Those that train together.

    Attributes:
        kind: None (there is one), ``"ddp"`` or ``"fsdp"``.
        rank, count: which one this is, of how many.
    """

    def __init__(self, kind):
        self.kind = kind
        self.rank = dist.get_rank() if kind else 0
        self.count = dist.get_world_size() if kind else 1

    def own(self, parts):
        """This process's share of a list: as many neighbours as the others have."""
        size = len(parts) // self.count
        return parts[self.rank * size : (self.rank + 1) * size]

    def shared(self, model):
        """The model that is trained: the model itself, or with FSDP2 a copy of which each process has a share."""
        if self.kind != "fsdp":
            return model
        from torch.distributed.fsdp import fully_shard

        model = copy.deepcopy(model)
        device = next(model.parameters()).device.type
        mesh = dist.device_mesh.init_device_mesh(device, (self.count,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def called(self, model):
        """What has to be called in place of the model, for its gradients to be those of all."""
        return torch.nn.parallel.DistributedDataParallel(model) if self.kind == "ddp" else model

    def unless_last(self, model, last):
        """A context for all micro-batches of a step but the last, after which gradients are added up."""
        return model.no_sync() if self.kind == "ddp" and not last else nullcontext()

    def total(self, numbers):
        """The sum over processes, of a float64 tensor."""
        if self.kind:
            dist.all_reduce(numbers)
        return numbers

    def of_each(self, value):
        """Every process's value, a list."""
        if not self.kind:
            return [value]
        found = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_first(self, function):
        """What a function returns, or raises, in the first process; it runs there alone."""
        if not self.kind:
            return function()
        found = [None, None]
        if not self.rank:
            try:
                found[0] = function()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]


def whole(tensor):
    """A tensor of which every process has a share, gathered; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(target, value):
    """Copies a whole tensor into one of which every process may have a share."""
    if hasattr(target, "full_tensor"):
        value = dist.tensor.distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
