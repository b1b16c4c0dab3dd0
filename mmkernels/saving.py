"""Models as files: weights as safetensors, everything else as JSON. Loading runs no code that a file brings."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch

from . import __version__
from .data.extras import require
from .data.preprocessing import Preprocessing
from .models import ImageTextModel

FORMAT = "mmkernels model"
VERSION = 1  # of the files: rises when an older mmkernels would read them wrongly
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def save(folder, model, preprocessing=None):
    """Writes a model into a folder, which is made if it isn't there: ``model.safetensors``, its weights, and
    ``model.json``, its arguments, how files become its inputs, and what wrote it. Each file is written whole or not at
    all, and the second says what belongs to it.

    Args:
        folder: a path.
        model: an :class:`mmkernels.models.ImageTextModel`.
        preprocessing: a :class:`mmkernels.data.Preprocessing`.

    Raises:
        ImportError: `safetensors` isn't installed.
    """
    # Copies: what shares memory safetensors refuses.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    weights = require("safetensors.torch").save(tensors)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {"mmkernels": __version__, "torch": torch.__version__},
        "weights": hashlib.sha256(weights).hexdigest(),
        "model": model.config,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
    _write(folder / WEIGHTS, weights)
    _write(folder / DESCRIPTION, text.encode() + b"\n")


def load(folder, *, device="cpu"):
    """Reads what :func:`save` wrote. Neither file can bring code: one holds numbers, the other text, and both are
    checked; memory is taken for the weights that are there, not for what the text asks for.

    Returns:
        ``(model, preprocessing)``: the model in evaluation mode, on `device`; preprocessing as it was given, or None.

    Raises:
        ValueError: the folder doesn't hold such a model: files are missing, foreign, damaged, written by a newer
            mmkernels, or don't belong together. The message names folder and reason.
        ImportError: `safetensors` or, for the tokenizer, `tokenizers` isn't installed.
    """
    folder = Path(folder)
    description = _description(folder)
    weights = _read(folder / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != description["weights"]:
        raise ValueError(f"{folder / WEIGHTS} isn't the file that {DESCRIPTION} was written with, or is damaged")
    try:
        tensors = require("safetensors.torch").load(weights)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{folder / WEIGHTS} can't be read: {error}") from error
    try:
        with torch.device("meta"):
            model = ImageTextModel(**description["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} describes no model: {error}") from error
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} doesn't fit the model of {DESCRIPTION}: {error}") from error
    try:
        given = description["preprocessing"]
        preprocessing = None if given is None else Preprocessing.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION}: {error}") from error
    return model.to(device).eval(), preprocessing


def _description(folder):
    path = folder / DESCRIPTION
    try:
        found = json.loads(_read(path))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'{path} isn\'t a model of mmkernels: it lacks "format": "{FORMAT}"')
    version = found.get("version")
    if type(version) is not int or version > VERSION:
        raise ValueError(
            f"{path} has version {version!r}; mmkernels {__version__} reads up to {VERSION}. It was written by "
            f"{found.get('written_by')}: pip install --upgrade mmkernels"
        )
    for name, kind in {"weights": str, "model": dict, "preprocessing": (dict, type(None))}.items():
        if not isinstance(found.get(name, 0), kind):
            raise ValueError(f"{path}: {name} is missing or no {kind}, got {found.get(name)!r}")
    return found


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path.parent} isn't a model's folder: {path.name} can't be read: {error.strerror}"
        ) from error


def _write(path, content):
    """Writes the file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
