"""Adapters of PEFT on a repaired model, and repairs of models that have adapters.

What comes out is compared with PEFT's own model, with the repair of what PEFT itself merged, and, with a gate, with the
decoder of `test_decoding`.
"""

import copy
import json
import shutil
import sys

import pytest
import torch
from conftest import random_subspace
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_decoding import (
    FULL,
    Reference,
    assert_answers,
    case,  # noqa: F401  a fixture
    of_each_kind,
    samples,  # noqa: F401  a fixture
)
from test_fitting import QUICK, prompts  # noqa: F401  a fixture
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
)

import care_hf
from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.contrasts import Contrast
from care_hf.mediation import mediate
from care_hf.neurons import rank_neurons
from care_hf.projection import repair
from care_hf.resume import model_fingerprint
from care_hf.samples import Sample, collate
from care_hf.separability import measure_separability
from care_hf.sites import Site, record, site_module

FFN, LAYER = Site(2, "ffn"), Site(4, "residual")
SOME = ["q_proj", "down_proj"]
RANDOM = {"target_modules": SOME, "init_lora_weights": False}


def subspaces(*sites):
    kinds = {FFN: (random_subspace(1), random_subspace(2, oblique=True)), LAYER: (random_subspace(3),) * 2}
    return SafetySubspaces({site: dict(zip(("visual", "text"), kinds[site], strict=True)) for site in sites or kinds})


@pytest.fixture(scope="module")
def inputs(world, processor):
    cases = [*world.attack("typographic", "fit", 1), *world.benign("icon", "fit", 1)]
    return collate(processor, [Sample(x.messages) for x in cases], [4]).inputs


def adapted(base, config, name="default"):
    torch.manual_seed(3)
    model = get_peft_model(base, config, name).eval()
    for wrapper in model.modules():
        for part in getattr(wrapper, "modules_to_save", {}).values() if hasattr(wrapper, "original_module") else ():
            for parameter in part.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


CONFIGS = {
    "lora": LoraConfig(**RANDOM),
    "all linear": LoraConfig(
        target_modules="all-linear", init_lora_weights=False, r=4, use_rslora=True, rank_pattern={"q_proj": 2}
    ),
    "by pattern": LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False),
    "dora": LoraConfig(**RANDOM, use_dora=True),
    "pissa": LoraConfig(target_modules=SOME, init_lora_weights="pissa", inference_mode=True),
    "whole modules too": LoraConfig(**RANDOM, modules_to_save=["multi_modal_projector"]),
    "the repaired module too": LoraConfig(**RANDOM, modules_to_save=["layers.2.mlp"]),
    "ia3": IA3Config(target_modules=["k_proj", *SOME], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "loha": LoHaConfig(target_modules=SOME, init_weights=False, alpha=64),
    "lokr": LoKrConfig(target_modules=SOME, init_weights=False),
    "hra": HRAConfig(target_modules=SOME, init_weights=False),
}


# A repair on top of adapters


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_repair_of_an_adapted_model(llava, inputs, kind, tmp_path):
    plain = logits(llava, inputs)
    peft = adapted(llava, copy.deepcopy(CONFIGS[kind]))
    own = logits(peft, inputs)
    assert kind == "pissa" or not torch.allclose(own, plain, atol=1e-2)
    repaired = CareForConditionalGeneration.from_base(peft, subspaces())
    with repaired.disable(), record(repaired.vlm, [FFN]) as before:
        assert torch.equal(logits(repaired, inputs), own)
    with record(repaired.vlm, [FFN]) as after:
        expected = logits(repaired, inputs)
    mask = inputs["input_ids"] == llava.config.image_token_id
    torch.testing.assert_close(after[FFN], repair(before[FFN], subspaces().sites[FFN], visual_mask=mask))
    assert not torch.allclose(expected, own, atol=1e-2)

    repaired.save_pretrained(tmp_path / "adapted")
    loaded = AutoModel.from_pretrained(tmp_path / "adapted")
    assert type(loaded) is CareForConditionalGeneration and list(loaded.config.adapters) == ["default"]
    assert torch.equal(logits(loaded, inputs), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "again"), inputs), expected)

    assert repaired.merge_adapters() is repaired
    torch.testing.assert_close(logits(repaired, inputs), expected, rtol=1e-4, atol=1e-4)
    assert repaired.config.adapters == {} and not any("base_layer" in name for name in repaired.state_dict())
    assert torch.equal(logits(peft, inputs), own)  # shares its weights with what was merged
    others = CareForConditionalGeneration.from_base(peft.merge_and_unload(safe_merge=True), subspaces())
    torch.testing.assert_close(logits(repaired, inputs), logits(others, inputs), rtol=1e-5, atol=1e-5)
    repaired.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "merged"), inputs), logits(repaired, inputs))


