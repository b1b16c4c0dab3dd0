"""Which fusion? Trains every architecture with every fusion on the demo's data, each with several seeds."""

import dataclasses
import itertools
import statistics
import time
from dataclasses import dataclass

import torch

from . import checks, demo, training
from .bench import report
from .bench.timing import keep_freed_memory, peak_memory
from .data.extras import require
from .models import fusions as fusion_kinds
from .models import image_text

ARCHITECTURES = tuple(sorted(image_text.ARCHITECTURES, key="article".__ne__))  # the article's own first
FUSIONS = tuple(fusion_kinds.FUSIONS)
# Of every training: shares of held-out pairs that are right, in all and of each kind; and the area under the ROC curve.
SCORES = ("accuracy", "auc", "right", "hard", "easy")
COSTS = ("step_milliseconds", "memory_mb", "parameters")


@dataclass(frozen=True)
class Settings:
    """What all trainings share.

    Attributes:
        epochs: of every training.
        limit: how many pictures; None is all of them.
        size: height and width of the pictures.
        seeds: trainings of every model. A seed draws parameters, order and negatives; held-out pictures stay the same.
    """

    epochs: int = demo.EPOCHS
    limit: int | None = None
    size: int = demo.SIZE
    seeds: int = 3

    def __post_init__(self):
        for name in ("epochs", "size", "seeds"):
            checks.dimension(name, getattr(self, name))
        if self.limit is not None:
            checks.dimension("limit", self.limit)


def run(architectures=ARCHITECTURES, fusions=FUSIONS, *, settings=None, threads=None, progress=None):
    """Trains them one after the other, a seed at a time, so that a slower hour of the machine hits all alike.

    Args:
        architectures, fusions: names; every one of the first is trained with every one of the second.
        settings: :class:`Settings`; None: their defaults.
        threads: PyTorch's; None leaves them as they are.
        progress: called with (what is being trained, how many are done, of how many).

    Returns:
        A dict that JSON can hold: ``environment``, ``settings``, and ``rows``, for every model `architecture`,
        `fusion`, and of every score and cost a list ``values``, a seed a value, with ``mean`` and ``std`` (0 of one).

    Raises:
        ValueError: there is no such architecture or fusion.
        ImportError: a package of ``mmkernels[demo]`` isn't installed.
    """
    settings = settings or Settings()
    for name, chosen, known in (("architectures", architectures, ARCHITECTURES), ("fusions", fusions, FUSIONS)):
        for each in chosen:
            checks.choice(name, each, known)
    models = list(dict.fromkeys(itertools.product(architectures, fusions)))
    keep_freed_memory()
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        found = _train_all(models, settings, progress or (lambda *_: None))
        environment = report.environment("cpu", quick=False)
    finally:
        torch.set_num_threads(before)
    rows = [
        {"architecture": architecture, "fusion": fusion, **_spread(found[architecture, fusion])}
        for architecture, fusion in models
    ]
    return {"environment": environment, "settings": dataclasses.asdict(settings), "rows": rows}


def best(found):
    """The row whose mean accuracy is highest."""
    return max(found["rows"], key=lambda row: row["accuracy"]["mean"])


def _train_all(models, settings, progress):
    """(architecture, fusion) -> what :func:`_train` found, a seed each."""
    task = demo.load(settings.limit, size=settings.size, progress=False)
    found = {model: [] for model in models}
    total = len(models) * settings.seeds
    for done, (seed, model) in enumerate(itertools.product(range(settings.seeds), models)):
        progress(f"{', '.join(model)}, seed {seed}", done, total)
        found[model].append(_train(task, *model, seed, settings))
    return found


def _train(task, architecture, fusion, seed, settings):
    """One model: its scores over held-out pictures, and its costs."""
    model = demo.build(task, architecture=architecture, fusion=fusion, seed=seed)
    training.fit(model, task.training, **demo.fitting(settings.epochs), seed=seed, progress=False)
    scores = training.evaluate(model, task.validation)
    return {**{name: scores[name] for name in SCORES}, **costs(model, task)}


