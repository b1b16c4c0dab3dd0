"""Keras 3 layers on its torch backend: spatial and channel attention."""

import math
from typing import Any

try:
    import keras
except ImportError as error:  # Keras's own, or that of the backend which it is set to
    raise ImportError(
        "mmkernels.integrations.keras needs keras 3 on its torch backend (KERAS_BACKEND=torch in the environment): "
        f"{error}"
    ) from error

from .. import backends, checks, functional

if keras.backend.backend() != "torch":
    raise ImportError(
        f"mmkernels.integrations.keras needs Keras's torch backend, got {keras.backend.backend()!r}: set "
        "KERAS_BACKEND=torch in the environment before keras is imported"
    )

__all__ = ["ChannelAttention", "SpatialAttention"]


class _ImageTextLayer(keras.layers.Layer):
    """A layer of [image, text], whose image's mask tells which positions take part."""

    def __init__(self, use_bias, kernel_initializer, bias_initializer, data_format, backend, **options):
        super().__init__(**options)
        backends.check(backend)
        self.use_bias = checks.flag("use_bias", use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        checks.choice("data_format", self.data_format, ("channels_last", "channels_first"))
        self.backend = backend
        self.supports_masking = True

    def compute_mask(self, inputs, mask=None):
        return self._image_mask(mask)

    def get_config(self):
        return super().get_config() | {
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "data_format": self.data_format,
            "backend": self.backend,
        }

    def _pair(self, inputs):
        """Of tensors or of shapes: image and text."""
        if not isinstance(inputs, (list, tuple)) or len(inputs) != 2:
            raise ValueError(f"{type(self).__name__} must be called on a list [image, text], got {inputs}")
        return inputs

    def _shapes(self, input_shape):
        """(image's, text's, axis of the image's channels), checked."""
        image, text = map(tuple, self._pair(input_shape))
        if len(image) not in self.RANKS:
            raise ValueError(f"image must be {self.IMAGES}, got shape {image}")
        if len(text) != 2:
            raise ValueError(f"text must be [B, E], got shape {text}")
        axis = 1 if self._planes(image) else len(image) - 1
        for name, shape, index in (("image", image, axis), ("text", text, 1)):
            if shape[index] is None:
                raise ValueError(f"{name} must have a known number of channels, got shape {shape}")
        return image, text, axis

    def _planes(self, image_shape):
        return len(image_shape) == 4 and self.data_format == "channels_first"

    def _image_mask(self, mask):
        """`mask` may be the image's, or one of each input; Keras gives the latter."""
        if not isinstance(mask, (list, tuple)):
            return mask
        image_mask, text_mask = mask
        if text_mask is not None:
            raise ValueError("text's mask must be None: the text is one vector a sample [B, E]")
        return image_mask


@keras.saving.register_keras_serializable(package="mmkernels")
class SpatialAttention(_ImageTextLayer):
    """Weighs every image position by how well it matches the text, in place of ``Dot``, softmax and ``Multiply``.

    A ``Dense`` layer projects the text to the image's channels; the softmax runs over the positions, all of an image's
    rows together. See :func:`mmkernels.spatial_attention`.

    Args:
        num_heads: H, divides the image's channels; each has a softmax of its own over its share of them.
        combine: ``"multiply"``: like image, each position times its weight; ``"pool"``: their sum ``[B, D]``.
        rescale: multiply the weights by the number of positions that take part, so that their mean is 1.
        scale: factor of the scores; default ``(D / num_heads) ** -0.5``. 1.0 is the plain ``Dot``.
        use_bias, kernel_initializer, bias_initializer: of the text's projection.
        data_format: of images with two axes of positions: ``"channels_last"`` or ``"channels_first"``; default
            Keras's.
        backend: as in :func:`mmkernels.spatial_attention`.

    Shape:
        a list of image ``[B, Y, X, D]`` (``[B, D, Y, X]`` with ``"channels_first"``) or ``[B, N, D]``, and text
        ``[B, E]`` -> like image, or ``[B, D]`` (``"pool"``). ``mask``: bool ``[B, Y, X]`` or ``[B, N]``, True = takes
        part; by default the one that Keras keeps with the image. With ``need_weights=True`` also the weights
        ``[B, H, N]``.

    Raises:
        ValueError, TypeError: an argument or an input is wrong; the message names it.
    """

    RANKS = (3, 4)
    IMAGES = "[B, N, D] or an image of two axes of positions"

    def __init__(
        self,
        num_heads: int = 1,
        combine: str = "multiply",
        *,
        rescale: bool = False,
        scale: float | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        data_format: str | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(use_bias, kernel_initializer, bias_initializer, data_format, backend, **options)
        self.num_heads = checks.dimension("num_heads", num_heads)
        checks.choice("combine", combine, ("multiply", "pool"))
        self.combine = combine
        self.rescale = checks.flag("rescale", rescale)
        self.scale = None if scale is None else checks.number("scale", scale)

    def build(self, input_shape):
        image, text, axis = self._shapes(input_shape)
        checks.heads("num_heads", self.num_heads, ("image's channels", image[axis]))
        self.text_projection = keras.layers.Dense(
            image[axis],
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            dtype=self.dtype_policy,
            name="text_projection",
        )
        self.text_projection.build(text)

    def call(self, inputs, mask=None, need_weights=False):
        image, text = self._pair(inputs)
        mask = self._image_mask(mask)
        planes = self._planes(image.shape)
        # Rows of an image with its channels last are one axis of positions: a view.
        rows = image if planes or image.dim() == 3 else image.flatten(1, 2)
        if mask is not None and not planes and mask.dim() == 3:
            mask = mask.flatten(1)
        found = functional.spatial_attention(
            rows,
            self.text_projection(text),
            mask=mask,
            scale=self.scale,
            num_heads=self.num_heads,
            combine=self.combine,
            rescale=self.rescale,
            layout="bdhw" if planes else "bnd",
            need_weights=need_weights,
            backend=self.backend,
        )
        result, *weights = found if need_weights else (found,)
        if self.combine == "multiply":
            result = result.reshape(image.shape)
        return (result, *weights) if need_weights else result

    def compute_mask(self, inputs, mask=None):
        return super().compute_mask(inputs, mask) if self.combine == "multiply" else None

    def compute_output_shape(self, input_shape):
        image, _, axis = self._shapes(input_shape)
        return image if self.combine == "multiply" else (image[0], image[axis])

    def compute_output_spec(self, inputs, mask=None, need_weights=False):
        shapes = [tensor.shape for tensor in self._pair(inputs)]
        result = keras.KerasTensor(self.compute_output_shape(shapes), dtype=self.compute_dtype)
        if not need_weights:
            return result
        image, _, axis = self._shapes(shapes)
        sizes = [size for i, size in enumerate(image) if i not in (0, axis)]
        positions = None if None in sizes else math.prod(sizes)
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        return result, keras.KerasTensor((image[0], self.num_heads, positions), dtype=wide)

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "combine": self.combine,
            "rescale": self.rescale,
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable(package="mmkernels")
class ChannelAttention(_ImageTextLayer):
    """Weighs the channels of every image position by image and text together: ``softmax(W [X, Y]) * X``, in place of
    ``Concatenate``, ``Dense``, softmax and ``Multiply``.

    The softmax runs over channels, so that no position waits for another. See :func:`mmkernels.channel_attention`.

    Args:
        use_bias, kernel_initializer, bias_initializer: of the scores' ``kernel`` ``[D + E, D]``, laid out as that of a
            ``Dense`` layer on the concatenation of image and text.
        data_format: as of :class:`SpatialAttention`.
        backend: as in :func:`mmkernels.channel_attention`.

    Shape:
        a list of image ``[B, Y, X, D]`` (``[B, D, Y, X]`` with ``"channels_first"``), ``[B, N, D]`` or ``[B, D]``, and
        text ``[B, E]`` -> like image; with ``need_weights=True`` also the weights, like image. A mask of the image goes
        on to the next layer: positions have nothing to do with each other here.

    Raises:
        ValueError, TypeError: an argument or an input is wrong; the message names it.
    """

    RANKS = (2, 3, 4)
    IMAGES = "[B, D], [B, N, D] or an image of two axes of positions"

    def __init__(
        self,
        *,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        data_format: str | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(use_bias, kernel_initializer, bias_initializer, data_format, backend, **options)

    def build(self, input_shape):
        image, text, axis = self._shapes(input_shape)
        channels = image[axis]
        self.kernel = self.add_weight(
            shape=(channels + text[1], channels), initializer=self.kernel_initializer, name="kernel"
        )
        self.bias = (
            self.add_weight(shape=(channels,), initializer=self.bias_initializer, name="bias")
            if self.use_bias
            else None
        )

    def call(self, inputs, mask=None, need_weights=False):
        image, text = self._pair(inputs)
        self._image_mask(mask)
        planes = self._planes(image.shape)
        if planes:
            rows = image.flatten(2).mT
        else:
            rows = image.flatten(1, 2) if image.dim() == 4 else image
        found = functional.channel_attention(
            rows,
            text,
            keras.ops.convert_to_tensor(self.kernel).T,
            None if self.bias is None else keras.ops.convert_to_tensor(self.bias),
            need_weights=need_weights,
            backend=self.backend,
        )
        found = [
            (tensor.mT if planes else tensor).reshape(image.shape) for tensor in (found if need_weights else (found,))
        ]
        return tuple(found) if need_weights else found[0]

    def compute_output_shape(self, input_shape):
        return self._shapes(input_shape)[0]

    def compute_output_spec(self, inputs, mask=None, need_weights=False):
        shape = self.compute_output_shape([tensor.shape for tensor in self._pair(inputs)])
        result = keras.KerasTensor(shape, dtype=self.compute_dtype)
        return (result, keras.KerasTensor(shape, dtype=self.compute_dtype)) if need_weights else result
