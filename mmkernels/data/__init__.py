"""Data sets: OpenMoji's pictures with their names in English and Chinese (:func:`load`), and folders of files that a
CSV file lists (:class:`Table`).

Needs ``pip install mmkernels[demo]``. Nothing is downloaded: pictures and names come from installed packages.
"""

from .batch import Batch
from .image_files import UnreadableError, read_image
from .pairs import Pairs, Splits, load, split
from .pictures import Picture, catalogue, load_images
from .preprocessing import Preprocessing
from .sheet import Row, Sheet, read_sheet
from .sound_files import Spectrogram, read_sound
from .table import Table
from .text import encode, read_embedding, train_tokenizer

__all__ = [
    "Batch",
    "Pairs",
    "Picture",
    "Preprocessing",
    "Row",
    "Sheet",
    "Spectrogram",
    "Splits",
    "Table",
    "UnreadableError",
    "catalogue",
    "encode",
    "load",
    "load_images",
    "read_embedding",
    "read_image",
    "read_sheet",
    "read_sound",
    "split",
    "train_tokenizer",
]
