"""Places: named exactly or refused, and held against a forward."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ChameleonConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    T5Config,
)

import care_hf
from care_hf.interventions import layer_calls
from care_hf.site_check import check_contributions
from care_hf.sites import Site, decoder_layers, output_tensor, record, site_module

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
INPUTS = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
BOTH = [Site(1, "ffn"), Site(1, "attention")]


def build(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@torch.no_grad()
def added_by_parts(model, layer):
    """What a layer adds to the stream, and what its attention and FFN put out together."""
    with layer_calls(model) as calls, record(model, BOTH) as activations:
        model(**INPUTS)
    entered, left = calls[layer][0], output_tensor(calls[layer][1])
    return left - entered, sum(activations[site] for site in BOTH)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Olmo2Config(**SIZES)], ids=["llama", "olmo2"])
def test_sites_are_what_is_added(config):
    model = build(config)
    torch.testing.assert_close(*added_by_parts(model, 1), rtol=1e-4, atol=1e-5)
    check_contributions(model, BOTH, INPUTS)


def test_norms_of_outputs_under_names_of_inputs_norms():
    class ChameleonSwinDecoderLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm = (
                nn.Identity() for _ in range(4)
            )

    model = build(LlamaConfig(**SIZES))
    layer = model.model.layers[1] = ChameleonSwinDecoderLayer()
    assert site_module(model, Site(1, "ffn")) is layer.post_attention_layernorm
    assert site_module(model, Site(1, "attention")) is layer.input_layernorm
    assert ChameleonConfig().swin_norm is False


def test_an_ffn_that_is_scaled_before_it_is_added_is_refused():
    granite = build(GraniteConfig(**SIZES, residual_multiplier=0.5))
    with pytest.raises(ValueError, match="Layer 1 of GraniteForCausalLM does not add the outputs"):
        check_contributions(granite, BOTH, INPUTS)
    check_contributions(granite, [Site(1, "residual")], INPUTS)
    check_contributions(build(GraniteConfig(**SIZES, residual_multiplier=1.0)), BOTH, INPUTS)


def test_a_half_precision_model_passes():
    check_contributions(build(LlamaConfig(**SIZES)).bfloat16(), BOTH, INPUTS)


def test_an_encoder_decoder_is_refused_with_what_was_looked_for():
    t5 = build(T5Config(vocab_size=40, d_model=32, d_ff=48, num_layers=3, num_heads=2), AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match=r"one list of 3 layers .* found \['.*block'.*name_places"):
        decoder_layers(t5)


class TestNaming:
    @pytest.fixture
    def odd(self):
        """A Llama whose parts have names that nobody knows."""
        model = build(LlamaConfig(**SIZES))
        for layer in model.model.layers:
            layer.ff, layer.mix = layer.mlp, layer.self_attn
            del layer.mlp, layer.self_attn
        return model

    def test_an_unknown_component_is_refused_with_what_was_looked_for(self, odd):
        with pytest.raises(
            ValueError, match=r"looked for .*'mlp'.* in LlamaDecoderLayer, and it has .*ff.*name_places"
        ):
            site_module(odd, Site(1, "ffn"))

    def test_names_given_by_hand_are_taken(self, odd):
        care_hf.name_places(odd, layers="model.layers", ffn="ff", attention="mix")
        assert site_module(odd, Site(1, "ffn")) is odd.model.layers[1].ff
        assert site_module(odd, Site(2, "attention")) is odd.model.layers[2].mix
        assert decoder_layers(odd) is odd.model.layers

    def test_two_lists_of_one_length_are_not_guessed_between(self):
        model = build(LlamaConfig(**SIZES))
        model.model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        with pytest.raises(ValueError, match=r"\['blocks', 'layers'\]"):
            decoder_layers(model)
        care_hf.name_places(model, layers="model.layers")
        assert decoder_layers(model) is model.model.layers and site_module(model, Site(0, "ffn"))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ({"layers": "model.blocks"}, "layers='model.blocks' is no list of modules"),
            ({"layers": "model.norm"}, "is no list"),
            (
                {"layers": "model.layers", "ffn": "ff"},
                r"ffn='ff' is no module of decoder layers \[0, 1, 2\]; it has .*mlp",
            ),
        ],
    )
    def test_wrong_names_are_refused(self, names, message):
        with pytest.raises(ValueError, match=message):
            care_hf.name_places(build(LlamaConfig(**SIZES)), **names)

    def test_they_are_kept_in_a_checkpoint(self, tmp_path):
        model = build(LlamaConfig(**SIZES))
        model.model.blocks = nn.ModuleList(nn.Identity() for _ in range(3))  # nothing of it is saved
        care_hf.name_places(model, layers="model.layers", ffn="mlp.down_proj")
        repaired = care_hf.CareForConditionalGeneration.from_base(
            model, care_hf.SafetySubspaces.random(model, layers=[1], rank=2, component="ffn")
        )
        expected = repaired(**INPUTS).logits
        repaired.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**INPUTS).logits, expected)
        assert type(loaded.vlm.model.layers[1].mlp.down_proj).__name__ == "CareLinear"
