"""``python -m mmkernels``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] not in ("click", "rich"):
        raise
    sys.exit(f"The command line needs {error.name}, which isn't installed: pip install mmkernels[cli]")

if __name__ == "__main__":
    main(prog_name="python -m mmkernels")
