"""The wrapper: a base vision-language model whose chosen modules repair their outputs, and its fail-closed loading."""

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights

from .configuration_care import CareConfig
from .projection import SafetyProjection, Subspace
from .sites import Site, hidden_size, image_token_ids, output_tensor, replace_output, site_module

AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


class RepairState:
    """What the repaired modules of a model share at run time and no file keeps: the switch, and the visual tokens."""

    def __init__(self):
        self.enabled = True
        self.visual_mask: torch.Tensor | None = None


class CareSiteMixin:
    """Put before a module's own class, repairs its output by `care` (`SafetyProjection`) unless `care_state` is off."""

    def forward(self, *args, **kwargs):
        """The module's own forward, then the repair."""
        output = super().forward(*args, **kwargs)
        if not self.care_state.enabled:
            return output
        h = output_tensor(output)
        mask = self.care_state.visual_mask
        if mask is not None:
            mask = mask.to(h.device).reshape(h.shape[:-1])  # some FFNs work on (B * S, d)
        return replace_output(output, self.care(h, mask))

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        return _new_site_module, (type(self).__mro__[2],), self.__dict__


@functools.cache
def care_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `CareSiteMixin` before it; weight names stay those of `cls`."""
    return type(
        f"Care{cls.__name__}", (CareSiteMixin, cls), {"__module__": __name__, "__doc__": f"A repaired {cls.__name__}."}
    )


def _new_site_module(cls: type[nn.Module]) -> nn.Module:
    repaired = care_class(cls)
    return repaired.__new__(repaired)


class Switch:
    """Returned by `disable` and `enable`; as a context manager it puts back what was set before."""

    def __init__(self, state: RepairState, enabled: bool):
        self.state, self.before = state, state.enabled
        state.enabled = enabled

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.state.enabled = self.before


class CareForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model with CARE's repair in its forward (arXiv 2603.27240).

    Made by `care_hf.fit`, by `from_base`, or by any Auto class from a saved checkpoint; `generate` and everything else
    of the base works as it does there. Buffers, all saved: `layers` (int64, the repaired decoder layers) and one
    `SafetyProjection`, named `care`, in each repaired module.

    Attributes:
        vlm: the base model with its repaired modules.
        processor: the base's processor, if known; `save_pretrained` saves it beside the model.
    """

    config_class = CareConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _auto_class = "AutoModel"  # so that save_pretrained copies the code that trust_remote_code needs

    def __init__(self, config: CareConfig, vlm: PreTrainedModel | None = None):
        super().__init__(config)
        self.processor = None
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config) if vlm is None else vlm
        layers = sorted({Site.parse(entry["site"]).layer for entry in config.sites})
        self.register_buffer("layers", torch.tensor(layers, dtype=torch.int64))
        self.care_state = RepairState()
        self._no_split_modules = list(self.vlm._no_split_modules or [])
        for entry in config.sites:
            self._repair_site(entry)
        self._keep_in_fp32_modules_strict = [
            f"{name}.{leaf}"
            for name, module in self.named_modules()
            if isinstance(module, SafetyProjection)
            for leaf, buffer in module.named_buffers()
            if buffer.is_floating_point()
        ]
        if config.fusion == "route":
            self._watch_visual_tokens()
        self.post_init()

    def _repair_site(self, entry: dict[str, Any]) -> None:
        site = Site.parse(entry["site"])
        module = site_module(self.vlm, site)
        if site.component == "residual":
            # accelerate keeps a layer on one device by the name of its class
            self._no_split_modules.append(f"Care{type(module).__name__}")
        module.__class__ = care_class(type(module))
        module.care_state = self.care_state
        module.care = SafetyProjection(hidden_size(self.vlm), entry["ranks"], self.config.fusion, entry["oblique"])
        if "_old_forward" in module.__dict__:  # accelerate's hooks call a forward that they bound before
            module._old_forward = type(module).forward.__get__(module)

    def _watch_visual_tokens(self) -> None:
        if not image_token_ids(self.config):
            raise ValueError(
                f"Fusion 'route' needs to know the image tokens, and the configuration of {type(self.vlm).__name__} "
                "names none; choose another fusion."
            )
        self.vlm.care_state = self.care_state
        self.vlm.register_forward_pre_hook(_note_visual_tokens, with_kwargs=True)
        self.vlm.register_forward_hook(_forget_visual_tokens, always_call=True)

    @classmethod
    def from_base(cls, model: PreTrainedModel, subspaces) -> "CareForConditionalGeneration":
        """Repair `model`; it stays as it is itself, and the result shares every one of its weights.

        Args:
            model: any vision-language model with a decoder-only text part.
            subspaces: a `SafetySubspaces`: `sites` {Site: {modality: Subspace}}, `fusion`, `fusion_weight`, `strength`.

        Raises:
            TypeError: the model is repaired already.
            ValueError: no sites, a site that the model does not have, or bases of another hidden size.
        """
        if isinstance(model, cls):
            raise TypeError("The model is repaired already; repair its base, or fit one repair with all sites.")
        if not subspaces.sites:
            raise ValueError("There are no sites to repair; give at least one.")
        for site, by_modality in subspaces.sites.items():
            for name, subspace in by_modality.items():
                if subspace.basis.shape[0] != hidden_size(model):
                    raise ValueError(
                        f"The {name} basis of site {site} has d={subspace.basis.shape[0]}, but {type(model).__name__} "
                        f"has a hidden size of {hidden_size(model)}; the subspaces were fitted on another model."
                    )
            site_module(model, site)  # raises where there is none
        vlm = copy_structure(model)
        sites = [
            {
                "site": str(site),
                "ranks": {name: s.rank for name, s in by_modality.items()},
                "oblique": [name for name, s in by_modality.items() if s.reader is not None],
            }
            for site, by_modality in sorted(subspaces.sites.items())
        ]
        config = CareConfig(vlm.config, sites, subspaces.fusion, dtype=model.dtype)
        with no_init_weights():
            repaired = cls(config, vlm)
        for site, by_modality in subspaces.sites.items():
            module = site_module(vlm, site)
            loaded = SafetyProjection.from_subspaces(
                by_modality, subspaces.fusion, subspaces.fusion_weight, subspaces.strength
            )
            module.care = loaded.to(_device_of(module))
        repaired.layers = repaired.layers.to(model.device)
        return repaired.train(model.training)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint whose repair is not whole raises instead of loading.

        Raises:
            ValueError: a tensor of the repair or of the base is missing, or a tensor of the repair has another shape,
                is unknown to the configuration or holds what it cannot hold.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        foreign = sorted(key for key in info["unexpected_keys"] if ".care." in key or key == "layers")
        reshaped = sorted(
            str(key) for key in info["mismatched_keys"] if ".care." in str(key) or "layers" in str(key).split("'")
        )
        for what, keys in (
            ("lacks", missing),
            ("has, unknown to its config.json,", foreign),
            ("has in another shape", reshaped),
        ):
            if keys:
                raise ValueError(
                    f"The checkpoint {what} {len(keys)} tensors: {', '.join(keys[:5])}. It would not run as repaired, "
                    "so it is not loaded; save it again from the repaired model."
                )
        model.check()
        return (model, info) if output_loading_info else model

    def check(self) -> None:
        """Assert that the repair is what its configuration says and can be applied exactly.

        Raises:
            ValueError: a buffer is missing, offloaded, not finite or inconsistent.
        """
        for site, module in self._site_modules().items():
            for name, buffer in module.care.named_buffers():
                if buffer.is_meta:
                    raise ValueError(f"Buffer {name} of site {site} is offloaded; load with offload_buffers=False.")
            try:
                module.care.check()
            except ValueError as error:
                raise ValueError(f"Site {site}: {error}") from error
        layers = sorted({site.layer for site in self._site_modules()})
        if self.layers.tolist() != layers:
            raise ValueError(f"The buffer `layers` is {self.layers.tolist()}, but config.json names sites in {layers}.")

    def care_modules(self) -> dict[Site, SafetyProjection]:
        """The repair of every site."""
        return {site: module.care for site, module in self._site_modules().items()}

    def _site_modules(self) -> dict[Site, nn.Module]:
        return {
            site: site_module(self.vlm, site) for site in (Site.parse(entry["site"]) for entry in self.config.sites)
        }

    def subspaces(self) -> dict[Site, dict[str, Subspace]]:
        """The repair as it stands in the buffers."""
        return {site: module.care.subspaces() for site, module in self._site_modules().items()}

    @property
    def strength(self) -> float:
        """Scale of the whole correction, 1 as fitted, 0 the base bit for bit; assign to change it everywhere."""
        return float(next(iter(self._site_modules().values())).care.strength)

    @strength.setter
    def strength(self, value: float) -> None:
        for module in self._site_modules().values():
            module.care.strength.fill_(value)

    def disable(self) -> Switch:
        """Switch the repair off, until `enable` or, as in ``with model.disable():``, for a while. Never saved."""
        return Switch(self.care_state, False)

    def enable(self) -> Switch:
        """Switch the repair on again, or in a `with` for a while."""
        return Switch(self.care_state, True)

    # Everything else is the base's.

    def forward(self, *args, **kwargs):
        """The base's forward, repaired."""
        return self.vlm(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The base's `generate`, repaired."""
        return self.vlm.generate(*args, **kwargs)

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

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers; also writes the processor, if there is one, and the code to load without this package."""
        module = type(self).__module__.rpartition(".")[2]
        self.config.auto_map = {name: f"{module}.{type(self).__name__}" for name in AUTO_CLASSES}
        self.config.auto_map["AutoConfig"] = f"{CareConfig.__module__.rpartition('.')[2]}.{CareConfig.__name__}"
        if self.processor is not None:
            # First: with push_to_hub the model's save uploads whatever is in the folder.
            self.processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy of the modules of `model` that shares all of its tensors."""
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):  # accelerate's; their weights_map may hold the whole model
            shared += [
                v for v in (getattr(part, "weights_map", None), getattr(part, "tied_params_map", None)) if v is not None
            ]
    return copy.deepcopy(model, {id(value): value for value in shared})


def _device_of(module: nn.Module) -> torch.device:
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    return tensors[0].device if tensors else torch.device("cpu")


def _note_visual_tokens(vlm: nn.Module, args, kwargs) -> None:
    """Find the image and video tokens as the base itself does: by id, or by the placeholder's embedding."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = image_token_ids(vlm.config)
    if ids is not None:
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for token in tokens:
            mask = mask | (ids == token)
    else:
        embeddings, embed = kwargs["inputs_embeds"], vlm.get_input_embeddings()
        mask = torch.zeros(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
        for token in tokens:
            placeholder = embed(torch.tensor(token, device=embeddings.device))
            mask = mask | (embeddings == placeholder).all(-1)
    vlm.care_state.visual_mask = mask


def _forget_visual_tokens(vlm: nn.Module, args, output) -> None:
    vlm.care_state.visual_mask = None
