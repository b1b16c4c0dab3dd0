"""The report's pictures."""

import torch

from .. import faithfulness as measure
from .. import plot
from ..data.extras import require

_PICTURES = 6
_DELETED = 48  # pictures that are deleted bit by bit
_SHOWN = 224  # height and width in the report


def attention(model, pairs, seed):
    """For some held-out pictures, drawn at random: the picture, then the weights of each of its texts over it.

    Returns:
        A list of rows; each is a list of dicts: image (PNG bytes), text, language, probability and label (None for the
        picture itself).
    """
    chosen = _draw(len(pairs), seed)[:_PICTURES]
    batch = pairs.collate([pairs[i] for i in chosen])
    image = batch.inputs["image"]
    text = batch.inputs["text"]
    model.eval()
    weights = model.attention(image, text)
    probabilities = model.predict(image, text)
    rows = []
    for b, index in enumerate(chosen):
        picture = _large(pairs.images[index])
        row = [{"image": plot.png(picture), "text": "", "language": "en", "probability": None, "label": None}]
        for k, words in enumerate(pairs.texts(index)):
            row.append(
                {
                    "image": plot.png(plot.attention(picture, weights[b, k])),
                    "text": words,
                    "language": pairs.languages[k % len(pairs.languages)],
                    "probability": probabilities[b, k].item(),
                    "label": bool(batch.target[b, k]),
                }
            )
        rows.append(row)
    return rows


def faithfulness(model, pairs, seed):
    """Deletes what the model attends to, with each picture's own first text; see :mod:`mmkernels.faithfulness`.

    Returns:
        ``areas`` of attended and random deletion (means over pictures), the share of ``faithful`` pictures, how many
        ``pictures``; and the figure (PNG bytes).
    """
    chosen = _draw(len(pairs), seed + 1)[:_DELETED]
    batch = pairs.collate([pairs[i] for i in chosen])
    image = batch.inputs["image"]
    text = batch.inputs["text"][:, 0]
    model.eval()
    white = (1 - pairs.mean) / pairs.std  # the pictures' own background
    found = measure.deletion(
        lambda image: model.predict(image, text), image, model.attention(image, text), fill=white, seed=seed
    )
    attended, random = found.areas
    numbers = {
        "pictures": len(chosen),
        "attended": attended.mean().item(),
        "random": random.mean().item(),
        "faithful": found.faithful,
    }
    return numbers, plot.png(plot.deletion(found))


def losses(histories):
    return plot.png(plot.losses(histories))


def _draw(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _large(picture):
    Image = require("PIL.Image")
    return Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
