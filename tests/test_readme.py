"""The README's Python runs as printed."""

import re
from pathlib import Path


def test_example():
    blocks = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert blocks
    names = {}
    for block in blocks:  # they follow each other
        exec(compile(block, "README.md", "exec"), names)
    assert names["seen"].shape == names["image"].shape == names["image_out"].shape and names["weights"].shape == (
        8,
        8,
        576,
    )
    assert names["pooled"].shape == (8, 64) and names["bags"].shape == (3, 64)
