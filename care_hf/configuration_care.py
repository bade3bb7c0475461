"""What a repaired checkpoint says of itself in config.json."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .projection import FUSIONS, MODALITIES
from .sites import Site


class CareConfig(PreTrainedConfig):
    """Configuration of a repaired vision-language model: that of its base, and the shape of the repair.

    Whatever it does not define itself it answers as the base's configuration does.

    Args:
        vlm_config: the base's configuration, or its dict.
        sites: one dict per repaired site: ``{"site": "16.ffn", "ranks": {"visual": 16, "text": 16}, "oblique": []}``.
        fusion: how the corrections of the two modalities become one, see `projection.SafetyProjection`.

    Raises:
        ValueError: sites or fusion are not of that form.
    """

    model_type = "care"
    sub_configs = {"vlm_config": AutoConfig}  # noqa: RUF012  the form that transformers expects
    has_no_defaults_at_init = True

    def __init__(self, vlm_config=None, sites=(), fusion: str = "adaptive", **kwargs: Any):
        if isinstance(vlm_config, dict):
            if "model_type" not in vlm_config:
                raise ValueError(
                    "vlm_config has no 'model_type', so the base model is unknown; the config.json is broken."
                )
            vlm_config = AutoConfig.for_model(**vlm_config)
        self.vlm_config = vlm_config
        self.sites = [_check_site(entry) for entry in sites]
        if len({entry["site"] for entry in self.sites}) < len(self.sites):
            raise ValueError(f"sites={[entry['site'] for entry in self.sites]} name a place twice.")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is not known; choose one of {FUSIONS}.")
        self.fusion = fusion
        if vlm_config is not None:
            kwargs.setdefault("is_encoder_decoder", vlm_config.is_encoder_decoder)
            kwargs.setdefault("attn_implementation", vlm_config._attn_implementation)
            kwargs.setdefault("tie_word_embeddings", getattr(vlm_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        """The base's text configuration."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here: image_token_id, text_config, quantization_config, ...
        vlm_config = self.__dict__.get("vlm_config")
        if name.startswith("_") or vlm_config is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        return getattr(vlm_config, name)


def _check_site(entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry, dict) or not {"site", "ranks"} <= set(entry):
        raise ValueError(f"A site is described as {entry!r}; expected a dict with 'site', 'ranks' and 'oblique'.")
    Site.parse(entry["site"])
    ranks, oblique = entry["ranks"], list(entry.get("oblique", ()))
    if not ranks or set(ranks) - set(MODALITIES) or not all(isinstance(k, int) and k > 0 for k in ranks.values()):
        raise ValueError(
            f"Site {entry['site']}: ranks={ranks!r} must give a whole number for one or both of {MODALITIES}."
        )
    if set(oblique) - set(ranks):
        raise ValueError(f"Site {entry['site']}: oblique={oblique!r} names a modality without a rank.")
    return {"site": entry["site"], "ranks": dict(ranks), "oblique": oblique}
