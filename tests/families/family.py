"""One model family in miniature."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from care_hf.sites import image_token_ids


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny random configuration of a real architecture, and what turns prompts into its inputs.

    Attributes:
        name: the model type as transformers calls it; for a variant with a suffix, such as "llava+pixtral".
        config: builds the configuration: 4 text layers, a deeper vision tower, some 100 tokens.
        processor: builds the processor from the configuration; its own class where that runs without torchvision.
        images: how many it takes: "any" number in each prompt; "equal" numbers in the prompts of a batch, or else its
            rows are not as alone; "one" in each prompt; "none".
        adjust: changes the model once it is built, where stock initialisation leaves it blind.
        lacks: what the processor lacks for `AutoProcessor` to load it as it was saved; empty if nothing.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    processor: Callable[[PreTrainedConfig], Any]
    images: Literal["any", "equal", "one", "none"] = "any"
    adjust: Callable[[PreTrainedModel], Any] | None = None
    lacks: str = ""

    @property
    def text_only(self) -> bool:
        return self.images == "none"

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model in evaluation mode; do not change it."""
        return self.build()

    def build(self) -> PreTrainedModel:
        """A new model in evaluation mode, with the same random weights each time."""
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if self.text_only else AutoModelForImageTextToText
        model = auto.from_config(self.config()).eval()
        if self.adjust:
            with torch.no_grad():
                self.adjust(model)
        # A random model may answer with a placeholder, for which there would be no image in the next step.
        model.generation_config.suppress_tokens = [*image_token_ids(model.config)] or None
        return model
