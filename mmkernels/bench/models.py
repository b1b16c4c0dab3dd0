"""What fusing gives whole public models, with random weights: ``mmkernels bench --models``.

A model and its fused self are one object, patched and unpatched in turn, so that nothing else differs; five rounds, the
spread printed. A model's row says how much faster the modules that were replaced are, how much of the model they were,
how much faster that makes the whole, what memory it needs at most, and by how much the outputs differ.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import integrations
from . import report
from .contests import missing
from .timing import keep_freed_memory, peak_memory

ROUNDS = 5
# Of the largest output: roundings of a whole model in float32. Its layers are tested one by one, more strictly.
ALLOWED = 1e-3


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: with its input's size.
        package: what has to be installed.
        make: ``(quick) -> (module, inputs)``, the arguments by name; `quick` with few pixels.
        result: what of the output is compared, and trained on: a tensor.
        target: the least ratio of times; None: none is promised.
        training: whether a training step is timed, in place of inference.
        memory: the most of the plain one's peak memory that the fused one may take; None: nothing is promised.
        random: whether it drops other elements plain than fused: outputs are compared where none are dropped.
        fuse, restore: what makes ``module`` fused, and plain again.
    """

    name: str
    package: str
    make: Callable
    result: Callable
    target: float | None = None
    training: bool = False
    memory: float | None = None
    random: bool = False
    fuse: Callable = integrations.patch
    restore: Callable = integrations.unpatch


def grounding_dino(quick):
    import transformers as hf

    swin = hf.SwinConfig(image_size=384, out_features=["stage2", "stage3", "stage4"])
    config = hf.GroundingDinoConfig(backbone_config=swin, fusion_dropout=0.0)
    module = hf.GroundingDinoForObjectDetection(config)
    y, x = (320, 384) if quick else (800, 1333)
    ids = torch.tensor([[101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 1037, 6411, 1012, 1037, 2160, 102]])
    return module, {"pixel_values": _picture(1, y, x), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def deformable_detr(quick):
    import transformers as hf

    backbone = hf.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = hf.DeformableDetrConfig(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False
    )
    module = hf.DeformableDetrForObjectDetection(config)
    return module, {"pixel_values": _picture(1, *((320, 384) if quick else (800, 1333)))}


def mask2former(quick):
    import transformers as hf

    swin = hf.SwinConfig(image_size=224, out_features=["stage1", "stage2", "stage3", "stage4"])
    module = hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(backbone_config=swin))
    size = 256 if quick else 512
    return module, {"pixel_values": _picture(1, size, size)}


def rt_detr(quick):
    import transformers as hf

    return _rt_detr(hf.RTDetrForObjectDetection, hf.RTDetrConfig, quick)


def rt_detr_v2(quick):
    import transformers as hf

    return _rt_detr(hf.RTDetrV2ForObjectDetection, hf.RTDetrV2Config, quick)


def _rt_detr(kind, config, quick):
    size = 320 if quick else 640
    return kind(config()), {"pixel_values": _picture(1, size, size)}


def _picture(batch, y, x):
    return torch.randn(batch, 3, y, x, generator=torch.Generator().manual_seed(0))


def stable_diffusion(quick):
    """1.5's UNet."""
    import diffusers

    module = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    size = 16 if quick else 64
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 4, size, size, generator=draw), torch.randn(1, 77, 768, generator=draw)
    return module, {"sample": image, "timestep": 500, "encoder_hidden_states": text}


def vit(quick):
    """On the attention interface; 577 tokens."""
    import transformers as hf

    size = 64 if quick else 384
    module = hf.ViTModel(hf.ViTConfig(image_size=size, attn_implementation="sdpa"))
    return module, {"pixel_values": _picture(1 if quick else 4, size, size)}


def _on_interface(model):
    integrations.transformers.register()
    model.set_attn_implementation("mmkernels")


def _on_sdpa(model):
    model.set_attn_implementation("sdpa")


def torchmil_pool(quick):
    from torchmil.nn import AttentionPool

    return AttentionPool(1024, 256, gated=True), {"X": _bag(quick)}


