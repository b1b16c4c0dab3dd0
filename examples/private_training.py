"""Differentially private training with a fused layer: what kind of thing is it, told by a picture and its name?

    python examples/private_training.py [PICTURES [EPOCHS [NOISE]]]

Real pictures and names (OpenMoji, Unicode CLDR): is it a person? Nobody who sees the trained model can tell much about
any single one of the pictures that it was trained on: how little is what epsilon says.
"""

import sys

import torch

from mmkernels import data, training
from mmkernels.models import ImageTextModel

PEOPLE = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "face"}
PICTURES, EPOCHS, NOISE = [*map(float, sys.argv[1:]), *(150, 6, 0.8)[len(sys.argv) - 1 :]]


class People(torch.utils.data.Dataset):
    """Of pairs their pictures, each with its name in Chinese; the English one tells the answer."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        picture = self.pairs.pictures[index]
        person = not PEOPLE.isdisjoint(picture.texts["en"].split())
        return self.pairs[index][0], picture.texts["zh"], float(person)

    def collate(self, items):
        images, texts, people = zip(*items)
        text = data.encode(self.pairs.tokenizer, texts)
        return data.Batch({"image": torch.stack(images), "text": text}, torch.tensor(people))


task = data.load(int(PICTURES), size=32, progress=False)
people, held_out = People(task.training), People(task.validation)
for name, privacy in (("without privacy", None), ("private", training.Privacy(NOISE, clip=1.0, delta=1e-4))):
    torch.manual_seed(0)
    model = ImageTextModel(task.tokenizer.get_vocab_size(), channels=(16, 32), embedding=32, hidden=32, num_heads=4)
    history = training.fit(
        model, people, epochs=int(EPOCHS), batch_size=64, learning_rate=1e-2, privacy=privacy, progress=False
    )
    found = training.evaluate(model, held_out)
    told = "" if privacy is None else f", epsilon {history.epsilon:.1f} (delta {privacy.delta})"
    print(f"{name}: {found['accuracy']:.1%} of {len(held_out)} held-out pictures right, AUC {found['auc']:.3f}{told}")
    assert torch.isfinite(torch.tensor(found["loss"]))
assert 0 < history.epsilon < float("inf")
