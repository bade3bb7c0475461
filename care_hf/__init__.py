"""Diagnose and repair unsafe channels in vision-language models, after CARE (arXiv 2603.27240)."""

import importlib

import transformers
from transformers import AutoConfig

from .configuration_care import CareConfig
from .modeling_care import AUTO_CLASSES, CareForConditionalGeneration

__version__ = "0.1.0"

AutoConfig.register(CareConfig.model_type, CareConfig)
for _auto in AUTO_CLASSES:
    getattr(transformers, _auto).register(CareConfig, CareForConditionalGeneration)

# Loaded on first use: `import care_hf` should cost no more than what loading a checkpoint needs.
_LAZY = {
    "Budget": "budget",
    "Card": "model_card",
    "Case": "suite",
    "Diagnosis": "diagnosis",
    "Recipe": "recipe",
    "SafetySubspaces": "subspace",
    "Suite": "suite",
    "attribute": "token_attribution",
    "cost_of_switching": "switching",
    "diagnose": "diagnosing",
    "evaluate": "evaluation",
    "fit": "fitting",
    "load_adapter": "checkpoint",
    "load_testbed": "testbed",
    "merge": "merging",
    "name_places": "sites",
    "save_adapter": "checkpoint",
    "trace": "tracing",
    "tune": "tuning",
    "write_card": "model_card",
}

__all__ = ["CareConfig", "CareForConditionalGeneration", *sorted(_LAZY)]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_LAZY])
