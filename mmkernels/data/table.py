"""A folder of files and a CSV file that says what belongs together: a data set."""

import copy
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .batch import Batch
from .extras import require
from .image_files import UnreadableError, colour_statistics, read_image
from .labels import guess_task, sorted_labels, target, wrong_label
from .preprocessing import Preprocessing
from .sheet import Row, read_sheet
from .sound_files import read_sound
from .store import Store
from .text import train_tokenizer

COLUMN_OF = {"image": "path", "text": "text", "sound": "sound"}


@dataclass
class Sample:
    """A row that can be used: what it holds of each modality (a text, or the number of a file in the store; None where
    it is missing), and its label."""

    row: Row
    image: int | None
    text: str | None
    sound: int | None
    label: str


class Table(Dataset):
    """The rows of a CSV file with columns path (of an image), text, sound (path of a sound file) and label; not all of
    the first three must be there.

    Everything is checked, and every file is read, once, here: a training doesn't meet a bad row. Rows that can't be
    used are left out, and :attr:`problems` says which and why: a file that doesn't exist, can't be decoded, or is out
    of bounds (2^26 pixels, an hour); a path that leaves the folder, also by a symbolic link, or is absolute; an empty
    text; a label that isn't one of the known, or no number; another number of cells than columns; bytes that aren't
    UTF-8. Pixels and spectrograms are kept in a temporary file.

    Args:
        csv: a path.
        root: the folder that paths in the file are relative to, and can't leave; default: where the file is.
        preprocessing: a :class:`mmkernels.data.Preprocessing`. Of a new one (the default) task and labels are learnt
            here, from all rows, the rest by :meth:`learn`; of a model's, rows are checked against it.
        strict: refuse a file with bad rows.
        labelled: whether there must be a column with labels; if not, a batch has no target.
        progress: whether to show a progress bar.

    Attributes:
        sheet: the whole file, a :class:`mmkernels.data.Sheet`.
        samples: its good rows.
        problems: the bad ones, each with its line and problem.

    Raises:
        OSError: the file can't be read, or the disk is full.
        ValueError: it lacks a column; of labelled rows none can be used; with ``strict``, one can't; or all labels are
            the same.
        ImportError: a package of ``mmkernels[demo]`` or ``[denoise]`` isn't installed.
    """

    def __init__(self, csv, root=None, preprocessing=None, *, strict=False, labelled=True, progress=False):
        self.preprocessing = preprocessing = Preprocessing() if preprocessing is None else preprocessing
        self.labelled = labelled
        self.positive_weight = None
        needed = ["label"] if labelled else []
        if preprocessing.modalities and not preprocessing.allow_missing:
            needed += [COLUMN_OF[modality] for modality in preprocessing.modalities]
        self.sheet = read_sheet(csv, needed)
        self.modalities = [
            modality for modality in preprocessing.modalities or COLUMN_OF if COLUMN_OF[modality] in self.sheet
        ]
        self._store = Store()
        self.samples = self._samples(Path(csv).parent if root is None else Path(root), progress)
        if labelled:
            self._check_labels()
        self.problems = [row for row in self.sheet.rows if row.problem]
        if (strict and self.problems) or (labelled and not self.samples):
            raise ValueError(self.report() or f"{csv} has no rows")

    def report(self, limit=20):
        """What is wrong with the bad rows, a line each; of more than ``limit`` the number. Empty where none is bad."""
        if not self.problems:
            return ""
        lines = [f"{len(self.problems)} of {len(self.sheet.rows)} rows of {self.sheet.path} can't be used:"]
        lines += [f"line {row.line}: {row.problem}" for row in self.problems[:limit]]
        beyond = len(self.problems) - limit
        return "\n".join(lines + ([f"and {beyond} more"] if beyond > 0 else []))

    def _samples(self, root, progress):
        """Reads every file once, and returns the good rows; in bad ones notes what is wrong."""
        readers = {
            "image": lambda path: read_image(
                path, self.preprocessing.size, self.preprocessing.resize, self.preprocessing.denoise
            ),
            "sound": lambda path: read_sound(path, self.preprocessing.spectrogram),
        }
        self._check_cells()
        places = {}
        for modality in set(self.modalities) & set(readers):
            column = COLUMN_OF[modality]
            paths = dict.fromkeys(self.sheet.cell(row, column) for row in self.sheet.rows if not row.problem)
            paths.pop("", None)
            places[modality] = self._read(root, list(paths), readers[modality], f"{modality}s", progress)
        samples = []
        for row in self.sheet.rows:
            found = {} if row.problem else {modality: self.sheet.cell(row, COLUMN_OF[modality]) for modality in places}
            for modality, path in found.items():
                place = places[modality].get(path)
                if isinstance(place, str):
                    row.problem = row.problem or place
                found[modality] = place
            if not row.problem:
                text = self.sheet.cell(row, "text") or None if "text" in self.modalities else None
                label = self.sheet.cell(row, "label") if self.labelled else ""
                samples.append(Sample(row, found.get("image"), text, found.get("sound"), label))
        return samples

    def _check_cells(self):
        for row in self.sheet.rows:
            if row.problem:
                continue
            empty = [column for column in map(COLUMN_OF.get, self.modalities) if not self.sheet.cell(row, column)]
            if len(empty) == len(self.modalities):
                row.problem = f"no {' and no '.join(empty)}" if empty else "it has nothing that the model takes"
            elif empty and not self.preprocessing.allow_missing:
                row.problem = f"its {empty[0]} is empty"
            elif self.labelled and not self.sheet.cell(row, "label"):
                row.problem = "its label is empty"

    def _read(self, root, paths, reader, title, progress):
        """By path: where it is in the store, or what is wrong with it."""

        def read(path):
            try:
                return reader(inside(root, path))
            except UnreadableError as error:
                return str(error)

        places = {}
        # Decoders let go of Python's lock. A few files at a time: what was decoded waits in memory for its turn.
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            require("tqdm.auto").tqdm(total=len(paths), desc=title, disable=not progress, delay=1) as bar,
        ):
            for start in range(0, len(paths), 64):
                few = paths[start : start + 64]
                for path, found in zip(few, pool.map(read, few)):
                    places[path] = found if isinstance(found, str) else self._store.append(found)
                bar.update(len(few))
        return places

    def _check_labels(self):
        preprocessing = self.preprocessing
        labels = [sample.label for sample in self.samples]
        if preprocessing.task is None and labels:
            preprocessing.task = guess_task(labels)
        for sample in self.samples:
            sample.row.problem = wrong_label(sample.label, preprocessing.task, preprocessing.labels)
        self.samples = [sample for sample in self.samples if not sample.row.problem]
        if preprocessing.labels is None and self.samples:
            found = sorted_labels([sample.label for sample in self.samples], preprocessing.task)
            wanted = {"binary": 2, "regression": 0}.get(preprocessing.task)
            least = {"multiclass": 2, "multilabel": 1}.get(preprocessing.task)
            if len(found) != wanted if least is None else len(found) < least:
                raise ValueError(
                    f"{self.sheet.path}: {preprocessing.task} needs {wanted if least is None else f'{least} or more'} "
                    f"different labels, found {found[:10]}"
                )
            preprocessing.labels = found

    def learn(self, *, vocabulary=10_000, min_frequency=2):
        """Learns what is None in the preprocessing from these samples: colours' mean and standard deviation, words,
        sound's level, and which modalities there are; returns it. Of several tables that share it (:meth:`split`), the
        training's should learn."""
        found = self.preprocessing
        images, sounds = (
            sorted({getattr(sample, name) for sample in self.samples} - {None}) for name in ("image", "sound")
        )
        texts = [sample.text for sample in self.samples if sample.text is not None]
        if found.modalities is None:
            there = {"image": images, "text": texts, "sound": sounds}
            found.modalities = tuple(modality for modality in self.modalities if there[modality])
        if found.mean is None and images:
            mean, std = colour_statistics(self._store[index] for index in images)
            found.mean, found.std = tuple(mean.tolist()), tuple(std.clamp_min(1 / 255).tolist())
        if found.tokenizer is None and texts:
            found.tokenizer = train_tokenizer(
                texts, vocabulary=vocabulary, min_frequency=min_frequency, length=found.length
            )
        if found.sound_mean is None and sounds:
            values = torch.cat([self._store[index].flatten() for index in sounds]).double()
            found.sound_mean, found.sound_std = values.mean().item(), max(values.std(correction=0).item(), 1e-3)
        if found.task == "regression" and found.number_mean is None:
            values = torch.tensor([float(sample.label) for sample in self.samples], dtype=torch.float64)
            found.number_mean, found.number_std = values.mean().item(), values.std(correction=0).item() or 1.0
        return found

    def split(self, fraction=0.2, *, seed=0):
        """Two tables, the second with about ``fraction`` of the samples of each label. Samples with the same image (or
        sound, or text, where there is no image) are on one side."""
        groups = {}
        for sample in self.samples:
            key = next(value for value in (sample.image, sample.sound, sample.text) if value is not None)
            groups.setdefault(str(key), []).append(sample)
        by_label = self.preprocessing.task in ("binary", "multiclass") and self.labelled
        strata = {}
        for group in groups.values():
            strata.setdefault(group[0].label if by_label else "", []).append(group)
        draw = random.Random(seed)
        sides = ([], [])
        for label in sorted(strata):
            stratum = strata[label]
            draw.shuffle(stratum)
            count = round(fraction * len(stratum))
            for number, group in enumerate(stratum):
                sides[number < count].extend(group)
        tables = []
        for samples in sides:
            table = copy.copy(self)
            table.samples = sorted(samples, key=lambda sample: sample.row.line)
            tables.append(table)
        if not all(sides):
            raise ValueError(f"fraction {fraction} of {len(groups)} groups of samples leaves one side empty")
        return tuple(tables)

    def negatives_per_positive(self):
        """Of a binary task's labels; what :attr:`positive_weight` becomes to count both alike."""
        positive = sum(sample.label == self.preprocessing.labels[1] for sample in self.samples)
        return (len(self.samples) - positive) / max(1, positive)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        """image uint8 ``[3, Y, X]``, text, sound float ``[M, F]`` (None where missing) and target."""
        sample = self.samples[index]
        image, sound = (None if place is None else self._store[place] for place in (sample.image, sample.sound))
        return image, sample.text, sound, target(sample.label, self.preprocessing) if self.labelled else None

    def collate(self, items):
        """Items to a :class:`mmkernels.data.Batch`. Sounds shorter than the longest are padded with NaN; a missing
        modality's ``*_present`` is False, where the preprocessing allows it."""
        preprocessing = self.preprocessing
        given = dict(zip(COLUMN_OF, zip(*(item[:3] for item in items))))
        inputs = {}
        for modality in preprocessing.modalities or ():
            values = given[modality]
            present = torch.tensor([value is not None for value in values])
            inputs[modality] = getattr(self, f"_{modality}s")(values)
            if preprocessing.allow_missing:
                inputs[f"{modality}_present"] = present
        targets = [item[3] for item in items]
        return Batch(inputs, torch.stack(targets) if self.labelled else None)

    def _images(self, images):
        blank = torch.zeros(3, *self.preprocessing.size, dtype=torch.uint8)
        stacked = torch.stack([blank if image is None else image for image in images])
        # channels_last is what the CPU's convolutions are fastest in; the fused layer reads it as it lies.
        return self.preprocessing.normalised(stacked).contiguous(memory_format=torch.channels_last)

    def _texts(self, texts):
        return self.preprocessing.text([text or "" for text in texts])

    def _sounds(self, sounds):
        longest = max([1] + [sound.shape[1] for sound in sounds if sound is not None])
        padded = torch.full((len(sounds), self.preprocessing.spectrogram.bands, longest), math.nan)
        for place, sound in zip(padded, sounds):
            if sound is not None:
                place[:, : sound.shape[1]] = self.preprocessing.normalised_sound(sound)
        return padded


def inside(root, path):
    """root / path, which must be a file below it.

    Raises:
        UnreadableError: it isn't there, is no regular file, or isn't below root, followed through symbolic links.
    """
    try:
        folder = root.resolve()
        found = (folder / path).resolve()
        if Path(path).is_absolute() or not found.is_relative_to(folder):
            raise UnreadableError(f"{path} leaves the folder {root}")
        if not found.is_file():
            raise UnreadableError(f"{path} {'is no file' if found.exists() else 'does not exist'} in {root}")
    except (OSError, RuntimeError) as error:  # too long a name, links in a circle
        raise UnreadableError(f"{path} can't be looked up: {error}") from error
    return found
