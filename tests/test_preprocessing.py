"""Images and texts from files, whatever they are, and what is said of broken ones. Needs mmkernels[demo,denoise]."""

import io
import json
import struct
import zlib

import pytest
import torch
from support.attention_tests import assert_rule

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tokenizers")

from mmkernels import data  # noqa: E402
from mmkernels.data import image_files  # noqa: E402

LEFT_RED = np.zeros((20, 40, 3), dtype=np.uint8)
LEFT_RED[:, :20, 0] = 255
LEFT_RED[:, 20:, 2] = 255


def colours(pixels):
    """The colours of the middle of the left and of the right half."""
    _, y, x = pixels.shape
    return [tuple(pixels[:, y // 2, place].tolist()) for place in (x // 4, 3 * x // 4)]


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes(mode):
    pixels = data.read_image(Image.fromarray(LEFT_RED).convert(mode), (20, 40))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 20, 40)
    for found, colour in zip(colours(pixels), (RED, BLUE)):
        assert max(abs(a - b) for a, b in zip(found, colour)) <= 2  # YCbCr rounds


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.int32, bool])
def test_grey_of_any_depth(depth, tmp_path):
    """16 bits are scaled, where Pillow's own conversion cuts off."""
    white = {np.uint8: 255, bool: True}.get(depth, 65535)
    values = np.zeros((20, 40), dtype=depth)
    values[:, 20:] = white
    Image.fromarray(values).save(tmp_path / "grey.tif")
    assert colours(data.read_image(tmp_path / "grey.tif", (20, 40))) == [(0, 0, 0), WHITE]


def test_sixteen_bits_of_a_png(tmp_path):
    values = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    found = data.read_image(tmp_path / "grey.png", (16, 16))
    assert torch.equal(found[0], torch.arange(256, dtype=torch.uint8).view(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_is_white(mode):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image = clear.convert("RGB").convert("P") if mode == "P" else clear.convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert (data.read_image(image, (8, 8)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, tmp_path):
    """A camera's turned picture, as viewers show it."""
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    image = Image.fromarray(LEFT_RED)
    for turn in turns.get(orientation, []):
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert colours(data.read_image(tmp_path / "turned.png", (20, 40))) == [RED, BLUE]


def test_crop_takes_the_centre():
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 255
    assert (data.read_image(Image.fromarray(image), (20, 20)) == 255).all()
    # Lanczos' kernel is six pixels wide here, and reaches over the edge.
    assert (data.read_image(Image.fromarray(image.transpose(1, 0, 2)), (10, 10))[:, 3:-3] == 255).all()


def test_pad_keeps_everything():
    found = data.read_image(Image.fromarray(LEFT_RED), (40, 40), "pad")
    assert (found[:, :9] == 255).all() and (found[:, -9:] == 255).all() and colours(found) == [RED, BLUE]


def test_stretch():
    assert colours(data.read_image(Image.fromarray(LEFT_RED), (30, 30), "stretch")) == [RED, BLUE]


@pytest.mark.parametrize("resize", image_files.RESIZE)
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (7, 3)])
def test_any_proportions(resize, size):
    """A line becomes a picture, too, and doesn't grow beyond memory on the way."""
    image = Image.new("RGB", size, (255, 0, 0))
    found = data.read_image(image, (16, 24), resize)
    assert found.shape == (3, 16, 24) and (found[0] == 255).all()


def noisy_and_clean():
    y, x = np.mgrid[:64, :64]
    clean = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 12), 200 * (x > 32)], -1)
    noise = np.random.default_rng(0).normal(0, 20, clean.shape)
    return (clean + noise).clip(0, 255).round().astype(np.uint8), clean


@pytest.mark.parametrize("denoise", image_files.DENOISE)
def test_denoise(denoise):
    """Closer to the truth than what came in; and a drawing without noise loses nothing but single pixels."""
    if denoise != "median":
        pytest.importorskip("skimage")
    noisy, clean = noisy_and_clean()

    def error(pixels):
        return (pixels.permute(1, 2, 0).double() - torch.from_numpy(clean)).square().mean().sqrt()

    plain, filtered = (data.read_image(Image.fromarray(noisy), (64, 64), denoise=name) for name in (None, denoise))
    assert error(filtered) < 0.6 * error(plain)
    drawing = Image.fromarray(LEFT_RED)
    assert torch.equal(data.read_image(drawing, (20, 40), denoise=denoise), data.read_image(drawing, (20, 40)))


def test_noise_level():
    noisy, clean = noisy_and_clean()
    assert 15 < image_files.noise_level(noisy.astype(np.float64)) < 25
    assert image_files.noise_level(LEFT_RED.astype(np.float64)) == 0