class _MONAIHead(torch.nn.Module):
    """MILModel behind its backbone."""

    def __init__(self):
        super().__init__()
        from monai.networks.nets import MILModel

        self.model = MILModel(2, mil_mode="att", backbone=torch.nn.Identity(), backbone_num_features=1024)

    def forward(self, bag):
        return self.model.calc_head(bag)


def monai_pool(quick):
    return _MONAIHead(), {"bag": _bag(quick)}


def clam_attention(quick):
    from .. import AdditiveAttention

    return AdditiveAttention(1024, 256, gated=True, dropout=0.25), {"image": _bag(quick)}


def clam(quick):
    from ..models import ClamSB

    return ClamSB(1024), {"image": _bag(quick)}


def _attention_of(module):
    return getattr(module, "attention", module)


def _as_published(module):
    """CLAM's attention in its own words, with the same parameters."""
    attention = _attention_of(module)

    def forward(image, *, mask=None, offsets=None, need_scores=False):
        drop = lambda hidden: torch.nn.functional.dropout(hidden, attention.dropout, attention.training)
        hidden = drop(attention.image_projection(image).tanh()) * drop(attention.gate_projection(image).sigmoid())
        scores = attention.score_projection(hidden).mT
        pooled = scores.softmax(-1) @ image
        return (pooled, scores) if need_scores else pooled

    attention.forward = forward


def _as_ours(module):
    _attention_of(module).__dict__.pop("forward", None)


def _bag(quick):
    return torch.randn(1, 1000 if quick else 100_000, 1024, generator=torch.Generator().manual_seed(0))


def _encoded(output):
    """Before queries are chosen by their scores, which a rounding may exchange."""
    return output.encoder_last_hidden_state_vision


def _logits(output):
    return output.logits


def _itself(output):
    return output


MODELS = (
    Model("Grounding DINO, 800 x 1333", "transformers", grounding_dino, _encoded, 2.0),
    Model("Grounding DINO, 800 x 1333, training step", "transformers", grounding_dino, _encoded, 1.8, training=True),
    Model("Deformable DETR, 800 x 1333", "transformers", deformable_detr, _logits, 1.8),
    Model("Mask2Former, 512 x 512", "transformers", mask2former, lambda o: o.masks_queries_logits, 1.4),
    Model("RT-DETR, 640 x 640", "transformers", rt_detr, _logits, 1.0),
    Model("RT-DETRv2, 640 x 640", "transformers", rt_detr_v2, _logits, 1.0),
    Model("Stable Diffusion 1.5's UNet, 64 x 64", "diffusers", stable_diffusion, lambda o: o.sample, 1.05),
    Model(
        "ViT-B/16, 4 x 384 x 384, by the attention interface",
        "transformers",
        vit,
        lambda o: o.last_hidden_state,
        0.98,
        fuse=_on_interface,
        restore=_on_sdpa,
    ),
    Model(
        "torchmil's gated pool, 100,000 x 1024, training step",
        "torchmil",
        torchmil_pool,
        _itself,
        1.2,
        training=True,
        memory=0.2,
    ),
    Model(
        "MONAI's MILModel, 100,000 x 1024, training step",
        "monai",
        monai_pool,
        _itself,
        1.2,
        training=True,
        memory=0.2,
    ),
    Model(
        "CLAM-SB's attention, dropout 0.25, 100,000 x 1024, training step",
        "mmkernels",
        clam_attention,
        _itself,
        1.2,
        training=True,
        memory=0.2,
        random=True,
        fuse=_as_ours,
        restore=_as_published,
    ),
    Model(
        "CLAM-SB, dropout 0.25, 100,000 x 1024, training step",
        "mmkernels",
        clam,
        lambda output: output.logits,
        1.2,
        training=True,
        random=True,
        fuse=_as_ours,
        restore=_as_published,
    ),
)


