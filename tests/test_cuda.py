"""The CUDA kernels: cut into few and many chunks, under sanitizers, and what they move."""

import os
import subprocess

import pytest
import torch
from support import compiling, emulated, traffic

import mmkernels as mmk
from mmkernels import cases, tolerance

OPERATION = "spatial_attention"
ATTENTION = ("gated_cross_attention", "bidirectional_attention")
BACKEND = "cuda-emulated"

needs_emulator = pytest.mark.skipif(emulated.why_not_here() is not None, reason=str(emulated.why_not_here()))


def assert_right(case, dtype, gradients=True, operation=OPERATION, **configuration):
    with emulated.configured(**configuration):
        verdicts = tolerance.Standard(operation, case, dtype, gradients=gradients).test(
            getattr(mmk, operation), backend=BACKEND
        )
    assert all(v.passed for v in verdicts), "\n".join(str(v) for v in verdicts if not v.passed)


# With little shared memory, tiles are small and slabs narrow; with many processors, chunks are many.
DEVICES = {
    "small tiles, few chunks": dict(shared=12_000, processors=1, order="shuffled", tiles=True),
    "small tiles, many chunks": dict(shared=9_000, processors=200, order="descending", late_copies=False, tiles=True),
    "narrow slabs": dict(shared=9_000, processors=50, seed=3, order="shuffled", tiles=True),
}
# Every sort of case once: the whole list runs on the default device, in test_spatial_attention.py.
SOME = [
    case
    for i, case in enumerate(cases.selected(OPERATION, small=True))
    if i % 4 == 0 or case.group in ("packed", "bdhw views", "masks")
]


@needs_emulator
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_however_it_is_cut(case, device):
    assert_right(case, torch.bfloat16 if len(case.name) % 3 == 0 else torch.float32, **DEVICES[device])


# So little shared memory that every sample of a group needs a cluster, forward or backward; of the other groups, many.
CLUSTERED = {"bnd views": 4_000, "bdhw views": 4_000, "masks": 5_000, "options": 5_000}


@needs_emulator
@pytest.mark.parametrize("order", ["shuffled", "descending"])
@pytest.mark.parametrize(
    "case", [case for case in cases.selected(OPERATION, small=True) if case.group not in ("packed", "empty")], ids=str
)
def test_in_clusters(case, order):
    """All dense cases on a device that has clusters."""
    emulated.counts()
    assert_right(
        case,
        torch.float32,
        shared=CLUSTERED.get(case.group, 5_500),
        processors=1,
        cluster=8,
        order=order,
        late_copies=order == "shuffled",
        tiles=True,
    )
    assert emulated.counts().cluster > 1 or case.group not in CLUSTERED


def _sized(positions, channels, start, planes, combine):
    def make(draw):
        base = draw.normal(2 * positions * channels + start)[start:]
        image = base.view(2, channels, positions).mT if planes else base.view(2, positions, channels)
        return {
            "image": image,
            "text": draw.normal(2, channels),
            "mask": draw.mask(2, positions),
            "combine": combine,
            "need_weights": True,
        }

    return cases.Case(f"{positions}x{channels} from {start} {planes} {combine}", "sized", make, True)


any_way = pytest.mark.parametrize("tiles", [False, True], ids=["registers", "tiles"])  # that features may take


@needs_emulator
@any_way
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "positions, channels, start",
    [(1, 257, 0), (1, 257, 3), (1, 8, 1), (20_011, 1, 1), (20_011, 3, 0), (515, 257, 5), (515, 24, 8), (515, 24, 1)],
)
def test_sizes(positions, channels, start, planes, dtype, combine, tiles):
    """One chunk and many, at storage offsets that are aligned to 16 bytes and that aren't."""
    assert_right(_sized(positions, channels, start, planes, combine), dtype, shared=60_000, processors=6, tiles=tiles)


@needs_emulator
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("positions", [515, 9])
@pytest.mark.parametrize("blocks", [2, 4, 8, 16])
def test_cluster_sizes(blocks, positions, dtype, planes, start, combine):
    """Samples for each size of cluster, the last block with few positions or none; the fourth is too large for any."""
    channels = 257 if positions > 100 else 8_000
    shared = int(1.3 * positions * channels * dtype.itemsize / blocks) + 4_000 + 8 * channels
    device = dict(shared=shared, processors=4, tiles=True)
    case = _sized(positions, channels, start, planes, combine)
    if positions > 100:
        with emulated.configured(cluster=min(blocks, 8), **device):
            emulated.counts()
            mmk.spatial_attention(**case.build(dtype), backend=BACKEND)
            assert emulated.counts().cluster == (blocks if blocks <= 8 else 1)
    assert_right(case, dtype, order="shuffled", seed=blocks, cluster=8, **device)  # backward: the next size


