"""What was built, what this machine has, and which backend can run where."""

import platform
from pathlib import Path

import torch

from . import backends, functional

BUILT = ("compiler", "torch_target", "cpu_isas", "cpu_isa", "cuda_architectures", "cuda_reason")


def collect():
    """Everything as a dictionary of plain values."""
    from . import __version__

    extension = backends.extension
    built = {name: _plain(getattr(extension, name, None)) for name in BUILT} if extension is not None else None
    return {
        "mmkernels": __version__,
        "extension": {"file": extension.__file__, **built}
        if extension is not None
        else {"missing": backends.extension_error},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
        "huge_pages": huge_pages(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": _backends(),
    }


def processor():
    """The processor's name, or its architecture where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache(default=32 << 20):
    """Bytes of the CPU's largest cache."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=default)


def huge_pages():
    """The system's setting: always, madvise, never or "unknown"; see "Fresh memory" in docs/architecture.md."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return setting[setting.index("[") + 1 : setting.index("]")]
    except (OSError, ValueError):
        return "unknown"


def show(found, console):
    from rich.table import Table

    table = Table(title=f"mmkernels {found['mmkernels']}", show_header=False)
    for name, value in found.items():
        if name in ("mmkernels", "backends"):
            continue
        for key, item in value.items() if isinstance(value, dict) else ((name, value),):
            if isinstance(item, (list, tuple)):
                item = ", ".join(map(str, item)) or "none"
            if key == "cache_bytes":
                key = "largest cache"
                item = f"{item / 2**20:.0f} MiB"
            table.add_row(key.replace("_", " "), "" if item is None else str(item))
    console.print(table)

    table = Table("operation", "backend", "device", "can run", title="backends")
    for row in found["backends"]:
        if row["reason"] is None:
            told = "[green]yes[/]" + (", chosen by default" if row["default"] else "")
        else:
            told = f"no: {row['reason']}"
        table.add_row(row["operation"], row["backend"], row["device"], told)
    console.print(table)


def _backends():
    rows = []
    for operation in functional.__all__:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            default = None
            for backend in backends.names():
                reason = backends.why_not(backend, operation, device, torch.float32)
                if reason is None and default is None and backend in backends.ORDER:
                    default = backend
                rows.append(
                    {
                        "operation": operation,
                        "backend": backend,
                        "device": device,
                        "reason": reason,
                        "default": backend == default,
                    }
                )
    return rows


def _plain(value):
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else value
