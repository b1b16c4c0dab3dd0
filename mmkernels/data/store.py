"""Tensors in a temporary file."""

import tempfile

import torch

from .extras import require


class Store:
    """A list of tensors of any shapes that lies in a file without a name: the system keeps in memory what it has room
    for, and the file is gone with the object.

    Raises:
        OSError: the disk is full (:meth:`append`).
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        self._places = []
        self._size = 0
        self._map = None

    def __len__(self):
        return len(self._places)

    def append(self, tensor):
        """Returns the tensor's index."""
        data = tensor.contiguous().numpy().data
        self._file.write(data)
        self._places.append((self._size, tensor.dtype, tensor.shape))
        self._size += data.nbytes
        self._map = None
        return len(self) - 1

    def __getitem__(self, index):
        offset, dtype, shape = self._places[index]
        np = require("numpy")
        if self._map is None:
            self._file.flush()
            self._map = np.memmap(self._file, mode="r")
        size = shape.numel() * dtype.itemsize
        return torch.from_numpy(np.array(self._map[offset : offset + size])).view(dtype).view(shape)
