"""Checks of what an image-text model is built with and called with."""

import torch

from .. import checks


def check_call(given, present, smallest, has_sound):
    """Of a call's arguments by modality, and which samples have each (bool ``[B]``, or None); returns B. An image has
    at least `smallest` pixels a side."""
    for name, value in given.items():
        if value is not None:
            checks.is_tensor(name, value)
        elif present[name] is not None:
            raise ValueError(f"{name}_present must be None where {name} is None, which is missing in all samples")
    if not has_sound and given["sound"] is not None:
        raise ValueError("sound must be None of a model with sound=False, got a tensor")
    batch = next((len(value) for value in given.values() if value is not None and value.dim()), None)
    if batch is None:
        raise ValueError("image, text or sound must be given, got None of all")
    if given["image"] is not None:
        _check_image(given["image"], smallest)
    if given["text"] is not None:
        _check_text(given["text"], batch)
    if given["sound"] is not None:
        _check_sound(given["sound"], batch)
    for name, value in present.items():
        if value is not None:
            checks.boolean_mask(f"{name}_present", value, name, given[name], ("B", batch))
    return batch


def _check_image(image, smallest):
    checks.features("image", image)
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < smallest:
        raise ValueError(f"image must be [B, 3, Y, X] with Y and X at least {smallest}, got {list(image.shape)}")


def _check_text(text, batch):
    if text.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"text must hold token ids (int64), got {text.dtype}")
    if text.dim() not in (2, 3) or text.shape[0] != batch or (text.dim() == 3 and not text.shape[1]):
        raise ValueError(f"text must be [B, T] or [B, K, T] with B = {batch}, got {list(text.shape)}")


def _check_sound(sound, batch):
    checks.features("sound", sound)
    if sound.dim() != 3 or len(sound) != batch or 0 in sound.shape[1:]:
        raise ValueError(f"sound must be [B, M, F] with B = {batch}, M and F at least 1, got {list(sound.shape)}")


def check_channels(channels):
    """As a list of ints."""
    if not isinstance(channels, (tuple, list)) or not channels:
        raise TypeError(f"channels must be a sequence of at least one int, got {channels!r}")
    return [checks.dimension(f"channels[{i}]", each) for i, each in enumerate(channels)]


def check_index(name, value, size):
    """One of `size` things, also from the end."""
    value = checks.integer(name, value)
    if not -size <= value < size:
        raise ValueError(f"{name} must be from {-size} to {size - 1}, got {value}")
    return value
