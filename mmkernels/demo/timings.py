"""How much faster the fused layers are, alone, in the demo's model, and in a public one."""

import torch

from .. import training
from ..bench import absorbed_attention as fusion_layer
from ..bench.timing import race


def layer_and_model(models, pairs):
    """The fusion layer alone, then a whole training step with Adam's update.

    Args:
        models: the fused and the plain one, by name.
        pairs: a data set; its first items are the batch.

    Returns:
        ``layer`` and ``model``: each what is timed, and milliseconds of fused and plain; ``share``: what the layer,
        once a text, is of the plain model's step, from 0 to 1; ``rounds``.
    """
    batch = pairs.collate([pairs[i] for i in range(training.BATCH)])
    image = batch.inputs["image"]
    text = batch.inputs["text"]
    texts = text.shape[1]
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
        return lambda: training.step(model, optimizer, batch, positive_weight=pairs.positive_weight)

    found = {}
    for name, job, what in (
        ("layer", layer, f"the fusion layer, image {list(features.shape)}, one text"),
        ("model", step, f"the whole model, image {list(image.shape)}, {texts} texts, with Adam's update"),
    ):
        times = race({which: job(model) for which, model in models.items()}, rounds=11, budget=20)
        found[name] = {"what": what, **{which: 1e3 * time.median for which, time in times.items()}}
    found["rounds"] = len(times["fused"].rounds)
    found["share"] = min(1.0, texts * found["layer"]["plain"] / found["model"]["plain"])
    return found


def grounding_dino(budget=4.0):
    """Grounding DINO's fusion layer on 800 x 1333 pixels and 16 tokens, with all of its projections.

    Returns:
        ``what``, and milliseconds of ``forward`` and ``training`` (forward and backward), by contestant: ours, sdpa,
        and Hugging Face's own where transformers is installed.
    """
    arguments = fusion_layer.layer_inputs(fusion_layer.SHAPES[0], "cpu")
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
