"""What is drawn, and whether attention tells what counts. Needs mmkernels[demo]."""

import io

import pytest
import torch

for package in ("matplotlib", "PIL", "torchmetrics", "numpy"):
    pytest.importorskip(package)

import numpy  # noqa: E402
from PIL import Image  # noqa: E402

from mmkernels import faithfulness, plot  # noqa: E402


def noise(size=24):
    return torch.randint(256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def shown(picture):
    image = Image.open(io.BytesIO(plot.png(picture, dpi=60)))
    image.load()
    assert image.getextrema() != ((255, 255),) * len(image.getbands()), "nothing is drawn"
    return image


def test_attention_shines_where_the_weights_are():
    weights = torch.zeros(4, 4)
    weights[0, 3] = 0.7  # the upper right corner
    drawn = torch.from_numpy(numpy.array(plot.attention(noise(), weights).convert("HSV")))
    saturation = drawn[..., 1].float()
    assert saturation[:5, -5:].mean() > 50
    assert saturation[12:].max() == 0  # grey


def test_what_attends_to_everything_glows_nowhere():
    drawn = plot.attention(noise(), 1 + 1e-6 * torch.rand(6, 6)).convert("HSV")
    assert drawn.getextrema()[1] == (0, 0)


@pytest.mark.parametrize("form", ["channels first", "channels last", "Pillow"])
def test_pictures_of_every_form(form):
    picture = noise()
    given = {
        "channels first": picture,
        "channels last": picture.permute(1, 2, 0),
        "Pillow": Image.fromarray(picture.permute(1, 2, 0).numpy()),
    }[form]
    weights = torch.rand(3, 5)
    assert plot.attention(given, weights).tobytes() == plot.attention(picture, weights).tobytes()


@pytest.mark.parametrize(
    "weights", [torch.zeros(3, 3), torch.rand(3, 3, dtype=torch.float64), torch.ones(1, 1).bfloat16()]
)
def test_any_weights_can_be_drawn(weights):
    assert plot.attention(noise(), weights).size == (24, 24)


def test_words_glow_where_they_are_read_more_than_others():
    weights = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])  # two words, one position each
    left, right = (
        torch.from_numpy(numpy.array(Image.open(io.BytesIO(plot.png(figure))).convert("HSV"))[..., 1]).float()
        for figure in (plot.words(noise(), weights[[n]].expand(2, 1, 2), ["a", "b"]) for n in (0, 1))
    )
    assert not torch.equal(left, right)
    middle = left.shape[1] // 4
    assert left[:, :middle].sum() > 4 * left[:, middle : 2 * middle].sum()


def test_figures_are_drawn(tmp_path):
    torch.manual_seed(0)
    shown(plot.gallery([noise()] * 5, ["a long caption that goes on for two lines"] * 5, columns=3))
    shown(plot.words(noise(), torch.rand(5, 3, 3), ["a", "red", "heart", "\u7ea2\u5fc3", "\U000f0000"]))
    shown(plot.confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ["cat", "dog", "\u72d7"]))
    shown(plot.curves(torch.rand(20), torch.rand(20) > 0.5))
    shown(plot.curves(torch.rand(20, 3).softmax(1), torch.randint(3, (20,)), ["a", "b", "c"]))
    shown(plot.curves(torch.rand(20, 2), torch.rand(20, 2) > 0.5))
    shown(plot.regression(torch.rand(9), torch.rand(9)))
    shown(plot.losses({"fused": [3.0, 2.0, 1.0], "plain": [3.0]}))
    plot.save(plot.losses({"none": []}), tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").format == "PNG"


def test_no_boxes_are_drawn_for_signs_that_no_font_has():
    private = "\U000f0000"
    assert plot.writable("heart", "word 1") == "heart"
    assert plot.writable(f"a{private}", "word 1") == "word 1 (U+F0000)"
    assert plot.writable(private * 9) == "U+F0000"


@pytest.mark.parametrize(
    "job, message",
    [
        (lambda: plot.attention(torch.rand(3, 4, 4), torch.rand(2, 2)), "picture must be uint8"),
        (lambda: plot.attention(noise(), torch.rand(2, 2, 2)), r"weights must be \[y, x\], got \[2, 2, 2\]"),
        (lambda: plot.words(noise(), torch.rand(2, 3, 3), ["a"]), "texts must be 2 words"),
        (lambda: plot.confusion(torch.zeros(2, 3)), r"matrix must be \[C, C\]"),
    ],
)
def test_mistakes(job, message):
    with pytest.raises(ValueError, match=message):
        job()


def brightness(image):
    """A score that looks at the left half only."""
    return image[..., : image.shape[-1] // 2].mean((1, 2, 3))


def test_deletion_tells_right_attention_from_wrong():
    torch.manual_seed(0)
    image = torch.rand(6, 3, 20, 20)
    left = torch.zeros(6, 10, 10)
    left[..., :5] = torch.rand(6, 10, 5)
    right = faithfulness.deletion(brightness, image, left, patches=4, rounds=8)
    assert right.faithful == 1
    assert torch.equal(right.fractions, torch.linspace(0, 1, 5, dtype=torch.float64))
    attended, random = right.areas
    assert (attended < random).all()
    assert (right.least >= right.attended).all()
    # Before anything and after everything is deleted, order says nothing.
    for end in (0, -1):
        assert torch.equal(right.attended[:, end], right.least[:, end])
        assert torch.equal(right.attended[:, end], right.random[0, :, end])
    assert faithfulness.deletion(brightness, image, left.flip(-1), patches=4).faithful == 0
    shown(plot.deletion(right))


def test_deletion_is_repeated_by_its_seed():
    image = torch.rand(2, 3, 9, 9)
    weights = torch.rand(2, 2, 2)
    first, same, other = (faithfulness.deletion(brightness, image, weights, patches=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.random, same.random)
    assert not torch.equal(first.random, other.random)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.rand(2, 3, 9, 9), torch.rand(1, 2, 2)), r"weights \[B, y, x\], got \[2, 3, 9, 9\] and \[1, 2, 2\]"),
        ((torch.rand(2, 3, 4, 9), torch.rand(2, 2, 2)), "patches must be at most 4"),
    ],
)
def test_mistakes_in_a_deletion(arguments, message):
    with pytest.raises(ValueError, match=message):
        faithfulness.deletion(brightness, *arguments)