def costs(model, task, rounds=7):
    """Of a training step, without the optimizer: the processor time, the least of some rounds (who else is busy doesn't
    matter then), and the most memory beyond parameters, gradients and batch (None where the system can't tell); and how
    many parameters there are."""
    pairs = task.training
    batch = pairs.collate([pairs[i] for i in range(min(demo.BATCH, len(pairs)))])
    model.train()

    def step():
        start = time.process_time()
        loss, _ = model(**batch.inputs, target=batch.target)
        loss.backward()
        return time.process_time() - start

    memory = peak_memory(step)
    return {
        "step_milliseconds": 1e3 * min(step() for _ in range(rounds)),
        "memory_mb": None if memory is None else memory / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _spread(trained):
    """Score or cost -> its mean and standard deviation over seeds, and its values."""
    rows = {}
    for name in (*SCORES, *COSTS):
        values = [each[name] for each in trained]
        known = [value for value in values if value is not None]
        mean = statistics.mean(known) if known else None
        rows[name] = {"mean": mean, "std": statistics.stdev(known) if len(known) > 1 else 0.0, "values": values}
    return rows


def show(found, console):
    """A row a model."""
    from rich.table import Table

    console.print(f"{report.title(found['environment'])}; {described(found['settings'])}", highlight=False)
    table = Table()
    for title in ("architecture", "fusion", *TITLES.values()):
        table.add_column(title, justify="left" if title in ("architecture", "fusion") else "right")
    top = best(found)
    for row in found["rows"]:
        cells = [row["architecture"], row["fusion"], *cells_of(row)]
        table.add_row(*cells, style="bold" if row is top else None)
    console.print(table)


TITLES = {
    "accuracy": "right, %",
    "auc": "AUC, %",
    "hard": "of hard negatives, %",
    "step_milliseconds": "a step, processor ms",
    "memory_mb": "memory, MB",
    "parameters": "parameters",
}


def cells_of(row):
    """A row's numbers as text, mean and (of several seeds) standard deviation, in the order of TITLES."""
    cells = []
    for name in TITLES:
        mean, std = row[name]["mean"], row[name]["std"]
        if mean is None:
            cells.append("")
        elif name in SCORES:
            spread = f" ± {100 * std:.1f}" if len(row[name]["values"]) > 1 else ""
            cells.append(f"{100 * mean:.1f}{spread}")
        else:
            cells.append(f"{mean:,.0f}")
    return cells


def described(settings):
    """The settings, in words."""
    pictures = "all pictures" if settings["limit"] is None else f"{settings['limit']} pictures"
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "1 seed"
    epochs = f"{settings['epochs']} epochs" if settings["epochs"] > 1 else "1 epoch"
    return f"{pictures}, {settings['size']} x {settings['size']}, {epochs}, {seeds}"


def plot(found, path):
    """Accuracy over a step's time, a point a model: colours are architectures, signs are fusions; bars are the standard
    deviation over seeds."""
    figure = require("matplotlib.figure").Figure((8, 4.5), layout="constrained")
    lines = require("matplotlib.lines")
    axes = figure.subplots()
    signs = dict(zip(FUSIONS, "osD^v"))
    colours = {name: f"C{i}" for i, name in enumerate(ARCHITECTURES)}
    for row in found["rows"]:
        axes.errorbar(
            row["step_milliseconds"]["mean"],
            100 * row["accuracy"]["mean"],
            100 * row["accuracy"]["std"],
            fmt=signs[row["fusion"]],
            color=colours[row["architecture"]],
            capsize=2,
        )
    axes.set(xlabel="a training step, processor ms", ylabel="held-out pairs right, %")
    used = {key: {row[key] for row in found["rows"]} for key in ("architecture", "fusion")}
    handles = [lines.Line2D([], [], color=c, label=n) for n, c in colours.items() if n in used["architecture"]]
    handles += [
        lines.Line2D([], [], color="black", linestyle="", marker=sign, label=name)
        for name, sign in signs.items()
        if name in used["fusion"]
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
