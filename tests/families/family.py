"""One model family in miniature."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny random configuration of a real architecture, and what turns prompts into its inputs.

    Attributes:
        name: the model type as transformers calls it; for a variant with a suffix, such as "llava+pixtral".
        config: builds the configuration: 3 or 4 text layers, a deeper vision tower, some 100 tokens.
        processor: builds the processor from the configuration; its own class where that runs without torchvision.
        text_only: whether there are no images.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    processor: Callable[[PreTrainedConfig], Any]
    text_only: bool = False

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model in evaluation mode, with the same random weights each time; do not change it."""
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if self.text_only else AutoModelForImageTextToText
        return auto.from_config(self.config()).eval()
