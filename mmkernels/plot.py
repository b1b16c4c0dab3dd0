"""Pictures of what a model looks at and of how well it does. Needs matplotlib and Pillow, no window and no pyplot.

Functions that draw over a photograph return a Pillow image; those that draw axes a matplotlib Figure. :func:`png` and
:func:`save` take either.
"""

import io
import textwrap
from functools import cache
from pathlib import Path

import torch

from .data.extras import require

# Families with Chinese, Japanese and Korean signs, as systems and packages have them.
CJK_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "SimHei",
    "Arial Unicode MS",
    "Noto Sans CJK JP",
    "IPAexGothic",
)


BRIGHT = 4  # times the mean weight: from there on it can't glow more than the largest does


def attention(picture, weights, *, least=None, most=None, strength=0.75):
    """The picture in grey, glowing where the weights are larger than if they were spread evenly.

    Args:
        picture: uint8 ``[3, Y, X]`` or ``[Y, X, 3]``, or a Pillow image.
        weights: float ``[y, x]``, 0 or more, of any resolution (it is drawn over the whole picture) and any sum.
        least: the weight from which on it glows; default: their mean.
        most: the weight that glows with all its strength; default: the largest, but at least :data:`BRIGHT` times the
            mean. So what attends to everything alike glows nowhere.
        strength: of the glow, from 0 to 1.

    Returns:
        A Pillow image of the picture's size.
    """
    Image = require("PIL.Image")
    image = _image(picture)
    heat = _heat(weights, image.size, least, most)
    colours = require("matplotlib").colormaps["inferno"](heat.numpy(), bytes=True)[..., :3]
    glow = Image.fromarray(colours.copy())
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.35)
    alpha = Image.fromarray((255 * strength * heat.sqrt()).to(torch.uint8).numpy())
    return Image.composite(glow, pale, alpha)


def words(picture, weights, texts, *, columns=4):
    """A heat map a word: where it is read, as :meth:`mmkernels.models.ImageTextModel.word_attention` tells.

    Args:
        picture: as in :func:`attention`.
        weights: float ``[T, y, x]``. All words share one scale: where a word is read more than words are on average,
            it glows; twice as much, or the largest weight, glows most.
        texts: the T words.
        columns: panels a line.

    Returns:
        A matplotlib Figure. A word that no font can write is told by its number and its code points.
    """
    weights = torch.as_tensor(weights)
    if len(texts) != len(weights):
        raise ValueError(f"texts must be {len(weights)} words, one for each of the weights, got {len(texts)}")
    mean = weights.mean()
    most = torch.maximum(weights.amax(), 2 * mean)
    pictures = [attention(picture, heat, least=mean, most=most) for heat in weights]
    return gallery(
        pictures, [writable(word, f"word {number}") for number, word in enumerate(texts, 1)], columns=columns
    )


def gallery(pictures, captions, *, columns=4):
    """Pictures in lines, each under its caption.

    Args:
        pictures: Pillow images, or uint8 as in :func:`attention`.
        captions: as many texts.
        columns: pictures a line.

    Returns:
        A matplotlib Figure.
    """
    columns = max(1, min(columns, len(pictures)))
    lines = max(1, -(-len(pictures) // columns))
    images = [_image(picture) for picture in pictures]
    height = max((image.height / image.width for image in images), default=1)
    figure, axes = _figure((2.2 * columns, (2.2 * height + 0.4) * lines), lines, columns)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, caption in zip(axes.flat, images, captions):
        ax.imshow(image)
        ax.set_title(textwrap.fill(writable(caption), 24), fontsize=9, **_font())
    return figure


def confusion(matrix, labels=None):
    """How often each class (a row) was taken for which (a column).

    Args:
        matrix: int ``[C, C]``, as torchmetrics' ConfusionMatrix gives it.
        labels: C names.
    """
    matrix = torch.as_tensor(matrix)
    labels = list(map(str, range(len(matrix)))) if labels is None else [writable(label) for label in labels]
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(labels) != len(matrix):
        raise ValueError(f"matrix must be [C, C] with C = {len(labels)} labels, got {list(matrix.shape)}")
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    side = max(3.2, 1.6 + 0.55 * len(labels))
    figure, axes = _figure((side + 0.8, side), 1, 1)
    ax = axes.flat[0]
    drawn = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(matrix)):
        for column in range(len(matrix)):
            dark = shares[row, column] > 0.5
            ax.text(column, row, int(matrix[row, column]), ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(labels)), labels, rotation=45 if max(map(len, labels)) > 3 else 0, **_font())
    ax.set_yticks(range(len(labels)), labels, **_font())
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(drawn, label="share of the true class", shrink=0.8)
    return figure


def curves(probabilities, target, labels=None):
    """ROC and precision-recall curves side by side, a line a class or label.

    Args:
        probabilities: float ``[K]`` (yes or no), or ``[K, C]``.
        target: 0 or 1, like probabilities; or the class, int64 ``[K]``.
        labels: C names.
    """
    metrics = require("torchmetrics.functional")
    probabilities = torch.as_tensor(probabilities)
    target = torch.as_tensor(target)
    if probabilities.dim() == 1:
        probabilities = probabilities[:, None]
    if target.dim() == 1 and probabilities.shape[1] > 1:
        target = torch.nn.functional.one_hot(target.long(), probabilities.shape[1])
    target = target.reshape(probabilities.shape).long()
    labels = [None] * probabilities.shape[1] if labels is None else labels
    figure, axes = _figure((8, 3.6), 1, 2)
    roc, recall = axes.flat
    for label, p, t in zip(labels, probabilities.unbind(1), target.unbind(1)):
        if 0 < t.sum() < len(t):  # else there is no such curve
            false, true, _ = metrics.roc(p, t, task="binary")
            roc.plot(false, true, label=label and writable(label))
            precise, found, _ = metrics.precision_recall_curve(p, t, task="binary")
            recall.plot(found, precise, label=label and writable(label))
    roc.plot([0, 1], [0, 1], linewidth=0.8, color="grey", linestyle=":")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    recall.set(xlabel="recall", ylabel="precision", title="precision and recall", ylim=(0, 1.05))
    if roc.get_legend_handles_labels()[0] and labels[0] is not None:
        recall.legend(fontsize=8, prop=_font().get("fontproperties"))
    return figure


