"""The article's model in Keras 3, on its torch backend, with the fused layer in place of Keras's own.

    python examples/keras_article.py      (needs keras)

The article's listing takes a Dot of 64 image channels and 128 text channels, which can't be, and puts a Dense layer on
a 4-D tensor. `build` is that listing put right: the text is projected to the image's channels, every position gets a
score, and the positions are pooled before the sigmoid. To use the fused layer takes two lines: the import, and the
call in place of `attend`, which is Dense, Dot, softmax, Multiply and the sum.

A picture has a square of some colour, and a text names a colour, among other words; the model learns to tell whether
it is the same.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras  # type: ignore[import-untyped]
import numpy as np
from keras import layers

from mmkernels.integrations.keras import SpatialAttention  # the first line

COLOURS = np.eye(3)
SIZE = 24
SQUARE = 6
WORDS = 3
VOCABULARY = 8


def attend(image: Any, text: Any) -> Any:
    """[B, Y, X, D] and [B, E] -> [B, D], by Keras's own layers"""
    text = layers.Dense(image.shape[-1])(text)
    scores = layers.Dot(axes=(3, 1))([image, text])
    weights = layers.Softmax(axis=(1, 2))(scores)
    weighed = layers.Multiply()([image, keras.ops.expand_dims(weights, -1)])
    return keras.ops.sum(weighed, (1, 2))


def fused(image: Any, text: Any) -> Any:
    return SpatialAttention(combine="pool", scale=1.0)([image, text])  # the second


def build(attend: Callable[[Any, Any], Any] = fused) -> Any:
    image = keras.Input((SIZE, SIZE, 3))
    text = keras.Input((WORDS,), dtype="int32")
    features = layers.Conv2D(16, 3, activation="relu")(image)
    features = layers.MaxPooling2D(2)(features)
    features = layers.Conv2D(32, 3, activation="relu")(features)
    features = layers.MaxPooling2D(2)(features)
    state = layers.LSTM(16)(layers.Embedding(VOCABULARY, 16)(text))
    answer = layers.Dense(1, activation="sigmoid")(attend(features, state))
    model = keras.Model([image, text], answer)
    model.compile(keras.optimizers.Adam(0.003), "binary_crossentropy", metrics=["accuracy"])
    return model


def examples(count: int, seed: int) -> tuple[list[Any], Any]:
    """[pictures [count, Y, X, 3], texts [count, T]], and whether the colours are the same [count]."""
    draw = np.random.default_rng(seed)
    image = draw.normal(0, 0.1, (count, SIZE, SIZE, 3)).astype("float32")
    text = draw.integers(len(COLOURS), VOCABULARY, (count, WORDS))
    same = draw.integers(0, 2, count)
    for i in range(count):
        seen, other = draw.permutation(len(COLOURS))[:2]
        y, x = draw.integers(0, SIZE - SQUARE, 2)
        image[i, y : y + SQUARE, x : x + SQUARE] += COLOURS[seen]
        text[i, draw.integers(WORDS)] = seen if same[i] else other
    return [image, text], same


def train(attend: Callable[[Any, Any], Any] = fused, epochs: int = 8) -> tuple[Any, list[float]]:
    """The model, and its loss after each epoch. The same seed gives both ways the same parameters."""
    keras.utils.set_random_seed(0)
    model = build(attend)
    data, same = examples(1024, 0)
    history = model.fit(data, same, epochs=epochs, batch_size=32, verbose=0).history
    return model, history["loss"]


def main() -> None:
    model, losses = train()
    _, plain = train(attend, epochs=1)
    unseen, same = examples(256, 1)
    right = model.evaluate(unseen, same, verbose=0)[1]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {right:.0%} of new pictures are told rightly")
    print(f"the first epoch with Keras's own layers: {plain[0]:.3f}")
    assert abs(plain[0] - losses[0]) < 1e-3
    assert losses[-1] < 0.8 * losses[0] and right > 0.65

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "article.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    assert (loaded.predict(unseen, verbose=0) == model.predict(unseen, verbose=0)).all()


if __name__ == "__main__":
    main()
