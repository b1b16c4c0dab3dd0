"""Which attention classes of the installed transformers patch knows, and why not the rest: a table in Markdown.

python tools/transformers_table.py     a minute: it imports every model
"""

import collections
import importlib
import re
from pathlib import Path

import transformers
from torch import nn

from mmkernels.integrations.patching import LOOKS_LIKE_ATTENTION
from mmkernels.integrations.transformers import reasons
from mmkernels.integrations.transformers.converters import CONVERTERS

EXAMPLES = 6


def main():
    transformers.logging.set_verbosity_error()
    found = collections.defaultdict(list)
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            print(f"left out, since {error.name} isn't installed: {file.stem}")
            continue
        for cls in vars(module).values():
            if _is_attention(cls, name):
                known = f"{name}.{cls.__qualname__}" in CONVERTERS
                found["replaced" if known else reasons.why_not(cls)].append(cls.__name__)
    print(f"transformers {transformers.__version__}\n")
    print("| classes | what becomes of them | for example |")
    print("|---|---|---|")
    for reason in ("replaced", *reasons.REASONS):
        names = sorted(set(found[reason]))
        shown = names if reason == "replaced" else names[:: max(1, len(names) // EXAMPLES)][:EXAMPLES]
        print(f"| {len(names)} | {reason} | {', '.join(f'`{name}`' for name in shown)} |")


def _is_attention(cls, name):
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name):
        return False
    return bool(LOOKS_LIKE_ATTENTION.search(cls.__name__)) and not re.search("Output$|Layer$|Block$", cls.__name__)


if __name__ == "__main__":
    main()
