"""What else could stand in a repair's place, to compare its cost with: models that share the base's tensors."""

import torch
from torch import nn
from transformers import PreTrainedModel

from care_hf.mergeability import plan_merge
from care_hf.merged_model import fold, plain_copy
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.repaired_module import copy_structure
from care_hf.sites import Site, hidden_size, site_module
from care_hf.subspace import SafetySubspaces, random_basis

RIVALS = ("hook", "lora", "merged")


def rival(base: PreTrainedModel, layers: tuple[int, ...], rank: int, name: str) -> nn.Module:
    """`base` with a rival of that rank on the FFNs of `layers`, random as a fitted one would be in size.

    Args:
        base: stays as it is.
        layers: of the decoder.
        rank: of one subspace.
        name: "hook", a plain forward hook that projects h about a mean; "lora", PEFT's adapter on the FFN's last linear
            layer; "merged", a repair by one subspace folded into the weights.
    """
    if name == "merged":
        whole = SafetySubspaces.random(base, layers, rank)
        sites = {site: {"text": groups["text"]} for site, groups in whole.sites.items()}
        repaired = CareForConditionalGeneration.from_base(base, SafetySubspaces(sites, "constant", 0.0))
        plan, obstacles = plan_merge(repaired)
        if obstacles:
            raise ValueError(f"It cannot be merged: {obstacles}.")
        merged = plain_copy(repaired.vlm)
        fold(merged, plan)
        return merged.to(base.device)
    other = copy_structure(base)
    if name == "hook":
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            basis = random_basis(hidden_size(base), rank, generator).to(base.device, base.dtype)
            mean = torch.zeros(hidden_size(base), device=base.device, dtype=base.dtype)
            site_module(other, Site(layer, "ffn")).register_forward_hook(
                lambda module, args, h, basis=basis, mean=mean: h + ((mean - h) @ basis) @ basis.mT
            )
        return other
    from peft import LoraConfig, get_peft_model

    chosen = "|".join(map(str, layers))
    config = LoraConfig(r=rank, target_modules=rf".*language_model.*\.({chosen})\.mlp\.down_proj")
    return get_peft_model(other, config).to(base.device).eval().base_model.model
