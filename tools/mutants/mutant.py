"""What a mutant is, and how its place in the sources is found: by its text, wherever that lies and however it is
wrapped."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where a backend's kernels lie, and what between two tokens counts for nothing: comments, pragmas, white space.
SOURCES = {
    "cpu": (("csrc/cpu/*.cpp", "csrc/cpu/*.h"), r"(?:\s|//[^\n]*|#[^\n]*)*"),
    "cuda": (("csrc/cuda/*.cu", "csrc/cuda/*.h", "csrc/*.h"), r"(?:\s|//[^\n]*|#[^\n]*)*"),
    "triton": (("mmkernels/triton/**/*.py",), r"(?:\s|#[^\n]*)*"),
}


@dataclass(frozen=True)
class Mutant:
    """One wrong edit: `find` becomes `put`. In both, $name stands for whatever one word is there.

    `tests`: arguments of pytest, run before all that is run anyway. `equivalent`: why no test can tell, where none can.
    """

    operation: str
    name: str
    find: str
    put: str
    tests: str = ""
    equivalent: str = ""


def mutants(backend):
    return importlib.import_module(f"{backend}_mutants").MUTANTS


class NotFound(Exception):
    pass


def locate(backend, mutant, root=ROOT):
    """(file, match) of the one place whose tokens are those of `mutant.find`."""
    patterns, gap = SOURCES[backend]
    tokens = re.findall(r"\$?\w+|[^\w\s]", mutant.find)
    seen = set()
    parts = []
    for token in tokens:
        name = token[1:]
        if token[0] != "$":
            parts.append(re.escape(token))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            parts.append(rf"(?P<{name}>\b\w+)")
            seen.add(name)
    pattern = re.compile(r"(?<!\w)" * tokens[0][0].isalnum() + gap.join(parts))
    places = [
        (path, match)
        for glob in patterns
        for path in sorted(root.glob(glob))
        for match in pattern.finditer(path.read_text())
    ]
    if len(places) != 1:
        where = ", ".join(str(path.relative_to(root)) for path, _ in places)
        raise NotFound(
            f"{backend}, {mutant.operation}, {mutant.name}: its text must be found once under {', '.join(patterns)}, "
            f"was found {len(places)} times{' in ' + where if places else ''}: {mutant.find!r}"
        )
    return places[0]


def mutated(backend, mutant, root=ROOT):
    """(file, its text with the mutant in it)."""
    path, match = locate(backend, mutant, root)
    put = re.sub(r"\$(\w+)", lambda word: match[word[1]], mutant.put)
    text = path.read_text()
    return path, text[: match.start()] + put + text[match.end() :]
