"""Dropout of additive attention: which elements, from which seed, and how PyTorch sees it. (What is computed with them
is compared on every backend by the cases.)"""

import pytest
import torch
from support.attention_tests import assert_module, draw
from support.runnable import runnable
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk
from mmkernels.reference.dropout import GATE, HIDDEN, dropout_factors, philox

OPERATION = "additive_attention"
on_every_backend = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION))
in_float64 = pytest.mark.parametrize("backend, device, dtype", runnable(OPERATION, [torch.float64]))


def layers(hidden=6, channels=5, dtype=torch.float32, device="cpu", gated=True):
    shapes = {"w_image": (hidden, channels), "v": (2, hidden)} | ({"w_gate": (hidden, channels)} if gated else {})
    tensors = {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return tensors | {"query": None, "w_query": None}


def dropped(image, p=0.4, seed=3, function=mmk.additive_attention, hidden=30, **options):
    """Of each row which hidden units are 0: all are 1, and each has a map of its own."""
    ones = image.new_ones(hidden, image.shape[-1])
    torch.manual_seed(seed)
    _, scores = function(
        image.new_ones(image.shape),
        None,
        ones,
        None,
        torch.eye(hidden).to(ones),
        activation="relu",
        dropout_p=p,
        need_scores=True,
        **options,
    )
    assert torch.equal(scores.unique(), scores.new_tensor([0, image.shape[-1] / (1 - p)]))
    return scores == 0


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, words):
    """Those that come with the generator (Random123, kat_vectors)."""
    found = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_as_many_as_asked_for():
    """Of 600,000 elements within five standard deviations; hidden units, gates, rows and seeds know nothing of each
    other."""
    seeds = torch.tensor(11), torch.tensor(12)
    for p in (0.01, 0.25, 0.75):
        draws = [dropout_factors(s, (3, 1000), 200, which, p, torch.float64) for s in seeds for which in (HIDDEN, GATE)]
        draws += [draws[0].roll(1, 1), draws[0].roll(1, 2)]
        deviation = (p * (1 - p) / 600_000) ** 0.5
        for i, one in enumerate(draws):
            assert torch.equal(one.unique(), torch.tensor([0, 1 / (1 - p)], dtype=torch.float64))
            assert abs(float((one == 0).double().mean()) - p) < 5 * deviation
            for other in draws[:i]:
                both = float(((one == 0) & (other == 0)).double().mean())
                assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / 600_000) ** 0.5 + 2 * p * 5 * deviation


@on_every_backend
@pytest.mark.parametrize("hidden", [1, 2, 7, 30, 133])
def test_the_same_elements_on_every_backend(backend, device, dtype, hidden):
    image = torch.zeros(2, 50, 3, dtype=dtype, device=device)
    expected = dropped(image, hidden=hidden, function=mmk.reference.additive_attention)
    assert torch.equal(dropped(image, hidden=hidden, backend=backend), expected)
    assert not torch.equal(dropped(image, hidden=hidden, backend=backend, seed=4), expected)
    packed = dropped(image.flatten(0, 1), hidden=hidden, backend=backend, offsets=[0, 50, 50, 100])
    assert torch.equal(packed, expected.transpose(0, 1).flatten(1))


@on_every_backend
def test_the_seed_repeats_it(backend, device, dtype):
    image = draw(2, 9, 5, device=device)
    run = lambda: mmk.additive_attention(image, **layers(device=device), dropout_p=0.5, backend=backend)
    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    assert torch.equal(run(), first) and torch.equal(run(), second) and not torch.equal(first, second)
    before = torch.get_rng_state()
    mmk.additive_attention(image, **layers(device=device), backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@on_every_backend
def test_all_and_none(backend, device, dtype):
    """With p = 1 all scores are 0, as torch's dropout has it; with 0 nothing is dropped, to the bit."""
    image = draw(2, 9, 5, device=device)
    run = lambda **p: mmk.additive_attention(image, **layers(device=device), need_scores=True, backend=backend, **p)
    assert not run(dropout_p=1)[1].any()
    assert all(torch.equal(a, b) for a, b in zip(run(dropout_p=0), run()))


@in_float64
def test_gradcheck(backend, device, dtype):
    """The backward pass drops what the forward pass dropped; so does its own."""
    tensors = layers(dtype=dtype, device=device)
    names = [name for name, t in tensors.items() if t is not None]
    given = [t.requires_grad_() for t in (draw(2, 3, 5, dtype=dtype, device=device), *(tensors[n] for n in names))]

    def run(image, *given):
        torch.manual_seed(5)
        return mmk.additive_attention(
            image, **tensors | dict(zip(names, given)), dropout_p=0.5, need_scores=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, given, check_forward_ad=backend != "reference")
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("backend, device, dtype", [c for c in runnable(OPERATION) if c.values[0] != "reference"])
def test_nothing_is_stored(backend, device, dtype):
    """Autograd saves as many numbers with dropout as without. (Plain PyTorch keeps what it multiplies with.)"""
    image = draw(2, 100, 5, device=device).requires_grad_()
    saved = []
    for p in (0.0, 0.5):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved[-1].append(t.numel()) or t, lambda t: t):
            saved.append([])
            mmk.additive_attention(image, **layers(device=device), dropout_p=p, backend=backend)
    assert sum(saved[1]) == sum(saved[0]) + 1  # the seed