def regression(predicted, target):
    """Predictions over what was true; the line is where they are equal."""
    predicted = torch.as_tensor(predicted).flatten()
    target = torch.as_tensor(target).flatten()
    figure, axes = _figure((4, 4), 1, 1)
    ax = axes.flat[0]
    ax.scatter(target, predicted, s=12, alpha=0.6)
    ends = [min(target.min(), predicted.min()).item(), max(target.max(), predicted.max()).item()]
    ax.plot(ends, ends, linewidth=0.8, color="grey")
    ax.set(xlabel="true", ylabel="predicted")
    return figure


def losses(histories, *, smooth=10):
    """Losses step by step, a line a training; the later ones are drawn thinner, over the earlier.

    Args:
        histories: a list of losses (or a :class:`mmkernels.training.History`) by name.
        smooth: a running mean over so many steps.
    """
    figure, axes = _figure((8, 3.2), 1, 1)
    ax = axes.flat[0]
    for number, (name, history) in enumerate(histories.items()):
        values = torch.tensor(getattr(history, "losses", history), dtype=torch.float64)
        width = max(1, min(smooth, len(values) // 5))
        mean = values.unfold(0, width, 1).mean(1) if len(values) else values
        ax.plot(range(width - 1, width - 1 + len(mean)), mean, linewidth=max(1, 3 - 2 * number), label=name)
    ax.set(xlabel="step", ylabel="loss")
    ax.legend()
    return figure


def deletion(found):
    """What :func:`mmkernels.faithfulness.deletion` measured: mean scores while patches are deleted, and
    the standard error of that mean."""
    figure, axes = _figure((5.5, 3.4), 1, 1)
    ax = axes.flat[0]
    for name, scores, colour in (
        ("most attended first", found.attended, "#a32020"),
        ("in random order", found.random.mean(0), "#555555"),
        ("least attended first", found.least, "#0a6b2d"),
    ):
        mean = scores.mean(0)
        error = scores.std(0, correction=0) / len(scores) ** 0.5
        ax.plot(found.fractions, mean, label=name, color=colour)
        ax.fill_between(found.fractions, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="share of the picture that is deleted", ylabel="score")
    ax.legend()
    return figure


def png(picture, *, dpi=120):
    """A Figure or Pillow image as the bytes of a PNG file."""
    file = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(file, dpi=dpi, format="png")
    else:
        picture.save(file, "PNG")
    return file.getvalue()


def save(picture, path, *, dpi=120):
    """Writes a Figure or Pillow image to a PNG file."""
    Path(path).write_bytes(png(picture, dpi=dpi))


def writable(text, instead=None):
    """The text, if the fonts that are found can write it; else ``instead`` and the code points of what they can't."""
    fonts = _charmaps()
    missing = sorted({ord(c) for c in text if not c.isspace()} - set().union(*fonts))
    if not missing:
        return text
    codes = " ".join(f"U+{code:04X}" for code in missing[:4]) + (" ..." if len(missing) > 4 else "")
    return f"{instead} ({codes})" if instead else codes


def _image(picture):
    Image = require("PIL.Image")
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    picture = torch.as_tensor(picture)
    if picture.dim() != 3 or picture.dtype != torch.uint8 or 3 not in (picture.shape[0], picture.shape[2]):
        raise ValueError(
            f"picture must be uint8 [3, Y, X] or [Y, X, 3], or a Pillow image; got {picture.dtype} "
            f"{list(picture.shape)}"
        )
    if picture.shape[0] == 3:
        picture = picture.permute(1, 2, 0)
    return Image.fromarray(picture.contiguous().numpy())


def _heat(weights, size, least, most):
    """Weights [y, x] -> from 0 (least or less) to 1 (most or more), of a picture's size (X, Y)."""
    weights = torch.as_tensor(weights).detach().float().cpu()
    if weights.dim() != 2:
        raise ValueError(f"weights must be [y, x], got {list(weights.shape)}")
    heat = torch.nn.functional.interpolate(weights[None, None], size[::-1], mode="bilinear", align_corners=False)[0, 0]
    mean = weights.mean()
    least = mean if least is None else torch.as_tensor(least).float()
    most = weights.amax().clamp_min(BRIGHT * mean) if most is None else torch.as_tensor(most).float()
    return ((heat - least) / (most - least).clamp_min(torch.finfo(heat.dtype).tiny)).clamp(0, 1)


def _figure(size, lines, columns):
    figure = require("matplotlib.figure").Figure(size, layout="tight")
    return figure, figure.subplots(lines, columns, squeeze=False)


@cache
def _families():
    """The default family, then what is installed of :data:`CJK_FAMILIES`."""
    manager = require("matplotlib.font_manager")
    known = {font.name for font in manager.fontManager.ttflist}
    return ["DejaVu Sans", *(family for family in CJK_FAMILIES if family in known)]


@cache
def _charmaps():
    manager = require("matplotlib.font_manager")
    return tuple(
        frozenset(manager.get_font(manager.findfont(family, fallback_to_default=True)).get_charmap())
        for family in _families()
    )


def _font():
    return {"fontproperties": require("matplotlib.font_manager").FontProperties(family=_families())}
