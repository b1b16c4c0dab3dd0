"""Builds and checks the GPU kernels on a machine that has one, and writes what it found to one JSON file.

    python tools/gpu_check.py [--list] [--only STEP ...] [--json FILE] [--limit SECONDS]

Nothing is downloaded or installed: the extension is built in place, for this machine's GPU (MMKERNELS_CUDA_ARCHS
chooses otherwise), and what isn't there is skipped with a word. A step that fails doesn't end the run; the exit status
is 1 if any failed. The file is written after every step, and a later run with --only replaces those steps in it, as
long as the commit is the same.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = [path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*_attention.cu"))]
PYTHON = sys.executable
LIMIT = 480.0  # seconds a step
TAIL = 6_000  # characters kept of what a command printed
OUT_OF_TIME = "out of time"  # in place of an exit status
PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "setuptools", "pybind11", "ninja")


@dataclass
class Step:
    """Commands that run beside each other. `{json}` in one is a file whose content goes into the report. Passed: every
    command exits with one of `passing`, and not all with a 5 (pytest's word for "no test selected")."""

    name: str
    commands: list
    needs: tuple = ()  # the GPU, programs, Python modules, by name
    environment: dict = field(default_factory=dict)
    passing: tuple = (0,)
    alone: bool = False  # nothing else runs beside it: others are built on it, or it times


def steps(facts):
    """In the order in which they pay: what is wrong is known before anything is timed."""
    build = {"MMKERNELS_CUDA": "1"}
    if "MMKERNELS_CUDA_ARCHS" not in os.environ and facts["gpus"]:
        build["MMKERNELS_CUDA_ARCHS"] = ";".join(sorted({gpu["capability"] for gpu in facts["gpus"]}))
    mmkernels = [PYTHON, "-m", "mmkernels"]
    shown = ("click", "rich")
    yield Step(
        "build",
        [[PYTHON, "setup.py", "build_ext", "--inplace"]],
        ("gpu", "nvcc", "pybind11", "setuptools"),
        build,
        alone=True,
    )
    yield Step("info", [[*mmkernels, "info", "--json", "{json}"]], shown, alone=True)

    backends = {"cuda": ("gpu",), "triton": ("gpu", "triton")}
    for backend, needs in backends.items():
        commands = [
            [*mmkernels, "verify", "--backend", backend, "--operation", operation, "--dtype", dtype, "--json", "{json}"]
            for operation in OPERATIONS
            for dtype in ("float32", "bfloat16", "float16")
        ]
        yield Step(f"verify-{backend}", commands, (*needs, *shown))

    for backend, needs in backends.items():
        commands = [pytest("tests/test_gpu.py", "-k", f"{backend}-cuda and {operation}") for operation in OPERATIONS]
        yield Step(f"tests-graphs-{backend}", commands, (*needs, "pytest"))
    for backend, needs in backends.items():
        commands = [pytest(f"tests/test_{operation}.py", "-k", f"{backend}-cuda") for operation in OPERATIONS]
        yield Step(f"tests-{backend}", commands, (*needs, "pytest"))
    commands = [
        pytest(str(path.relative_to(ROOT)), "-k", "not cuda-cuda and not triton-cuda")
        for path in sorted(ROOT.glob("tests/test_*.py"))
    ]
    yield Step("tests-others", commands, ("pytest",), passing=(0, 5))

    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        for backend, needs in backends.items():
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                PYTHON,
                "tests/support/gpu_calls.py",
                backend,
            ]
            # Without PyTorch's cache, an allocation's ends are seen, and what was never written.
            yield Step(
                f"{tool}-{backend}", [command], (*needs, "compute-sanitizer"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            )

    for operation in OPERATIONS:
        command = [*mmkernels, "bench", "--device", "cuda", "--operation", operation]
        for dtype in ("float32", "bfloat16"):
            words = [*command, "--dtype", dtype, "--json", "{json}"]
            yield Step(f"bench-{operation}-{dtype}", [words], ("gpu", *shown), alone=True)


def pytest(*arguments):
    return [PYTHON, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *arguments]


def environment():
    """Of every step. This checkout is what is imported; a test file sets TRITON_INTERPRET unless it is set; the
    emulator tests no GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "TRITON_INTERPRET": "0",
        "MMKERNELS_TEST_EMULATOR": "0",
    }
    if shutil.which("nvcc") is None and find_program("nvcc"):
        found["CUDA_HOME"] = str(Path(find_program("nvcc")).parent.parent)
    return found


def lacking(needs, facts):
    """What a step needs and this machine hasn't, or None."""
    for need in dict.fromkeys(needs):
        if need == "gpu":
            missing = not facts["gpus"]
        elif need in ("nvcc", "compute-sanitizer"):
            missing = find_program(need) is None
        else:
            missing = importlib.util.find_spec(need) is None
        if missing:
            return "there is no GPU that torch can use" if need == "gpu" else f"{need} isn't installed"
    return None


def find_program(name):
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        filter(None, (shutil.which(name, path=f"{home}/bin") for home in homes if home)), None
    )


