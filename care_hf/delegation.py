"""A model that leaves everything to the one that it wraps."""

from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from .repaired_module import SignatureOfBase


class LeavesToBase(PreTrainedModel, GenerationMixin):
    """What transformers, PEFT and torch ask of a model is answered by `vlm`, the base; so is what it does not know.

    Attributes:
        vlm: the base, set by the class that is derived from this one.
    """

    base_model_prefix = "vlm"

    @SignatureOfBase
    def forward(self, *args, **kwargs):
        """The base's."""
        return self.vlm(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The base's `generate`."""
        self._tell_base_how_it_is_spread()
        return self._generate(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        return self.vlm.generate(*args, **kwargs)

    def _tell_base_how_it_is_spread(self) -> None:
        """Let the base's `generate` know what transformers and torch noted on the whole model only."""
        for name in ("hf_device_map", "_tp_size", "_is_fsdp_managed_module"):
            if name in self.__dict__:
                setattr(self.vlm, name, getattr(self, name))
        if "_tp_size" in self.__dict__:
            self.vlm._tp_plan = {name.removeprefix("vlm."): style for name, style in self._tp_plan.items()}
        if hasattr(self, "_get_fsdp_state"):  # after torch's fully_shard
            self.vlm._is_fsdp_managed_module = True  # processes that are done go on for those that are not
            if "_generate" not in self.__dict__:  # the model's own weights are gathered where one of its methods begins
                from torch.distributed.fsdp import register_fsdp_forward_method

                register_fsdp_forward_method(self, "_generate")

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """The base's."""
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def generation_config(self):
        """The base's."""
        return self.vlm.generation_config if "vlm" in self.__dict__.get("_modules", {}) else None

    @generation_config.setter
    def generation_config(self, value) -> None:
        if "vlm" in self._modules:  # PreTrainedModel's own __init__ sets one before there is a base
            self.vlm.generation_config = value

    def get_input_embeddings(self):
        """The base's."""
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        """The base's."""
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The base's."""
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value):
        """The base's."""
        self.vlm.set_output_embeddings(value)

    def get_decoder(self):
        """The base's."""
        return self.vlm.get_decoder()

    def resize_token_embeddings(self, *args, **kwargs):
        """The base's."""
        return self.vlm.resize_token_embeddings(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "vlm" or name.startswith("_"):
                raise
            return getattr(self.vlm, name)
