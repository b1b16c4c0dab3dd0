"""The inputs that tests and ``python -m mmkernels verify`` run every backend on.

Each operation has one generator here, under its own name, that yields :class:`Case` objects; whoever adds an operation
adds its generator and nothing else. A case draws its tensors from a seed, in the dtype and on the device that are asked
for, and returns the operation's arguments by name. Every floating-point tensor among them gets a gradient.
"""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Emulated and interpreted backends take the small cases only: at most so many image elements.
SMALL = 6_000


@dataclass(frozen=True)
class Case:
    """One set of arguments. `group` is the line of verify's table that it counts for."""

    name: str
    group: str
    make: Callable
    small: bool

    def build(self, dtype, device="cpu", seed=0):
        """The arguments by name; the same seed gives the same values on every device."""
        return self.make(Draw(dtype, device, seed + zlib.crc32(self.name.encode())))

    def __str__(self):
        return self.name


class Draw:
    """Draws tensors on the CPU, so that they don't depend on the device, and moves them there."""

    def __init__(self, dtype, device, seed):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def mask(self, *shape, share=0.6):
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def padding(self, keep, value):
        """A mask to add: 0 where `keep`, else `value`."""
        return torch.zeros(keep.shape, dtype=self.dtype, device=self.device).masked_fill(~keep, value)

    @property
    def largest(self):
        """The dtype's largest number: what people put into masks instead of Inf, negative."""
        return torch.finfo(self.dtype).max


def selected(operation, *, small=False):
    """The cases of an operation, by its name."""
    return [case for case in globals()[operation]() if case.small or not small]


def is_slow(backend, device_type):
    """Whether a backend is executed for correctness alone (emulated CUDA, interpreted Triton)."""
    return backend.endswith("-emulated") or (backend == "triton" and device_type == "cpu")


# Where a tensor can lie. Each takes the draw and the logical shape and returns a view of that shape.


def contiguous(draw, *shape):
    return draw.normal(*shape)


def transposed(draw, *shape):
    """The last two dimensions are swapped in memory."""
    return draw.normal(*shape[:-2], shape[-1], shape[-2]).mT


def every_second_row(draw, *shape):
    return draw.normal(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :]


def every_second_channel(draw, *shape):
    return draw.normal(*shape[:-1], 2 * shape[-1])[..., 1::2]


def window(draw, *shape):
    """A crop out of the middle of a larger tensor."""
    base = draw.normal(*(n + 2 for n in shape))
    return base[(slice(1, -1),) * len(shape)]


def unaligned(draw, *shape):
    """Contiguous, but one element past the start of its storage."""
    return draw.normal(torch.Size(shape).numel() + 1)[1:].view(shape)


def batch_first_last(draw, *shape):
    """The batch is the innermost dimension in memory."""
    return draw.normal(*shape[1:], shape[0]).movedim(-1, 0)


def same_for_all(draw, *shape):
    """One sample expanded over the batch: stride 0."""
    return draw.normal(1, *shape[1:]).expand(shape)


def same_row(draw, *shape):
    """One row expanded over the positions: stride 0."""
    return draw.normal(*shape[:-2], 1, shape[-1]).expand(shape)


def same_channel(draw, *shape):
    return draw.normal(*shape[:-1], 1).expand(shape)


def channels_last(draw, batch, channels, height, width):
    return draw.normal(batch, height, width, channels).permute(0, 3, 1, 2)


def channels_last_window(draw, batch, channels, height, width):
    return draw.normal(batch, height + 3, width + 2, channels)[:, 2:-1, 1:-1].permute(0, 3, 1, 2)


def channels_last_some(draw, batch, channels, height, width):
    """Channels-last, and the channels are a slice of more."""
    return draw.normal(batch, height, width, channels + 5)[..., 2:-3].permute(0, 3, 1, 2)


def near_largest(draw, *shape):
    """Products with what is drawn normally reach up to the dtype's largest number, and not beyond."""
    return (draw.normal(*shape).double() * (draw.largest / 20)).to(draw.dtype)


DENSE = (
    contiguous,
    transposed,
    every_second_row,
    every_second_channel,
    window,
    unaligned,
    batch_first_last,
    same_for_all,
    same_row,
    same_channel,
)
PLANES = (
    contiguous,
    transposed,
    every_second_row,
    every_second_channel,
    window,
    unaligned,
    same_for_all,
    channels_last,
    channels_last_window,
    channels_last_some,
)
PACKED = (contiguous, transposed, every_second_row, every_second_channel, window, unaligned, same_row)


