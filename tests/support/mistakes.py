"""The mistakes that callers make: those that all operations have in common. Their own are in tests/operations."""

import inspect
import warnings

import torch

BOOLEAN = ("mask", "image_mask", "text_mask", "tokens", "pairs")


class Form:
    """A valid call. `shapes` names the dimensions of its tensors, in the order in which they are checked; `others` are
    the rest."""

    wider = ()  # (tensor, dtype) that a kernel takes although the others have another: they have more bits

    def __init__(self, sizes, shapes, **others):
        self.sizes, self.others = sizes, others
        self.shapes = {name: tuple(dims.split(", ")) for name, dims in shapes.items()}
        self.tensors = {name: self._draw(name in BOOLEAN, dims) for name, dims in self.shapes.items()}
        self.arguments = self.tensors | others

    def _draw(self, boolean, dims):
        size = [_size(dim, self.sizes) for dim in dims]
        return torch.ones(size, dtype=torch.bool) if boolean else torch.randn(size)

    def keeping_nothing(self):
        """The same call, as backends take it that keep no rows for a backward pass."""
        shapes = {name: ", ".join(dims) for name, dims in self.shapes.items()}
        return Form(self.sizes | {"R": 0}, shapes, **self.others | {"kept_rows": 0})

    def with_more(self, shapes):
        """The same call with further tensors."""
        form = Form(self.sizes, {name: ", ".join(dims) for name, dims in self.shapes.items()} | shapes, **self.others)
        form.arguments |= self.arguments
        form.wider = self.wider
        return form


def _size(dim, sizes):
    return sum(
        int(part) if part.isdigit() else sizes[part] for part in dim.split(" + ")
    )  # "D + E" and "2" are dimensions, too


def _resized(tensor):
    """(dimension, tensor that is one longer or shorter there)"""
    for place, size in enumerate(tensor.shape):
        yield place, torch.cat([tensor, tensor.new_ones(*tensor.shape[:place], 1, *tensor.shape[place + 1 :])], place)
        if size:
            yield place, tensor.narrow(place, 0, size - 1)


# Of the public functions ----------------------------------------------------------------------------------------------


def of_types(form, optional):
    """Anything but a tensor, and tensors of another dtype, layout or device."""
    anchor, *rest = (name for name, value in form.arguments.items() if isinstance(value, torch.Tensor))
    for name in (anchor, *rest):
        value = form.arguments[name]
        if name != "offsets":
            yield f"{name} a list", {name: [[1.0]]}, TypeError, [f"{name} must be a torch.Tensor, got list"]
            yield f"{name} a number", {name: 1.0}, TypeError, [f"{name} must be a torch.Tensor, got float"]
        if name not in optional:
            yield f"{name} None", {name: None}, TypeError, [f"{name} must be a torch.Tensor, got NoneType"]
        yield from of_layouts(name, value)
        if name == anchor:
            yield f"{name} elsewhere", {name: value.to("meta")}, ValueError, [f"{name}'s device meta, got cpu"]
        else:
            yield (
                f"{name} elsewhere",
                {name: value.to("meta")},
                ValueError,
                [f"{name} must be on {anchor}'s device cpu, got meta"],
            )
        wrong, expected = {
            torch.bool: ((torch.float32, torch.uint8, torch.int64), "must be bool (True = takes part)"),
            torch.int64: ((torch.float32, torch.int16, torch.bool), "must be int32 or int64"),
            torch.float32: (
                (torch.int64, torch.bool, torch.complex64),
                "must be float32, bfloat16, float16 or float64",
            ),
        }[value.dtype]
        for dtype in wrong:
            yield f"{name} of {dtype}", {name: value.to(dtype)}, ValueError, [f"{name} {expected}, got {dtype}"]
        if value.dtype == torch.float32 and name != anchor:
            for dtype in (torch.float64, torch.float16, torch.bfloat16):
                yield (
                    f"{name} of {dtype}",
                    {name: value.to(dtype)},
                    ValueError,
                    [f"{name} must have {anchor}'s dtype torch.float32, got {dtype}"],
                )
        if value.dtype == torch.bool:  # as Hugging Face's attention_mask comes
            for dtype in (torch.int64, torch.int32, torch.uint8):
                yield (
                    f"{name} of {dtype}",
                    {name: value.to(dtype)},
                    ValueError,
                    [f"{name} {expected}, got {dtype}: {name}.bool() makes zeros and ones a mask"],
                )


def of_layouts(name, value):
    yield (
        f"{name} sparse",
        {name: value.to_sparse()},
        ValueError,
        [f"{name} must be a dense (strided) tensor, got layout torch.sparse_coo"],
    )
    for layout in (torch.strided, torch.jagged):
        nested = _nested(value, layout)
        yield (
            f"{name} nested, {layout}",
            {name: nested},
            ValueError,
            [f"{name} must be a dense (strided) tensor, got nested, layout {layout}"],
        )