@pytest.mark.parametrize("active", [["first"], ["second"], ["second", "first"]])
def test_of_several_adapters_the_active_ones_stay_active(llava, inputs, active, tmp_path):
    peft = adapted(llava, LoraConfig(**RANDOM), "first")
    peft.add_adapter("second", LoraConfig(target_modules=["v_proj", "q_proj"], r=3, init_lora_weights=False))
    peft.base_model.set_adapter(active)
    repaired = CareForConditionalGeneration.from_base(peft, subspaces())
    expected = logits(repaired, inputs)
    repaired.save_pretrained(tmp_path / "both")
    loaded = AutoModel.from_pretrained(tmp_path / "both")
    assert loaded.config.active_adapters == active and set(loaded.config.adapters) == {"first", "second"}
    assert torch.equal(logits(loaded, inputs), expected)
    loaded.merge_adapters()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-4, atol=1e-4)

    config = json.loads((tmp_path / "both" / "config.json").read_text())
    del config["adapters"]["second"]
    (tmp_path / "both" / "config.json").write_text(json.dumps({**config, "active_adapters": ["first"]}))
    with pytest.raises(ValueError, match=r"lacks .*v_proj|unknown to its config.json"):
        AutoModel.from_pretrained(tmp_path / "both")


def test_an_adapter_that_the_configuration_lost_is_noticed(llava, tmp_path):
    peft = adapted(llava, LoraConfig(**RANDOM), "first")
    peft.add_adapter("second", LoraConfig(**RANDOM))
    CareForConditionalGeneration.from_base(peft, subspaces()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["adapters"]["second"]  # its layers are those of the first
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown to its config.json.*lora_A.second"):
        AutoModel.from_pretrained(tmp_path)


def test_checkpoints_whose_adapters_are_not_whole_do_not_load(llava, tmp_path, monkeypatch):
    path = tmp_path / "whole"
    CareForConditionalGeneration.from_base(adapted(llava, LoraConfig(**RANDOM)), subspaces()).save_pretrained(path)
    weights, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())

    def refused(message, new_weights=weights, error=ValueError, **changes):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(path, broken)
        save_file(new_weights, broken / "model.safetensors", metadata={"format": "pt"})
        (broken / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=message):
            AutoModel.from_pretrained(broken)

    added = [name for name in weights if ".lora_" in name]
    assert len(added) == 2 * (6 * 2 + 3)
    for name in added[:4]:
        refused(f"lacks 1 tensors: .*{name.rpartition('layers')[2]}", {k: v for k, v in weights.items() if k != name})
    refused("lacks", adapters={}, active_adapters=[])
    (name,), (entry,) = config["adapters"], config["adapters"].values()
    refused("mismatch", error=RuntimeError, adapters={name: {**entry, "r": 3}})
    refused("lacks", adapters={name: {**entry, "target_modules": [*SOME, "k_proj"]}})
    refused("cannot be put on", adapters={name: {**entry, "target_modules": ["nowhere"]}})
    refused("cannot be put on.*PROMPT_TUNING", adapters={name: {"peft_type": "PROMPT_TUNING"}})
    refused("must be a dict of PEFT's", adapters={name: {}})
    refused("are not among the adapters", active_adapters=["other"])
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("pip install peft", error=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_in_single_precision_on_a_base_in_half(llava, inputs, dtype, tmp_path):
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    llava.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    peft = adapted(base, LoraConfig(**RANDOM))
    peft.base_model.set_adapter("default")
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    repaired = CareForConditionalGeneration.from_base(peft, subspaces())
    repaired.save_pretrained(tmp_path / "care")
    loaded = AutoModel.from_pretrained(tmp_path / "care")
    dtypes = {"lora_" in name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes == {True: dtype, False: torch.bfloat16}
    assert torch.equal(logits(loaded, inputs), logits(repaired, inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: get_peft_model(m, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PROMPT_TUNING"),
        (lambda m: get_peft_model(m, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PREFIX_TUNING"),
        (lambda m: get_peft_model(m, VeraConfig(target_modules=["q_proj"], r=2)), "VERA"),
        (lambda m: get_peft_model(m, LoraConfig(**RANDOM, alora_invocation_tokens=[5])), "alora_invocation_tokens"),
        (lambda m: PeftMixedModel(m, LoraConfig(**RANDOM)), "PeftMixedModel"),
    ],
)
def test_adapters_that_are_not_in_the_modules_are_refused(llava, make, message):
    peft = make(llava)
    with pytest.raises(TypeError, match=rf"{message}.*merge_and_unload"):
        CareForConditionalGeneration.from_base(peft, subspaces())


def test_every_door_refuses_them(llava, processor, prompts):  # noqa: F811
    peft = get_peft_model(llava, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    contrast = Contrast((5,), (6,))
    doors = [
        lambda: care_hf.fit(peft, *prompts, processor, QUICK),
        lambda: care_hf.diagnose(peft, *prompts, processor),
        lambda: care_hf.trace(peft, processor, *prompts),
        lambda: care_hf.evaluate(peft, None, processor=processor),
        lambda: care_hf.attribute(peft, processor, prompts[0][0]),
        lambda: mediate(peft, processor, *prompts),
        lambda: rank_neurons(peft, processor, prompts[0], prompts[1], contrast),
        lambda: measure_separability(peft, processor, *prompts),
    ]
    for door in doors:
        with pytest.raises(TypeError, match="PROMPT_TUNING"):
            door()


def scaled(peft):
    next(m for m in peft.modules() if hasattr(m, "set_scale")).set_scale("default", 2.0)


def astray(peft):
    next(m for m in peft.modules() if hasattr(m, "set_scale")).set_adapter([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.merge_adapter(), "applied twice.*unmerge_adapter"),
        (lambda p: p.base_model.disable_adapter_layers(), "switched off"),
        (scaled, "of another shape, scale or name"),
        (astray, "differ in their active adapters"),
        (lambda p: p.get_base_model().peft_config["default"].__dict__.update(lora_alpha=3), "places differ"),
        (lambda p: p.get_base_model().__dict__.pop("peft_config"), "no `peft_config`"),
    ],
)
def test_adapters_that_would_not_come_back_are_refused(llava, processor, prompts, change, message):  # noqa: F811
    peft = adapted(llava, LoraConfig(**RANDOM))
    change(peft)
    base = peft.get_base_model()
    with pytest.raises(ValueError, match=message):
        CareForConditionalGeneration.from_base(base, subspaces())
    with pytest.raises(ValueError, match=message):  # before any forward
        care_hf.fit(base, *prompts, processor, QUICK)


def test_what_changed_since_the_repair_is_not_saved_as_if_it_had_not(llava, tmp_path):
    repaired = CareForConditionalGeneration.from_base(adapted(llava, LoraConfig(**RANDOM)), subspaces())
    scaled(repaired)
    with pytest.raises(ValueError, match="of another shape, scale or name"):
        repaired.save_pretrained(tmp_path)


def test_tied_weights_are_not_merged_apart(llava, inputs):
    llava.lm_head.weight = llava.get_input_embeddings().weight
    repaired = CareForConditionalGeneration.from_base(
        adapted(llava, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)), subspaces()
    )
    before = logits(repaired, inputs)
    with pytest.raises(ValueError, match=r"tied .*embed_tokens"):
        repaired.merge_adapters()
    assert torch.equal(logits(repaired, inputs), before)


def test_there_must_be_adapters_to_merge(llava):
    with pytest.raises(ValueError, match="no adapters to merge"):
        CareForConditionalGeneration.from_base(llava, subspaces()).merge_adapters()


def test_a_fit_of_an_adapted_model_is_that_of_the_merged_one(testbed, prompts, tmp_path):  # noqa: F811
    base, processor = testbed
    peft = adapted(copy.deepcopy(base), LoraConfig(**RANDOM))
    prints = [model_fingerprint(base), model_fingerprint(peft.get_base_model())]
    fitted = care_hf.fit(peft, *prompts, processor, QUICK)
    with peft.disable_adapter():
        prints.append(model_fingerprint(peft.get_base_model()))
    scaled(peft)
    prints.append(model_fingerprint(peft.get_base_model()))
    assert len(set(prints)) == 4
    scaled_back = next(m for m in peft.modules() if hasattr(m, "set_scale"))
    scaled_back.set_scale("default", 1.0)
    expected = care_hf.fit(peft.merge_and_unload(), *prompts, processor, QUICK)
    for name, subspace in expected.subspaces()[FFN].items():
        ours = fitted.subspaces()[FFN][name]
        torch.testing.assert_close(ours.mean, subspace.mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.basis @ ours.basis.mT, subspace.basis @ subspace.basis.mT, rtol=1e-2, atol=1e-2)
    fitted.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.adapters["default"]["target_modules"] == sorted(SOME)


def test_a_gated_repair_of_an_adapted_model_decodes_as_the_reference(case):  # noqa: F811
    peft = adapted(copy.deepcopy(case.base), LoraConfig(**RANDOM, r=2, lora_alpha=1))
    reference = Reference(peft.get_base_model(), case.subspaces)
    repaired = CareForConditionalGeneration.from_base(peft, case.subspaces)
    answers = [reference.answer(case.singles[i]) for i in of_each_kind(case)]
    assert {answer.fires for answer in answers} == {False, True}
    assert [a.tokens for a in answers] != [case.answers[i].tokens for i in of_each_kind(case)]
    for i, answer in zip(of_each_kind(case), answers, strict=True):
        assert_answers(repaired.generate(**case.singles[i], **FULL), [answer])


# Adapters on top of a repair


def test_lora_on_top_of_a_gated_repair(case, tmp_path):  # noqa: F811
    model = copy.deepcopy(case.model)
    model.save_pretrained(tmp_path / "care")
    peft = adapted(model, LoraConfig(**RANDOM, r=2, lora_alpha=1))
    first = case.singles[of_each_kind(case)[0]]
    peft(**first, labels=first["input_ids"]).loss.backward()
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    gradients = [p.grad for n, p in peft.named_parameters() if "language_model" in n and n in trained]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)
    peft.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "care"), tmp_path / "lora")
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "care"), tmp_path / "lora")
    merged = merged.merge_and_unload()
    assert isinstance(merged, CareForConditionalGeneration)
    reference = _reference_of(case, model)
    answers = [reference.answer(case.singles[i]) for i in of_each_kind(case)]
    assert [a.tokens for a in answers] != [case.answers[i].tokens for i in of_each_kind(case)]
    for i, answer in zip(of_each_kind(case), answers, strict=True):
        for ours in (peft, again, merged):
            output = ours.generate(**case.singles[i], **FULL)
            assert output.sequences[0, -len(answer.tokens) :].tolist() == answer.tokens
            torch.testing.assert_close(torch.stack(output.logits, 1)[0], answer.logits, rtol=1e-4, atol=1e-4)


