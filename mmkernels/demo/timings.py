"""How much faster the fused layers are, alone, in the demo's model, and in a public one."""

import contextlib

import torch

from .. import training
from ..bench import absorbed_attention as fusion_layer
from ..bench.timing import race


def layer_and_model(models, pairs, batch_size):
    """The fusion layers alone, then a whole training step with Adam's update.

    Args:
        models: the fused and the plain one, by name.
        pairs: a data set; its first items are the batch.
        batch_size: how many.

    Returns:
        ``layer`` and ``model``: each what is timed, and milliseconds of fused and plain; ``share``: what the layers,
        once a text, are of the plain model's step, from 0 to 1; ``rounds``.
    """
    batch = pairs.collate([pairs[i] for i in range(min(batch_size, len(pairs)))])
    texts = batch.inputs["text"].shape[1]
    given = _given_to_fusion(models["fused"], batch)

    def layer(model):
        def job():
            for name, (image, *others) in given.items():
                getattr(model, name)(image.detach().requires_grad_(), *others).sum().backward()

        return job

    def step(model):
        optimizer = torch.optim.Adam(model.parameters())
        return lambda: training.step(model, optimizer, batch, positive_weight=pairs.positive_weight)

    found = {}
    shapes = " and ".join(str(list(image.shape)) for image, *_ in given.values())
    whole = list(batch.inputs["image"].shape)
    for name, job, what in (
        ("layer", layer, f"fusion: {shapes}, one text"),
        ("model", step, f"the whole model, image {whole}, {texts} texts, with Adam's update"),
    ):
        times = race({which: job(model) for which, model in models.items()}, rounds=11, budget=20)
        found[name] = {"what": what, **{which: 1e3 * time.median for which, time in times.items()}}
    found["rounds"] = len(times["fused"].rounds)
    found["share"] = min(1.0, texts * found["layer"]["plain"] / found["model"]["plain"])
    return found


@torch.no_grad()
def _given_to_fusion(model, batch):
    """What a model gives its fusion layers, by name, for a batch's first texts: features, and what fuses with them."""
    given = {}
    with contextlib.ExitStack() as hooks:
        for name in model.fusion_names:
            keep = lambda module, arguments, name=name: given.update({name: arguments})
            hooks.enter_context(getattr(model, name).register_forward_pre_hook(keep))
        model(image=batch.inputs["image"], text=batch.inputs["text"][:, 0])
    return given


def grounding_dino(shape=fusion_layer.SHAPES[0], budget=4.0):
    """Grounding DINO's fusion layer with all of its projections, on 800 x 1333 pixels and 16 tokens or another `shape`
    of the benchmark's.

    Returns:
        ``what``, and milliseconds of ``forward`` and ``training`` (forward and backward), by contestant: ours, sdpa,
        and Hugging Face's own where transformers is installed.
    """
    arguments = fusion_layer.layer_inputs(shape, "cpu")
    layers = {name: make(arguments) for name, make in fusion_layer.LAYERS.items()}
    image, text = arguments["image"], arguments["text"]

    def forward(layer):
        with torch.inference_mode():
            layer(image, text)

    def both(layer):
        x = image.detach().requires_grad_()
        sum(out.sum() for out in layer(x, text)).backward()

    found = {"what": f"image {list(image.shape)}, text {list(text.shape)}"}
    for name, job in (("forward", forward), ("training", both)):
        times = race(
            {which: (lambda job=job, layer=layer: job(layer)) for which, layer in layers.items()},
            rounds=5,
            budget=budget,
        )
        found[name] = {which: 1e3 * time.median for which, time in times.items()}
    return found
