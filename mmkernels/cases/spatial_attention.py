"""Sizes, layouts, masks, heads, options, packed bags, large inputs."""

import itertools

import torch

from .common import SMALL, Case
from .layouts import (
    DENSE,
    MASKS,
    PACKED,
    PLANES,
    channels_last,
    contiguous,
    every_second_channel,
    mask_random,
    mask_whole_sample,
    reaching,
    same_channel,
    same_for_all,
    transposed,
    window,
)


def generate():
    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_text=contiguous,
        mask=None,
        bags=None,
        offsets_dtype=torch.int64,
        gain=1,
        **options,
    ):
        """`shape` is image's: [B, N, D], [B, D, Y, X], or [rows, D] with the bags' sizes in `bags`."""
        if len(shape) == 4:
            options["layout"] = "bdhw"

        def build(draw):
            batch, channels = (
                (len(bags), shape[1]) if bags is not None else (shape[0], shape[1 if len(shape) == 4 else 2])
            )
            arguments = {"image": make(draw, *shape), "text": make_text(draw, batch, channels) * gain, **options}
            if callable(options.get("scale")):
                heads = [
                    arguments[name].unflatten(-1, (options.get("num_heads", 1), -1)).transpose(-2, -3)
                    for name in ("image", "text")
                ]
                arguments["scale"] = options["scale"](heads[0], heads[1].transpose(0, 1)[:, :, None])
            if mask is not None:
                grid = shape[:1] if bags is not None else (shape[0], *shape[2:]) if len(shape) == 4 else shape[:2]
                arguments["mask"] = mask(draw, *grid)
            if bags is not None:
                bounds = list(itertools.accumulate(bags, initial=0))
                arguments["offsets"] = torch.tensor(bounds, dtype=offsets_dtype, device=draw.device)
            return arguments

        return Case(f"{group}: {name}", group, build, torch.Size(shape).numel() <= SMALL)

    both = ("multiply", "pool")

    # Sizes that fit no vector, tile or block; the batch sizes 1 to 5 in turn.
    pairs = (
        (1, 1),
        (1, 3),
        (3, 1),
        (3, 3),
        (113, 1),
        (1, 113),
        (16, 64),
        (33, 17),
        (1023, 3),
        (799, 3),
        (113, 203),
        (3, 1023),
        (1, 1023),
        (1023, 1),
        (1024, 113),
    )
    for i, (n, d) in enumerate(pairs):
        for combine in both:
            b = 1 + i % 5
            yield case("sizes", f"{b}x{n}x{d} {combine}", (b, n, d), combine=combine, need_weights=i % 2 == 0)
    for combine in both:
        yield case("empty", f"no sample {combine}", (0, 7, 5), combine=combine, need_weights=True)
        yield case("empty", f"no position {combine}", (3, 0, 5), combine=combine, need_weights=True)
        yield case("empty", f"no sample bdhw {combine}", (0, 5, 2, 3), combine=combine, need_weights=True)
        yield case("empty", f"no row bdhw {combine}", (2, 5, 0, 3), combine=combine, need_weights=True)
        yield case("empty", f"no bag {combine}", (0, 5), bags=(), combine=combine, need_weights=True)
        yield case("empty", f"empty bags {combine}", (0, 5), bags=(0, 0), combine=combine, need_weights=True)

    # Layouts.
    for make, combine in itertools.product(DENSE, both):
        yield case(
            "bnd views",
            f"{make.__name__} {combine}",
            (3, 21, 18),
            make=make,
            num_heads=2,
            combine=combine,
            need_weights=True,
        )
    for make_text in (transposed, every_second_channel, window, same_for_all, same_channel):
        yield case("bnd views", f"text {make_text.__name__}", (3, 21, 18), make_text=make_text)
    for make, combine in itertools.product(PLANES, both):
        yield case(
            "bdhw views",
            f"{make.__name__} {combine}",
            (3, 18, 5, 7),
            make=make,
            num_heads=3,
            combine=combine,
            need_weights=True,
            mask=mask_random,
        )
    for shape in ((2, 1, 1, 1), (1, 3, 1, 17), (2, 64, 7, 7), (5, 33, 3, 1), (2, 37, 15, 13)):
        for make in (contiguous, channels_last):
            name = "x".join(map(str, shape))
            yield case("bdhw sizes", f"{name} {make.__name__}", shape, make=make)
            yield case("bdhw sizes", f"{name} {make.__name__} pool", shape, make=make, combine="pool")

    # Masks.
    for (name, mask), combine in itertools.product(MASKS.items(), both):
        yield case("masks", f"{name} {combine}", (4, 37, 20), mask=mask, combine=combine, need_weights=True)
        yield case("masks", f"{name} {combine} bdhw", (3, 20, 4, 9), mask=mask, combine=combine)
    yield case("masks", "random rescale", (4, 37, 20), mask=mask_random, rescale=True, need_weights=True)
    yield case("masks", "whole sample rescale", (4, 37, 20), mask=mask_whole_sample, rescale=True, need_weights=True)

    # Heads and the other options.
    for heads, combine in itertools.product((1, 2, 5, 20), both):
        yield case("heads", f"{heads} {combine}", (2, 19, 20), num_heads=heads, combine=combine, need_weights=True)
        yield case(
            "heads", f"{heads} {combine} bdhw", (2, 20, 3, 5), num_heads=heads, combine=combine, mask=mask_random
        )
    yield case("heads", "3 of 35 channels", (2, 50, 105), num_heads=3, need_weights=True)
    yield case("heads", "12 of 64 channels", (1, 196, 768), num_heads=12, mask=mask_random)
    for combine in both:
        yield case("options", f"rescale {combine}", (2, 29, 24), rescale=True, combine=combine, need_weights=True)
        yield case("options", f"scale 0.3 {combine}", (2, 29, 24), scale=0.3, combine=combine)
        yield case("options", f"scale 0 {combine}", (2, 29, 24), scale=0.0, combine=combine, need_weights=True)
        yield case("options", f"negative scale {combine}", (2, 29, 24), scale=-1.0, combine=combine)
        yield case("options", f"integer scale {combine}", (2, 29, 24), scale=1, combine=combine)
        yield case("options", f"large scores {combine}", (3, 65, 48), gain=8, combine=combine, need_weights=True)
        for heads, sign in ((1, 1), (3, -1)):
            yield case(
                "extremes",
                f"scores near the largest, {sign} {combine}",
                (3, 21, 24),
                num_heads=heads,
                scale=reaching(sign),
                combine=combine,
                need_weights=True,
            )

    # Packed bags: empty ones in front, inside and at the end.
    bags = (0, 1, 37, 0, 0, 5, 16, 0)
    rows = sum(bags)
    for combine, offsets_dtype in itertools.product(both, (torch.int64, torch.int32)):
        name = f"{combine} {str(offsets_dtype).removeprefix('torch.')}"
        yield case(
            "packed", name, (rows, 22), bags=bags, offsets_dtype=offsets_dtype, combine=combine, need_weights=True
        )
        yield case(
            "packed",
            f"{name} mask, heads",
            (rows, 22),
            bags=bags,
            offsets_dtype=offsets_dtype,
            combine=combine,
            num_heads=2,
            need_weights=True,
            mask=lambda draw, n: draw.mask(n),
        )
    yield case("packed", "rescale", (rows, 22), bags=bags, rescale=True, mask=lambda draw, n: draw.mask(n))
    yield case(
        "packed",
        "everything masked",
        (rows, 22),
        bags=bags,
        need_weights=True,
        mask=lambda draw, n: torch.zeros(n, dtype=torch.bool, device=draw.device),
    )
    yield case("packed", "strided mask", (rows, 22), bags=bags, mask=lambda draw, n: draw.mask(2 * n)[::2])
    yield case("packed", "one bag", (113, 3), bags=(113,), need_weights=True)
    yield case("packed", "bags of one", (5, 9), bags=(1,) * 5, need_weights=True)
    for make in PACKED[1:]:
        yield case("packed", make.__name__, (rows, 22), bags=bags, make=make, need_weights=True)

    # More positions than one block or thread takes: the split softmax and its merge.
    for combine in both:
        yield case("large", f"bag of 20011 {combine}", (20_011, 40), bags=(20_011,), combine=combine, need_weights=True)
        yield case(
            "large",
            f"bags of 1, 20011, 0, 700 {combine}",
            (20_712, 24),
            bags=(1, 20_011, 0, 700),
            combine=combine,
            num_heads=2,
            mask=lambda draw, n: draw.mask(n),
        )
        yield case("large", f"1x20011x33 {combine}", (1, 20_011, 33), combine=combine, need_weights=True)
        yield case(
            "large",
            f"2x48x131x77 channels_last {combine}",
            (2, 48, 131, 77),
            make=channels_last,
            combine=combine,
            mask=mask_random,
        )
        yield case("large", f"1x48x131x77 {combine}", (1, 48, 131, 77), combine=combine)
    yield case("large", "1x20011x24 large scores", (1, 20_011, 24), gain=8, need_weights=True)
