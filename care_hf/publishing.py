"""What a repaired model does beside saving itself: its card, and its way to the Hub.

This goes to the Hub with the model; the rooms that do the work do not, and are looked for by name.
"""

import functools
import importlib
from typing import Any

import torch.distributed
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Publishes:
    """Gives a model its card and `push_to_hub`.

    Attributes:
        card: a `care_hf.Card`, what the model card should tell beyond what is known anyway; None if nothing.
    """

    card = None

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers; a README.md that somebody else wrote stays as it is, and no old weights are left behind.

        Without care_hf installed, under torch.distributed, or with an adapter that is saved by itself, exactly as in
        transformers.
        """
        if self._publisher() is None:
            return super().push_to_hub(repo_id, **kwargs)
        return self._publisher().push(self, repo_id, **kwargs)

    def _add_card(self, folder, target) -> None:
        """Write the card into `folder`, which is about to take the place of `target`; without care_hf there is none."""
        publisher = self._publisher()
        if publisher is not None:
            publisher.add_card(self, folder, target=target)

    def _publisher(self):
        """The module that pushes; None where transformers had better do it."""
        # Of several processes only one would get there, and wait for the others for ever.
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return _installed("hub_push") if alone and not self._hf_peft_config_loaded else None


def publishes(save_pretrained):
    """Give a `save_pretrained` the push, which comes when the model is safe."""

    @functools.wraps(save_pretrained)
    def save_and_publish(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        publisher = self._publisher()
        if publisher is None:
            return save_pretrained(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        save_pretrained(self, save_directory, *args, **kwargs)
        if push_to_hub and kwargs.get("is_main_process", True):
            publisher.push_saved(self, save_directory, **kwargs)
        return None

    return save_and_publish


def writes_alone(given: dict[str, Any]) -> bool:
    """Whether this process writes the whole checkpoint, by the arguments that `save_pretrained` was given."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    return first and given.get("is_main_process", True) and not given.get("distributed_checkpoint", False)


def _installed(name: str):
    try:
        return importlib.import_module(f"care_hf.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("care_hf", f"care_hf.{name}"):
            raise
        logger.info("care_hf is not installed, so the model gets no card of its own.")
        return None