def reaching(sign):
    """A scale that depends on queries and keys: with it the scores come near the largest number that they can be
    computed in, and in base 2 beyond it."""

    def scale(query, key):
        limit = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).max
        return sign * 0.9 * limit / float((query.double() @ key.double().mT).abs().max())

    return scale


# Masks: each takes the draw and the mask's shape, batch (or rows) first.


def _mask_all(draw, *shape):
    return torch.ones(shape, dtype=torch.bool, device=draw.device)


def _mask_none(draw, *shape):
    return ~_mask_all(draw, *shape)


def _mask_one(draw, *shape):
    """A single position, the last, takes part."""
    mask = _mask_none(draw, *shape).flatten(1)
    mask[:, -1] = True
    return mask.view(shape)


def _mask_random(draw, *shape):
    return draw.mask(*shape)


def _mask_whole_sample(draw, *shape):
    """The first sample has no position at all."""
    mask = draw.mask(*shape)
    mask[0] = False
    return mask


def _mask_strided(draw, *shape):
    """Neither dense nor aligned."""
    return draw.mask(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]


def _mask_transposed(draw, *shape):
    return draw.mask(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def _mask_shared(draw, *shape):
    """One mask for all samples: stride 0."""
    return draw.mask(1, *shape[1:]).expand(shape)


MASKS = {
    "all": _mask_all,
    "none": _mask_none,
    "one": _mask_one,
    "random": _mask_random,
    "whole sample": _mask_whole_sample,
    "strided": _mask_strided,
    "transposed": _mask_transposed,
    "shared": _mask_shared,
}


def spatial_attention():
    """Sizes, layouts, masks, heads, options, packed bags, large inputs."""

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
            mask=_mask_random,
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
    yield case("masks", "random rescale", (4, 37, 20), mask=_mask_random, rescale=True, need_weights=True)
    yield case("masks", "whole sample rescale", (4, 37, 20), mask=_mask_whole_sample, rescale=True, need_weights=True)

    # Heads and the other options.
    for heads, combine in itertools.product((1, 2, 5, 20), both):
        yield case("heads", f"{heads} {combine}", (2, 19, 20), num_heads=heads, combine=combine, need_weights=True)
        yield case(
            "heads", f"{heads} {combine} bdhw", (2, 20, 3, 5), num_heads=heads, combine=combine, mask=_mask_random
        )
    yield case("heads", "3 of 35 channels", (2, 50, 105), num_heads=3, need_weights=True)
    yield case("heads", "12 of 64 channels", (1, 196, 768), num_heads=12, mask=_mask_random)
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
            mask=_mask_random,
        )
        yield case("large", f"1x48x131x77 {combine}", (1, 48, 131, 77), combine=combine)
    yield case("large", "1x20011x24 large scores", (1, 20_011, 24), gain=8, need_weights=True)


# Views of heads, [B, H, N, C].


def heads_last(draw, batch, heads, positions, channels):
    """A view of [B, N, H * C], as a projection gives it."""
    return draw.normal(batch, positions, heads, channels).transpose(1, 2)


def heads_slice(draw, batch, heads, positions, channels):
    """One of three slices of [B, N, 3 * H * C], as a joint projection gives it."""
    return draw.normal(batch, positions, 3, heads, channels)[:, :, 1].transpose(1, 2)


HEADS = (
    heads_last,
    heads_slice,
    transposed,
    every_second_row,
    every_second_channel,
    window,
    unaligned,
    batch_first_last,
    same_for_all,
    same_row,
    same_channel,
)

# B, H, N, T, d, dv: sizes that fit no vector, tile or block.
HEAD_SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 1, 1, 3),
    (1, 2, 1, 3, 3, 1),
    (2, 3, 7, 5, 8, 8),
    (1, 2, 33, 17, 13, 21),
    (1, 1, 113, 20, 16, 16),
    (1, 1, 50, 77, 40, 24),
    (3, 1, 16, 16, 32, 32),
    (1, 1, 3, 113, 17, 7),
    (1, 1, 65, 33, 64, 48),
    (1, 2, 130, 31, 3, 5),
)
HEAD_SIZES_LARGE = (
    (1, 2, 113, 203, 64, 64),
    (1, 1, 1023, 77, 113, 97),
    (2, 1, 97, 1023, 40, 72),
    (1, 1, 203, 256, 256, 256),
    (1, 1, 65, 33, 300, 257),
    (1, 2, 20_011, 20, 16, 16),
    (1, 1, 3, 5001, 24, 24),
    (5, 3, 61, 64, 64, 64),
)


