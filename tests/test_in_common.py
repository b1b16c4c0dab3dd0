"""Gradients of attention over heads, where queries, keys and values are alike but for small differences.

The gradients of a softmax's scores add up to 0, and what keys (or queries) have in common cancels in the sums that they
weigh. What rounding leaves of the 0 multiplies it: of the result that backward's mean is taken of, and of the gradients
themselves. One result's gradient alone shows what belongs to its softmax; of both together, they hide each other.
"""

import pytest
import torch
from support.attention_tests import assert_computes, gradients
from support.runnable import runnable

from mmkernels import cases
from mmkernels.cases.common import in_common
from mmkernels.cases.heads import IN_COMMON_SCALE, IN_COMMON_SIZES, heads_small

# Arguments, and the results by whose gradients alone it is differentiated, with the arguments that they depend on.
GATED = ("query", "key", "value")
BOTH = ("image_query", "text_key", "image_value", "text_value")
ABSORBED = ("image", "key", "value")
OPERATIONS = {
    "gated_cross_attention": (GATED, {"result": (slice(1), GATED)}),
    "bidirectional_attention": (
        BOTH,
        {
            "image_out": (slice(1), ("image_query", "text_key", "text_value")),
            "text_out": (slice(1, 2), ("image_query", "text_key", "image_value")),
            "both": (slice(2), BOTH),
        },
    ),
    "absorbed_attention": (
        ABSORBED,
        {
            "image_out": (slice(1), ABSORBED),
            "text_out": (slice(1, 2), ABSORBED[:2]),
            "both": (slice(2), ABSORBED),
        },
    ),
}
SIZES = (*IN_COMMON_SIZES, (1, 2, 200, 30, 8, 8), (1, 1, 1023, 20, 48, 32), (1, 1, 3, 700, 17, 7))


def given(operation, shape, dtype, device):
    """The arguments by name."""
    batch, heads, positions, tokens, d, dv = shape
    draw = cases.Draw(dtype, device, tokens)
    if operation == "absorbed_attention":  # its key has the scale in it
        image = in_common(draw, draw.normal(batch, positions, d))
        key, value = (in_common(draw, draw.normal(batch, heads, tokens, channels)) for channels in (d, dv))
        return {"image": image, "key": IN_COMMON_SCALE * key, "value": value}
    rows = lambda name: tokens if name.startswith("text") or name in ("key", "value") else positions
    channels = lambda name: dv if name.endswith("value") else d
    names = OPERATIONS[operation][0]
    return {name: in_common(draw, draw.normal(batch, heads, rows(name), channels(name))) for name in names}


@pytest.mark.property("values in {dtype}")
@pytest.mark.parametrize(
    "operation, result, backend, device, dtype, shape",
    [
        pytest.param(operation, result, *each.values, shape, id=f"{operation}-{result}-{each.id}-{shape[2]}x{shape[3]}")
        for operation, (_, results) in OPERATIONS.items()
        for result in results
        for each in runnable(operation, cases.DTYPES)
        for shape in SIZES
        if each.values[0] != "reference"
        # float32 is refused there on a GPU, whatever the emulator gives.
        if not (
            operation == "absorbed_attention" and each.values[0].startswith("cuda") and each.values[2] == torch.float32
        )
        if heads_small(shape) or not cases.is_slow(*each.values[:2])
    ],
)
def test_all_in_common(operation, result, backend, device, dtype, shape):
    which, of = OPERATIONS[operation][1][result]
    options = {} if operation == "absorbed_attention" else {"scale": IN_COMMON_SCALE}
    arguments = given(operation, shape, dtype, device)

    def compute(function, *tensors):
        def run(*tensors):
            others = {name: t.to(tensors[0].dtype) for name, t in arguments.items() if name not in of}
            found = function(**dict(zip(of, tensors)), **others, **options)
            return found[which] if isinstance(found, tuple) else found

        return gradients(run, tensors)

    assert_computes(compute, operation, backend, [arguments[name] for name in of], cancels=True)
