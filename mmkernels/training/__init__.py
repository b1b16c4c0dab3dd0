"""Fits a model of several modalities, whatever its task, and tells how well it does."""

from .distributed import is_first, own_device
from .evaluation import evaluate, predict, summary
from .fitting import fit
from .history import History
from .privacy import Privacy
from .steps import BATCH, step

__all__ = ["BATCH", "History", "Privacy", "evaluate", "fit", "is_first", "own_device", "predict", "step", "summary"]
