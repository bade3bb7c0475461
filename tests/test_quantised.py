"""Repairs on quantised weights and with quantised caches, as far as they run without a GPU."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_decoding import (
    FULL,
    NEW,
    Reference,
    case,  # noqa: F401  a fixture
    of_each_kind,
    samples,  # noqa: F401  a fixture
)
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    QuantizedCache,
    TorchAoConfig,
)

from care_hf import CareForConditionalGeneration, SafetySubspaces, modeling_care
from care_hf.gating import unpack
from care_hf.projection import repair
from care_hf.resume import answers_fingerprint
from care_hf.sites import Site, record, site_module

FFN = Site(1, "ffn")
METHODS = ("torchao", "bitsandbytes 8", "bitsandbytes 4")
VISION_LINEARS, TEXT_LINEARS, PROJECTOR_LINEARS = 2 * 6, 3 * 7, 2


def quantisation(method, skipped=None):
    package, _, bits = method.partition(" ")
    pytest.importorskip(package)
    if package == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=bits == "8", load_in_4bit=bits == "4", llm_int8_skip_modules=skipped)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def quantised(model):
    """The names of the linear layers whose weights are."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module.weight).__name__ == "Int8Tensor" or not module.weight.is_floating_point())
    ]


def build(text):
    """A LLaVA whose widths are multiples of 64, as bitsandbytes needs for 4 bits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=90, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model, a repair of it, the folders of both."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = build(LlamaConfig(vocab_size=99, **text, tie_word_embeddings=False, initializer_range=0.2))
    return saved(base, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """The same of a model whose FFN is repaired in a single linear layer."""
    text = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4, "init_std": 0.2}
    base = build(OPTConfig(vocab_size=99, num_hidden_layers=3, **text, tie_word_embeddings=False))
    return saved(base, tmp_path_factory.mktemp("opt"))


def saved(base, path):
    found = SafetySubspaces.random(base, layers=[1], rank=8)
    base.save_pretrained(path / "base")
    CareForConditionalGeneration.from_base(base, found).save_pretrained(path / "care")
    return found, path / "base", path / "care"


@pytest.fixture(scope="module")
def inputs():
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7], [8, 90, 90, 90, 90, 9, 10]])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def load_base(path, method, skipped=None):
    return AutoModelForImageTextToText.from_pretrained(path, quantization_config=quantisation(method, skipped))


def assert_repaired(repaired, inputs, found):
    """At its site the model does the algebra of the repair; returns its logits."""
    with repaired.disable(), record(repaired.vlm, [FFN]) as before:
        off = logits(repaired, inputs)
    with record(repaired.vlm, [FFN]) as after:
        on = logits(repaired, inputs)
    mask = inputs["input_ids"] == 90
    torch.testing.assert_close(after[FFN], repair(before[FFN], found.sites[FFN], visual_mask=mask))
    assert not torch.allclose(on, off, atol=1e-3)
    return on


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base_is_repaired_saved_and_loaded(small, inputs, method, tmp_path):
    found, path, _ = small
    expected = logits(load_base(path, method), inputs)
    base = load_base(path, method)
    assert len(quantised(base)) == VISION_LINEARS + TEXT_LINEARS + PROJECTOR_LINEARS
    repaired = CareForConditionalGeneration.from_base(base, found)  # before either has run
    repaired.save_pretrained(tmp_path / "once")
    with repaired.disable():
        assert torch.equal(logits(repaired, inputs), expected)
    on = assert_repaired(repaired, inputs, found)
    assert torch.equal(logits(base, inputs), expected)
    ours = dict(repaired.vlm.named_parameters())
    assert all(ours[name] is parameter for name, parameter in base.named_parameters())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [90]}
    answer = repaired.generate(**inputs, **options)
    assert torch.equal(answer, repaired.generate(**inputs, **options, use_cache=False))
    loaded = AutoModel.from_pretrained(tmp_path / "once")
    assert len(quantised(loaded)) == len(quantised(base))
    assert torch.equal(assert_repaired(loaded, inputs, found), on)
    loaded = AutoModel.from_pretrained(tmp_path / "once")
    try:
        loaded.save_pretrained(tmp_path / "twice")
    except NotImplementedError as error:
        assert "cannot save weights again" in str(error)
    else:
        assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "twice"), inputs), on)


@pytest.mark.parametrize("method", METHODS)
def test_a_repaired_checkpoint_is_quantised_as_it_is_loaded(small, inputs, method, tmp_path):
    found, path, care = small
    whole = AutoModel.from_pretrained(care)
    repaired = AutoModel.from_pretrained(care, quantization_config=quantisation(method))
    assert len(quantised(repaired)) == VISION_LINEARS + TEXT_LINEARS + PROJECTOR_LINEARS
    ours, theirs = ({n: b for n, b in m.named_buffers() if ".care" in n or n == "layers"} for m in (repaired, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    repaired.save_pretrained(tmp_path)
    on = assert_repaired(repaired, inputs, found)
    expected = CareForConditionalGeneration.from_base(load_base(path, method), found)
    assert torch.equal(on, logits(expected, inputs)) and not torch.equal(on, logits(whole, inputs))
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), inputs), on)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_not_quantised_still_is_not_when_loaded(small, inputs, method, tmp_path):
    found, path, _ = small
    base = load_base(path, method, ["model.vision_tower", "lm_head"])
    assert len(quantised(base)) == TEXT_LINEARS + PROJECTOR_LINEARS
    repaired = CareForConditionalGeneration.from_base(base, found)
    repaired.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert quantised(loaded) == quantised(repaired) == [f"vlm.{name}" for name in quantised(base)]
    assert torch.equal(logits(loaded, inputs), logits(repaired, inputs))


@pytest.mark.parametrize("method", METHODS)
def test_quantised_checkpoints_that_are_not_whole_do_not_load(small, method, tmp_path):
    found, path, _ = small
    CareForConditionalGeneration.from_base(load_base(path, method), found).save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weight = next(name for name in weights if "layers.1.mlp.down_proj." in name and name.endswith(("weight", "qdata")))
    for missing in [*(name for name in weights if ".care." in name or name == "layers"), weight]:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        kept = {name: value for name, value in weights.items() if name != missing}
        save_file(kept, tmp_path / "broken" / "model.safetensors", metadata=metadata)
        with pytest.raises((ValueError, RuntimeError)):
            AutoModel.from_pretrained(tmp_path / "broken")


def test_4_bit_weights_that_the_cpu_repacked_are_not_saved_changed(small, inputs, tmp_path):
    found, path, _ = small
    repaired = CareForConditionalGeneration.from_base(load_base(path, "bitsandbytes 4"), found)
    on = logits(repaired, inputs)
    states = [getattr(parameter, "quant_state", None) for parameter in repaired.parameters()]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("This CPU does not repack them.")
    answers_fingerprint(repaired, None)
    with pytest.raises(ValueError, match="save it changed"):
        repaired.save_pretrained(tmp_path)
    assert torch.equal(logits(repaired, inputs), on)


# A repaired module that is a linear layer itself


@pytest.mark.parametrize("method", METHODS)
def test_a_repaired_linear_layer_keeps_its_repair_when_the_rest_is_quantised(opt, inputs, method, tmp_path):
    found, _, care = opt
    repaired = AutoModel.from_pretrained(care, quantization_config=quantisation(method))
    assert type(site_module(repaired.vlm, FFN)).__name__ == "CareLinear"
    assert len(quantised(repaired)) == VISION_LINEARS + 3 * 6 + PROJECTOR_LINEARS - (method != "torchao")
    repaired.save_pretrained(tmp_path)
    on = assert_repaired(repaired, inputs, found)
    assert torch.equal(assert_repaired(AutoModel.from_pretrained(tmp_path), inputs, found), on)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_layer_quantised_before_its_repair(opt, inputs, method, tmp_path, monkeypatch):
    found, path, _ = opt
    repaired = CareForConditionalGeneration.from_base(load_base(path, method), found)
    if method == "torchao":
        repaired.save_pretrained(tmp_path)
        on = assert_repaired(repaired, inputs, found)
        assert torch.equal(assert_repaired(AutoModel.from_pretrained(tmp_path), inputs, found), on)
        return
    assert_repaired(CareForConditionalGeneration.from_base(load_base(path, method), found), inputs, found)
    single = r"Site 1\.ffn is a single linear layer of Linear(8bitLt|4bit)\. .*or repair another"
    with pytest.raises(ValueError, match=single):
        repaired.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(modeling_care, "check_saved", lambda *_: None)  # as if another had written it
    repaired.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"its weight is of torch\.int8|mismatch"):
        AutoModel.from_pretrained(tmp_path)


# Adapters on quantised weights


@pytest.mark.parametrize("method", METHODS)
def test_a_repair_of_adapters_on_quantised_weights(small, inputs, method, tmp_path):
    found, path, _ = small
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft = get_peft_model(load_base(path, method), config).eval()
    repaired = CareForConditionalGeneration.from_base(peft, found)
    repaired.save_pretrained(tmp_path)
    own = logits(peft, inputs)
    assert not torch.allclose(own, logits(load_base(path, method), inputs), atol=1e-2)
    with repaired.disable():
        assert torch.equal(logits(repaired, inputs), own)
    on = assert_repaired(repaired, inputs, found)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert quantised(loaded) == quantised(repaired)
    assert torch.equal(logits(loaded, inputs), on)
    with pytest.raises(ValueError, match="quantised, and merging"):
        loaded.merge_adapters()
    assert torch.equal(logits(loaded, inputs), on)


# Quantised caches


class CachedReference(Reference):
    """The reference, with a cache: it is given a prompt at once and then a token at a time."""

    def _hook(self, site):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            (end,) = self.ends
            if site == self.subspaces.gate_site and self.begin <= end < self.begin + h.shape[1]:
                self.fired = {end: self._fires(h[0, end - self.begin].double(), end)}
            repaired = h.clone()
            for column in range(max(0, end - self.begin), h.shape[1]):
                repaired[0, column] = self._repair(site, h[0, column], self.begin + column)
            return (repaired, *output[1:]) if isinstance(output, tuple) else repaired

        return hook

    @torch.no_grad()
    def answer(self, inputs, cache):
        eos = torch.tensor(self.model.generation_config.eos_token_id)
        self.ids, self.begin, self.ends = inputs["input_ids"], 0, [inputs["input_ids"].shape[1] - 1]
        given, tokens, scores = dict(inputs), [], []
        for _ in range(NEW):
            scores.append(self.model(**given, past_key_values=cache, use_cache=True).logits[0, -1])
            tokens.append(int(scores[-1].index_fill(0, eos, -torch.inf).argmax()))
            self.begin = cache.get_seq_length()
            given = {"input_ids": torch.tensor([tokens[-1:]])}
        return tokens, torch.stack(scores)


@pytest.mark.parametrize(
    ("backend", "layer", "options"),
    [
        ("fp8", "Fp8QuantizedLayer", {}),
        ("hqq", "HQQQuantizedLayer", {"nbits": 4, "q_group_size": 16, "residual_length": 4}),
    ],
)
def test_a_quantised_cache_holds_keys_in_few_bits_and_decisions_exactly(case, backend, layer, options):  # noqa: F811
    if backend != "fp8":
        pytest.importorskip(backend)
    reference, off = CachedReference(case.base, case.subspaces), []
    config = case.base.config.get_text_config()
    for i in of_each_kind(case):
        inputs = case.singles[i]
        tokens, scores = reference.answer(inputs, QuantizedCache(backend, config, **options))
        chosen = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **options}}
        output = case.model.generate(**inputs, **FULL, **chosen)
        assert output.sequences[0, -NEW:].tolist() == tokens
        ours = torch.stack(output.logits, 1)[0]
        torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-3)
        off.append((ours - case.answers[i].logits).abs().max())
        *keys, turns = output.past_key_values.layers
        assert {type(part).__name__ for part in keys} == {layer}
        assert turns.keys[0, 0, :, 0].tolist() == output.sequences[0, :-1].tolist()
        end = inputs["input_ids"].shape[1] - 1
        assert bool(unpack(turns.values[0, 0, end, 0])[1]) == case.answers[i].fires
    assert max(off) > 1e-2  # what the cache itself changes