def bomb():
    """A PNG of a few hundred bytes with 20000 x 20000 pixels in its head."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def saved(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "content, message",
    [
        (bomb(), "pixels"),
        (b"", "no image"),
        (b"not an image", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),
        *((saved(kind)[: len(saved(kind)) // 2], "can't be read") for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")),
        (saved("WEBP")[:200], "can't be read|no image"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    path = tmp_path / "some picture.png"
    path.write_bytes(content)
    with pytest.raises(data.UnreadableError, match=message) as caught:
        data.read_image(path, (16, 16))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(data.UnreadableError, match="nowhere.png doesn't exist"):
        data.read_image(tmp_path / "nowhere.png", (16, 16))


def test_numbers_without_a_range(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(data.UnreadableError, match="mode F"):
        data.read_image(tmp_path / "float.tif", (4, 4))


def test_normalised():
    preprocessing = data.Preprocessing(size=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    found = preprocessing.image(Image.new("RGB", (9, 9), (255, 0, 255)))
    assert torch.equal(found[:, 0, 0], torch.tensor([1.0, -1.0, 1.0])) and found.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="mean isn't known yet"):
        data.Preprocessing().image(Image.new("RGB", (9, 9)))


def test_colour_statistics():
    images = torch.randint(256, (5, 3, 7, 6), dtype=torch.uint8)
    values = images.double().transpose(0, 1).flatten(1) / 255
    for found, truth in zip(image_files.colour_statistics(images), (values.mean(1), values.std(1, correction=0))):
        assert_rule(found, truth, peer=truth.float())


def test_as_json():
    tokenizer = data.train_tokenizer(["a red cat", "a blue cat"], min_frequency=1)
    given = data.Preprocessing(
        size=(8, 9), denoise="nlm", mean=(0.1, 0.2, 0.3), tokenizer=tokenizer, labels=("no", "yes"), task="binary"
    )
    again = data.Preprocessing.from_dict(json.loads(json.dumps(given.to_dict())))
    assert again.to_dict() == given.to_dict() and again.size == (8, 9) and again.labels == ("no", "yes")
    assert torch.equal(again.text(["a blue dog"]), given.text(["a blue dog"]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": "large"}, "size"),
        ({"size": [0, 8]}, "size"),
        ({"resize": "cut"}, "resize"),
        ({"denoise": "gauss"}, "denoise"),
        ({"task": "guess"}, "task"),
        ({"mean": [1.0]}, "mean"),
        ({"labels": [3]}, "labels"),
        ({"modalities": ["smell"]}, "modalities"),
        ({"tokenizer": "{}"}, "can't be read"),
        ({"spectrogram": None}, "can't be read"),
        ({"spectrogram": {"rate": 16000, "window": 0}}, "can't be read"),
        ({"colour": 1}, "colour"),
    ],
)
def test_foreign_json(change, message):
    with pytest.raises(ValueError, match=message):
        data.Preprocessing.from_dict({**data.Preprocessing().to_dict(), **change})


# Pretrained embeddings


@pytest.fixture
def tokenizer():
    return data.train_tokenizer(["red green paris café", "blue , paris"], min_frequency=1)


FORMATS = {
    "GloVe": "red 1 2 3\nParis 4 5 6\nother 7 8 9\n. . . 0 0 0\nblue -1 0 1\n",
    "word2vec": "5 3\nred 1 2 3\nParis 4 5 6\nother 7 8 9\n. . . 0 0 0\nblue -1 0 1\n",
    "fastText": "5 3\nred 1 2 3 \nParis 4 5 6 \nother 7 8 9 \n. . . 0 0 0 \nblue -1 0 1 \n",
    "exact before alike": "red 1 2 3\nPARIS 9 9 9\nparis 4 5 6\nblue -1 0 1\n",
    "Windows": "red 1 2 3\r\nparis 4 5 6\r\nblue -1 0 1\r\n",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding(kind, tokenizer, tmp_path):
    (tmp_path / "vectors.txt").write_text(FORMATS[kind], newline="")
    weight, found = data.read_embedding(tmp_path / "vectors.txt", tokenizer)
    ids = tokenizer.get_vocab()
    for word, vector in {"red": [1, 2, 3], "paris": [4, 5, 6], "blue": [-1, 0, 1], "[PAD]": [0, 0, 0]}.items():
        assert weight[ids[word]].tolist() == vector
    assert {word for word, index in ids.items() if found[index]} == {"red", "paris", "blue"}
    again, _ = data.read_embedding(tmp_path / "vectors.txt", tokenizer)
    other, _ = data.read_embedding(tmp_path / "vectors.txt", tokenizer, seed=1)
    assert torch.equal(weight, again) and weight.isfinite().all()
    drawn = ids["green"]
    assert weight[drawn].any() and not torch.equal(weight[drawn], other[drawn])


@pytest.mark.parametrize(
    "text, message",
    [
        ("red 1 2 3\nblue 1 2\n", "line 2"),
        ("red 1 2 3\nblue 1 two 3\n", "line 2"),
        ("red 1 2 nan\n", "finite"),
        ("red\n", "line 1"),
        ("other 1 2 3\n", "none of"),
        ("", "none of"),
    ],
)
def test_a_wrong_embedding(text, message, tokenizer, tmp_path):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_embedding(tmp_path / "vectors.txt", tokenizer)
    assert "vectors.txt" in str(caught.value)


def test_long_texts_are_cut():
    tokenizer = data.train_tokenizer(["a b c d e f"], min_frequency=1, length=4)
    assert data.encode(tokenizer, ["a b c d e f", "a"]).shape == (2, 4)