def _nested(value, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strided ones are a prototype
        return torch.nested.nested_tensor([value, value], layout=layout)


def of_shapes(form, known=()):
    """Too many dimensions, too few, and every dimension one longer and one shorter. The first that doesn't fit to those
    before it is told; `known` dimensions come from elsewhere (of bags, from offsets)."""
    names = list(form.shapes)

    def told(name, changed, sizes):
        before = {
            part for other in names[: names.index(name)] for dim in form.shapes[other] for part in dim.split(" + ")
        } | set(known)
        expected = ", ".join(
            str(_size(dim, sizes)) if set(dim.split(" + ")) <= before else "any" for dim in form.shapes[name]
        )
        return ValueError, [
            f"{name} must have shape [{', '.join(form.shapes[name])}] = [{expected}], got {list(changed.shape)}"
        ]

    seen = set(known)
    for i, (name, dims) in enumerate(form.shapes.items()):
        tensor = form.tensors[name]
        for what, wrong in (("too deep", tensor[None]), ("too flat", tensor[0])):
            yield f"{name} {what}", {name: wrong}, *told(name, wrong, form.sizes)
        if i == 0 and dims[0] == "B":  # whatever the number of samples is, it may be 1
            exception, (message,) = told(name, tensor[0], form.sizes)
            yield (
                f"{name} of one sample",
                {name: tensor[0]},
                exception,
                [f"{message}: one sample without a batch is {name}[None]"],
            )
        for place, wrong in _resized(tensor):
            what = f"{name} {list(wrong.shape)}"
            if set(dims[place].split(" + ")) <= seen:
                yield what, {name: wrong}, *told(name, wrong, form.sizes)
            else:  # whatever has this dimension next doesn't fit
                other = next(
                    (
                        other
                        for other in names[i + 1 :]
                        if any(dims[place] in dim.split(" + ") for dim in form.shapes[other])
                    ),
                    None,
                )
                if other is not None:
                    yield (
                        what,
                        {name: wrong},
                        *told(other, form.tensors[other], form.sizes | {dims[place]: wrong.shape[place]}),
                    )
        seen |= {part for dim in dims for part in dim.split(" + ")}


def of_options(function):
    """Every option of a plain type, which its default value tells."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "scale":
            for value in ("1", True, torch.tensor(1.0), 1j):
                yield (
                    f"{name} {value!r}",
                    {name: value},
                    TypeError,
                    [f"{name} must be a number, got {type(value).__name__}"],
                )
        elif name == "backend":
            yield f"{name} a number", {name: 3}, TypeError, [f"{name} must be a str or None, got int"]
            yield (
                f"{name} unknown",
                {name: "gpu"},
                ValueError,
                [f"{name} must be None or one of", "'cuda', 'triton', 'cpu', 'reference'", "got 'gpu'"],
            )
        elif isinstance(parameter.default, bool):
            for value in (1, None, "True"):
                yield (
                    f"{name} {value!r}",
                    {name: value},
                    TypeError,
                    [f"{name} must be a bool, got {type(value).__name__}"],
                )
        elif isinstance(parameter.default, str):
            for value in (3, None, [parameter.default]):
                yield (
                    f"{name} {value!r}",
                    {name: value},
                    TypeError,
                    [f"{name} must be a str, got {type(value).__name__}"],
                )
            yield (
                f"{name} unknown",
                {name: "another"},
                ValueError,
                [f"{name} must be one of", repr(parameter.default), "got 'another'"],
            )


def bounds(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


BAGS = bounds(0, 2, 3, 6)
BAG_SIZES = {"B": 3, "rows": 6}


def of_offsets(form):
    """Bounds that are none of BAGS' six rows; they are looked at before the other tensors. Of another number of bags:
    the tensor with a row for each doesn't fit."""
    image = form.tensors["image"]
    yield (
        "image elsewhere",
        {"image": image.to("meta")},
        ValueError,
        ["offsets must be on image's device meta, got cpu"],
    )
    yield (
        "offsets None",
        {"offsets": None},
        ValueError,
        ["image must have shape [B, N, D] = [any, any, any], got [6, 8]"],
    )
    for place, wrong in _resized(image):
        if place == 0:
            yield (
                f"image {list(wrong.shape)}",
                {"image": wrong},
                ValueError,
                [f"offsets must end with the number of rows of image, {len(wrong)}, got 6"],
            )
    yield (
        "offsets a number",
        {"offsets": 1.0},
        TypeError,
        ["offsets must be a torch.Tensor or a list of ints, got float"],
    )
    for kind in (list, tuple):
        yield (
            f"offsets a {kind.__name__} of floats",
            {"offsets": kind([0, 2.0, 6])},
            TypeError,
            ["offsets[1] must be an int, got float"],
        )
        yield (
            f"offsets a {kind.__name__} of lists",
            {"offsets": kind([[0, 6]])},
            TypeError,
            ["offsets[0] must be an int, got list"],
        )
        yield (
            f"offsets an empty {kind.__name__}",
            {"offsets": kind()},
            ValueError,
            ["offsets must have shape [B + 1], got [0]"],
        )
        yield (
            f"offsets a {kind.__name__} that ends early",
            {"offsets": kind([0, 2, 3, 5])},
            ValueError,
            ["offsets must end with the number of rows of image, 6, got 5"],
        )
    yield (
        "offsets an array of floats",
        {"offsets": BAGS.double().numpy()},
        ValueError,
        ["offsets must be int32 or int64, got torch.float64"],
    )
    yield (
        "offsets of two dimensions",
        {"offsets": BAGS[None]},
        ValueError,
        ["offsets must have shape [B + 1], got [1, 4]"],
    )
    yield (
        "offsets without dimensions",
        {"offsets": bounds(0)[0]},
        ValueError,
        ["offsets must have shape [B + 1], got []"],
    )
    yield "offsets empty", {"offsets": bounds()}, ValueError, ["offsets must have shape [B + 1], got [0]"]
    for dtype in (torch.int64, torch.int32):
        for values, told in (
            ((1, 2, 3, 6), "start with 0, got 1"),
            ((-1, 2, 3, 6), "start with 0, got -1"),
            ((0, 2, 3, 5), "end with the number of rows of image, 6, got 5"),
            ((0, 2, 3, 7), "end with the number of rows of image, 6, got 7"),
            ((0, 4, 2, 6), "ascend, got 4 before 2 at index 1"),
            ((0, 2, 99, 6), "ascend, got 99 before 6 at index 2"),
            ((0, -2, 3, 6), "ascend, got 0 before -2 at index 0"),
        ):
            yield (
                f"offsets {values} {dtype}",
                {"offsets": bounds(*values, dtype=dtype)},
                ValueError,
                [f"offsets must {told}"],
            )
    name, (_, *dims) = next((name, dims) for name, dims in form.shapes.items() if dims[0] == "B")
    for values in ((0, 6), (0, 1, 2, 3, 6)):
        yield (
            f"offsets of {len(values) - 1} bags",
            {"offsets": bounds(*values)},
            ValueError,
            [
                f"{name} must have shape [B, {', '.join(dims)}] = [{len(values) - 1}, ",
                f"got {list(form.tensors[name].shape)}",
            ],
        )


def of_public(function, operation):
    """(form, name, mistake) of everything; of the same name, the more special one counts."""
    for i, (kind, form) in enumerate(operation.FORMS.items()):
        packed = "offsets" in form.others
        common = [
            *of_types(form, operation.OPTIONAL),
            *of_shapes(form, ("B",) if packed else getattr(operation, "KNOWN", ())),
            *(of_offsets(form) if packed else ()),
            *(of_options(function) if i == 0 else ()),
        ]
        for name, mistake in ({name: mistake for name, *mistake in common} | operation.MISTAKES.get(kind, {})).items():
            yield kind, name, mistake


# Of the registered operations -----------------------------------------------------------------------------------------

WRONG_OFFSETS = {
    f"offsets {name}": {"offsets": value}
    for name, value in {
        "of int32": BAGS.int(),
        "of floats": BAGS.float(),
        "of two dimensions": BAGS[None],
        "without dimensions": BAGS[0],
        "empty": bounds(),
        "descend": bounds(0, 4, 2, 6),
        "end early": bounds(0, 2, 3, 5),
        "end late": bounds(0, 2, 3, 7),
        "start late": bounds(1, 2, 3, 6),
        "negative": bounds(-5, 2, 3, 6),
        "negative inside": bounds(0, -2, 3, 6),
        "far out of range": bounds(0, 2**40, 2**41, 6),
        "of two bags": bounds(0, 3, 6),
        "of four bags": bounds(0, 1, 2, 3, 6),
        "elsewhere": BAGS.to("meta"),
        "sparse": BAGS.to_sparse(),
        "None": None,
    }.items()
}


def wrong_tensors(form, name):
    """(what, tensor) in place of a valid one."""
    tensor = form.tensors[name]
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ):
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    yield "elsewhere", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "a scalar", tensor.new_ones(())
    yield "flat", tensor.flatten() if tensor.dim() > 1 else tensor[None]
    yield "empty", tensor.new_empty(0)
    yield "of one more dimension", tensor[None]
    yield "of one more dimension behind", tensor[..., None]
    told = {dim for other, dims in form.shapes.items() if other != name for dim in dims}
    if form.others.get("offsets") is not None:
        told.add("B")
    for place, wrong in _resized(tensor):
        if form.shapes[name][place] in told or form.shapes[name][place].isdigit():  # else any size fits
            yield f"{list(wrong.shape)}", wrong
