"""What training takes: time and peak memory of a step, fused, plain and recomputed, for every batch size.

Each point is measured in a process of its own, so that none finds memory that another one left.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from . import checks
from .bench import report
from .bench.timing import keep_freed_memory, peak_memory, race
from .data import Batch
from .data.extras import require
from .models import ImageTextModel
from .training import step
from .training.recomputation import recomputation

# name -> (the model's backend, whether activations are computed again).
VARIANTS = {
    "fused": (None, False),
    "plain": ("reference", False),
    "fused, recomputed": (None, True),
    "plain, recomputed": ("reference", True),
}
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Settings:
    """What all points share.

    Attributes:
        architecture, fusion, num_heads: the :class:`mmkernels.models.ImageTextModel`'s.
        size: height and width of the images.
        tokens: of a text.
        device: ``"cpu"`` or ``"cuda"``.
        threads: PyTorch's, on the CPU; None leaves them as they are.
        rounds: timed steps a point; their median counts.
    """

    architecture: str = "article"
    fusion: str = "spatial"
    num_heads: int = 4
    size: int = 224
    tokens: int = 16
    device: str = "cpu"
    threads: int | None = None
    rounds: int = 5

    def __post_init__(self):
        for name in ("num_heads", "size", "tokens", "rounds"):
            checks.dimension(name, getattr(self, name))
        checks.choice("device", self.device, ("cpu", "cuda"))


def run(settings=None, *, variants=tuple(VARIANTS), batch_sizes=BATCH_SIZES, progress=None):
    """Measures a training step (forward, backward, AdamW's update) of every variant with every batch size.

    Args:
        settings: :class:`Settings`; None: their defaults.
        variants: names of :data:`VARIANTS`.
        batch_sizes: ascending; after one that doesn't fit into memory, larger ones aren't tried.
        progress: called with (what is being measured, how many are done, of how many).

    Returns:
        A dict that JSON can hold: ``environment``, ``settings``, and ``points``, of each ``variant``, ``batch_size``,
        ``milliseconds`` a step, ``memory_mb``, the most that a step needs beyond what stays (parameters, their moments,
        the batch; None where the system can't tell), and ``error``, None or why there are no numbers.

    Raises:
        ValueError: there is no such variant or model.
        RuntimeError: a process ended by something other than too little memory.
    """
    settings = settings or Settings()
    for name in variants:
        checks.choice("variant", name, tuple(VARIANTS))
    _model(settings, None)  # a mistake is told here, not by another process
    points = []
    for i, size in enumerate(batch_sizes):
        for j, name in enumerate(variants):
            if progress:
                progress(f"{name}, {size}", i * len(variants) + j, len(batch_sizes) * len(variants))
            if any(point["variant"] == name and point["error"] for point in points):
                continue
            points.append({"variant": name, "batch_size": size, **_in_a_process(settings, name, size)})
    return {"environment": report.environment(settings.device, False), "settings": asdict(settings), "points": points}


def _in_a_process(settings, variant, batch_size):
    told = json.dumps({**asdict(settings), "variant": variant, "batch_size": batch_size})
    done = subprocess.run([sys.executable, "-m", "mmkernels.limits", told], capture_output=True, text=True)
    nothing = {"milliseconds": None, "memory_mb": None}
    if done.returncode == 0:
        return {**json.loads(done.stdout.splitlines()[-1]), "error": None}
    if done.returncode == -9:
        return {**nothing, "error": "killed: the system has no more memory"}
    why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    if "memory" not in why.lower():
        raise RuntimeError(f"measuring {variant} with {batch_size} samples failed: {why}")
    return {**nothing, "error": why}


def measure(settings, variant, batch_size):
    """One point, here: ``milliseconds`` and ``memory_mb``."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    backend, again = VARIANTS[variant]
    device = settings.device
    model = _model(settings, backend).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(batch_size, 3, settings.size, settings.size, generator=draw)
    text = torch.randint(1, 1000, (batch_size, settings.tokens), generator=draw)
    target = torch.randint(0, 2, (batch_size,), generator=draw).float()
    inputs = {"image": image.contiguous(memory_format=torch.channels_last), "text": text}
    batch = Batch(inputs, target).to(device)
    with recomputation(model, again):
        job = lambda: step(model, optimizer, batch)
        job()  # the moments, which stay
        peak = peak_memory(job, device)
        keep_freed_memory()
        seconds = race({"step": job}, device=device, rounds=settings.rounds, budget=60.0, burst=0.0)["step"].median
    return {"milliseconds": 1e3 * seconds, "memory_mb": None if peak is None else peak / 1e6}


def _model(settings, backend):
    torch.manual_seed(0)
    return ImageTextModel(
        1000,
        architecture=settings.architecture,
        fusion=settings.fusion,
        num_heads=settings.num_heads,
        backend=backend,
    )


def plot(found):
    """Memory and time over the batch size, a line a variant: a matplotlib Figure."""
    figure = require("matplotlib.figure", "cli").Figure((10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("memory_mb", "milliseconds"), ("peak memory of a step, MB", "time of a step, ms")
    ):
        for i, name in enumerate(dict.fromkeys(point["variant"] for point in found["points"])):
            points = [p for p in found["points"] if p["variant"] == name and p[key] is not None]
            style = {"color": f"C{i % 2}", "linestyle": ":" if "recomputed" in name else "-", "marker": "o"}
            axes.plot([p["batch_size"] for p in points], [p[key] for p in points], label=name, **style)
        axes.set(xlabel="batch size", ylabel=label, ylim=(0, None))
        axes.legend()
    settings = found["settings"]
    figure.suptitle(
        f"{settings['architecture']}, {settings['fusion']}; {settings['size']} x {settings['size']}, "
        f"{settings['tokens']} tokens; {settings['device']}"
    )
    return figure


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    where = {name: options.pop(name) for name in ("variant", "batch_size")}
    print(json.dumps(measure(Settings(**options), **where)))