def _heads_small(shape):
    batch, heads, positions, tokens, d, dv = shape
    return batch * heads * positions * tokens * (d + dv) <= 40 * SMALL


def gated_cross_attention():
    """Sizes, layouts, masks of every kind and shape, options."""

    def case(group, name, shape, *, make=contiguous, make_text=None, gate=True, mask=None, gain=1, **options):
        def build(draw):
            batch, heads, positions, tokens, d, dv = shape
            text = make_text or make
            arguments = {
                "query": make(draw, batch, heads, positions, d),
                "key": text(draw, batch, heads, tokens, d),
                "value": text(draw, batch, heads, tokens, dv),
                **options,
            }
            if gain != 1:
                arguments["query"] = arguments["query"] * gain
            if callable(options.get("scale")):
                arguments["scale"] = options["scale"](arguments["query"], arguments["key"])
            if gate:
                arguments["gate"] = make(draw, batch, heads, positions, dv)
            if mask is not None:
                arguments["attn_mask"] = mask(draw, batch, heads, positions, tokens)
            return arguments

        return Case(f"{group}: {name}", group, build, _heads_small(shape))

    for i, shape in enumerate((*HEAD_SIZES, *HEAD_SIZES_LARGE)):
        name = "x".join(map(str, shape))
        yield case("sizes" if i < len(HEAD_SIZES) else "large", name, shape, gate=i % 3 != 0, need_weights=i % 4 == 0)
    for shape in ((0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6)):
        yield case("empty", "x".join(map(str, shape)), shape, need_weights=True)

    some = (2, 2, 21, 19, 12, 10)
    for make in HEADS:
        yield case("views", make.__name__, some, make=make)
        yield case(
            "views", f"{make.__name__} mask", some, make=make, mask=lambda draw, b, h, n, t: draw.mask(b, t), gate=False
        )
    yield case("views", "heads_last image, contiguous text", some, make=heads_last, make_text=contiguous)

    masks = {
        "BT": lambda draw, b, h, n, t: draw.mask(b, t),
        "B11T": lambda draw, b, h, n, t: draw.mask(b, 1, 1, t),
        "BHNT": lambda draw, b, h, n, t: draw.mask(b, h, n, t),
        "11NT": lambda draw, b, h, n, t: draw.mask(1, 1, n, t),
        "T": lambda draw, b, h, n, t: draw.mask(t),
        "1H1T": lambda draw, b, h, n, t: draw.mask(1, h, 1, t),
        "BHN1": lambda draw, b, h, n, t: draw.mask(b, h, n, 1),
        "all": lambda draw, b, h, n, t: _mask_all(draw, b, t),
        "none": lambda draw, b, h, n, t: _mask_none(draw, b, t),
        "one": lambda draw, b, h, n, t: _mask_one(draw, b, t),
        "whole sample": lambda draw, b, h, n, t: _mask_whole_sample(draw, b, t),
        "whole sample BHNT": lambda draw, b, h, n, t: _mask_whole_sample(draw, b, h, n, t),
        "strided": lambda draw, b, h, n, t: _mask_strided(draw, b, h, n, t),
        "transposed": lambda draw, b, h, n, t: _mask_transposed(draw, b, h, n, t),
        "causal": lambda draw, b, h, n, t: torch.ones(n, t, dtype=torch.bool, device=draw.device).tril()[None, None],
        "float BT": lambda draw, b, h, n, t: draw.normal(b, t),
        "float BHNT": lambda draw, b, h, n, t: draw.normal(b, h, n, t),
        "float 11NT": lambda draw, b, h, n, t: draw.normal(1, 1, n, t),
        "float H11": lambda draw, b, h, n, t: draw.normal(h, 1, 1),
        "float transposed": lambda draw, b, h, n, t: draw.normal(b, h, t, n).mT,
        "float -inf": lambda draw, b, h, n, t: draw.normal(b, h, n, t).masked_fill(
            ~draw.mask(b, h, n, t), float("-inf")
        ),
    }
    for name, mask in masks.items():
        yield case("masks", name, some, mask=mask, need_weights=name in ("BT", "BHNT", "float 11NT"))
        yield case("masks", f"{name}, no gate", (2, 1, 5, 37, 20, 8), mask=mask, gate=False)
    yield case(
        "masks", "BT, as many samples as positions", (3, 2, 3, 5, 12, 10), mask=lambda draw, b, h, n, t: draw.mask(b, t)
    )
    # As Hugging Face pads: the dtype's lowest number, in base 2 beyond the range of floats.
    extremes = {
        "lowest everywhere": lambda draw, b, h, n, t: draw.padding(_mask_none(draw, b, 1, 1, t), -draw.largest),
        "lowest padding": lambda draw, b, h, n, t: draw.padding(draw.mask(b, 1, 1, t), -draw.largest),
        "lowest, a whole sample": lambda draw, b, h, n, t: draw.padding(
            _mask_whole_sample(draw, b, h, n, t), -draw.largest
        ),
        "lowest but one": lambda draw, b, h, n, t: draw.padding(_mask_one(draw, b, t), -draw.largest),
        "-inf but one": lambda draw, b, h, n, t: draw.padding(_mask_one(draw, b, t), float("-inf")),
        "lowest and -inf": lambda draw, b, h, n, t: draw.padding(draw.mask(b, h, n, t), float("-inf")).clamp(
            max=-draw.largest
        ),
        "largest at one": lambda draw, b, h, n, t: draw.padding(~_mask_one(draw, b, t), draw.largest),
        "largest at some": lambda draw, b, h, n, t: draw.padding(draw.mask(b, h, n, t), draw.largest),
        "lowest and largest": lambda draw, b, h, n, t: (
            draw.padding(draw.mask(b, h, n, t), -draw.largest) + draw.padding(draw.mask(b, h, n, t), draw.largest)
        ),
    }
    for name, mask in extremes.items():
        yield case("extremes", name, some, mask=mask)
        yield case("extremes", f"{name}, no gate, 1023 tokens", (2, 1, 3, 1023, 4, 5), mask=mask, gate=False)
    for sign in (1, -1):
        yield case("extremes", f"scores near the largest, {sign}", some, scale=reaching(sign))
        yield case(
            "extremes",
            f"scores near the largest, {sign}, no gate, mask",
            some,
            scale=reaching(sign),
            gate=False,
            mask=lambda draw, b, h, n, t: draw.mask(b, t),
        )

    yield case("masks", "BT, 1023 tokens", (2, 1, 65, 1023, 24, 24), mask=lambda draw, b, h, n, t: draw.mask(b, t))
    yield case(
        "masks", "BHNT, 1023 tokens", (2, 1, 65, 1023, 24, 24), mask=lambda draw, b, h, n, t: draw.mask(b, h, n, t)
    )

    for scale in (0.3, 0.0, -1.0, 1):
        yield case("options", f"scale {scale}", some, scale=scale)
    yield case("options", "large scores", (1, 2, 40, 33, 24, 16), gain=8)
    yield case("options", "large scores, no gate", (1, 2, 40, 33, 24, 16), gain=8, gate=False)


