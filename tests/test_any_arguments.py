"""Any sizes, options and memory layouts, on every backend that can run here."""

import pytest
import torch
from support.attention_tests import assert_passed
from support.runnable import runnable

import mmkernels as mmk
from mmkernels import cases, functional, tolerance
from mmkernels.cases import deformable_attention as sampled

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis isn't installed: it draws these tests' arguments")
from hypothesis import strategies as st  # noqa: E402

# Of two or three tokens or channels a softmax's gradient may cancel to less than its terms' rounding, and the peer be
# lucky: one call of a thousand is a little more off than the rule allows. Of these the gradients are judged in cases
# only.
WITH_GRADIENTS = set(functional.__all__) - {
    "bidirectional_attention",
    "channel_attention",
    "gated_cross_attention",
    "absorbed_attention",
}

sizes = st.integers(1, 9)
few = st.integers(1, 3)  # samples and heads: more would be the same again
widths = st.integers(1, 40)
shares = st.sampled_from([None, 0.0, 0.3, 0.9])  # of what is masked out; None: no mask


@st.composite
def layouts(draw_from, dimensions):
    """``make(draw, shape)``: a tensor with its dimensions in any order in memory, expanded or with elements skipped."""
    order = draw_from(st.permutations(range(dimensions)))
    steps = [draw_from(st.sampled_from([0, 1, 1, 1, 2, 3])) for _ in range(dimensions)]
    start = draw_from(st.integers(0, 3))

    def make(draw, shape):
        # Dimension d is d-th in memory by `order`; step 0 expands it, a larger one skips elements.
        assert len(shape) == dimensions
        lengths = [max(1, shape[d] * steps[d]) for d in order]
        tensor = draw.normal(start + torch.Size(lengths).numel())[start:].view(lengths)
        for i, d in enumerate(order):
            if steps[d] == 0:
                tensor = tensor.expand(*tensor.shape[:i], shape[d], *tensor.shape[i + 1 :])
            else:
                tensor = tensor[(slice(None),) * i + (slice(None, None, steps[d]),)]
        return tensor.permute([order.index(d) for d in range(dimensions)])

    return make


@st.composite
def spatial_attention(draw_from):
    batch = draw_from(st.integers(1, 4))
    height = draw_from(sizes)
    width = draw_from(sizes)
    heads = draw_from(st.integers(1, 4))
    per_head = draw_from(st.integers(1, 20))
    layout = draw_from(st.sampled_from(["bnd", "bdhw", "packed"]))
    channels = heads * per_head
    shape = {
        "bnd": (batch, height * width, channels),
        "bdhw": (batch, channels, height, width),
        "packed": (height * width, channels),
    }[layout]
    grid = {"bnd": shape[:2], "bdhw": (batch, height, width), "packed": shape[:1]}[layout]
    bounds = [0, *sorted(draw_from(st.lists(st.integers(0, shape[0]), max_size=4))), shape[0]]
    image = draw_from(layouts(len(shape)))
    share = draw_from(shares)
    options = {
        "num_heads": heads,
        "combine": draw_from(st.sampled_from(["multiply", "pool"])),
        "rescale": draw_from(st.booleans()),
        "need_weights": draw_from(st.booleans()),
    }

    def make(draw):
        samples = len(bounds) - 1 if layout == "packed" else batch
        arguments = {"image": image(draw, shape), "text": draw.normal(samples, channels), **options}
        if layout == "packed":
            arguments["offsets"] = torch.tensor(bounds, device=draw.device)
        if layout == "bdhw":
            arguments["layout"] = "bdhw"
        if share is not None:
            arguments["mask"] = draw.mask(*grid, share=1 - share)
        return arguments

    return cases.Case(f"{layout} {shape} {share} {bounds} {options}", "any", make, True)


@st.composite
def gated_cross_attention(draw_from):
    batch, heads, positions, tokens = (draw_from(drawn) for drawn in (few, few, sizes, sizes))
    width = draw_from(widths)
    value_width = draw_from(widths)
    shapes = {
        "query": (batch, heads, positions, width),
        "key": (batch, heads, tokens, width),
        "value": (batch, heads, tokens, value_width),
    }
    if draw_from(st.booleans()):
        shapes["gate"] = (batch, heads, positions, value_width)
    layout = {name: draw_from(layouts(4)) for name in shapes}
    share = draw_from(shares)
    grid = [draw_from(st.sampled_from([1, size])) for size in (batch, heads, positions)]
    need_weights = draw_from(st.booleans())

    def make(draw):
        arguments = {name: layout[name](draw, shape) for name, shape in shapes.items()}
        if share is not None:
            arguments["attn_mask"] = draw.mask(*grid, tokens, share=1 - share)
        return {**arguments, "need_weights": need_weights}

    return cases.Case(f"{shapes} {share} {grid}", "any", make, True)


