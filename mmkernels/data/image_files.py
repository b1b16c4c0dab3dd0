"""Image files as pixels: any format, orientation and mode, at the size a model takes, denoised."""

from pathlib import Path

import torch

from .extras import require

# Not Pillow's whole list: some of its readers start other programs (EPS), and nobody photographs in them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# A file of a few KB can hold more pixels than there is memory. 8192 x 8192 is beyond cameras' pictures.
MAX_PIXELS = 2**26
RESIZE = ("crop", "pad", "stretch")
DENOISE = ("median", "bilateral", "nlm")


class UnreadableError(ValueError):
    """A file that can't be read as what it should be; the message names it."""


def read_image(source, size, resize="crop", denoise=None):
    """An image file as uint8 ``[3, Y, X]``, RGB: turned as its EXIF orientation says, transparent parts white.

    Args:
        source: a path, or a Pillow image.
        size: Y, X.
        resize: ``"crop"`` scales until the image covers Y x X and cuts what stands out, from the centre; ``"pad"``
            scales until it fits in, on white; ``"stretch"`` changes its proportions.
        denoise: None, ``"median"`` (3 x 3), ``"bilateral"``, or ``"nlm"`` (non-local means), after scaling.

    Raises:
        UnreadableError: broken or cut off, no image, more than 2^26 pixels, or a mode without a known range.
        ImportError: Pillow isn't installed, or for the latter two denoisers scikit-image.
    """
    Image = require("PIL.Image")
    if isinstance(source, Image.Image):
        return _pixels(_denoised(_resized(_rgb(source), size, resize), denoise))
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without some
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            scaled = _resized(_rgb(image), size, resize)
    except Image.UnidentifiedImageError as error:
        raise UnreadableError(f"{Path(source)} is no image of a known format ({', '.join(formats)})") from error
    except FileNotFoundError as error:
        raise UnreadableError(f"{Path(source)} doesn't exist") from error
    except Exception as error:  # what a reader raises for a broken file depends on the format, and on where it is
        raise UnreadableError(f"{Path(source)} can't be read: {error or type(error).__name__}") from error
    return _pixels(_denoised(scaled, denoise))


def _rgb(image):
    """Any mode as RGB; reads the pixels of a file."""
    Image = require("PIL.Image")
    image = require("PIL.ImageOps").exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image):
    """Grey of 16 bits as 8. Pillow would cut off what is above 255."""
    np = require("numpy")
    values = np.asarray(image)
    if image.mode == "F" or values.size == 0 or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} isn't 8 or 16 bits a channel")
    return require("PIL.Image").fromarray((values.astype(np.uint32) * 255 // 65535).astype(np.uint8))


def _resized(image, size, resize):
    Image = require("PIL.Image")
    y, x = size
    width, height = image.size
    if resize == "crop":
        # What is cut off isn't scaled before: a line of a pixel's height would become as wide as a wall.
        scale = min(width / x, height / y)
        left, top = (width - x * scale) / 2, (height - y * scale) / 2
        return image.resize((x, y), Image.Resampling.LANCZOS, (left, top, width - left, height - top))
    if resize == "stretch":
        return image.resize((x, y), Image.Resampling.LANCZOS)
    scale = min(x / width, y / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    framed = Image.new("RGB", (x, y), "white")
    framed.paste(image.resize(inner, Image.Resampling.LANCZOS), ((x - inner[0]) // 2, (y - inner[1]) // 2))
    return framed


def _denoised(image, denoise):
    """An RGB image, filtered.

    Bilateral filter: Tomasi and Manduchi 1998. Non-local means: Buades, Coll and Morel 2005. Both are as strong as the
    noise that is in the image.
    """
    if denoise is None:
        return image
    if denoise == "median":
        return image.filter(require("PIL.ImageFilter").MedianFilter(3))
    np = require("numpy")
    restoration = require("skimage.restoration", "denoise")
    values = np.asarray(image, dtype=np.float32) / 255
    sigma = noise_level(values)
    if sigma == 0:
        return image
    if denoise == "bilateral":
        values = restoration.denoise_bilateral(
            values, win_size=5, sigma_color=1.5 * sigma, sigma_spatial=1.5, channel_axis=-1
        )
    else:
        values = restoration.denoise_nl_means(
            values, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, channel_axis=-1
        )
    return require("PIL.Image").fromarray((values * 255).round().clip(0, 255).astype(np.uint8))


def noise_level(values):
    """The standard deviation of the noise in an image ``[Y, X, C]``, from what its finest diagonal details are in the
    median (Donoho and Johnstone 1994): 0 for a drawing, whose details are few."""
    np = require("numpy")
    y, x = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
    corners = values[0:y:2, 0:x:2] - values[1:y:2, 0:x:2] - values[0:y:2, 1:x:2] + values[1:y:2, 1:x:2]
    return float(np.median(abs(corners / 2), axis=(0, 1)).mean() / 0.6745) if corners.size else 0.0


def _pixels(image):
    np = require("numpy")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def colour_statistics(images):
    """Mean and standard deviation of every colour (0 to 1) over images, uint8 ``[..., 3, Y, X]``, without a float copy
    of any."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for image in images:
        counts += torch.stack([torch.bincount(image.select(-3, c).flatten(), minlength=256) for c in range(3)])
    counts /= counts.sum(1, keepdim=True)
    values = (torch.arange(256) / 255).double()
    mean = counts @ values
    return mean.float(), (counts @ values**2 - mean**2).clamp_min(0).sqrt().float()