def bidirectional_attention():
    """Sizes, layouts, masks, options."""

    def case(
        group, name, shape, *, make=contiguous, make_text=None, image_mask=None, text_mask=None, gain=1, **options
    ):
        def build(draw):
            batch, heads, positions, tokens, d, dv = shape
            text = make_text or make
            arguments = {
                "image_query": make(draw, batch, heads, positions, d),
                "text_key": text(draw, batch, heads, tokens, d),
                "image_value": make(draw, batch, heads, positions, dv),
                "text_value": text(draw, batch, heads, tokens, dv),
                **options,
            }
            if gain != 1:
                arguments["image_query"] = arguments["image_query"] * gain
            if callable(options.get("scale")):
                arguments["scale"] = options["scale"](arguments["image_query"], arguments["text_key"])
            if image_mask is not None:
                arguments["image_mask"] = image_mask(draw, batch, positions)
            if text_mask is not None:
                arguments["text_mask"] = text_mask(draw, batch, tokens)
            return arguments

        return Case(f"{group}: {name}", group, build, _heads_small(shape))

    for i, shape in enumerate((*HEAD_SIZES, *HEAD_SIZES_LARGE)):
        yield case("sizes" if i < len(HEAD_SIZES) else "large", "x".join(map(str, shape)), shape)
    for shape in ((0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6)):
        yield case("empty", "x".join(map(str, shape)), shape)

    some = (2, 2, 21, 19, 12, 10)
    for make in HEADS:
        yield case("views", make.__name__, some, make=make)
        yield case("views", f"{make.__name__} masks", some, make=make, image_mask=_mask_random, text_mask=_mask_random)
    yield case("views", "heads_last image, contiguous text", some, make=heads_last, make_text=contiguous)
    for name, mask in MASKS.items():
        yield case("masks", f"image {name}", some, image_mask=mask)
        yield case("masks", f"text {name}", some, text_mask=mask)
        yield case("masks", f"both {name}", some, image_mask=mask, text_mask=mask)
    yield case("masks", "both, 1023 tokens", (2, 1, 65, 1023, 24, 24), image_mask=_mask_random, text_mask=_mask_random)
    yield case(
        "masks", "both, 20011 positions", (1, 2, 20_011, 20, 16, 16), image_mask=_mask_random, text_mask=_mask_random
    )
    for scale in (0.3, 0.0, -1.0, 1):
        yield case("options", f"scale {scale}", some, scale=scale)
    yield case("options", "large scores", (1, 2, 40, 33, 24, 16), gain=8)
    for sign in (1, -1):
        yield case("extremes", f"scores near the largest, {sign}", some, scale=reaching(sign))
        yield case(
            "extremes",
            f"scores near the largest, {sign}, masks",
            some,
            scale=reaching(sign),
            image_mask=_mask_random,
            text_mask=_mask_random,
        )
        yield case(
            "extremes", f"scores near the largest, {sign}, 70 tokens", (1, 1, 130, 70, 12, 10), scale=reaching(sign)
        )


