"""Reference models built on the fused operations."""

from .image_text import ImageTextModel

__all__ = ["ImageTextModel"]
