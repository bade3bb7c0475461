"""The wrapper: a base vision-language model whose chosen modules repair their outputs, and its fail-closed loading."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .adapters import (
    adapter_layers,
    adapter_tensors,
    check_places,
    describe_adapters,
    merge_adapters,
    restore_adapters,
    unwrapped,
    watch_places,
)
from .atomic import replaced_folder
from .configuration_care import BASE_CLASSES, FORMAT, CareConfig, auto_class
from .delegation import LeavesToBase
from .gating import Gate, GateReader, TurnProjection, prompt_ends
from .loading import LoadsWhole, repair_digest
from .projection import FUSIONS, MIXED, FixedPrecision, ModalityProjection, SafetyProjection, Subspace
from .publishing import Publishes, publishes, writes_alone
from .quantised import check_linear, check_saveable, check_saved, saving
from .repair_state import RecallingCheckpoint, RepairState, watch_forwards
from .repaired_module import CareSiteMixin, care_class, copy_structure, execution_device
from .repairing import check_base, check_prompt_end, configuration, projection
from .sites import Site, hidden_size, image_token_ids, site_module, visual_token_ids

logger = logging.get_logger(__name__)

AUTO_CLASSES = ("AutoModel", *(auto.__name__ for auto in BASE_CLASSES))


def _check_runner(config: CareConfig) -> None:
    """Assert that whole sequences will come in, which vLLM's Transformers backend joins and cuts as it likes."""
    if str(config.get_text_config()._attn_implementation).startswith("vllm"):
        raise ValueError(
            "vLLM would run the code in this checkpoint, which cannot tell its requests apart there, so that the "
            "repair would not be exact; install care_hf beside vLLM, which serves the checkpoint by a plugin."
        )


class Switch:
    """Returned by `disable` and `enable`; as a context manager it puts back what was set before."""

    def __init__(self, state: RepairState, enabled: bool):
        self.state, self.before = state, state.enabled
        state.enabled = enabled

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.state.enabled = self.before


