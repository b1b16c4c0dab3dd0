"""Fits a model of several modalities, whatever its task, and tells how well it does."""

from .evaluation import evaluate, predict, summary
from .fitting import fit
from .history import History
from .steps import BATCH, step

__all__ = ["BATCH", "History", "evaluate", "fit", "predict", "step", "summary"]
