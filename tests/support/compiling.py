"""What tests compile is compiled once: objects and programs are kept under the hash of everything that they are made
of.

Several processes may ask for the same file at the same time: one makes it, the others wait.
"""

import fcntl
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("MMKERNELS_TEST_CACHE") or Path(tempfile.gettempdir()) / f"mmkernels-tests-{os.getuid()}")
COMPILER = os.environ.get("CXX", "g++")
INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.M)


def compiled(source, flags, compiler=COMPILER):
    """(object file, what the compiler said of it)."""
    source = Path(source)
    command = [compiler, *map(str, flags), "-c", str(source)]
    key = [_version(compiler), torch.__version__, *command[1:-1], source.name]
    folder = _made(
        key,
        _parts(source, flags),
        source.stem,
        lambda path: _run([*command, "-o", str(path / "object.o")], path / "said"),
    )
    return folder / "object.o", (folder / "said").read_text()


def program(name, jobs, link=(), compiler=COMPILER):
    """A program or shared library of that name, linked from (source, flags) jobs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(done[0]) for done in pool.map(lambda job: compiled(*job), jobs)]
    command = [compiler, *objects, *map(str, link)]
    folder = _made(
        [_version(compiler), torch.__version__, *command],
        [],
        name,
        lambda path: _run([*command, "-o", str(path / name)], path / "said"),
    )
    return folder / name


def _made(key, files, name, make):
    """The folder that `make` filled, now or before."""
    digest = hashlib.sha256(repr(key).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:24]}"
    if folder.exists():
        return folder

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
                make(Path(temporary))
                os.chmod(temporary, 0o755)
                os.rename(temporary, folder)  # whole or not at all
                os.mkdir(temporary)  # for TemporaryDirectory to remove
    return folder


def _parts(source, flags):
    """The file, and every file that it includes by a quoted name, in a fixed order."""
    folders = [Path(str(flag)[2:]) for flag in flags if str(flag).startswith("-I")]
    found, left = {}, [Path(source).resolve()]
    left += [Path(flag).resolve() for before, flag in zip(flags, flags[1:]) if before == "-include"]
    while left:
        file = left.pop()
        if file in found or not file.is_relative_to(ROOT):
            continue
        found[file] = True
        for name in INCLUDE.findall(file.read_bytes()):
            name = name.decode()
            left += [path for folder in (file.parent, *folders) if (path := (folder / name).resolve()).is_file()]
    return sorted(found)


@functools.cache
def _version(compiler):
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _run(command, log):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    log.write_text(done.stdout)
