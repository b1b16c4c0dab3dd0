"""Which torch this package runs with."""

import re

import torch

OLDEST_TORCH = "2.10"  # the stable ABI that the extension is built for: TORCH_TARGET_VERSION in setup.py


def check_torch(found=torch.__version__):
    """Raises ImportError where torch is older than the extension's ABI: the kernels couldn't be loaded, and plain
    PyTorch would run in their place."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < tuple(map(int, OLDEST_TORCH.split("."))):
        raise ImportError(
            f"mmkernels needs torch {OLDEST_TORCH} or newer, but torch {found} is installed: "
            "pip install --upgrade torch"
        )


check_torch()
