"""Channel attention: the public function, and the operation as PyTorch sees it."""

from torch.nn.functional import linear

from .. import backends, checks
from ..reference.precision import without_autocast
from .common import accumulate_dtype, autocast, cast, kept_rows
from .operation import Operation


def channel_attention(image, text, weight, bias=None, *, need_weights=False, backend=None):
    """``image * softmax(weight @ [image_n ; text_b] + bias, -1)``: the article's formula 4.2, ``softmax(W_a [X, Y])``.

    The concatenation is never built: ``weight``'s last E columns act on the text once a sample, which shifts the scores
    of all its positions. Scores turn into the result panel by panel while they are in cache, no ``[B, N, D]`` scores
    are kept: the backward pass computes them again. (Training on the CPU keeps the weights of the first rows, at most
    16 MiB, or 80 MiB beside an image that wants no gradient.)

    The softmax runs over channels. Over positions it would cancel the text: the text adds the same number to the scores
    of all positions of a channel, and softmax doesn't change when all its scores grow by the same number. Over channels
    every score gets a number of its own, and the text decides which channels of a position count.

    Args:
        image: ``[B, N, D]`` or ``[B, D]``, float32, bfloat16, float16 or float64, any strides.
        text: ``[B, E]``, same dtype.
        weight: ``[D, D + E]``, same dtype; its first D columns act on the image.
        bias: ``[D]``, same dtype, or None.
        need_weights: also return the weights: shape and dtype of image, differentiable.
        backend: None picks the fastest that can run; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` force one.

    Returns:
        A tensor like image, contiguous, or ``(result, weights)``.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; the message names it.
        BackendError: the backend that was forced can't run.

    Source: attention over concatenated features, Bahdanau et al. 2015 (arXiv:1409.0473), over channels as in Chen et
    al. 2017 (arXiv:1611.05594).
    """
    key = _passed.key((need_weights,), (image, text, weight, bias))
    if key not in _passed:
        checks.features("image", image)
        for name, tensor in (("text", text), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
            checks.features(name, tensor)
        image, text, weight, bias = autocast(image, text, weight, bias)
        need_weights = checks.flag("need_weights", need_weights)
        _check(image, text, weight, bias)
        _passed.add(key)
    channels = image.shape[-1]
    run = backends.choose("channel_attention", image, backend)
    inputs = image if image.dim() == 3 else image[:, None], text, weight, bias
    rows = kept_rows(run, image.numel() // channels, channels, accumulate_dtype(image), *inputs)
    result, weights, _ = run(*inputs, need_weights, rows)
    if image.dim() == 2:
        result = result[:, 0]
        weights = weights[:, 0] if need_weights else weights
    return (result, weights) if need_weights else result


_passed = checks.Passed()


def _check(image, text, weight, bias):
    if image.dim() != 2:
        checks.shape("image", image, ("B", None), ("N", None), ("D", None))
    channels = image.shape[-1]
    if channels == 0:
        raise ValueError(f"image must have at least one channel (D), got shape {list(image.shape)}")
    checks.channel_text(image, text)
    checks.like("weight", weight, "image", image)
    checks.shape("weight", weight, ("D", channels), ("D + E", channels + text.shape[1]))
    if bias is not None:
        checks.like("bias", bias, "image", image)
        checks.shape("bias", bias, ("D", channels))


# The operation. inputs: image [B, N, D]; text [B, E]; weight [D, D + E]; bias [D].
# options: need_weights; without it weights are empty; kept_rows. extra: the first kept_rows rows' weights [kept_rows,
# D], float32 (float64).
# The text's part of the scores is computed inside: as nodes of the graph apart from it a product, its gradients and
# slices of the weight would cost a small call half of what all the rest costs.


@without_autocast
def _reference(image, text, weight, bias, need_weights, kept_rows):
    accumulate = accumulate_dtype(image)
    x = image.to(accumulate)
    of_image, of_text = weight.to(accumulate).split_with_sizes([image.shape[2], text.shape[1]], 1)
    bias_hidden = linear(text.to(accumulate), of_text, cast(bias, accumulate))
    weights = (x @ of_image.T + bias_hidden[:, None]).softmax(-1)
    return (x * weights).to(image.dtype), weights.to(image.dtype) if need_weights else image.new_empty(0)


def _fake(image, text, weight, bias, need_weights, kept_rows):
    return (
        image.new_empty(image.shape),
        image.new_empty(image.shape if need_weights else 0),
        image.new_empty(kept_rows, image.shape[2], dtype=accumulate_dtype(image)),
    )


OPERATION = Operation(
    "channel_attention",
    "(Tensor image, Tensor text, Tensor weight, Tensor? bias, bool need_weights, SymInt kept_rows) -> (Tensor result, "
    "Tensor weights, Tensor kept)",
    differentiable=("image", "text", "weight", "bias"),
    shared=("weight", "bias"),
    extras=("kept",),
    kept=("kept",),
    reference=_reference,
    fake=_fake,
    fake_grad=lambda name, tensor: tensor.new_empty(tensor.shape),
)
ChannelAttentionFunction = OPERATION.Function

if backends.extension is not None:
    OPERATION.register("channel_attention", "cpu", "cuda")
backends.implement_lazily("triton", "channel_attention", "mmkernels.triton.channel_attention")