def _reference_of(case, adapted_model):  # noqa: F811
    """The reference on the base with the same LoRA, by its definition."""
    base, ours = copy.deepcopy(case.base), dict(adapted_model.vlm.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if name.endswith(tuple(SOME)):
                a, b = (ours[name].get_submodule(f"lora_{x}.default").weight for x in "AB")
                module.weight += b @ a / 2
    return Reference(base, case.subspaces)


def test_a_repaired_model_saves_the_adapters_on_it(llava, inputs, tmp_path):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces())
    alone = logits(repaired, inputs)
    peft = adapted(repaired, LoraConfig(**RANDOM))
    expected = logits(peft, inputs)
    repaired.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), inputs), expected)
    repaired.merge_adapters()
    torch.testing.assert_close(logits(repaired, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(repaired, inputs), alone, atol=1e-2)
    adapted(repaired, LoraConfig(target_modules=r"vlm.*layers\.1.*q_proj", init_lora_weights=False))
    with pytest.raises(ValueError, match="cannot be put on"):
        repaired.save_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{"target_modules": ["gate_proj"], "modules_to_save": ["layers.2.mlp"]}])
def test_a_repaired_module_is_not_copied_into_an_adapter(llava, inputs, config):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces())
    adapted(repaired, LoraConfig(**config))
    with pytest.raises(ValueError, match=r"ModulesToSaveWrapper.*layers\.2\.mlp"):
        repaired(**inputs)


