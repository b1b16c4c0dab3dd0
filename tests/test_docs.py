"""The pages: their links lead somewhere, and what they list is complete."""

import functools
import re
import runpy

import pytest
from support.compiling import ROOT

PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("bench", "csrc", "examples", "mmkernels", "tests", "tools")
CODE = (".py", ".cpp", ".cu", ".h", ".toml", "Makefile", "run")


def sources():
    """Every file of code, as it is in the repository."""
    folders = [path for name in FOLDERS for path in (ROOT / name).rglob("*")]
    return [path for path in [*folders, *ROOT.glob("*"), *ROOT.glob(".ci/*")] if path.name.endswith(CODE)]


def headings(text):
    """As links name them."""
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        assert not heading or heading in headings(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)}|docs)/[\w*/.-]*)`", page.read_text(encoding="utf-8"))
    assert not [
        name for name in named if not re.search("OPERATION|NAME", name) and not list(ROOT.glob(name.rstrip("/")))
    ]


def test_pages_that_code_names_exist():
    named = {name for file in sources() for name in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))}
    assert "docs/architecture.md" in named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_variable_is_documented():
    """Ours all; of others those that the page lists are read."""
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", page, re.M))
    text = "\n".join(file.read_text(encoding="utf-8") for file in sources() if file.name != "test_docs.py")
    ours = set(re.findall(r"\bMMKERNELS_[A-Z][A-Z_]*\b", text))
    assert len(ours) >= 8
    assert ours == {name for name in listed if name.startswith("MMKERNELS_")}
    assert listed - ours <= set(re.findall(r"""environ[\w.]*[(\[]"(\w+)\"""", text))


BENCH_TABLE = runpy.run_path(str(ROOT / "tools/bench_table.py"))
GENERATED = {
    **runpy.run_path(str(ROOT / "tools/api_reference.py"))["WRITTEN"],
    **{name: functools.partial(BENCH_TABLE["page"], name) for name in BENCH_TABLE["PAGES"]},
}


@pytest.mark.parametrize("file", GENERATED)
def test_what_is_generated_is_current(file):
    current = (ROOT / file).read_text(encoding="utf-8") == GENERATED[file]()
    assert current, "what it is written from has changed: make docs"
