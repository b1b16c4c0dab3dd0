"""What is installed: it refuses what it can't run with, says what it lacks, and has every file that it reads."""

import fnmatch
import importlib.resources
import re
import subprocess
import sys
import warnings

import pytest
import torch
from support.compiling import ROOT

import mmkernels as mmk
from mmkernels import backends, versions


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0", "2.9.0a0+git1234"])
def test_an_old_torch_is_refused(version):
    with pytest.raises(ImportError) as caught:
        versions.check_torch(version)
    assert version in str(caught.value) and "torch 2.10 or newer" in str(caught.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git5678", "2.100.1", "3.0", "parrot"])
def test_a_newer_torch_is_taken(version):
    versions.check_torch(version)


def test_an_old_torch_is_refused_at_import():
    """By the very import, before anything can run slowly."""
    code = "import torch; torch.__version__ = '2.9.1'; import mmkernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ImportError: mmkernels needs torch 2.10 or newer, but torch 2.9.1 is installed: pip install --upgrade torch"
    )


def test_the_oldest_torch_stands_everywhere_alike():
    major, minor = versions.OLDEST_TORCH.split(".")
    assert f"-DTORCH_TARGET_VERSION=0x{int(major):02x}{int(minor):02x}000000000000" in (ROOT / "setup.py").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count(f'"torch>={versions.OLDEST_TORCH}"') == 2
    assert backends.extension is None or backends.extension.torch_target == versions.OLDEST_TORCH


@pytest.fixture
def without_extension(own_backends, monkeypatch):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "undefined symbol: aoti_torch_something")
    monkeypatch.setattr(backends, "_warned", False)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_missing_extension_is_said_once(without_extension, compiled):
    run = torch.compile(mmk.spatial_attention, backend="eager", fullgraph=True) if compiled else mmk.spatial_attention
    image = torch.randn(2, 5, 8)
    text = torch.randn(2, 8)
    with pytest.warns(
        RuntimeWarning, match="'reference' instead of its C.. and CUDA kernels: undefined symbol: aoti_torch_something"
    ):
        run(image, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(image, text)
        mmk.channel_attention(image, text, torch.randn(8, 16))


def test_a_forced_reference_needs_no_warning(without_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmk.spatial_attention(torch.randn(2, 5, 8), torch.randn(2, 8), backend="reference")


def test_every_file_that_is_no_code_is_installed():
    """Data files of the checkout are named by pyproject.toml, and are where the installed package lies."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mmkernels"]
    found = [
        path for path in (ROOT / "mmkernels").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    ]
    files = [str(path.relative_to(ROOT / "mmkernels")) for path in found]
    assert {"templates/demo.html", "py.typed", "ops/spatial_attention.pyi"} <= set(files)
    for name in files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
        assert importlib.resources.files("mmkernels").joinpath(name).is_file(), name


def test_every_package_is_found():
    """A folder without __init__.py would be left out of a wheel without a word."""
    folders = {path.parent for path in (ROOT / "mmkernels").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_import_is_light():
    """No heavy or optional package is imported before it is used."""
    code = "import sys, torch; before = set(sys.modules); import mmkernels; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"numpy", "triton", "matplotlib", "PIL", "click", "rich", "tokenizers", "jinja2", "torchinfo", "hypothesis"}
    heavy |= {"keras", "kernels", "transformers", "skimage", "soundfile", "soxr", "safetensors", "torchmetrics"}
    assert not heavy & {re.split(r"\.", name)[0] for name in found}
