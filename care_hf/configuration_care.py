"""What a repaired checkpoint says of itself in config.json."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from .gating import TURN
from .projection import FUSIONS, MODALITIES
from .sites import Site, runs_before

GATE = {"site", "required", "alarms", "pictured", "prompt_end"}
BASE_CLASSES = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)  # the first that knows it
FORMAT = 2  # of a repaired checkpoint; 1 is what had no number and no digest
SCOPES = ("all", "prompt")  # of a repair by modality; a `TurnProjection` has its scope in its name


class CareConfig(PreTrainedConfig):
    """Configuration of a repaired vision-language model: that of its base, and the shape of the repair.

    Whatever it does not define itself it answers as the base's configuration does.

    Args:
        vlm_config: the base's configuration, or its dict.
        sites: one dict per repaired site: ``{"site": "16.ffn", "ranks": {"visual": 16, "text": 16}, "oblique": []}``,
            or with ranks of "last" and "response" and the number of repaired "steps" of the response.
        fusion: how the corrections of the two modalities become one, see `projection.SafetyProjection`.
        gate: ``{"site": "16.residual", "required": 1, "alarms": 2, "pictured": 2, "prompt_end": [5]}``, see
            `gating.Gate`; None if there is none.
        scope: which tokens a repair by modality applies to, "all" or those of the "prompt".
        origin: how the repair came about, as strings.
        adapters: PEFT's configuration of every adapter in the base, as a dict, by name.
        active_adapters: the names of those that act.
        adapter_dtype: that of their tensors, such as "float32"; None if there are none.
        care_format: the format of the checkpoint that this describes; 1 if it says none.
        repair_digest: the hash of the repair in it (see `loading.repair_digest`), which formats before 2 lack.

    Raises:
        ValueError: vlm_config, sites, fusion, gate, scope or adapters are not of that form, the gate decides after a
            repair that asks it, or the format is one of a later version.
    """

    model_type = "care"
    sub_configs = {"vlm_config": AutoConfig}  # noqa: RUF012  the form that transformers expects
    has_no_defaults_at_init = True

    def __init__(
        self,
        vlm_config=None,
        sites=(),
        fusion: str = "adaptive",
        gate: dict[str, Any] | None = None,
        scope: str = "all",
        origin: dict[str, str] | None = None,
        adapters: dict[str, dict[str, Any]] | None = None,
        active_adapters=(),
        adapter_dtype: str | None = None,
        care_format: int = 1,
        repair_digest: str | None = None,
        **kwargs: Any,
    ):
        _check_format(care_format, repair_digest)
        if kwargs.get("transformers_weights") is not None:
            raise ValueError(
                f"transformers_weights={kwargs['transformers_weights']!r} names other weights than the checkpoint's, "
                "which would not be checked; take it out of config.json."
            )
        self.care_format, self.repair_digest = care_format, repair_digest
        if isinstance(vlm_config, dict):
            vlm_config = _read_base(vlm_config)
        if vlm_config is None:
            raise ValueError(
                "There is no vlm_config, so this is not the configuration of a repaired model; to repair a base model, "
                "use `care_hf.fit` or `CareForConditionalGeneration.from_base`."
            )
        if not isinstance(vlm_config, PreTrainedConfig):
            raise ValueError(f"vlm_config={vlm_config!r} must be a configuration or its dict.")
        self.vlm_config = vlm_config
        if not isinstance(sites, (list, tuple)):
            raise ValueError(f"sites={sites!r} must be a list of dicts.")
        self.sites = [_check_site(entry) for entry in sites]
        if len({entry["site"] for entry in self.sites}) < len(self.sites):
            raise ValueError(f"sites={[entry['site'] for entry in self.sites]} name a place twice.")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is not known; choose one of {FUSIONS}.")
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is not known; choose one of {SCOPES}.")
        if not isinstance(origin or {}, dict):
            raise ValueError(f"origin={origin!r} must be a dict of strings.")
        self.fusion, self.scope, self.gate, self.origin = fusion, scope, gate, dict(origin or {})
        self._check_gate()
        self.adapters, self.active_adapters, self.adapter_dtype = adapters or {}, active_adapters, adapter_dtype
        self._check_adapters()
        self.active_adapters = list(active_adapters)
        kwargs.setdefault("is_encoder_decoder", vlm_config.is_encoder_decoder)
        own = vlm_config._attn_implementation
        for name, of_whole in (("attn_implementation", {"": own}), ("experts_implementation", {})):
            kwargs.setdefault(name, {**of_whole, "vlm_config": _of_each_part(vlm_config, f"_{name}")})
        kwargs.setdefault("tie_word_embeddings", getattr(vlm_config, "tie_word_embeddings", False))
        try:
            super().__init__(**kwargs)
        except (ValueError, TypeError):
            raise
        except Exception as error:  # huggingface_hub's of a field that has another type
            raise ValueError(f"config.json holds what transformers cannot read: {error}") from error

    def _check_gate(self) -> None:
        asking = [
            entry["site"]
            for entry in self.sites
            if self.scope == "prompt" or not set(entry["ranks"]) <= set(MODALITIES)
        ]
        if self.gate is None:
            if asking:
                raise ValueError(f"The repairs of sites {asking} ask a gate where the prompt ends, and there is none.")
            return
        if not isinstance(self.gate, dict) or set(self.gate) != GATE:
            raise ValueError(f"gate={self.gate!r} must be a dict of {sorted(GATE)}.")
        counts = [self.gate[name] for name in ("required", "alarms", "pictured")]
        ends = self.gate["prompt_end"]
        if (
            not all(map(_counts, counts))
            or not isinstance(ends, (list, tuple))
            or not ends
            or not all(map(_counts, ends))
        ):
            raise ValueError(f"gate={self.gate!r} must hold counts of detectors, and token ids in prompt_end.")
        _canonical(self.gate["site"])
        late = [site for site in asking if not runs_before(Site.parse(self.gate["site"]), Site.parse(site))]
        if late:
            raise ValueError(
                f"The gate reads site {self.gate['site']}, after sites {late} have run; put it there or before."
            )

    def _check_adapters(self) -> None:
        if not isinstance(self.adapters, dict) or not all(
            isinstance(entry, dict) and "peft_type" in entry for entry in self.adapters.values()
        ):
            raise ValueError(f"adapters={self.adapters!r} must be a dict of PEFT's configurations, by name.")
        names = self.active_adapters
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"active_adapters={names!r} must be a list of names.")
        unknown = sorted(set(self.active_adapters) - set(self.adapters))
        if unknown:
            raise ValueError(f"active_adapters={unknown} are not among the adapters, {sorted(self.adapters)}.")

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the folder that the base was loaded from: it names people and machines."""
        return _without_folders(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without what is as in any configuration."""
        return _without_folders(super().to_diff_dict())

    def get_text_config(self, decoder=None, encoder=None):
        """The base's text configuration."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "tie_word_embeddings" and self.__dict__.get("vlm_config") is not None:
            self.vlm_config.tie_word_embeddings = value  # it is the base that has the embeddings

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here: image_token_id, text_config, quantization_config, ...
        vlm_config = self.__dict__.get("vlm_config")
        if name.startswith("_") or vlm_config is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        return getattr(vlm_config, name)


def hub_name(config: PreTrainedConfig) -> str | None:
    """The Hub id that a model was loaded by; None if it was loaded from a folder or made here."""
    name = getattr(config, "_name_or_path", None) or ""
    return None if not name or _is_folder(name) else name


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_folders(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "_name_or_path" or not _is_folder(str(value))
    }


def _of_each_part(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    """An implementation, attention's or experts', as transformers takes it part by part, for parts may differ."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    of_parts = {key: _of_each_part(part, name) for key, part in parts.items() if part is not None}
    return {"": getattr(config, name, None), **of_parts}


def _check_format(care_format: Any, repair_digest: Any) -> None:
    if not _counts(care_format) or care_format < 1:
        raise ValueError(f"care_format={care_format!r} must be a whole number; the config.json is broken.")
    if care_format > FORMAT:
        raise ValueError(
            f"The checkpoint has the format {care_format}, and this version of care_hf reads up to {FORMAT}; install a "
            "newer one (pip install -U care_hf)."
        )
    if not isinstance(repair_digest, str) and (repair_digest is not None or care_format > 1):
        raise ValueError(
            f"repair_digest={repair_digest!r} must be the hash of the repair, which every checkpoint of format "
            f"{care_format} has; the config.json is broken."
        )


def _read_base(values: dict[str, Any]) -> PreTrainedConfig:
    if "model_type" not in values:
        raise ValueError("vlm_config has no 'model_type', so the base model is unknown; the config.json is broken.")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # whatever the base's own class makes of values that it does not expect
        raise ValueError(
            f"vlm_config is no configuration of a {values['model_type']!r} that transformers can read "
            f"({type(error).__name__}: {error}); the config.json is broken, or of another version of transformers."
        ) from error


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int as well


def _canonical(text: Any) -> None:
    """Assert that a site is written as `str(Site)` writes it, for two ways to write one would be two sites."""
    if not isinstance(text, str) or str(Site.parse(text)) != text:
        raise ValueError(f"{text!r} is not a site as it is written in a file; for example '16.ffn'.")


def _check_site(entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry, dict) or not {"site", "ranks"} <= set(entry):
        raise ValueError(f"A site is described as {entry!r}; expected a dict with 'site', 'ranks' and 'oblique'.")
    _canonical(entry["site"])
    ranks, oblique, steps = entry["ranks"], entry.get("oblique", ()), entry.get("steps", 0)
    of_one_kind = isinstance(ranks, dict) and (set(ranks) <= set(MODALITIES) or set(ranks) <= set(TURN))
    if not ranks or not of_one_kind or not all(_counts(k) and k > 0 for k in ranks.values()):
        raise ValueError(
            f"Site {entry['site']}: ranks={ranks!r} must give a whole number for one or both of {MODALITIES}, or of "
            f"{TURN}."
        )
    if not isinstance(oblique, (list, tuple)) or not all(name in ranks for name in map(str, oblique)):
        raise ValueError(f"Site {entry['site']}: oblique={oblique!r} names what has no rank.")
    if not _counts(steps) or ("response" in ranks) != (steps > 0):
        raise ValueError(f"Site {entry['site']}: steps={steps!r} must be the number of repaired answer tokens.")
    return {"site": entry["site"], "ranks": dict(ranks), "oblique": list(oblique), "steps": steps}


def auto_class(config: PreTrainedConfig):
    """The Auto class that builds a base from its configuration.

    Raises:
        TypeError: none does.
    """
    for auto in BASE_CLASSES:
        if type(config) in auto._model_mapping:
            return auto
    raise TypeError(
        f"No model for a {type(config).__name__} is known to {', '.join(auto.__name__ for auto in BASE_CLASSES)}, so "
        "that what is repaired could not be loaded again; register the classes of the base with them, or update "
        "transformers."
    )
