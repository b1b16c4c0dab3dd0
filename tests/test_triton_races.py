"""The Triton kernels, interpreted: no thread may read or write what another one writes at the same time.

The interpreter runs one program after another, each as one thread. On a GPU a program is several warps, and one element
may be held by some of them: each loads it for itself. So between a program's loads and its stores of an address there
must be a barrier; and what one program stores, no other one of the same launch may load or store. What is loaded and
stored is recorded here, and the rule checked.
"""

import importlib.util

import pytest
import torch
from support.attention_tests import deterministic, draw
from triton_problems import OPERATIONS

import mmkernels as mmk
from mmkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not backends.INTERPRETED:
    pytest.skip("mmkernels was imported without TRITON_INTERPRET=1", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


class Accesses:
    """What the kernels do to memory while it records: which of them ran, and what went wrong."""

    def __init__(self, monkeypatch):
        self.kernels, self.races = set(), set()
        self.everything, self.since_barrier = [], []  # (program, whether it stores, addresses)
        builder = interpreter.InterpreterBuilder
        launch = interpreter.GridExecutor.__call__
        load = builder.create_masked_load
        store = builder.create_masked_store
        barrier = builder.create_barrier
        begin = builder.set_grid_idx

        def recorded_launch(executor, *arguments, **options):
            self.kernel = executor.fn.__name__
            self.kernels.add(self.kernel)
            self.everything = []
            launch(executor, *arguments, **options)
            self.compare_programs()

        def recorded_begin(builder, *program):
            self.program, self.since_barrier = program, []
            return begin(builder, *program)

        def recorded_barrier(builder):
            self.since_barrier = []
            return barrier(builder)

        def recorded_load(builder, pointers, mask, *others, **options):
            self.add(False, pointers.data[mask.data])
            return load(builder, pointers, mask, *others, **options)

        def recorded_store(builder, pointers, value, mask, *others, **options):
            self.add(True, pointers.data[mask.data])
            return store(builder, pointers, value, mask, *others, **options)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded_launch)
        for name, function in (
            ("set_grid_idx", recorded_begin),
            ("create_barrier", recorded_barrier),
            ("create_masked_load", recorded_load),
            ("create_masked_store", recorded_store),
        ):
            monkeypatch.setattr(builder, name, function)

    def add(self, stores, addresses):
        addresses = np.unique(addresses)
        for earlier, before in self.since_barrier:
            if (stores or earlier) and np.intersect1d(addresses, before, assume_unique=True).size:
                self.races.add(
                    f"{self.kernel}: {'stored' if earlier else 'loaded'}, then {'stored' if stores else 'loaded'}, no barrier between"
                )
        self.since_barrier.append((stores, addresses))
        self.everything.append((self.program, stores, addresses))

    def compare_programs(self):
        stored = {}
        for program, stores, addresses in self.everything:
            for address in addresses.tolist() if stores else ():
                if stored.setdefault(address, program) != program:
                    self.races.add(f"{self.kernel}: two programs store one address")
        for program, stores, addresses in self.everything:
            if not stores and any(stored.get(address, program) != program for address in addresses.tolist()):
                self.races.add(f"{self.kernel}: a program loads what another one stores")


def device_of(count, monkeypatch):
    """With many processors samples and heads are cut into pieces, whose results are merged."""
    from mmkernels.triton import additive_attention, heads, spatial_attention

    for module in (additive_attention, heads, spatial_attention):
        monkeypatch.setattr(module, "processors", lambda tensor: count)


def train(function, tensors, **options):
    tensors = [t.requires_grad_() for t in tensors]
    results = function(*tensors, backend="triton", **options)
    sum(r.sum() for r in (results if isinstance(results, tuple) else (results,))).backward()