class CareForConditionalGeneration(Publishes, LoadsWhole, LeavesToBase):
    """A vision-language model with CARE's repair in its forward (arXiv 2603.27240).

    Made by `care_hf.fit`, by `from_base`, or by any Auto class from a saved checkpoint; `generate` and everything else
    of the base works as it does there. Buffers, all saved: `layers` (int64, the repaired decoder layers), one
    `SafetyProjection` or `TurnProjection`, named `care`, in each repaired module, and, if there is a gate, a
    `GateReader`, named `care_gate`, in the module that it reads.

    Attributes:
        vlm: the base model with its repaired modules.
        processor: the base's processor, if known; `save_pretrained` saves it beside the model.
    """

    config_class = CareConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _auto_class = "AutoModel"  # so that save_pretrained copies the code that trust_remote_code needs

    def __init__(self, config: CareConfig, vlm: PreTrainedModel | None = None):
        super().__init__(config)
        _check_runner(config)
        self.processor = None
        if vlm is None:
            vlm = auto_class(config.vlm_config).from_config(config.vlm_config)
            if config.adapters:
                restore_adapters(vlm, config.adapters, config.active_adapters)
        self.vlm = vlm
        self.register_buffer("layers", torch.tensor(self._layers(), dtype=torch.int64))
        self.care_state = RepairState(
            config.gate["prompt_end"] if config.gate else (),
            image_token_ids(config.vlm_config),
            visual_token_ids(config.vlm_config) if self._tells_visual_tokens_apart() else (),
        )
        self._no_split_modules = list(self.vlm._no_split_modules or [])
        self._skip_keys_device_placement = self.vlm._skip_keys_device_placement
        for entry in config.sites:
            self._repair_site(entry)
        if config.gate:
            gate = config.gate
            module = self._guarded(Site.parse(gate["site"]))
            module.care_gate = GateReader(hidden_size(self.vlm), gate["required"], gate["alarms"], gate["pictured"])
        self._keep_in_fp32_modules_strict = [
            f"{name}.{leaf}"
            for name, module in self.named_modules()
            if isinstance(module, (SafetyProjection, TurnProjection, GateReader))
            for leaf, buffer in module.named_buffers()
            if buffer.is_floating_point()
        ]
        if config.adapter_dtype == "float32":
            # PEFT trains adapters in single precision on a base in half precision.
            self._keep_in_fp32_modules_strict += [name for name, _ in adapter_tensors(adapter_layers(self))]
        watch_places(self.vlm)
        watch_forwards(self.vlm, self.care_state)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers; buffers of the repair that nothing has filled are NaN, whatever memory held before."""
        fresh = [module for module in self.modules() if not getattr(module, "_is_hf_initialized", False)]
        self.vlm.initialize_weights()  # as of a model of transformers: of others it passes over some modules
        super().initialize_weights()
        for module in fresh:
            if isinstance(module, (FixedPrecision, ModalityProjection)):
                for buffer in module.buffers(recurse=False):
                    initialization.constant_(buffer, torch.nan if buffer.is_floating_point() else -1)
            elif module is self:
                initialization.copy_(self.layers, torch.tensor(self._layers()))

    def _layers(self) -> list[int]:
        return sorted({Site.parse(entry["site"]).layer for entry in self.config.sites})

    def _tells_visual_tokens_apart(self) -> bool:
        by_modality = any(set(entry["ranks"]) & {"visual", "text"} for entry in self.config.sites)
        if self.config.fusion != "route" or not by_modality:
            return False
        if not visual_token_ids(self.config):
            raise ValueError(
                f"Fusion 'route' needs to know the image tokens, and the configuration of {type(self.vlm).__name__} "
                "names none in whose place images are; choose another fusion."
            )
        return True

    def _repair_site(self, entry: dict[str, Any]) -> None:
        module = self._guarded(Site.parse(entry["site"]))
        dimension, ranks, oblique = hidden_size(self.vlm), entry["ranks"], entry["oblique"]
        if set(ranks) <= {"visual", "text"}:
            module.care = SafetyProjection(dimension, ranks, self.config.fusion, oblique)
        else:
            module.care = TurnProjection(dimension, ranks, entry["steps"], oblique)

    def _guarded(self, site: Site) -> nn.Module:
        """The module of `site`, its class swapped."""
        module = site_module(self.vlm, site)
        if isinstance(module, CareSiteMixin):
            return module
        if site.component == "residual":
            # accelerate keeps a layer on one device by the name of its class
            self._no_split_modules.append(f"Care{type(module).__name__}")
        module.__class__ = care_class(type(module))
        module.care = module.care_gate = None
        module.care_state, module.care_scope = self.care_state, self.config.scope
        if "forward" in module.__dict__:  # accelerate's, set before the class was swapped
            module.forward = module.__dict__["forward"]
        return module

    @classmethod
    def from_base(cls, model: PreTrainedModel, subspaces) -> "CareForConditionalGeneration":
        """Repair `model`; it stays as it is itself, and the result shares every one of its weights.

        Args:
            model: any vision-language or language model with a decoder-only text part, or a `PeftModel` of one, whose
                adapters are then part of the base.
            subspaces: a `SafetySubspaces`.

        Raises:
            TypeError: the model is repaired already, of a class that no Auto class loads, or has an adapter that is not
                wholly in its modules.
            ValueError: no sites, a site that the model does not have, bases or a gate of another hidden size, a gate
                that would decide after a repair that asks it, or adapters that could not be saved as they are.
        """
        model = unwrapped(model)
        if isinstance(model, cls):
            raise TypeError("The model is repaired already; repair its base, or fit one repair with all sites.")
        check_base(model, subspaces)
        vlm = copy_structure(model)
        config = configuration(model, vlm.config, subspaces)
        with no_init_weights():
            repaired = cls(config, vlm)
        for site, module in repaired._site_modules().items():
            module.care = projection(subspaces, site).to(execution_device(module))
        if config.gate:
            module = repaired._gate_module()
            module.care_gate = GateReader.from_gate(subspaces.gate).to(execution_device(module))
        if model.device.type != "meta":  # as it is where the base is offloaded
            repaired.layers = repaired.layers.to(model.device)
        for module in repaired.modules():
            module._is_hf_initialized = True  # `init_weights` is for what nothing has filled
        return repaired.train(model.training)

    def check(self) -> None:
        """Assert that the repair is what its configuration says and can be applied exactly.

        Raises:
            ValueError: a buffer is missing, offloaded, not finite or inconsistent, or an adapter is around a repaired
                module.
        """
        checked = [(f"site {site}", module.care) for site, module in self._site_modules().items()]
        if self.config.gate:
            checked.append(("the gate", self.gate_reader))
        for where, part in checked:
            for name, buffer in part.named_buffers():
                if buffer.is_meta:
                    raise ValueError(f"Buffer {name} of {where} is offloaded; load with offload_buffers=False.")
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{where[0].upper()}{where[1:]}: {error}") from error
        for site, module in self._site_modules().items():
            check_linear(module, f"Site {site}")
        check_prompt_end(self.vlm, self.gate)
        if self.layers.tolist() != self._layers():
            raise ValueError(
                f"The buffer `layers` is {self.layers.tolist()}, but config.json names sites in {self._layers()}."
            )

    def care_modules(self) -> dict[Site, SafetyProjection | TurnProjection]:
        """The repair of every site."""
        return {site: module.care for site, module in self._site_modules().items()}

    def _site_modules(self) -> dict[Site, nn.Module]:
        check_places(self.vlm)
        return {
            site: site_module(self.vlm, site) for site in (Site.parse(entry["site"]) for entry in self.config.sites)
        }

    def _gate_module(self) -> nn.Module:
        return site_module(self.vlm, Site.parse(self.config.gate["site"]))

    @property
    def gate_reader(self) -> GateReader | None:
        """The module that reads the gate's scores; None if there is no gate."""
        return self._gate_module().care_gate if self.config.gate else None

    @property
    def gate(self) -> Gate | None:
        """What decides whether to repair, as it stands in the buffers; None if every prompt is repaired."""
        if not self.config.gate:
            return None
        reader = self.gate_reader
        return Gate(self.config.gate["prompt_end"], reader.readers, reader.thresholds, reader.required, reader.pictured)

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

    def unfreeze_repair(self) -> list[torch.Tensor]:
        """Let bases, readers and anchors be trained, which nothing does otherwise.

        Give them to an optimiser, and call `retract_repair` after each of its steps. Before, move the model to where it
        is trained; what moves a model makes copies.

        Returns:
            The tensors, float32, which require gradients now.

        Raises:
            ValueError: the fusion needs a matrix of both bases, through which no gradient goes.
        """
        if self.config.fusion in MIXED and any(len(by_group) == 2 for by_group in self.subspaces().values()):
            raise ValueError(
                f"Fusion {self.config.fusion!r} cannot be trained; choose one of {set(FUSIONS) - set(MIXED)}."
            )
        tensors = [tensor for part in self._repair_parts() for tensor in part.trainable()]
        return [tensor.requires_grad_() for tensor in tensors]

    def retract_repair(self) -> None:
        """Make trained bases orthonormal again, without which they are no projection and are not saved."""
        for part in self._repair_parts():
            part.retract()

    def _repair_parts(self) -> list[ModalityProjection]:
        modules = [module for care in self.care_modules().values() for module in care.modules()]
        return [module for module in modules if isinstance(module, ModalityProjection)]

    def merge_adapters(self) -> "CareForConditionalGeneration":
        """Fold PEFT's active adapters into the weights, in place, and take all of them out; the repair stays.

        Weights that change are copied first, so that the model it was made from keeps its own.

        Returns:
            The model itself.

        Raises:
            ValueError: there are no adapters, they are merged or switched off, or are on quantised, offloaded or tied
                weights.
        """
        check_places(self.vlm)
        if getattr(self, "is_quantized", False):
            raise ValueError(
                "The base is quantised, and merging would round its weights anew; merge before quantising."
            )
        merge_adapters(self.vlm)
        self.__dict__.pop("peft_config", None)
        if self._hf_peft_config_loaded:
            self._hf_peft_config_loaded = False
            # `load_adapter` left those of the adapter's file, by which the whole model would be saved under its names.
            self.__dict__.pop("_weight_conversions", None)
        self._describe_adapters()
        return self

    def _describe_adapters(self) -> None:
        described = describe_adapters(self.vlm, getattr(self, "peft_config", None))
        self.config.adapters = described.get("adapters", {})
        self.config.active_adapters = described.get("active_adapters", [])
        self.config.adapter_dtype = described.get("adapter_dtype")

    def generate(self, *args, **kwargs):
        """The base's `generate`, repaired; warns of prompts in which a gate finds no end, and so repairs nothing."""
        given = {**inspect.signature(self.vlm.generate).bind_partial(*args).arguments, **kwargs}
        ids = next((given[name] for name in ("input_ids", "inputs") if given.get(name) is not None), None)
        if ids is not None and self.config.gate and self.care_state.enabled:
            self._warn_of_open_ends(ids)
        with self.care_state.answering(ids):
            return super().generate(*args, **kwargs)

    def _warn_of_open_ends(self, ids: torch.Tensor) -> None:
        end = self.config.gate["prompt_end"]
        open_ended = int((~prompt_ends(ids, end).any(dim=1)).sum())
        if open_ended:
            logger.warning(
                f"{open_ended} of {len(ids)} prompts hold no generation prompt (token ids {end}), so that the gate "
                "cannot decide and they are answered unrepaired; write them with the chat template and "
                "add_generation_prompt=True."
            )

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        recalling = RecallingCheckpoint(self.care_state, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, recalling, **kwargs)

    @publishes
    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers; also writes the processor, if there is one, and the code to load without this package.

        With care_hf installed it writes a model card and ``reproduce.json`` besides, see `care_hf.Card`; a README.md
        that somebody else wrote stays as it is. Both come with the model in one step, or not at all.

        Adapters in the modules are saved with everything else, but for those of the model's own `add_adapter` and
        `load_adapter`: then transformers saves the active one, and nothing else. Whoever is killed or runs out of disk
        leaves the folder as it was, see `atomic.replaced_folder`.

        Raises:
            ValueError: the repair is not whole (see `check`), an adapter is around a repaired module or could not be
                loaded again as it is, the module is a single linear layer that was quantised before its repair, or
                bitsandbytes would save changed weights.
            NotImplementedError: transformers cannot save what it loaded quantised.
            OSError: the folder cannot be written.
        """
        self.check()
        for site, module in self._site_modules().items():
            check_saved(module, f"Site {site}")
        check_saveable(self.vlm)
        if not self._hf_peft_config_loaded:
            self._describe_adapters()
        module = type(self).__module__.rpartition(".")[2]
        self.config.auto_map = {name: f"{module}.{type(self).__name__}" for name in AUTO_CLASSES}
        self.config.auto_map["AutoConfig"] = f"{CareConfig.__module__.rpartition('.')[2]}.{CareConfig.__name__}"
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs)
        given = {**given.arguments.pop("kwargs", {}), **given.arguments}
        self.config.care_format, self.config.repair_digest = FORMAT, repair_digest(self, given.get("state_dict"))
        with saving(getattr(self, "hf_quantizer", None)):
            if not writes_alone(given):
                super().save_pretrained(**given)
                return
            with replaced_folder(save_directory) as folder:
                if self.processor is not None:
                    # First: with push_to_hub the model's save uploads whatever is in the folder.
                    self.processor.save_pretrained(folder)
                if given.get("push_to_hub"):
                    given.setdefault("repo_id", Path(save_directory).resolve().name)
                super().save_pretrained(**{**given, "save_directory": folder})
                self._add_card(folder, save_directory)