@st.composite
def bidirectional_attention(draw_from):
    batch, heads, positions, tokens = (draw_from(drawn) for drawn in (few, few, sizes, sizes))
    width = draw_from(widths)
    value_width = draw_from(widths)
    shapes = {
        "image_query": (batch, heads, positions, width),
        "text_key": (batch, heads, tokens, width),
        "image_value": (batch, heads, positions, value_width),
        "text_value": (batch, heads, tokens, value_width),
    }
    layout = {name: draw_from(layouts(4)) for name in shapes}
    masked = {"image_mask": (positions, draw_from(shares)), "text_mask": (tokens, draw_from(shares))}

    def make(draw):
        arguments = {name: layout[name](draw, shape) for name, shape in shapes.items()}
        return arguments | {
            name: draw.mask(batch, size, share=1 - share) for name, (size, share) in masked.items() if share is not None
        }

    return cases.Case(f"{shapes} {masked}", "any", make, True)


@st.composite
def absorbed_attention(draw_from):
    batch, heads, positions, tokens = (draw_from(drawn) for drawn in (few, few, sizes, sizes))
    width = draw_from(widths)
    value_width = draw_from(widths)
    attend, bias, wide = (draw_from(st.booleans()) for _ in range(3))
    pool = draw_from(st.booleans()) if attend else True
    shapes = {
        "image": (batch, positions, width),
        "key": (batch, heads, tokens, width),
        "value": (batch, heads, tokens, value_width),
        "key_bias": (batch, heads, tokens),
    }
    layout = {name: draw_from(layouts(len(shape))) for name, shape in shapes.items()}
    masked = {"image_mask": (positions, draw_from(shares)), "text_mask": (tokens, draw_from(shares))}

    def make(draw):
        arguments = {name: layout[name](draw, shape) for name, shape in shapes.items()}
        if not attend:
            arguments["value"] = None
        if not bias:
            arguments["key_bias"] = None
        if wide and draw.dtype in (torch.bfloat16, torch.float16):
            arguments |= {n: t.float() for n, t in arguments.items() if n != "image" and t is not None}
        return (
            arguments
            | {"pool": pool}
            | {
                name: draw.mask(batch, size, share=1 - share)
                for name, (size, share) in masked.items()
                if share is not None
            }
        )

    return cases.Case(f"{shapes} {masked} {attend} {bias} {wide} {pool}", "any", make, True)


@st.composite
def deformable_attention(draw_from):
    """Small ones, as interpreters take long; those of public models are in test_deformable_attention.py."""
    batch = draw_from(st.integers(1, 2))
    heads = draw_from(st.integers(1, 2))
    queries = draw_from(st.integers(1, 4))
    channels = draw_from(widths)
    levels = draw_from(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3))
    counts = st.integers(0, 4)
    points = draw_from(st.one_of(st.none(), st.lists(counts, min_size=len(levels), max_size=len(levels))))
    of_level = draw_from(st.integers(1, 4))
    shape = batch, heads, channels, queries, of_level, levels
    positions = sum(y * x for y, x in levels)
    layout = draw_from(layouts(4))
    share = draw_from(shares)
    softmax, wide = draw_from(st.booleans()), draw_from(st.booleans())
    locate = draw_from(st.sampled_from([sampled.within, sampled.around, sampled.on_edges, sampled.not_finite]))

    def make(draw):
        of_points = (len(levels), of_level) if points is None else (sum(points),)
        arguments = {
            "value": layout(draw, (batch, positions, heads, channels)),
            "spatial_shapes": levels,
            "locations": sampled.locations(draw, shape, points, locate),
            "scores": draw.normal(batch, queries, heads, *of_points),
            "points": points,
            "softmax": softmax,
        }
        if wide and draw.dtype in (torch.bfloat16, torch.float16):
            arguments |= {name: arguments[name].float() for name in ("locations", "scores")}
        if share is not None:
            arguments["mask"] = draw.mask(batch, positions, share=1 - share)
        return arguments

    return cases.Case(f"{shape} {points} {share} {softmax} {locate.__name__}", "any", make, True)