@needs_emulator
@any_way
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize("shape", [(1, 700, 40), (3, 37, 40), (3, 370, 40)])
def test_same_bits_in_any_order(combine, shape, cluster, tiles):
    """Whatever order threads and blocks run in, and whenever copies arrive."""
    image = torch.randn(shape).requires_grad_()
    text = torch.randn(shape[0], 40).requires_grad_()
    found = []
    for order in emulated.ORDERS:
        for late in (False, True):
            with emulated.configured(
                order=order, late_copies=late, shared=20_000, processors=5, cluster=cluster, tiles=tiles
            ):
                result, weights = mmk.spatial_attention(
                    image, text, combine=combine, need_weights=True, num_heads=2, backend=BACKEND
                )
                found.append((result, weights, *torch.autograd.grad(result.square().sum(), (image, text))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_emulator
@any_way
@pytest.mark.parametrize("combine", ["multiply", "pool"])
@pytest.mark.parametrize("shared", [9_000, 163_000])
def test_scores_far_below_those_of_masked_positions(combine, shared, tiles):
    """Masked positions are zeros in the tile; their scores must not be the maximum."""

    def make(draw):
        image = draw.normal(2, 300, 16).sign() + 2  # small whole numbers: scores of -500 and less, without rounding
        return {
            "image": image,
            "text": -8 * torch.ones_like(image[:, 0]),
            "mask": draw.mask(2, 300),
            "combine": combine,
            "scale": 1.0,
        }

    assert_right(
        cases.Case(f"negative {combine}", "negative", make, True),
        torch.float32,
        gradients=False,
        shared=shared,
        processors=4,
        tiles=tiles,
    )


@needs_emulator
@pytest.mark.parametrize("which", traffic.PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moves_no_more_than_it_must(which, dtype):
    """A sample that fits in shared memory: features once, results once, in one launch."""
    shape = (3, 96, 128, dtype)
    with emulated.configured(tiles=True):
        found = traffic.moved(*shape, which)
        minimum = traffic.least(*shape, which)
    assert found.launches == 1
    assert minimum <= found.loaded + found.stored <= 1.02 * minimum


@needs_emulator
@pytest.mark.parametrize("which", traffic.PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cluster_moves_no_more_than_it_must(which, dtype):
    """Too large for a block: still once, in one launch; each block reads the text."""
    shape = (3, 960, 128, dtype)
    with emulated.configured(shared=140_000, processors=20, cluster=8, tiles=True):
        found = traffic.moved(*shape, which)
        minimum = traffic.least(*shape, which)
    assert found.launches == 1 and found.cluster > 1
    assert minimum <= found.loaded + found.stored <= 1.02 * minimum


@needs_emulator
@pytest.mark.parametrize("which", traffic.PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_move_what_their_passes_read(which, dtype):
    """Straight through registers: scores or their gradient in one pass, results in another."""
    shape = (1, 4000, 128, dtype)
    with emulated.configured(processors=4):
        found = traffic.moved(*shape, which)
        minimum = traffic.least(*shape, which)
    again = {"multiply": 1, "multiply backward": 2, "pool": 0, "pool backward": 1}[which] * 4000 * 128 * dtype.itemsize
    assert found.launches == (3 if "backward" in which else 2)
    assert minimum + again <= found.loaded + found.stored <= 1.3 * (minimum + again)


@needs_emulator
def test_few_samples_are_split_over_all_processors():
    """A cluster reads them once, but its few processors can't draw all of the memory's bandwidth."""
    with emulated.configured(shared=20_000, processors=64, cluster=8, tiles=True):
        one, many = (traffic.moved(samples, 300, 64, torch.float32, "multiply") for samples in (1, 4))
    assert (one.cluster, one.launches) == (1, 2) and (many.cluster, many.launches) == (8, 1)


@needs_emulator
@pytest.mark.parametrize("which, twice", [("multiply", 1), ("multiply backward", 1), ("pool", 0), ("pool backward", 0)])
def test_what_a_split_sample_moves(which, twice):
    """Two launches, many blocks; the features that are combined are read again, by pool none."""
    shape = (1, 6000, 64, torch.float32)
    with emulated.configured(shared=60_000, processors=8, tiles=True):
        found = traffic.moved(*shape, which)
        minimum = traffic.least(*shape, which)
    assert found.launches == 2 and found.blocks >= 2 * 16
    features = 6000 * 64 * 4
    assert minimum + twice * features <= found.loaded + found.stored <= minimum + twice * features + 0.2 * features


# One buffer or two for what streams, one part or many; too little shared memory for the widest class, and for one
# launch.
ATTENTION_DEVICES = {
    "an A100 with many processors": dict(processors=500, order="shuffled"),
    "one processor": dict(processors=1, order="descending", late_copies=False),
    "99 KiB": dict(shared=99 << 10, processors=40, order="shuffled", seed=3),
    "227 KiB": dict(shared=227 << 10, processors=132, late_copies=False),
}


def _heads(batch, heads, positions, tokens, d, dv, masked):
    def make(operation):
        def build(draw):
            image, text = (draw.normal(batch, heads, n, d) for n in (positions, tokens))
            values = [draw.normal(batch, heads, n, dv) for n in (positions, tokens)]
            masks = draw.mask(batch, positions), draw.mask(batch, tokens)
            if operation == "gated_cross_attention":
                return {"query": image, "key": text, "value": values[1], "gate": values[0]} | (
                    {"attn_mask": masks[1]} if masked else {}
                )
            return {"image_query": image, "text_key": text, "image_value": values[0], "text_value": values[1]} | (
                {"image_mask": masks[0], "text_mask": masks[1]} if masked else {}
            )

        return cases.Case(f"{positions}x{tokens}x{d}x{dv}", "cut", build, True)

    return make


@needs_emulator
@pytest.mark.parametrize("device", ATTENTION_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 700, 20, 24, 40),
        (1, 1, 150, 77, 64, 64),
        (1, 1, 90, 130, 100, 60),
        (1, 1, 70, 20, 256, 256),
        (1, 1, 20, 70, 300, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", ATTENTION)
def test_attention_however_it_is_cut(operation, shape, dtype, device):
    assert_right(
        _heads(*shape, masked=shape[2] % 20 == 10)(operation), dtype, operation=operation, **ATTENTION_DEVICES[device]
    )


@needs_emulator
@pytest.mark.parametrize("tokens", [20, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ATTENTION)
def test_attention_same_bits_in_any_order(operation, dtype, tokens):
    """Whatever order threads and blocks run in, and whenever copies arrive."""
    arguments = _heads(1, 1, 700, tokens, 24, 24, masked=True)(operation).build(dtype, "cpu", 0)
    leaves = [a.requires_grad_() for a in arguments.values() if a.is_floating_point()]
    found = []
    for order in emulated.ORDERS:
        for late in (False, True):
            with emulated.configured(order=order, late_copies=late, processors=5):
                results = getattr(mmk, operation)(**arguments, backend=BACKEND)
                results = results if isinstance(results, tuple) else (results,)
                found.append((*results, *torch.autograd.grad(sum(r.float().square().sum() for r in results), leaves)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_emulator
@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbed_attention_same_bits_in_any_order(dtype, tokens):
    image, key, value = torch.randn(1, 400, 24), torch.randn(1, 2, tokens, 24) / 5, torch.randn(1, 2, tokens, 20)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (image, key, value)]
    found = []
    for order in emulated.ORDERS:
        with emulated.configured(order=order, late_copies=order != "shuffled", processors=2):
            results = mmk.absorbed_attention(*leaves, backend=BACKEND)
            found.append((*results, *torch.autograd.grad(sum(r.float().square().sum() for r in results), leaves)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_emulator
def test_absorbed_attention_refuses_what_does_not_fit():
    with emulated.configured(shared=16 << 10), pytest.raises(RuntimeError, match="too little shared memory"):
        mmk.absorbed_attention(torch.randn(1, 7, 8), torch.randn(1, 1, 5, 8), backend=BACKEND)


@needs_emulator
@pytest.mark.parametrize("operation", ATTENTION)
def test_attention_refuses_what_does_not_fit(operation):
    arguments = _heads(1, 1, 7, 5, 8, 8, masked=False)(operation).build(torch.float32, "cpu", 0)
    with emulated.configured(shared=16 << 10), pytest.raises(RuntimeError, match="too little shared memory"):
        getattr(mmk, operation)(**arguments, backend=BACKEND)


@needs_emulator
@pytest.mark.parametrize("operation, which, shape, launches, limit", traffic.ATTENTION_LIMITS)
def test_what_attention_moves(operation, which, shape, launches, limit):
    found = traffic.attention_moved(operation, which, *shape)
    minimum = traffic.attention_least(operation, which, *shape)
    assert found.launches == launches
    assert minimum <= found.loaded + found.stored <= limit * minimum


# Channel and additive attention: several panels of rows, through which dropout counts on, samples that end inside of
# them, few and many blocks a sample.
ROW_DEVICES = {
    "one processor": dict(processors=1, order="descending"),
    "many processors": dict(processors=500, order="shuffled", seed=2),
}


def _channels(batch, positions, channels, make=cases.contiguous):
    def build(draw):
        return {
            "image": make(draw, batch, positions, channels),
            "text": draw.normal(batch, 5),
            "weight": draw.normal(channels, channels + 5) * 0.1,
            "need_weights": True,
        }

    return cases.Case(f"{batch}x{positions}x{channels} {make.__name__}", "cut", build, True)


def _bags(bags, channels, hidden, maps, combine="pool", masked=False, dropout_p=0.0):
    def build(draw):
        rows = sum(bags)
        image = draw.normal(rows, channels)
        mask = draw.mask(rows)
        arguments = {
            "image": image,
            "query": draw.normal(len(bags), 3),
            "w_image": draw.normal(hidden, channels) * 0.1,
            "w_query": draw.normal(hidden, 3),
            "v": draw.normal(maps, hidden) * 0.1,
            "w_gate": draw.normal(hidden, channels) * 0.1,
            "activation": "gelu",
            "combine": combine,
            "offsets": torch.tensor([0, *torch.tensor(bags).cumsum(0).tolist()]),
            "dropout_p": dropout_p,
            "need_weights": True,
        }
        return arguments | ({"mask": mask} if masked else {})

    return cases.Case(f"{bags} {combine}", "cut", build, True)


@needs_emulator
@pytest.mark.parametrize("device", ROW_DEVICES)
@pytest.mark.parametrize(
    "operation, case",
    [
        ("channel_attention", _channels(3, 700, 520)),
        ("channel_attention", _channels(3, 700, 520, cases.window)),
        ("additive_attention", _bags((0, 1500, 3, 900), 24, 260, 2, dropout_p=0.25)),
        ("additive_attention", _bags((1500, 0, 900), 24, 260, 1, "multiply", masked=True)),
        ("additive_attention", _bags((700, 5), 24, 20, 6)),
    ],
    ids=str,
)
def test_rows_however_they_are_cut(operation, case, device):
    assert_right(case, torch.float32, operation=operation, **ROW_DEVICES[device])


@needs_emulator
@pytest.mark.parametrize(
    "operation, case",
    [("channel_attention", _channels(2, 90, 40)), ("additive_attention", _bags((700, 0, 300), 24, 20, 2))],
    ids=str,
)
def test_rows_same_bits_in_any_order(operation, case):
    arguments = case.build(torch.float32)
    leaves = [a.requires_grad_() for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_floating_point()]
    found = []
    for order in emulated.ORDERS:
        with emulated.configured(order=order, processors=50):
            results = getattr(mmk, operation)(**arguments, backend=BACKEND)
            found.append((*results, *torch.autograd.grad(sum(r.square().sum() for r in results), leaves)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(
    "program, mode, count",
    [
        ("check", "plain", 400),
        ("check", "asan", 100),
        ("check", "tsan", 40),
        ("check_attention", "plain", 400),
        ("check_attention", "asan", 100),
        ("check_attention", "tsan", 30),
        ("check_absorbed", "plain", 150),
        ("check_absorbed", "asan", 40),
        ("check_absorbed", "tsan", 20),
        ("check_deformable", "plain", 400),
        ("check_deformable", "asan", 150),
        ("check_deformable", "tsan", 30),
        ("check_rows", "plain", 600),
        ("check_rows", "asan", 600),
        ("check_rows", "tsan", 60),
    ],
)
def test_random_arguments(program, mode, count):
    """Against plain loops in double; also offsets that are no offsets, which must stay inside of all memory."""
    flags = [*emulated.KERNEL, *emulated.MODES[mode]]
    jobs = [*emulated.emulator_jobs(mode), *emulated.kernel_jobs(mode), (emulated.EMULATOR / f"{program}.cpp", flags)]
    program = compiling.program(f"{program}-{mode}", jobs, emulated.MODES[mode])
    environment = os.environ | {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}
    done = subprocess.run([program, "1", str(count)], capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-3]) > count // 20  # so many in clusters, in several panels, or in order
