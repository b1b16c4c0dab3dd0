"""``train``."""

import shutil
from collections import Counter
from pathlib import Path

import click

from .. import tasks
from ..data.image_files import DENOISE, RESIZE
from .common import console, device_option, threads_option, write_json
from .own_data import (
    batch_option,
    csv_argument,
    draw,
    explained,
    measured,
    prepare,
    problems,
    read,
    root_option,
    show_metrics,
    strict_option,
)

ARCHITECTURES = ("article", "shared", "aligned", "hierarchical")
FUSIONS = ("spatial", "channel", "gated", "bidirectional", "additive")
NEED_IMAGE = ("spatial", "additive")  # in the article's architecture, which classifies what they pool alone

DATA = [
    root_option,
    strict_option,
    click.option(
        "--validation",
        type=click.Path(exists=True, dir_okay=False),
        metavar="CSV",
        help="Rows to evaluate on; default: some of CSV's.",
    ),
    click.option(
        "--hold-out",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.2,
        show_default=True,
        help="The share of CSV's rows to evaluate on, without --validation.",
    ),
    click.option("--task", type=click.Choice(tasks.NAMES), help="Default: guessed from the labels."),
    click.option(
        "--allow-missing",
        is_flag=True,
        help="An empty cell is a missing modality, no mistake.",
    ),
    click.option(
        "--size", type=click.IntRange(10, 4096), default=112, show_default=True, help="Height and width of the images."
    ),
    click.option(
        "--resize", type=click.Choice(RESIZE), default="crop", show_default=True, help="How they get to that size."
    ),
    click.option("--denoise", type=click.Choice(DENOISE), help="Filters the images."),
    click.option(
        "--vocabulary",
        type=click.IntRange(min=2),
        default=10_000,
        show_default=True,
        help="The largest number of words.",
    ),
    click.option(
        "--embeddings",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="Words' vectors to begin with (GloVe's, word2vec's or fastText's text format).",
    ),
]
MODEL = [
    click.option(
        "--architecture",
        type=click.Choice(ARCHITECTURES),
        default="article",
        show_default=True,
        help="See mmkernels.models.ImageTextModel.",
    ),
    click.option(
        "--fusion",
        type=click.Choice(FUSIONS),
        help="How image and text meet; default: spatial, without an image gated.",
    ),
    click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True, help="Of the attention."),
    click.option(
        "--norm",
        type=click.Choice(["batch", "group", "none"]),
        default="batch",
        show_default=True,
        help="After the image's convolutions.",
    ),
]
TRAINING = [
    click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Passes over the rows."),
    batch_option,
    click.option(
        "--accumulate",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Compute a batch in so many parts, for less memory.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=3e-3,
        show_default=True,
        help="The highest of the cycle.",
    ),
    click.option("--weight-decay", type=click.FloatRange(min=0), default=0.05, show_default=True, help="AdamW's."),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="What is computed in.",
    ),
    click.option("--recompute", is_flag=True, help="Keep fewer activations: less memory, more time, the same result."),
    click.option(
        "--modality-dropout",
        type=click.FloatRange(0, 1, max_open=True),
        help="How often a sample goes without one of its modalities; default: 0, with --allow-missing 0.2.",
    ),
    click.option("--balance", is_flag=True, help="Of two labels, let the rarer count as much as the other."),
    click.option("--resume", is_flag=True, help="Go on where a training that was stopped, with the same options, was."),
    click.option(
        "--distributed",
        type=click.Choice(["ddp", "fsdp"]),
        help="How processes that torchrun started train together: torchrun -m mmkernels train ...",
    ),
    click.option("--seed", default=0, show_default=True, help="Draws everything random."),
    threads_option,
    device_option,
]


def options(*lists):
    def decorate(command):
        for option in reversed([option for group in lists for option in group]):
            command = option(command)
        return command

    return decorate


@click.command()
@csv_argument
@click.option(
    "--out",
    type=click.Path(file_okay=False, writable=True),
    required=True,
    metavar="FOLDER",
    help="Where the model goes, and metrics.json and pictures beside it.",
)
@options(DATA, MODEL, TRAINING)
def train(csv, out, **chosen):
    """Trains a model on the rows of CSV: columns path (of an image), text, sound (a sound file) and label.

    Not all of the first three have to be there. Two different labels are a yes-no question, more are classes, "a|b"
    is several at once, and numbers are numbers.
    """
    with explained():
        from ..training import is_first, own_device

        device = prepare(chosen["threads"], chosen["device"])
        if chosen["distributed"]:
            device = own_device()
            console.quiet = not is_first()
        table, training, validation = _tables(csv, chosen)
        model = _model(training, chosen).to(device)
        history = _fit(model, training, validation, Path(out) / "checkpoint", chosen)
        if is_first():
            shutil.rmtree(Path(out) / "checkpoint")
            _finish(model, history, table, training, validation, Path(out), chosen)


