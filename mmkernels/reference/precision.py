"""The operations choose their own precision, also where autocast is on."""

import functools

import torch


def autocast_is_on(device_type):
    """Devices that know no autocast (meta) are asked nothing: PyTorch would raise."""
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def without_autocast(function):
    """Runs a function in the dtypes that it is given: autocast would run its products in low precision."""

    @functools.wraps(function)
    def run(*arguments, **options):
        device_type = next(a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)).device.type
        if not autocast_is_on(device_type):
            return function(*arguments, **options)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments, **options)

    return run