def collect_facts():
    """Card, driver, commit, versions. torch is asked in another process: this one must not hold a part of the GPU."""
    code = (
        "import json, torch\n"
        "gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []\n"
        "print(json.dumps({'torch': torch.__version__, 'torch_cuda': torch.version.cuda, 'gpus': [{'name': g.name, 'bytes': g.total_memory, "
        "'capability': f'{g.major}.{g.minor}', 'processors': g.multi_processor_count} for g in gpus]}))"
    )
    told = ask(PYTHON, "-c", code)
    facts = json.loads(told.splitlines()[-1]) if told else {"torch": None, "torch_cuda": None, "gpus": []}
    nvcc = find_program("nvcc")
    return {
        **facts,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": os.environ.get("MMKERNELS_COMMIT") or ask("git", "rev-parse", "HEAD"),
        "changed": bool(ask("git", "status", "--porcelain", "--untracked-files=no")),
        "driver": ask(
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit",
            "--format=csv,noheader",
        ),
        "nvcc": ask(nvcc, "--version").splitlines()[-1:] if nvcc else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def ask(*command):
    """What a command prints, or nothing where it isn't there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version(name):
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Command:
    """A command that runs, with everything that it starts."""

    def __init__(self, words, file, environment):
        self.words = [
            str(file) if word == "{json}" else find_program(word) or word if word == "compute-sanitizer" else word
            for word in words
        ]
        self.file = file
        self.start = time.monotonic()
        self.output = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            self.words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def result(self, killed=False):
        """What goes into the report, once it has ended or is to end now."""
        if killed:
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.output.seek(0)
        with self.output:
            tail = self.output.read()[-TAIL:]
        return {
            "command": self.words,
            "exit_code": OUT_OF_TIME if killed else code,
            "seconds": round(time.monotonic() - self.start, 1),
            "tail": tail,
            "results": read_json(self.file),
        }


def run_together(steps, limit):
    """Everything about steps that ran, in their order. Their commands share the time, and run beside each other: as
    many as there are cores."""
    start = time.monotonic()
    waiting = [(step.name, i, words) for step in steps for i, words in enumerate(step.commands)]
    told = {step.name: {**environment(), **step.environment} for step in steps}
    running = {}
    done = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and time.monotonic() - start < limit:
                while waiting and len(running) < cores():
                    name, i, words = waiting.pop(0)
                    running[name, i] = Command(words, Path(folder) / f"{name}-{i}.json", told[name])
                for key in [key for key, command in running.items() if command.process.poll() is not None]:
                    done[key] = running.pop(key).result()
                time.sleep(0.05)
        finally:
            done |= {key: command.result(killed=True) for key, command in running.items()}
    done |= {
        (name, i): {
            "command": words,
            "exit_code": OUT_OF_TIME,
            "seconds": 0.0,
            "tail": "it was never started",
            "results": None,
        }
        for name, i, words in waiting
    }
    return [result_of(step, [done[step.name, i] for i in range(len(step.commands))]) for step in steps]


def result_of(step, commands):
    codes = [command["exit_code"] for command in commands]
    passed = all(code in step.passing for code in codes) and any(code != 5 for code in codes)
    return {
        "name": step.name,
        "status": "passed" if passed else "failed",
        "seconds": max(command["seconds"] for command in commands),
        "environment": step.environment,
        "commands": commands,
    }


def side_by_side(steps):
    """The steps in groups that run beside each other, [[Step, ...], ...]."""
    for alone, group in itertools.groupby(steps, key=lambda step: step.alone):
        together = list(group)
        yield from [[step] for step in together] if alone else [together]


def read_json(file):
    """Infinities and NaN stand in it as strings: not every reader knows them."""
    try:
        return json.loads(file.read_text(), parse_constant=str)
    except (OSError, ValueError):
        return None


def write_report(path, facts, done):
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"facts": facts, "steps": list(done.values())}, indent=1) + "\n")
    temporary.replace(path)


def earlier_steps(path, facts):
    """Of a report about the same commit and card."""
    report = read_json(path) or {"facts": {}, "steps": []}
    same = all(report["facts"].get(key) == facts[key] for key in ("commit", "gpus", "torch"))
    return {step["name"]: step for step in report["steps"]} if same else {}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only tell the steps and their commands")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="these steps, or all whose names begin so (tests-, bench-)"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "gpu-check.json", metavar="FILE")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of a step; default: %(default)s")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended then, too
    facts = collect_facts()
    chosen = list(steps(facts))
    for wanted in options.only or ():
        if not any(step.name.startswith(wanted) for step in chosen):
            parser.error(f"--only {wanted}: no step begins so; there are {', '.join(step.name for step in chosen)}")
    chosen = [step for step in chosen if not options.only or step.name.startswith(tuple(options.only))]
    if options.list:
        for step in chosen:
            missing = lacking(step.needs, facts)
            print(step.name + (f" (skipped: {missing})" if missing else ""))
            for command in step.commands:
                print("   ", *(f"{name}={value}" for name, value in step.environment.items()), *command)
        return 0
    return run(chosen, facts, options.json, options.limit)


def run(chosen, facts, path, limit):
    """Runs the steps, writes the report, and returns the exit status."""
    done = earlier_steps(path, facts)
    print(f"{facts['driver'] or 'no GPU'}; torch {facts['torch']}; commit {facts['commit'] or 'unknown'}", flush=True)
    for steps in side_by_side(chosen):
        runnable = []
        for step in steps:
            missing = lacking(step.needs, facts)
            if missing:
                done[step.name] = {"name": step.name, "status": "skipped", "reason": missing}
                print(f"{step.name}: skipped, {missing}", flush=True)
            else:
                print(f"{step.name}: ...", flush=True)
                runnable.append(step)
        for step, result in zip(runnable, run_together(runnable, limit)):
            done[step.name] = result
            print(f"{step.name}: {result['status']}, {result['seconds']} s", flush=True)
            for command in result["commands"] if result["status"] == "failed" else ():
                if command["exit_code"] not in step.passing:
                    print(
                        f"exit status {command['exit_code']} of: {' '.join(command['command'])}\n{command['tail']}",
                        flush=True,
                    )
        write_report(path, facts, done)

    found = {
        status: [step.name for step in chosen if done[step.name]["status"] == status]
        for status in ("passed", "failed", "skipped")
    }
    print(
        "; ".join(
            f"{len(names)} {status}{': ' + ', '.join(names) if names and status != 'passed' else ''}"
            for status, names in found.items()
        )
    )
    print(f"everything is in {path}")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
