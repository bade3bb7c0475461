"""Diagnose and repair unsafe channels in vision-language models, after CARE (arXiv 2603.27240)."""

__version__ = "0.1.0"