@pytest.fixture
def opt():
    """Its FFN's output is that of a single linear layer, and so is what a repair of it repairs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, intermediate_size=64),
        text_config=OPTConfig(vocab_size=99, **text, word_embed_proj_dim=64, tie_word_embeddings=False),
        image_token_id=90,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def opt_inputs():
    ids = torch.tensor([[5, 90, 90, 90, 90, 6, 7]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


PLACE = Site(1, "ffn")


@pytest.mark.parametrize("targets", [["fc2"], "all-linear"])
def test_an_adapter_around_a_repaired_module_is_refused(opt, opt_inputs, targets, tmp_path):
    place = "model.language_model.decoder.layers.1.fc2"
    found = SafetySubspaces.random(opt, layers=[1], rank=4)
    repaired = CareForConditionalGeneration.from_base(opt, found)
    expected = logits(repaired, opt_inputs)
    peft = adapted(copy.deepcopy(repaired), LoraConfig(target_modules=targets))
    ours = peft.get_base_model()
    for use in (
        lambda: peft(**opt_inputs),
        lambda: peft.generate(**opt_inputs, max_new_tokens=1),
        lambda: torch.compile(ours, backend="eager")(**opt_inputs),
        ours.check,
        ours.subspaces,
        ours.merge_adapters,
        lambda: ours.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"exclude_modules=\['{place}'\]"):
            use()
    assert not any(tmp_path.iterdir())
    peft = adapted(repaired, LoraConfig(target_modules=targets, exclude_modules=[f"vlm.{place}"]))
    assert torch.equal(logits(peft, opt_inputs), expected)  # LoRA begins at nothing


def test_a_repair_around_an_adapted_linear_layer(opt, opt_inputs, tmp_path):
    found = SafetySubspaces.random(opt, layers=[1], rank=4)
    peft = adapted(opt, LoraConfig(target_modules=["fc2"], init_lora_weights=False))
    own = logits(peft, opt_inputs)
    repaired = CareForConditionalGeneration.from_base(peft, found)
    with repaired.disable(), record(repaired.vlm, [PLACE]) as before:
        assert torch.equal(logits(repaired, opt_inputs), own)
    with record(repaired.vlm, [PLACE]) as after:
        expected = logits(repaired, opt_inputs)
    torch.testing.assert_close(after[PLACE], repair(before[PLACE], found.sites[PLACE]))
    assert not torch.equal(after[PLACE], before[PLACE])
    repaired.save_pretrained(tmp_path)
    for model in (AutoModel.from_pretrained(tmp_path), copy.deepcopy(repaired)):
        assert torch.equal(logits(model, opt_inputs), expected)
        model.merge_adapters()
        model.check()
        torch.testing.assert_close(logits(model, opt_inputs), expected, rtol=1e-5, atol=1e-5)
        assert type(site_module(model.vlm, PLACE)).__name__ == "CareLinear"
        with model.disable():
            torch.testing.assert_close(logits(model, opt_inputs), own, rtol=1e-5, atol=1e-5)


def test_a_repair_inside_what_an_adapter_holds_is_refused(opt):
    found = SafetySubspaces.random(opt, layers=[1], rank=4)
    peft = adapted(opt, LoraConfig(target_modules=["layers.0.fc1"], modules_to_save=["decoder.layers.1"]))
    with pytest.raises(ValueError, match=r"ModulesToSaveWrapper .*merge it into the base"):
        CareForConditionalGeneration.from_base(peft, found)


# The adapters of transformers itself


def test_adapters_that_transformers_loaded(llava, inputs, tmp_path, monkeypatch):
    base = copy.deepcopy(llava)
    peft = adapted(llava, LoraConfig(**RANDOM))
    own = logits(peft, inputs)
    peft.save_pretrained(tmp_path / "lora")
    base.load_adapter(tmp_path / "lora")
    assert base._hf_peft_config_loaded and torch.equal(logits(base, inputs), own)
    repaired = CareForConditionalGeneration.from_base(base, subspaces())
    expected = logits(repaired, inputs)
    repaired.save_pretrained(tmp_path / "care")
    loaded = AutoModel.from_pretrained(tmp_path / "care")
    assert torch.equal(logits(loaded, inputs), expected)
    torch.testing.assert_close(logits(loaded.merge_adapters(), inputs), expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_a_repaired_model_loads_itself(llava, inputs, tmp_path, monkeypatch):
    # Its `add_adapter`, unlike its `load_adapter`, asks for a release of PEFT that may not be out.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0")
    CareForConditionalGeneration.from_base(llava, subspaces()).save_pretrained(tmp_path / "care")
    repaired = AutoModel.from_pretrained(tmp_path / "care")
    torch.manual_seed(0)
    repaired.add_adapter(LoraConfig(**RANDOM))
    expected = logits(repaired, inputs)
    repaired.save_pretrained(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").glob("*.safetensors")] == ["adapter_model.safetensors"]
    again = AutoModel.from_pretrained(tmp_path / "care")
    alone = logits(again, inputs)
    again.load_adapter(tmp_path / "lora")
    assert torch.equal(logits(again, inputs), expected) and not torch.allclose(alone, expected, atol=1e-2)
    again.disable_adapters()
    assert torch.equal(logits(again, inputs), alone)
    again.enable_adapters()
    again.merge_adapters()
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "merged"), inputs), logits(again, inputs))
    for auto in (AutoModel, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="in one step"):
            auto.from_pretrained(tmp_path / "lora")