def spatial_attention():
    """A small sample, one in chunks whose blocks hold fewer positions than a program has threads, packed bags of both
    kinds; and the result where the image lies."""
    for combine in ("multiply", "pool"):
        for shape in ((2, 5, 6), (1, 5, 8192)):
            train(mmk.spatial_attention, (draw(*shape), draw(shape[0], shape[2])), combine=combine, need_weights=True)
        train(
            mmk.spatial_attention, (draw(9, 4096), draw(3, 4096)), offsets=torch.tensor([0, 1, 1, 9]), combine=combine
        )
    for shape in ((2, 5, 6), (1, 5, 8192)):
        image = draw(*shape)
        mmk.spatial_attention(image, draw(shape[0], shape[2]), out=image, backend="triton")


def gated_cross_attention():
    for mask in (draw(1, 1, 140, 70), draw(1, 70) > 0):
        train(
            mmk.gated_cross_attention,
            (draw(1, 1, 140, 8), draw(1, 1, 70, 8), draw(1, 1, 70, 40), draw(1, 1, 140, 40)),
            attn_mask=mask,
        )


def bidirectional_attention():
    train(
        mmk.bidirectional_attention,
        (draw(1, 1, 140, 8), draw(1, 1, 20, 8), draw(1, 1, 140, 40), draw(1, 1, 20, 40)),
        image_mask=draw(1, 140) > 0,
        text_mask=draw(1, 20) > 0,
    )


def absorbed_attention():
    train(
        mmk.absorbed_attention,
        (draw(1, 70, 40), draw(1, 2, 20, 40), draw(1, 2, 20, 34)),
        key_bias=draw(1, 2, 20).requires_grad_(),
        image_mask=draw(1, 70) > 0,
        text_mask=draw(1, 20) > 0,
    )


def deformable_attention():
    levels = ((6, 5), (3, 3))
    tensors = draw(1, 39, 2, 40), draw(1, 30, 2, 2, 3, 2), draw(1, 30, 2, 2, 3)
    call = lambda value, locations, scores, **options: mmk.deformable_attention(
        value, levels, locations, scores, mask=torch.arange(39)[None] > 2, **options
    )
    for ordered in (False, True):
        with deterministic(ordered):
            train(call, tensors)


def channel_attention():
    for channels in (7, 2050):
        train(
            mmk.channel_attention, (draw(2, 3, channels), draw(2, 2), draw(channels, channels + 2)), need_weights=True
        )


def additive_attention():
    layers = lambda maps: (draw(2, 5), draw(4, 6), draw(4, 5), draw(maps, 4))
    train(
        mmk.additive_attention,
        (draw(2, 600, 6), *layers(2)),
        w_gate=draw(4, 6).requires_grad_(),
        bias_gate=draw(4).requires_grad_(),
    )
    train(mmk.additive_attention, (draw(50, 6), *layers(1)), offsets=torch.tensor([0, 3, 50]), combine="multiply")


@pytest.mark.parametrize("processors", (1, 100))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_races(operation, processors, monkeypatch):
    device_of(processors, monkeypatch)
    accesses = Accesses(monkeypatch)
    globals()[operation]()
    assert not accesses.races
    assert accesses.kernels <= OPERATIONS[operation].KERNELS
    assert processors == 1 or accesses.kernels == OPERATIONS[operation].KERNELS, "not every kernel ran"


@triton.jit
def shifted(to, barrier: tl.constexpr, step: tl.constexpr):
    """to[n + step] = to[n]"""
    n = tl.program_id(0) * 4 + tl.arange(0, 4)
    x = tl.load(to + n)
    if barrier:
        tl.debug_barrier()
    tl.store(to + n + step, x)


@pytest.mark.parametrize(
    "barrier, step, races",
    (
        (True, 0, []),
        (False, 0, ["shifted: loaded, then stored, no barrier between"]),
        (True, 8, []),
        (False, 8, []),
        (True, 4, ["shifted: a program loads what another one stores"]),
    ),
)
def test_races_are_found(barrier, step, races, monkeypatch):
    accesses = Accesses(monkeypatch)
    shifted[(2,)](torch.zeros(16), barrier, step)
    assert list(accesses.races) == races