def channel_attention():
    """Sizes, layouts, options."""

    def case(
        group,
        name,
        shape,
        *,
        make=contiguous,
        make_text=contiguous,
        make_weight=contiguous,
        bias=True,
        gain=1,
        **options,
    ):
        """`shape`: B, N, D, E, or B, D, E for an image without positions."""

        def build(draw):
            *image, text = shape
            arguments = {
                "image": make(draw, *image),
                "text": make_text(draw, image[0], text),
                "weight": make_weight(draw, image[-1], image[-1] + text) * (gain * (image[-1] + text) ** -0.5),
                **options,
            }
            if bias:
                arguments["bias"] = draw.normal(image[-1])
            return arguments

        return Case(
            f"{group}: {name}",
            group,
            build,
            torch.Size(shape[:-1]).numel() <= SMALL and shape[-2] * (shape[-2] + shape[-1]) <= 4 * SMALL,
        )

    sizes = (
        (1, 1, 1, 1),
        (2, 3, 1, 3),
        (1, 1, 3, 1),
        (3, 3, 3, 3),
        (2, 113, 5, 4),
        (1, 16, 64, 32),
        (2, 33, 17, 21),
        (5, 7, 40, 8),
        (1, 96, 48, 16),
        (1, 97, 33, 100),
        (1, 3, 113, 7),
        (1, 1023, 3, 2),
    )
    large = ((2, 700, 130, 64), (1, 40, 1023, 513), (3, 196, 256, 256), (1, 20_011, 33, 16), (4, 113, 768, 20))
    for i, shape in enumerate((*sizes, *large)):
        yield case(
            "sizes" if i < len(sizes) else "large",
            "x".join(map(str, shape)),
            shape,
            bias=i % 3 != 0,
            need_weights=i % 2 == 0,
        )
    for shape in ((1, 1, 1), (5, 7, 9), (113, 40, 16), (300, 64, 64)):
        yield case("no positions", "x".join(map(str, shape)), shape, need_weights=True)
    for shape in ((0, 5, 7, 3), (2, 0, 7, 3), (0, 7, 3), (2, 5, 7, 0)):
        yield case("empty", "x".join(map(str, shape)), shape, need_weights=True)
    for make in DENSE:
        yield case("views", make.__name__, (3, 21, 18, 12), make=make, need_weights=True)
        yield case("views", f"weight {make.__name__}", (3, 21, 18, 12), make_weight=make)
    for make_text in (transposed, every_second_channel, window, same_for_all, same_channel):
        yield case("views", f"text {make_text.__name__}", (3, 21, 18, 12), make_text=make_text)
    yield case("options", "large scores", (2, 50, 24, 8), gain=20, need_weights=True)
    yield case("options", "small scores", (2, 50, 24, 8), gain=0.01)
    yield case("extremes", "weight near the largest", (2, 21, 18, 12), make_weight=near_largest, need_weights=True)


def additive_attention():
    """Sizes, layouts, masks, every activation with and without gate, query and biases, maps, packed bags."""

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
            )
    for shape in ((0, 5, 7, 3), (2, 0, 7, 3)):
        for combine in both:
            yield case(
                "empty", f"{'x'.join(map(str, shape))} {combine}", shape, combine=combine, gated=True, need_weights=True
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
            "masks", f"{name} {combine}", (4, 37, 20, 12), mask=mask, combine=combine, gated=True, need_weights=True
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
            mask=lambda draw, n: draw.mask(n),
            **options,
        )
    yield case(
        "packed",
        "everything masked",
        rows,
        bags=bags,
        need_weights=True,
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
