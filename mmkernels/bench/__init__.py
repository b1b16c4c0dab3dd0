"""How fast is it, next to what people run today and next to the memory's own speed?

One file an operation says what competes (its contestants), :mod:`.timing` times them, :mod:`.report` shows the rows.
"""

import importlib

import torch

from .. import functional


def run(operations=None, *, quick=False, threads=None, device=None, progress=None):
    """Times every operation and returns ``{"environment": ..., "operations": {name: {"rows": ..., "figures": ...}}}``.

    Args:
        operations: names; default: all that have a benchmark.
        quick: few shapes and rounds, well under half a minute; its figures are only hints.
        threads: CPU threads to use; default: torch's setting.
        device: ``"cpu"`` or ``"cuda"``; default: the GPU if there is one.
        progress: called with (text, done, total).
    """
    from . import report
    from .timing import keep_freed_memory

    keep_freed_memory()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found = {
            name: importlib.import_module(f".{name}", __name__).run(
                device, quick=quick, progress=progress or (lambda *_: None)
            )
            for name in operations or functional.__all__
        }
        return {"environment": report.environment(device, quick), "operations": found}
    finally:
        torch.set_num_threads(before)
