"""Absorbed attention next to the layers that it replaces, whole: Hugging Face's fusion layer, attention with its
projections, and the same absorbed layer in plain PyTorch, eager and compiled."""
