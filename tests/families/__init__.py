"""Every model family that care_hf is tested on: a tiny random model, its real processor, and prompts for them."""

from .family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {}