def _tables(csv, chosen):
    """All rows of CSV, those to train with, and those to evaluate on."""
    from ..data import Preprocessing

    names = ("size", "resize", "denoise", "task", "allow_missing")
    preprocessing = Preprocessing(**{name: chosen[name] for name in names})
    table = read(csv, chosen["root"], preprocessing, strict=chosen["strict"])
    if chosen["validation"]:
        training = table
        validation = read(chosen["validation"], chosen["root"], preprocessing, strict=chosen["strict"])
    else:
        training, validation = table.split(chosen["hold_out"], seed=chosen["seed"])
    training.learn(vocabulary=chosen["vocabulary"])
    if chosen["balance"]:
        if preprocessing.task != "binary":
            raise click.UsageError(f"--balance goes with two labels, not with {preprocessing.task}")
        training.positive_weight = training.negatives_per_positive()
    kinds = Counter(sample.label for sample in table.samples) if preprocessing.task in ("binary", "multiclass") else {}
    told = ": " + ", ".join(f"{kinds[label]} {label}" for label in preprocessing.labels) if kinds else ""
    console.print(
        f"{preprocessing.task} from {' and '.join(preprocessing.modalities)}; {len(training)} rows to train with, "
        f"{len(validation)} to evaluate on{told}",
        highlight=False,
        markup=False,
    )
    return table, training, validation


def _model(training, chosen):
    import torch

    from ..data import read_embedding
    from ..models import ImageTextModel

    preprocessing = training.preprocessing
    tokenizer = preprocessing.tokenizer
    torch.manual_seed(chosen["seed"])
    sizes = {}
    if chosen["embeddings"]:
        if tokenizer is None:
            raise click.UsageError("--embeddings needs a column text")
        weight, found = read_embedding(chosen["embeddings"], tokenizer, seed=chosen["seed"])
        sizes["embedding"] = weight.shape[1]
    fusion = chosen["fusion"] or ("spatial" if "image" in preprocessing.modalities else "gated")
    if chosen["architecture"] == "article" and fusion in NEED_IMAGE and "image" not in preprocessing.modalities:
        raise click.UsageError(f"--fusion {fusion} tells where in an image, and there is none: take gated")
    model = ImageTextModel(
        tokenizer.get_vocab_size() if tokenizer else 2,
        architecture=chosen["architecture"],
        fusion=fusion,
        task=preprocessing.task,
        outputs=preprocessing.outputs,
        num_heads=chosen["heads"],
        norm=chosen["norm"],
        sound="sound" in preprocessing.modalities,
        substitutes=True if len(preprocessing.modalities) < 2 or _modality_dropout(chosen) else None,
        **sizes,
    )
    if chosen["embeddings"]:
        model.embedding.weight.data.copy_(weight)
        console.print(f"{int(found.sum())} of {len(found)} words have a vector in {chosen['embeddings']}", markup=False)
    return model


def _fit(model, training, validation, checkpoint, chosen):
    from .. import training as trainer

    if not chosen["resume"] and trainer.is_first():
        shutil.rmtree(checkpoint, ignore_errors=True)
    names = ["epochs", "batch_size", "accumulate", "learning_rate", "weight_decay", "precision", "recompute"]
    names += ["distributed", "seed"]
    return trainer.fit(
        model,
        training,
        validation=validation,
        modality_dropout=_modality_dropout(chosen),
        checkpoint_dir=checkpoint,
        **{name: chosen[name] for name in names},
    )


def _modality_dropout(chosen):
    given = chosen["modality_dropout"]
    return given if given is not None else 0.2 if chosen["allow_missing"] else 0.0


def _finish(model, history, table, training, validation, out, chosen):
    """Saves the model, and tells and draws how well it does."""
    from .. import plot, saving

    preprocessing = table.preprocessing
    batch_size = chosen["batch_size"]
    metrics = {
        name: measured(model, rows, batch_size) for name, rows in (("training", training), ("validation", validation))
    }
    saving.save(out, model, preprocessing)
    show_metrics(metrics)
    write_json(
        out / "metrics.json",
        {
            "task": preprocessing.task,
            "labels": preprocessing.labels,
            "options": chosen,
            **metrics,
            "rows": {"training": len(training), "validation": len(validation)},
            "skipped": problems(table),
            "losses": history.losses,
        },
    )
    draw(model, validation, out, batch_size, metrics["validation"])
    plot.save(plot.losses({"training": history}), out / "losses.png")
    console.print(f"The model: {click.format_filename(out)}", highlight=False, markup=False, soft_wrap=True)
