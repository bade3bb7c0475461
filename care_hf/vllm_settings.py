"""A repaired checkpoint's config.json as vLLM reads it: the base's, with the repair in it and another architecture."""

import copy
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.transformers_utils import config as vllm_config_module

from .configuration_care import CareConfig, auto_class
from .sites import PLACES

KEPT = "care_repair"  # where the base's configuration holds that of the repair
REPAIR = ("sites", "fusion", "scope", "gate", "care_format", "repair_digest")
NATIVE = {  # classes whose modules have been held against those of transformers, by the text models that they hold
    "LlavaForConditionalGeneration": "llama",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
BACKEND = tuple(f"Transformers{images}{experts}ForCausalLM" for images in ("", "MultiModal") for experts in ("", "MoE"))
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def served_config(config: CareConfig) -> PreTrainedConfig:
    """The base's configuration, so that vLLM does all it does for the base, with the repair in its `care_repair`.

    Raises:
        ValueError: the base has adapters or is quantised.
    """
    if config.adapters:
        raise ValueError(
            f"The checkpoint has PEFT adapters ({sorted(config.adapters)}), which vLLM would leave out; fold them into "
            "the weights first: load it with transformers, call merge_adapters(), and save it."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The checkpoint is saved quantised, which is not known to be exact in vLLM; save it in full precision and "
            "let vLLM quantise it (--quantization)."
        )
    base = copy.deepcopy(config.vlm_config)
    setattr(base, KEPT, {name: copy.deepcopy(getattr(config, name)) for name in REPAIR})
    base.dtype = config.dtype
    base.architectures = [f"Care{_vllm_class(base)}"]
    base.name_or_path = config.name_or_path
    return base


def _vllm_class(base: PreTrainedConfig) -> str:
    """vLLM's class of the base, or that of its Transformers backend."""
    name = auto_class(base)._model_mapping[type(base)]
    name = (name[0] if isinstance(name, tuple) else name).__name__
    text = base.get_text_config()
    if NATIVE.get(name) == text.model_type and getattr(base, PLACES, None) is None:
        return name
    experts = any(getattr(text, count, None) for count in EXPERTS)
    return f"Transformers{'' if text is base else 'MultiModal'}{'MoE' if experts else ''}ForCausalLM"


def repair_config(config: PreTrainedConfig) -> CareConfig:
    """The configuration of the repair in what `served_config` gave.

    Raises:
        ValueError: there is none.
    """
    kept = getattr(config, KEPT, None)
    if not isinstance(kept, dict):
        raise ValueError(
            f"A {type(config).__name__} without a repair cannot be served as a repaired model; take the override of "
            "'architectures' out."
        )
    base = copy.deepcopy(config)
    delattr(base, KEPT)
    return CareConfig(base, **kept)


def check_engine(config: CareConfig, vllm_config: VllmConfig) -> None:
    """Assert that vLLM will run the repair exactly under its settings.

    Raises:
        ValueError: it would not.
    """
    parallel, told = vllm_config.parallel_config, bool(config.gate) or config.fusion == "route"
    refused = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "enable_dbo": getattr(parallel, "enable_dbo", False),
        "kv_transfer_config": vllm_config.kv_transfer_config is not None and bool(config.gate),
        "enable_prompt_embeds": told and vllm_config.model_config.enable_prompt_embeds,
    }
    names = sorted(name for name, is_set in refused.items() if is_set)
    if names:
        raise ValueError(
            f"{', '.join(names)} of vLLM cannot be used with a repaired model: not every process would know what the "
            "gate decided. Leave it out; tensor_parallel_size and data_parallel_size can be used."
        )


def install() -> None:
    """Have vLLM read the config.json of a repaired checkpoint as `served_config` says."""
    parsers = vllm_config_module._CONFIG_FORMAT_TO_CONFIG_PARSER
    if not getattr(parsers["hf"], "reads_care", False):
        parsers["hf"] = _reading_care(parsers["hf"])


def _reading_care(parser: type) -> type:
    class CareConfigParser(parser):
        """vLLM's parser; of a repaired checkpoint this package alone reads it, never the code in the checkpoint."""

        reads_care = True

        def parse(self, model, trust_remote_code, *args, **kwargs) -> tuple[dict, Any]:
            """As vLLM's."""
            values, _ = PreTrainedConfig.get_config_dict(
                model, **{name: kwargs[name] for name in ("revision", "token") if kwargs.get(name) is not None}
            )
            if values.get("model_type") != CareConfig.model_type:
                return super().parse(model, trust_remote_code, *args, **kwargs)
            values, config = super().parse(model, False, *args, **kwargs)
            if not isinstance(config, CareConfig):
                raise ValueError(
                    f"config.json of {model} was read as a {type(config).__name__}; expected a CareConfig. Is a module "
                    "loaded that takes the model type 'care' for its own?"
                )
            return values, served_config(config)

    return CareConfigParser