@pytest.mark.property("vmap")
@on_every_backend
def test_vmap(backend, device, dtype):
    """Of its randomness torch.func.vmap is told, as it is for torch's dropout."""
    images = draw(2, 9, 5, device=device).expand(3, 2, 9, 5)
    run = lambda image: mmk.additive_attention(image, **layers(device=device), dropout_p=0.5, backend=backend)
    torch.manual_seed(7)
    once = run(images[0])
    torch.manual_seed(7)
    same = torch.func.vmap(run, randomness="same")(images)
    assert backend == "reference" or all(torch.equal(one, once) for one in same)  # there rows are multiplied together
    different = torch.func.vmap(run, randomness="different")(images)
    assert not torch.equal(different[0], different[1]) and not torch.equal(different[1], different[2])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(images)


@pytest.mark.property("checkpoint")
@on_every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, device, dtype, use_reentrant):
    run = lambda image: mmk.additive_attention(image, **layers(device=device), dropout_p=0.5, backend=backend)
    found = []
    for compute in (run, lambda image: checkpoint(run, image, use_reentrant=use_reentrant)):
        image = draw(2, 9, 5, device=device).requires_grad_()
        torch.manual_seed(7)
        compute(image).sum().backward()
        found.append(image.grad)
    assert torch.equal(*found)


@pytest.mark.property("compile")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(extension, compiler):
    """One graph. What a compiler draws is its own; forward and backward agree, and another call draws anew."""
    torch._dynamo.reset()
    image, layer, maps = torch.ones(1, 50, 3), torch.ones(40, 3), torch.eye(40).requires_grad_()

    def run(image, layer, maps):
        return mmk.additive_attention(
            image, None, layer, None, maps, activation="relu", dropout_p=0.25, need_scores=True, backend="cpu"
        )[1]

    torch.manual_seed(7)
    eager = [run(image, layer, maps) for _ in range(2)]
    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    torch.manual_seed(7)
    found = [compiled(image, layer, maps) for _ in range(2)]
    assert not torch.equal(*found)
    for scores, expected in zip(found, eager):
        assert torch.equal(scores.unique(), torch.tensor([0.0, 4.0]))
        assert compiler == "inductor" or torch.equal(scores, expected)
        (grad,) = torch.autograd.grad(scores.sum(), maps)  # of map k: the sum of hidden unit k, over rows
        assert torch.equal(grad.diagonal(), scores[0].sum(1))


@pytest.mark.property("the module")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_module(extension, hooked, packed):
    """In training alone; where projections have to be called the same elements are dropped."""
    torch.manual_seed(0)
    module = mmk.AdditiveAttention(24, 10, num_queries=2, gated=True, dropout=0.25)
    if hooked:
        module.image_projection.register_forward_hook(lambda module, args, output: None)
    image = draw(2, 30, 24)
    given, options = (image.flatten(0, 1), {"offsets": torch.tensor([0, 30, 60])}) if packed else (image, {})

    def call(module, image):
        torch.manual_seed(1)
        return module(image, need_weights=True, need_scores=True, **options)

    assert_module(call, module, [given])
    torch.manual_seed(0)
    plain = mmk.AdditiveAttention(24, 10, num_queries=2, gated=True)
    found, expected = (m.eval()(given, need_scores=True, **options) for m in (module, plain))
    assert hooked or all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not torch.equal(call(module.train(), given)[0], found[0])
