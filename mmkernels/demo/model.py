"""The demo's data, model and training: what was found to learn most in so short a time (docs/which-fusion.md)."""

import torch

from .. import data
from ..models import ImageTextModel

SIZE = 64  # small pictures leave time to see all of them often
EPOCHS = 16
BATCH = 32  # pictures a step
ARCHITECTURE = "hierarchical"
FUSION = "spatial"
_CHANNELS = (16, 32, 64)
_NEGATIVES = 1  # wrong texts for a right one: more of them took longer, and taught no more
_JITTER = 0.08


def load(limit=None, *, size=SIZE, seed=0, progress=True):
    """Pictures and words, see :func:`mmkernels.data.load`."""
    return data.load(limit, seed=seed, size=size, negatives=_NEGATIVES, jitter=_JITTER, progress=progress)


def build(task, *, architecture=ARCHITECTURE, fusion=FUSION, backend=None, seed=0):
    """The model for a task; the same seed gives the same parameters for every backend."""
    torch.manual_seed(seed)
    model = ImageTextModel(
        task.tokenizer.get_vocab_size(),
        architecture=architecture,
        fusion=fusion,
        channels=_CHANNELS,
        norm="batch",
        num_heads=4,
        backend=backend,
    )
    return model.to(memory_format=torch.channels_last)


def fitting(epochs=EPOCHS):
    """How :func:`mmkernels.training.fit` is called."""
    return {"epochs": epochs, "batch_size": BATCH, "learning_rate": 3e-3, "weight_decay": 0.05}
