"""The references choose their own precision."""

import functools

import torch


def without_autocast(function):
    """Autocast would run the reference's sums in low precision."""
    @functools.wraps(function)
    def run(*arguments, **options):
        first = arguments[0] if arguments else next(iter(options.values()))
        device = first.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)
    return run
