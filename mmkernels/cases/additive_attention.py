"""Sizes, layouts, masks, every activation with and without gate, query and biases, maps, packed bags."""

import itertools

import torch

from .common import SMALL, Case
from .layouts import DENSE, MASKS, PACKED, contiguous, near_largest

OUTPUTS = ("result", "weights", "scores")
PARAMETERS = ("w_image", "w_query", "v", "bias", "w_gate", "bias_gate")


def generate():
    def case(
        group,
        name,
        shape,
        *,
        query=5,
        maps=1,
        bias=True,
        gated=False,
        make=contiguous,
        make_weight=contiguous,
        make_v=None,
        mask=None,
        bags=None,
        offsets_dtype=torch.int64,
        gain=1,
        combine="pool",
        **options,
    ):
        """`shape`: B, N, D, A, or rows, D, A with the bags' sizes in `bags`."""

        def build(draw):
            *image, hidden = shape
            batch = len(bags) if bags is not None else image[0]
            channels = image[-1]
            layer = lambda *size, make=make_weight: make(draw, *size) * size[1] ** -0.5
            arguments = {
                "image": make(draw, *image),
                "query": None,
                "w_image": layer(hidden, channels),
                "w_query": None,
                "v": layer(maps, hidden, make=make_v or make_weight) * gain,
                "combine": combine,
                **options,
            }
            if query:
                arguments |= {"query": draw.normal(batch, query), "w_query": layer(hidden, query)}
            if bias:
                arguments["bias"] = draw.normal(hidden)
            if gated:
                arguments["w_gate"] = layer(hidden, channels)
                if bias:
                    arguments["bias_gate"] = draw.normal(hidden)
            if mask is not None:
                arguments["mask"] = mask(draw, *image[:-1])
            if bags is not None:
                bounds = list(itertools.accumulate(bags, initial=0))
                arguments["offsets"] = torch.tensor(bounds, dtype=offsets_dtype, device=draw.device)
            return arguments

        elements = torch.Size(shape[:-1]).numel()
        return Case(f"{group}: {name}", group, build, elements <= SMALL and elements * shape[-1] <= 40 * SMALL)

    both = ("pool", "multiply")
    sizes = (
        (1, 1, 1, 1),
        (2, 3, 1, 3),
        (1, 1, 3, 1),
        (3, 3, 3, 5),
        (2, 113, 5, 4),
        (1, 16, 64, 32),
        (2, 33, 17, 21),
        (5, 7, 40, 8),
        (1, 97, 33, 20),
        (1, 3, 113, 7),
        (1, 1023, 3, 2),
    )
    large = ((2, 700, 130, 64), (1, 40, 1023, 113), (3, 196, 256, 256), (1, 20_011, 33, 16), (4, 113, 300, 203))
    activations = ("tanh", "relu", "gelu")
    for i, shape in enumerate((*sizes, *large)):
        for j, combine in enumerate(both):
            yield case(
                "sizes" if i < len(sizes) else "large",
                f"{'x'.join(map(str, shape))} {combine}",
                shape,
                combine=combine,
                activation=activations[i % 3],
                gated=(i + j) % 2 == 0,
                query=i % 4,
                bias=i % 3 != 1,
                maps=1 + i % 5 if combine == "pool" else 1,
                need_weights=i % 2 == 0,
                need_scores=i % 4 == 0,
            )
    for shape in ((0, 5, 7, 3), (2, 0, 7, 3)):
        for combine in both:
            yield case(
                "empty",
                f"{'x'.join(map(str, shape))} {combine}",
                shape,
                combine=combine,
                gated=True,
                need_weights=True,
                need_scores=True,
            )
    yield case("empty", "no bag", (0, 5, 4), bags=(), need_weights=True)
    yield case("empty", "empty bags", (0, 5, 4), bags=(0, 0), need_weights=True)

    some = (3, 21, 18, 10)
    for activation, gated, query in itertools.product(activations, (False, True), (0, 5)):
        for combine in both:
            yield case(
                "networks",
                f"{activation}{' gated' * gated}{' query' * bool(query)} {combine}",
                some,
                activation=activation,
                gated=gated,
                query=query,
                combine=combine,
                need_weights=True,
            )
    yield case("networks", "nothing but w_image and v", some, query=0, bias=False)
    yield case("networks", "gate without bias", some, query=0, bias=False, gated=True)
    for maps in (2, 3, 8, 17):
        yield case("networks", f"{maps} maps", some, maps=maps, gated=maps % 2 == 0, need_weights=True)
    for p, activation in ((0.25, "tanh"), (0.9, "gelu"), (1.0, "relu")):
        for gated, shape in itertools.product((False, True), ((3, 21, 18, 10), (2, 130, 9, 33))):
            yield case(
                "dropout",
                f"{p} {activation}{' gated' * gated} {'x'.join(map(str, shape))}",
                shape,
                activation=activation,
                gated=gated,
                maps=2,
                dropout_p=p,
                need_weights=True,
                need_scores=True,
            )
    options = {"gated": True, "dropout_p": 0.25, "need_weights": True}
    yield case(
        "dropout", "multiplied, masked", some, combine="multiply", mask=lambda draw, *n: draw.mask(*n), **options
    )
    yield case("dropout", "packed", (59, 22, 9), bags=(0, 1, 37, 0, 0, 5, 16, 0), **options)
    yield case("dropout", "views", (2, 9, 16, 130), make=DENSE[-1], query=0, bias=False, **options)
    yield case("dropout", "large", (2, 3000, 40, 64), **options)
    yield case("dropout", "empty", (2, 0, 7, 3), **options)
    yield case("networks", "scores alone", some, maps=2, need_scores=True)
    yield case("networks", "large scores", (2, 65, 24, 16), gain=12, need_weights=True)
    for combine in both:
        yield case(
            "extremes", f"v near the largest {combine}", some, make_v=near_largest, combine=combine, need_weights=True
        )
    for make in DENSE:
        yield case("views", make.__name__, some, make=make, gated=True, maps=2, need_weights=True)
        yield case("views", f"{make.__name__} multiply", some, make=make, combine="multiply")
        yield case("views", f"weights {make.__name__}", some, make_weight=make, gated=True, maps=3)
    for (name, mask), combine in itertools.product(MASKS.items(), both):
        yield case(
            "masks",
            f"{name} {combine}",
            (4, 37, 20, 12),
            mask=mask,
            combine=combine,
            gated=True,
            need_weights=True,
            need_scores=True,
        )

    bags = (0, 1, 37, 0, 0, 5, 16, 0)
    rows = (sum(bags), 22, 9)
    for combine, offsets_dtype in itertools.product(both, (torch.int64, torch.int32)):
        name = f"{combine} {str(offsets_dtype).removeprefix('torch.')}"
        options = {"bags": bags, "offsets_dtype": offsets_dtype, "combine": combine, "gated": True}
        yield case("packed", name, rows, need_weights=True, **options)
        yield case(
            "packed",
            f"{name} mask, maps",
            rows,
            maps=3 if combine == "pool" else 1,
            need_weights=True,
            need_scores=True,
            mask=lambda draw, n: draw.mask(n),
            **options,
        )
    yield case(
        "packed",
        "everything masked",
        rows,
        bags=bags,
        need_weights=True,
        need_scores=True,
        mask=lambda draw, n: torch.zeros(n, dtype=torch.bool, device=draw.device),
    )
    yield case("packed", "strided mask", rows, bags=bags, mask=lambda draw, n: draw.mask(2 * n)[::2])
    yield case("packed", "bags of one", (5, 9, 4), bags=(1,) * 5, need_weights=True)
    yield case("packed", "no query", rows, bags=bags, query=0, need_weights=True)
    for make in PACKED[1:]:
        yield case("packed", make.__name__, rows, bags=bags, make=make, need_weights=True)
    for combine in both:
        yield case(
            "large",
            f"bags of 1, 20011, 0, 700 {combine}",
            (20_712, 24, 16),
            bags=(1, 20_011, 0, 700),
            combine=combine,
            gated=True,
            mask=lambda draw, n: draw.mask(n),
        )
