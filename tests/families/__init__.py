"""Every model family that care_hf is tested on: a tiny random model, its real processor, and prompts for them."""

from . import plain, qwen_like, special
from .family import Family
from .prompts import collated, prompts

__all__ = ["FAMILIES", "Family", "collated", "prompts"]

FAMILIES: dict[str, Family] = {f.name: f for f in (*plain.FAMILIES, *qwen_like.FAMILIES, *special.FAMILIES)}