def run(names=None, *, quick=False, threads=None, rounds=ROUNDS, progress=None):
    """Times models and returns ``{"environment": ..., "models": [row], "figures": [figure]}``.

    Args:
        names: of :data:`MODELS`; default: all whose packages are installed.
        quick: small pictures, two rounds: shows that it works, and says nothing of speed.
        threads: CPU threads to use; default: torch's setting.
        rounds: how many.
        progress: called with (text, done, total).
    """
    keep_freed_memory()
    progress = progress or (lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    chosen = [model for model in MODELS if names is None or model.name in names]
    rows = []
    try:
        for i, model in enumerate(chosen):
            progress(model.name, i, len(chosen))
            if missing(model.package):
                rows.append({"model": model.name, "left out": f"{model.package} isn't installed"})
                continue
            rows.append(_row(model, quick, 2 if quick else rounds))
            gc.collect()
        progress("done", len(chosen), len(chosen))
        figures = [figure.as_json() for figure in _figures(chosen, rows)]
        return {"environment": report.environment("cpu", quick), "models": rows, "figures": figures}
    finally:
        torch.set_num_threads(before)


def _row(model, quick, rounds):
    torch.manual_seed(0)
    module, inputs = model.make(quick)
    step = _step(model, module, inputs)
    replaced = [module.get_submodule(name) for name in integrations.patch(module, dry_run=True).replaced]
    module.train(model.training and not model.random)
    model.restore(module)
    plain = step()
    model.fuse(module)
    difference = ((plain - step()).abs().max() / plain.abs().max()).item()
    del plain
    module.train(model.training)
    if not difference <= ALLOWED:
        return {"model": model.name, "wrong": f"outputs differ by {difference:.0e} of the largest"}
    kinds = ("plain", model.restore), ("fused", model.fuse)
    times, layers = ({name: [] for name, _ in kinds} for _ in range(2))
    for _ in range(rounds):
        for name, change in kinds:
            change(module)
            start = time.perf_counter()
            _, seconds = _timed(step, replaced)
            times[name].append(time.perf_counter() - start)
            layers[name].append(seconds)
    memory = {}
    for name, change in kinds:
        change(module)
        memory[name] = peak_memory(step)
    ratios = [a / b for a, b in zip(times["plain"], times["fused"])]
    median = statistics.median
    row = {
        "model": model.name,
        "replaced": len(replaced),
        "plain, s": median(times["plain"]),
        "fused, s": median(times["fused"]),
        "faster": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
    if replaced and not model.training:
        row["share of the model"] = median(a / b for a, b in zip(layers["plain"], times["plain"]))
        row["layers faster"] = median(a / b for a, b in zip(layers["plain"], layers["fused"]))
    if None not in memory.values():
        row |= {"plain, MB": memory["plain"] / 1e6, "fused, MB": memory["fused"] / 1e6}
    return row | {"outputs differ by": difference}


def _step(model, module, inputs):
    """Inference, or a training step without the optimizer, which both would share; gives what is compared."""

    def infer():
        with torch.inference_mode():
            return model.result(module(**inputs))

    def train():
        torch.manual_seed(0)  # both drop the same: dropout, whole paths
        result = model.result(module(**inputs))
        module.zero_grad(set_to_none=True)
        result.square().mean().backward()
        return result.detach()

    return train if model.training else infer


def _timed(step, modules):
    """The step's result, and the seconds that these modules took of it (forward)."""
    seconds = 0.0
    started = {}

    def before(module, *_):
        started[module] = time.perf_counter()

    def after(module, *_):
        nonlocal seconds
        seconds += time.perf_counter() - started[module]

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        return step(), seconds


def _figures(models, rows):
    for model, row in zip(models, rows):
        if model.target is not None and "faster" in row:
            yield report.Figure(model.name, model.target, row["faster"])
        if model.memory is not None and row.get("plain, MB"):
            share = row["fused, MB"] / row["plain, MB"]
            yield report.Figure(f"{model.name}, memory", model.memory, share, at_most=True)


def show(found, console):
    """A row a model, then the figures."""
    from rich.table import Table

    env = found["environment"]
    console.print(report.title(env) + (" — a quick look: small pictures, two rounds" if env["quick"] else ""))
    columns = list(dict.fromkeys(name for row in found["models"] for name in row))
    table = Table(title="models, plain and fused in turn")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in found["models"]:
        table.add_row(*(_text(column, row.get(column)) for column in columns))
    console.print(table)
    report.show_figures("models", found["figures"], console)


def _text(column, value):
    if column == "outputs differ by" and value is not None:
        return f"{value:.0e}"
    if column == "share of the model" and value is not None:
        return f"{100 * value:.0f} %"
    return report.text(value)
