"""Teaching: did the pupil write the number that was asked for? Real handwriting, questions in four languages.

    python examples/teaching.py           # about a minute on 2 cores; --quick: seconds, and worse

The handwriting is scikit-learn's copy of UCI's digits: 1,797 real digits of 43 people. A question is the number's name
in one of four languages. The aligned architecture learns, by its contrastive loss, to put a digit and its names at one
place, whatever the language: so pictures can be found by words, too. Guide: docs/guides/teaching.md. Needs
mmkernels[demo] and scikit-learn.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

from mmkernels import data, training
from mmkernels.models import ImageTextModel

NAMES = {
    "en": "zero one two three four five six seven eight nine",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "zh": "零 一 二 三 四 五 六 七 八 九",
}
SIZE = 24


def write_answers(folder, count, seed=0):
    """A folder of pictures and its labels.csv: a row is what was written, what was asked, and whether it is right."""
    draw = random.Random(seed)
    digits = load_digits()
    chosen = draw.sample(range(len(digits.target)), min(count, len(digits.target)))
    rows = []
    for number in chosen:
        ink = Image.fromarray((255 - 15.9375 * digits.images[number]).astype("uint8"))
        ink.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        written = int(digits.target[number])
        for asked, label in ((written, "right"), (draw.choice([d for d in range(10) if d != written]), "wrong")):
            rows.append((f"{number}.png", draw.choice(list(NAMES.values())).split()[asked], label))
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "text", "label"), *rows])


def read_aloud(model, table, rows):
    """Which number each picture shows: the name that the model finds likeliest, of all names of one language."""
    names = NAMES["en"].split()
    images = table.collate([table[row] for row in rows]).inputs["image"]
    text = table.preprocessing.text(names).expand(len(images), -1, -1)  # [B, 10, T]
    return [names[k] for k in model.predict(images, text).argmax(1)]


def main(quick=False):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_answers(folder, 100 if quick else 1797)
        preprocessing = data.Preprocessing(size=SIZE, labels=("wrong", "right"), task="binary")
        table = data.Table(folder / "answers.csv", preprocessing=preprocessing)
        learn, test = table.split(0.2, seed=0)
        learn.learn(min_frequency=1)
        torch.manual_seed(0)
        model = ImageTextModel(
            preprocessing.tokenizer.get_vocab_size(),
            architecture="aligned",
            fusion="bidirectional",
            channels=(16, 32),
            norm="group",
            embedding=32,
            hidden=32,
            num_heads=4,
        )
        training.fit(
            model,
            learn,
            epochs=1 if quick else 12,
            batch_size=32,
            learning_rate=4e-3,
            progress=not quick,
            title="answers",
        )
        found = training.evaluate(model, test)
        print(f"{found['accuracy']:.0%} of {len(test)} answers are judged right, in {len(NAMES)} languages")
        print(f"the first pictures show: {', '.join(read_aloud(model, test, range(0, 20, 2)))}")
        if not quick:
            assert found["accuracy"] > 0.8


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
