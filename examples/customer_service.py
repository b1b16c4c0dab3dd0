"""Customer service: which department does a message with a picture go to, when often one of the two is missing?

    python examples/customer_service.py   # about a minute on 2 cores; --quick: seconds, and worse

Customers send a picture of what they bought (OpenMoji's drawings, each time askew and before another wall) and a line
of text, or only one of them. Four departments: a classification, with the shared architecture, gated cross-attention,
and learned substitutes for what is missing. Guide: docs/guides/customer-service.md. Needs mmkernels[demo].
"""

import argparse
import copy
import csv
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageChops

from mmkernels import data, training
from mmkernels.data.pictures import render
from mmkernels.models import ImageTextModel

DEPARTMENTS = {
    "clothing": "👕 👖 👗 👟 👒 🧦 🧤 🧣 👔 👜 👢 🎩 👠 🧥 🩳 👚 🥾 👛",
    "kitchen": "🍞 🍎 🧀 🍕 🍰 🍇 🥕 🍔 🍩 🍫 🥚 🍋 🌽 🍓 🥐 🍉 🥦 🍪",
    "electronics": "📱 💻 📷 📺 🎧 🖨️ ⌚ 🔋 🎮 📻 ☎️ 🎙️ 🖥️ 📹 🔦 💡 ⌨️ 🕹️",
    "garden": "🌻 🌷 🌵 🌳 🪴 🌹 🌲 🍀 🌴 🪻 🌱 🌸 🍁 🌿 🪷 🍄 🌼 🎄",
}
GENERAL = [
    "it arrived broken",
    "I would like another one",
    "this is not what I ordered",
    "where is my parcel",
    "how much",
]
NAMED = [
    "my {} is broken",
    "the {} is too small",
    "I ordered a {}",
    "please send the {} again",
    "a question about the {}",
]
SIZE = 48


def snapshot(drawing, draw):
    """The same thing as another customer photographs it: askew, nearer or further, before another wall."""
    wall = tuple(draw.randint(140, 255) for _ in range(3))
    side = draw.randint(SIZE * 2 // 3, SIZE)
    thing = drawing.rotate(draw.uniform(-25, 25), fillcolor="white").resize((side, side))
    photo = Image.new("RGB", (SIZE, SIZE), "white")
    photo.paste(thing, (draw.randint(0, SIZE - side), draw.randint(0, SIZE - side)))
    return ImageChops.multiply(photo, Image.new("RGB", photo.size, wall))


def write_messages(folder, rounds, seed=0):
    """A folder of pictures and its messages.csv. Of the messages a third each has a picture and a line that names
    nothing, a picture alone, or a line that names the thing alone."""
    draw = random.Random(seed)
    known = {p.emoji: p for p in data.catalogue()}
    rows = []
    for department, things in DEPARTMENTS.items():
        for thing in (thing for thing in things.split() if thing in known):
            drawing = render(known[thing], 2 * SIZE)
            for _ in range(rounds):
                for text in (draw.choice(GENERAL), ""):
                    path = f"{len(rows)}.png"
                    snapshot(drawing, draw).save(folder / path)
                    rows.append((path, text, department))
                rows.append(("", draw.choice(NAMED).format(known[thing].texts["en"]), department))
    draw.shuffle(rows)
    with (folder / "messages.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "label"), *rows])


def without(table, modality):
    """The rows that have no such modality, or all that have both."""
    missing = {modality} if modality else set()
    part = copy.copy(table)
    part.samples = [
        sample
        for sample in table.samples
        if {name for name in ("image", "text") if getattr(sample, name) is None} == missing
    ]
    return part


def main(quick=False):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_messages(folder, 1 if quick else 10)
        table = data.Table(folder / "messages.csv", preprocessing=data.Preprocessing(size=SIZE, allow_missing=True))
        learn, test = table.split(0.25, seed=1)
        learn.learn(min_frequency=1)
        torch.manual_seed(0)
        model = ImageTextModel(
            table.preprocessing.tokenizer.get_vocab_size(),
            architecture="shared",
            fusion="gated",
            task="multiclass",
            outputs=table.preprocessing.outputs,
            channels=(16, 32),
            norm="group",
            embedding=32,
            hidden=32,
        )
        training.fit(
            model,
            learn,
            epochs=1 if quick else 15,
            batch_size=32,
            learning_rate=4e-3,
            weight_decay=0.01,
            modality_dropout=0.2,
            progress=not quick,
            title="messages",
        )
        print(f"departments: {', '.join(table.preprocessing.labels)}")
        scores = {}
        for title, modality in (("picture and text", None), ("no picture", "image"), ("no text", "text")):
            scores[title] = training.evaluate(model, without(test, modality))
            print(f"{title}: {scores[title]['accuracy']:.0%} to the right department (chance: 25 %)")
        if not quick:
            assert all(score["accuracy"] > 0.4 for score in scores.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
