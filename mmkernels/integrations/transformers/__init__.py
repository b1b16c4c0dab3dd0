"""Hugging Face transformers: what :func:`mmkernels.patch` knows of its classes."""
