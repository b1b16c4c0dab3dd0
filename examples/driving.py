"""Driving: is there a bus in this scene, and where? Small things, far and near: the hierarchical architecture.

    python examples/driving.py            # about a minute on 2 cores; --quick: seconds, and worse

Street scenes of real drawings (OpenMoji): a few vehicles, signs and people, small and large, over asphalt. A question
names one of them. The model is told only whether it is there, never where; its attention finds it all the same.
Guide: docs/guides/driving.md. Needs mmkernels[demo].
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image

from mmkernels import data, plot, training
from mmkernels.data.pictures import render
from mmkernels.models import ImageTextModel

THINGS = ["🚗", "🚌", "🚲", "🚦", "🛑", "🚑", "🚜", "🐕", "🚸", "🚧", "🌳", "👮"]
SIZE = 64


def scene(things, drawings, draw):
    """A picture with these things on it, and where each is: (left, top, right, bottom)."""
    picture = Image.new("RGB", (SIZE, SIZE), (90, 90, 96))
    places = {}
    corners = draw.sample([(x, y) for x in (0, SIZE // 2) for y in (0, SIZE // 2)], len(things))
    for thing, (left, top) in zip(things, corners):
        side = draw.randint(SIZE // 4, SIZE // 2)
        left += draw.randint(0, SIZE // 2 - side)
        top += draw.randint(0, SIZE // 2 - side)
        picture.paste(drawings[thing].resize((side, side)), (left, top))
        places[thing] = (left, top, left + side, top + side)
    return picture, places


def write_scenes(folder, count, seed=0):
    """A folder of pictures and its labels.csv: a row is a scene, the name of a thing, and whether it is there."""
    draw = random.Random(seed)
    names = {p.emoji: p.texts["en"] for p in data.catalogue()}
    drawings = {p.emoji: render(p, 64) for p in data.catalogue() if p.emoji in THINGS}
    known = sorted(drawings)
    rows = []
    for number in range(count):
        there = draw.sample(known, draw.randint(2, 4))
        picture, places = scene(there, drawings, draw)
        picture.save(folder / f"{number}.png")
        asked = draw.choice(there)
        absent = draw.choice([thing for thing in known if thing not in there])
        rows.append((f"{number}.png", names[asked], "yes", places[asked]))
        rows.append((f"{number}.png", names[absent], "no", None))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "label"), *(row[:3] for row in rows)])
    return {(path, text): place for path, text, _, place in rows if place}


def looks_there(model, table, places):
    """How much of the attention is on the thing that is asked for, and how much of the picture the thing covers."""
    found = []
    for number, sample in enumerate(table.samples):
        if sample.label == "yes":
            path = table.sheet.cell(sample.row, "path")
            left, top, right, bottom = places[path, sample.text]
            batch = table.collate([table[number]])
            weights = model.attention(**batch.inputs)[0]
            weights = torch.nn.functional.interpolate(weights[None, None], (SIZE, SIZE), mode="bilinear")[0, 0]
            inside = weights[top:bottom, left:right].sum() / weights.sum()
            found.append((inside.item(), (right - left) * (bottom - top) / SIZE**2))
    return torch.tensor(found).mean(0).tolist()


def main(quick=False):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = write_scenes(folder, 60 if quick else 1500)
        table = data.Table(folder / "labels.csv", preprocessing=data.Preprocessing(size=SIZE))
        learn, test = table.split(0.2, seed=0)
        learn.learn(min_frequency=1)
        torch.manual_seed(0)
        model = ImageTextModel(
            table.preprocessing.tokenizer.get_vocab_size(),
            architecture="hierarchical",
            fusion="spatial",
            channels=(16, 32, 64),
            norm="batch",
            embedding=64,
            hidden=64,
            num_heads=4,
        )
        training.fit(
            model,
            learn,
            epochs=1 if quick else 12,
            batch_size=32,
            learning_rate=3e-3,
            weight_decay=0.05,
            progress=not quick,
            title="scenes",
        )
        found = training.evaluate(model, test)
        inside, area = looks_there(model, test, places)
        print(f"{found['accuracy']:.0%} of the questions about new scenes are answered right")
        print(f"{inside:.0%} of the attention is on what is asked for, which covers {area:.0%} of a picture")
        row = next(n for n, sample in enumerate(test.samples) if sample.label == "yes")
        weights = model.attention(**test.collate([test[row]]).inputs)[0]
        plot.save(plot.attention(test[row][0], weights), folder / "looks.png")
        if not quick:
            assert found["accuracy"] > 0.75 and inside > 1.5 * area


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