@st.composite
def channel_attention(draw_from):
    image = [draw_from(sizes) for _ in range(draw_from(st.integers(1, 2)))] + [draw_from(widths)]
    text = draw_from(widths)
    bias = draw_from(st.booleans())
    need_weights = draw_from(st.booleans())
    shapes = {"image": image, "text": (image[0], text), "weight": (image[-1], image[-1] + text)}
    layout = {name: draw_from(layouts(len(shape))) for name, shape in shapes.items()}

    def make(draw):
        arguments = {name: layout[name](draw, shape) for name, shape in shapes.items()}
        arguments["weight"] = arguments["weight"] * arguments["weight"].shape[1] ** -0.5
        return {**arguments, "bias": draw.normal(image[-1]) if bias else None, "need_weights": need_weights}

    return cases.Case(f"{shapes} {bias} {need_weights}", "any", make, True)


@st.composite
def additive_attention(draw_from):
    packed, gated, query, bias, need_weights = (draw_from(st.booleans()) for _ in range(5))
    batch = draw_from(sizes)
    positions = draw_from(st.integers(1, 40))
    channels = draw_from(widths)
    hidden = draw_from(widths)
    text = draw_from(sizes)
    combine = draw_from(st.sampled_from(["pool", "multiply"]))
    maps = draw_from(st.integers(1, 5)) if combine == "pool" else 1
    bounds = [0, *sorted(draw_from(st.lists(st.integers(0, positions), max_size=4))), positions]
    shapes = {
        "image": (positions, channels) if packed else (batch, positions, channels),
        "w_image": (hidden, channels),
        "v": (maps, hidden),
    } | ({"w_gate": (hidden, channels)} if gated else {})
    layout = {name: draw_from(layouts(len(shape))) for name, shape in shapes.items()}
    share = draw_from(shares)
    activation = draw_from(st.sampled_from(["tanh", "relu", "gelu"]))

    def make(draw):
        arguments = {name: layout[name](draw, shape) for name, shape in shapes.items()}
        for name in arguments.keys() - {"image"}:
            arguments[name] = arguments[name] * shapes[name][1] ** -0.5
        samples = len(bounds) - 1 if packed else batch
        arguments["query"] = draw.normal(samples, text) if query else None
        arguments["w_query"] = draw.normal(hidden, text) * text**-0.5 if query else None
        arguments["bias"] = draw.normal(hidden) if bias else None
        if gated and bias:
            arguments["bias_gate"] = draw.normal(hidden)
        if packed:
            arguments["offsets"] = torch.tensor(bounds, device=draw.device)
        if share is not None:
            arguments["mask"] = draw.mask(*shapes["image"][:-1], share=1 - share)
        return {**arguments, "activation": activation, "combine": combine, "need_weights": need_weights}

    return cases.Case(f"{shapes} {share} {bounds} {query} {bias} {activation}", "any", make, True)


@pytest.mark.property("values of any arguments")
@pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *combination.values, id=f"{operation}-{combination.id}")
        for operation in functional.__all__
        for combination in runnable(operation)
    ],
)
def test_anything(operation, backend, device, dtype):
    @hypothesis.given(case=globals()[operation]())
    def check(case):
        standard = tolerance.Standard(operation, case, dtype, device, gradients=operation in WITH_GRADIENTS)
        assert_passed(standard.test(getattr(mmk, operation), backend=backend))

    check()


# Which of the tensors want a gradient, in their order.
some = st.lists(st.booleans(), min_size=9, max_size=9)
DROPPING = st.fixed_dictionaries({"dropout_p": st.sampled_from([0.0, 0.25, 0.9]), "need_scores": st.booleans()})


@pytest.mark.property("gradients of any arguments")
@pytest.mark.parametrize(
    "operation, backend, device, dtype",
    [
        pytest.param(operation, *combination.values, id=f"{operation}-{combination.id}")
        for operation in functional.__all__
        for combination in runnable(operation)
        if combination.values[0] not in ("reference", "triton")
    ],
)
def test_gradients_of_some(operation, backend, device, dtype):
    """Where only some tensors want a gradient, or none does, everything has the same bits as where all do; with
    dropout and the scores, where there are such."""
    more = DROPPING if operation == "additive_attention" else st.just({})

    @hypothesis.given(case=globals()[operation](), wanted=some, options=more)
    def check(case, wanted, options):
        arguments = case.build(dtype, device) | options
        tensors = [name for name, t in arguments.items() if torch.is_tensor(t) and t.is_floating_point()]
        chosen = {name for name, asked in zip(tensors, wanted) if asked}
        found, alone = (
            tolerance.evaluate(getattr(mmk, operation), arguments, gradients=gradients, backend=backend)
            for gradients in (True, chosen)
        )
        assert alone.keys() == found.keys() - {f"{name}.grad" for name in tensors if name not in chosen}
        different = [name for name in alone if not same_bits(alone[name], found[name])]
        assert not different, f"{different} with gradients of {sorted(chosen)} alone"

    check()


def same_bits(a, b):
    """NaN is NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
