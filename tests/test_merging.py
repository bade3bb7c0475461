"""Repairs folded into weights, family by family, and every repair that cannot be."""

import copy
import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from families import FAMILIES, collated
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaProcessor

import care_hf
from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.affine import Affine
from care_hf.folding import FFN_ENDS, _ends, biases_by_flag, find_ends
from care_hf.gating import Gate
from care_hf.merge_check import TOLERANCES, difference, token_logits
from care_hf.mergeability import plan_merge
from care_hf.merged_model import plain_copy
from care_hf.projection import SafetyProjection, Subspace
from care_hf.sites import Site, site_module

NORMED = ("paligemma2", "gemma3", "glm4v")  # a norm comes after FFN and attention
WITH_MLP_BIAS = ("llava", "deepseek_vl", "idefics3", "smolvlm", "chameleon", "llama")
WITH_FFN_BIAS = ("instructblip",)  # OPT's own
MERGING = [name for name in FAMILIES if name not in NORMED]
BIASED = (*WITH_MLP_BIAS, *WITH_FFN_BIAS)


def layers(name):
    return (0, 2) if name == "mllama" else (2, 3)  # its others are gated cross-attention


def subspaces(model, where, component="ffn", beta=1.0, fusion="constant", anchor=1.0, **more):
    """Random bases; anchors far from 0."""
    drawn = SafetySubspaces.random(model, where, 3, component=component)
    generator = torch.Generator().manual_seed(1)
    sites = {
        site: {
            name: replace(s, mean=anchor * torch.randn(len(s.mean), generator=generator), beta=beta)
            for name, s in by.items()
        }
        for site, by in drawn.sites.items()
    }
    return SafetySubspaces(sites, fusion, 0.3, **more)


def repaired(name, **options):
    model = FAMILIES[name].model
    return CareForConditionalGeneration.from_base(model, subspaces(model, layers(name), **options))


def stock(path, text_only=False, **options):
    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    return auto.from_pretrained(path, **options).eval()


def tensors(path):
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merges a family, with anchors or without, once."""
    folder = tmp_path_factory.mktemp("merged")

    @functools.cache
    def merge(name, beta):
        inputs = collated(FAMILIES[name]).inputs
        return care_hf.merge(repaired(name, beta=beta), folder / f"{name} {beta}", inputs=inputs)

    return merge


# What merges


@pytest.mark.parametrize("name", MERGING)
def test_without_a_constant_every_family_merges(name, merged, tmp_path):
    result = merged(name, 0.0)
    assert result.difference < 1e-5 and not result.added and not result.rewritten
    FAMILIES[name].model.save_pretrained(tmp_path / "base")
    base, found = tensors(tmp_path / "base"), tensors(result.path)
    assert set(found) == set(base)
    different = {n for n in base if not torch.equal(base[n], found[n])}
    assert different == {n for n in result.changed if not n.endswith(".bias")}  # those of OPT are 0 here
    # In llama4 every second layer has experts, and one that all tokens share.
    assert len(different) == (3 if name == "llama4" else 2)
    config = json.loads((result.path / "config.json").read_text())
    assert config["architectures"] == [type(FAMILIES[name].model).__name__] and "auto_map" not in config


@pytest.mark.parametrize("name", BIASED)
def test_a_constant_goes_into_biases(name, merged):
    result = merged(name, 1.0)
    assert result.difference < 1e-5
    loaded = stock(result.path, FAMILIES[name].text_only)
    if name in WITH_FFN_BIAS:
        assert not result.added
        return
    text = loaded.config.get_text_config()
    assert text.mlp_bias and len(result.added) == 3 * 4  # gate, up and down of every layer
    for layer in range(4):
        mlp = site_module(loaded, Site(layer, "ffn"))
        assert not mlp.gate_proj.bias.any() and not mlp.up_proj.bias.any()
        assert bool(mlp.down_proj.bias.any()) == (layer in layers(name))


@pytest.mark.parametrize("name", MERGING)
def test_attention_needs_a_place_for_a_constant_too(name):
    plan, obstacles = plan_merge(repaired(name, component="attention"))
    assert not plan_merge(repaired(name, component="attention", beta=0.0))[1]
    flagged = (*WITH_MLP_BIAS, "qwen3_vl", "qwen3_vl_moe", "llama4", "aya_vision", "paligemma", "gemma")
    assert bool(obstacles) == (name not in (*flagged, "instructblip"))
    assert plan.flags == ({"attention_bias"} if name in flagged else set())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma", "aya_vision", "instructblip", "llama4"])
def test_attention_merges_too(name, tmp_path):
    inputs = collated(FAMILIES[name]).inputs
    model, dropped = repaired(name, component="attention"), name not in ("llava", "instructblip")
    if dropped:  # by vLLM, without a word
        with pytest.raises(ValueError, match="only_transformers=True"):
            care_hf.merge(model, tmp_path / "merged", inputs=inputs)
    merged = care_hf.merge(model, tmp_path / "merged", inputs=inputs, only_transformers=dropped)
    assert merged.difference < 1e-5 and len(merged.added) == (0 if name == "instructblip" else 16)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "instructblip"])
def test_in_double_precision_it_is_exact(name, tmp_path):
    model = copy.deepcopy(FAMILIES[name].model).double()
    beta = 1.0 if name in BIASED else 0.0
    model = CareForConditionalGeneration.from_base(model, subspaces(model, layers(name), beta=beta))
    merged = care_hf.merge(model, tmp_path / "merged", inputs=collated(FAMILIES[name]).inputs)
    assert merged.difference < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl_moe", "llama4"])
@torch.no_grad()
def test_half_precision_differs_by_its_rounding(name, dtype, tmp_path):
    FAMILIES[name].model.save_pretrained(tmp_path / "base")
    base, inputs = stock(tmp_path / "base", dtype=dtype), collated(FAMILIES[name]).inputs
    base.config._name_or_path = ""
    model = CareForConditionalGeneration.from_base(
        base, subspaces(base, layers(name), beta=float(name in BIASED), strength=3.0)
    )
    result = care_hf.merge(model, tmp_path / "merged", inputs=inputs)
    assert {t.dtype for t in tensors(result.path).values()} == {dtype}
    assert result.tolerance == TOLERANCES[dtype] and result.difference < result.tolerance / 2
    # A repair that is lost is far beyond what rounding explains.
    expected, without = token_logits(model, [inputs]), token_logits(base, [inputs])
    assert difference(expected, without) > result.tolerance


def test_stock_transformers_loads_them_without_this_package(merged, tmp_path):
    listed = {}
    for name in MERGING:
        beta, inputs = float(name in BIASED), collated(FAMILIES[name]).inputs
        with torch.no_grad():
            logits = repaired(name, beta=beta)(**inputs).logits
        torch.save((dict(inputs), logits), tmp_path / f"{name}.pt")
        listed[name] = (str(merged(name, beta).path), FAMILIES[name].text_only)
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    code = """
import json, pathlib, sys
sys.modules["care_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
MoeCausalLMOutputWithPast.image_outputs = None  # that stock Llama 4 asks for
folder = pathlib.Path(sys.argv[1])
for name, (path, text_only) in json.loads((folder / "listed.json").read_text()).items():
    inputs, expected = torch.load(folder / f"{name}.pt")
    model = (AutoModelForCausalLM if text_only else AutoModelForImageTextToText).from_pretrained(path).eval()
    with torch.no_grad():
        found = model(**inputs).logits
    print(name, float((found - expected).abs().max() / expected.abs().median()))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert set(errors) == set(MERGING) and all(float(error) < 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize("fusion", ["constant", "union", "adaptive", "printed"])
@pytest.mark.parametrize("modalities", [("visual",), ("text",), ("visual", "text")])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_map_is_the_repair(fusion, modalities, strength):
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name in modalities:
        basis, other = (
            torch.linalg.qr(torch.randn(16, 3, generator=generator, dtype=torch.float64)).Q,
            torch.randn(16, 3),
        )
        reader = basis + other.double() - basis @ (basis.mT @ other.double())
        parts[name] = Subspace(basis, torch.randn(16), 0.75, reader if name == "text" else None)
    if len(modalities) == 2 and fusion in ("adaptive", "printed"):
        return
    care = SafetyProjection.from_subspaces(parts, fusion, 0.3, strength)
    h, mapping = torch.randn(5, 7, 16, dtype=torch.float64), Affine.of(care)
    torch.testing.assert_close(mapping(h), care(h), rtol=1e-9, atol=1e-9)
    x, weight = torch.randn(7, 11, dtype=torch.float64), torch.randn(16, 11, dtype=torch.float64)
    expected = mapping(x @ weight.mT) - mapping.constant
    torch.testing.assert_close(x @ mapping.folded(weight).mT, expected)
    torch.testing.assert_close(x @ mapping.folded(weight.mT, transposed=True), expected)
    stacked = mapping.folded(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(x @ stacked[1].mT, 2 * expected)


def test_at_strength_zero_any_repair_is_its_base(tmp_path):
    model = repaired("llava", fusion="adaptive", component="residual")
    model.strength = 0
    merged = care_hf.merge(model, tmp_path / "merged")
    assert merged.difference == 0 and not merged.changed and not merged.added


def test_one_that_is_switched_off_or_trained_merges_as_it_would_act(tmp_path):
    model = repaired("llava").train()
    model.disable()
    assert care_hf.merge(model, tmp_path / "merged").difference < 1e-5
    assert model.training and not model.care_state.enabled


def test_hooks_of_accelerate_do_not_matter(tmp_path):
    base = copy.deepcopy(FAMILIES["llava"].model)
    before = CareForConditionalGeneration.from_base(base, subspaces(base, (2, 3), fusion="adaptive"))
    add_hook_to_module(site_module(before.vlm, Site(2, "ffn")), ModelHook())
    inputs = collated(FAMILIES["llava"]).inputs
    with torch.no_grad():
        torch.testing.assert_close(plain_copy(before.vlm)(**inputs).logits, base(**inputs).logits)
    add_hook_to_module(site_module(base, Site(2, "ffn")), ModelHook())
    model = CareForConditionalGeneration.from_base(base, subspaces(base, (2, 3)))
    assert care_hf.merge(model, tmp_path / "merged").difference < 1e-5


# Files


@pytest.fixture
def base(tmp_path):
    FAMILIES["llava"].model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    processor = FAMILIES["llava"].processor(FAMILIES["llava"].model.config)
    processor.save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("The base.")
    (tmp_path / "base/consolidated.safetensors").write_bytes(b"the base in another form")
    return tmp_path / "base"


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("single", [True, False])
def test_original_files_are_kept_but_for_what_changes(base, tmp_path, single, beta):
    if single:
        for path in base.glob("model*"):
            path.unlink()
        FAMILIES["llava"].model.save_pretrained(base)
    loaded = stock(base)
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3), beta=beta))
    merged = care_hf.merge(model, tmp_path / "merged")
    assert merged.rewritten and merged.difference < 1e-5
    originals, found = sorted(base.glob("model*.safetensors")), tensors(tmp_path / "merged")
    assert (len(originals) == 1) == single
    changed_files = 0
    for path in originals:
        other = tmp_path / "merged" / path.name
        if single and beta:
            other = tmp_path / "merged/model-00001-of-00002.safetensors"
        before, after = path.read_bytes(), other.read_bytes()
        assert len(before) == len(after)
        changed_files += before != after
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                assert torch.equal(file.get_tensor(name), found[name]) == (name not in merged.changed)
    assert changed_files <= 2
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not {"README.md", "consolidated.safetensors"} & names
    flag = json.loads((tmp_path / "merged/config.json").read_text())["text_config"].get("mlp_bias")
    assert bool(flag) == bool(beta)
    assert LlavaProcessor.from_pretrained(tmp_path / "merged").chat_template


@pytest.mark.parametrize("name", ["llama", "idefics3"])
def test_the_flag_is_set_where_the_text_configuration_is(name, tmp_path):
    FAMILIES[name].model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/config.json"
    config = {**json.loads(path.read_text()), "of the base": True}
    path.write_text(json.dumps(config))
    loaded = stock(tmp_path / "base", FAMILIES[name].text_only)
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3)))
    result = care_hf.merge(model, tmp_path / "merged")
    assert result.rewritten and result.difference < 1e-5
    found = json.loads((result.path / "config.json").read_text())
    (config if name == "llama" else config["text_config"])["mlp_bias"] = True
    assert found == config


def test_tied_embeddings_stay_tied(tmp_path):
    FAMILIES["gemma"].model.save_pretrained(tmp_path / "base")
    loaded = stock(tmp_path / "base", text_only=True)
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3), beta=0.0))
    care_hf.merge(model, tmp_path / "merged")
    again = stock(tmp_path / "merged", text_only=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors(tmp_path / "merged")


def test_a_model_in_higher_precision_than_its_files_keeps_their_dtype(tmp_path):
    half = copy.deepcopy(FAMILIES["llava"].model).bfloat16()
    half.save_pretrained(tmp_path / "base")
    loaded = stock(tmp_path / "base", dtype=torch.float32)
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3)))
    merged = care_hf.merge(model, tmp_path / "merged")
    assert merged.rewritten and {t.dtype for t in tensors(merged.path).values()} == {torch.bfloat16}
    assert 1e-5 < merged.difference < merged.tolerance == TOLERANCES[torch.bfloat16]


def test_files_of_other_weights_are_not_taken(base, tmp_path):
    loaded = stock(base)
    with torch.no_grad():
        loaded.model.language_model.layers[0].mlp.up_proj.weight.add_(0.01)
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3)))
    merged = care_hf.merge(model, tmp_path / "merged")
    assert not merged.rewritten and merged.difference < 1e-5
    with pytest.raises(
        ValueError, match=r"not what the model was made from: .*layers.0.mlp.up_proj.* is another there"
    ):
        care_hf.merge(model, tmp_path / "again", base=base)
    with pytest.raises(ValueError, match="it has no whole safetensors files"):
        care_hf.merge(model, tmp_path / "again", base=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "again" in path.name] == []


def test_the_hubs_cache_is_looked_into(base, tmp_path, monkeypatch):
    loaded = stock(base)
    loaded.config._name_or_path = "org/llava"
    model = CareForConditionalGeneration.from_base(loaded, subspaces(loaded, (2, 3)))
    assert not care_hf.merge(model, tmp_path / "one", compare="tensors").rewritten
    asked = []
    monkeypatch.setattr(
        "care_hf.merge_files.try_to_load_from_cache",
        lambda *args, **options: asked.append((args, options)) or str(base / "config.json"),
    )
    assert care_hf.merge(model, tmp_path / "two", compare="tensors").rewritten
    assert asked[0][0] == ("org/llava", "config.json")


def test_a_folder_merges_and_is_sharded(base, tmp_path):
    model = repaired("llava")
    model.processor = LlavaProcessor.from_pretrained(base)
    model.save_pretrained(tmp_path / "care")
    merged = care_hf.merge(tmp_path / "care", tmp_path / "merged", max_shard_size="100KB")
    names = {path.name for path in merged.path.iterdir()}
    assert "model.safetensors.index.json" in names and "tokenizer.json" in names
    assert not any(name.endswith(".py") for name in names)
    with_base = care_hf.merge(tmp_path / "care", tmp_path / "from base", base=base)
    assert with_base.rewritten and merged.difference == with_base.difference < 1e-5
    first, second = tensors(merged.path), tensors(with_base.path)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    care_hf.merge(model, tmp_path / "with processor")
    assert LlavaProcessor.from_pretrained(tmp_path / "with processor").chat_template


# What does not merge


def refusal(model, tmp_path, error=ValueError, **options):
    with pytest.raises(error) as caught:
        care_hf.merge(model, tmp_path / "merged", **options)
    assert not any(tmp_path.iterdir())
    return str(caught.value)


@pytest.mark.parametrize("fusion", ["adaptive", "printed", "route"])
def test_fusions_that_look_at_the_token_are_refused_with_a_measured_way_out(fusion, tmp_path):
    inputs = collated(FAMILIES["llava"]).inputs
    model = repaired("llava", fusion=fusion)
    message = refusal(model, tmp_path, inputs=inputs)
    assert f"fusion '{fusion}'" in message.lower() or f"fusion {fusion!r}" in message
    assert "(2.ffn, 3.ffn)" in message
    costs = care_hf.cost_of_switching(model, inputs)
    best = next(iter(costs))
    assert f"What would merge is Recipe({best}), at a cost of {costs[best].divergence:.2g} nats per token" in message
    assert set(costs) == {
        "fusion='constant', fusion_weight=0.5",
        "fusion='union'",
        "fusion='constant', modalities=('visual',)",
        "fusion='constant', modalities=('text',)",
        "no repair",
    }
    tokens = int(inputs["attention_mask"].sum())
    assert all(cost.divergence > 0 and 0 <= cost.agreement <= 1 and cost.tokens == tokens for cost in costs.values())
    assert [c.divergence for c in [*costs.values()][:-1]] == sorted(c.divergence for c in [*costs.values()][:-1])


def test_the_cost_is_that_of_the_model_that_would_merge(tmp_path):
    inputs = collated(FAMILIES["llava"]).inputs
    model = repaired("llava", fusion="adaptive")
    other = repaired("llava", fusion="constant")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        p, q = (m(**inputs).logits[mask].double().log_softmax(-1) for m in (model, repaired_at_half()))
        base = FAMILIES["llava"].model(**inputs).logits[mask].double().log_softmax(-1)
    costs = care_hf.cost_of_switching(model, inputs)
    cost = costs["fusion='constant', fusion_weight=0.5"]
    assert cost.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert cost.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert costs["no repair"].divergence == pytest.approx(float((p.exp() * (p - base)).sum(-1).mean()), rel=1e-3)
    assert care_hf.cost_of_switching(other, inputs)["fusion='union'"].divergence > 0


def repaired_at_half():
    model = FAMILIES["llava"].model
    found = replace(subspaces(model, (2, 3)), fusion_weight=0.5)
    return CareForConditionalGeneration.from_base(model, found)


def test_one_modality_under_route_and_a_scope_are_refused(tmp_path):
    model = FAMILIES["llava"].model
    text = replace(subspaces(model, (2,)).only("text"), fusion="route")
    message = refusal(CareForConditionalGeneration.from_base(model, text), tmp_path)
    assert "fusion 'route' repairs visual tokens otherwise" in message and "Recipe(fusion='constant')" in message
    # A gate without detectors only tells where the prompt ends.
    gate = Gate((5,), torch.zeros(model.config.text_config.hidden_size, 0), torch.zeros(0))
    scoped = subspaces(model, (2,), fusion="adaptive", scope="prompt", gate=gate, gate_site=Site(1, "residual"))
    message = refusal(CareForConditionalGeneration.from_base(model, scoped), tmp_path)
    assert "it repairs the tokens of the prompt alone" in message and "Recipe(scope='all', fusion='" in message
    place = {"last": Subspace(torch.eye(model.config.text_config.hidden_size)[:, :2], torch.ones(32))}
    turn = SafetySubspaces({Site(2, "ffn"): place}, "route", gate=gate, gate_site=Site(1, "residual"))
    message = refusal(CareForConditionalGeneration.from_base(model, turn), tmp_path)
    assert "and no others (2.ffn)" in message and "Recipe.load('paper').replace(fusion='constant'" in message


def test_gated_repairs_are_refused(tmp_path):
    model = FAMILIES["llava"].model
    width = model.config.text_config.hidden_size
    place = {"last": Subspace(torch.eye(width)[:, :2], torch.ones(width))}
    gate = Gate((5,), torch.ones(width, 1), torch.zeros(1))
    gated = SafetySubspaces({Site(2, "residual"): place}, "route", gate=gate, gate_site=Site(1, "residual"))
    message = refusal(CareForConditionalGeneration.from_base(model, gated), tmp_path)
    assert "its gate decides from activations" in message and "testbed" in message and "no repair at all" in message


def test_sites_that_no_linear_layer_ends_in_are_refused(tmp_path):
    message = refusal(repaired("llava", component="residual"), tmp_path)
    assert "residual stream itself" in message and "Recipe(component='ffn'), fitted anew" in message
    message = refusal(repaired("llava", component="residual", fusion="adaptive"), tmp_path)
    assert "fusion='constant'" in message and "component='ffn'" in message


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("component", ["ffn", "attention"])
def test_norms_are_refused(name, component, tmp_path):
    message = refusal(repaired(name, component=component, beta=0.0), tmp_path, inputs=collated(FAMILIES[name]).inputs)
    assert "RMSNorm, which scales each token by its own length" in message and "keep the repaired model" in message


@pytest.mark.parametrize("name", sorted(set(MERGING) - set(BIASED)))
def test_a_constant_without_a_place_is_an_obstacle(name):
    obstacles = plan_merge(repaired(name))[1]
    assert len(obstacles) == 2 and {obstacle.setting for obstacle in obstacles} == {"Recipe(anchor='none')"}
    assert all(("can have no bias" in o.reason) or ("a sum over experts" in o.reason) for o in obstacles)
    assert not plan_merge(repaired(name, anchor=0.0))[1]  # whatever beta is


def test_a_constant_without_a_place_is_refused(tmp_path):
    inputs = collated(FAMILIES["qwen2_5_vl"]).inputs
    message = refusal(repaired("qwen2_5_vl"), tmp_path, inputs=inputs)
    assert "down_proj of qwen2_5_vl_text can have no bias (2.ffn, 3.ffn)" in message
    assert "anchor='none'), at a cost of" in message
    anchored = care_hf.merge(repaired("qwen2_5_vl", anchor=0.0), tmp_path / "merged", inputs=inputs)
    assert anchored.difference < 1e-5


def test_a_cost_that_cannot_be_measured_does_not_hide_the_reason(tmp_path):
    message = refusal(repaired("instructblip", fusion="adaptive"), tmp_path)
    assert "fusion 'adaptive'" in message and "was not measured" in message and "give other `inputs`" in message


def test_adapters_and_other_models_are_refused(tmp_path):
    base = copy.deepcopy(FAMILIES["llava"].model)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = CareForConditionalGeneration.from_base(lora, subspaces(FAMILIES["llava"].model, (2, 3)))
    assert "call its `merge_adapters()` first" in refusal(model, tmp_path)
    assert care_hf.merge(model.merge_adapters(), tmp_path / "merged").difference < 1e-5
    with pytest.raises(TypeError, match="is not a repaired model"):
        care_hf.merge(base, tmp_path / "other")
    with pytest.raises(TypeError, match="merge_and_unload"):
        care_hf.merge(get_peft_model(repaired("llava"), LoraConfig(target_modules=["q_proj"])), tmp_path / "other")


def test_weights_that_are_quantised_offloaded_or_tied_are_refused(tmp_path):
    model = repaired("llava")
    model.config.quantization_config = {"quant_method": "any"}
    assert "The base is quantised" in refusal(model, tmp_path)
    model = copy.deepcopy(repaired("llava"))
    model.vlm.model.language_model.layers[0].mlp.up_proj.to("meta")
    assert "is offloaded" in refusal(model, tmp_path)
    model = copy.deepcopy(repaired("llava"))
    decoder = model.vlm.model.language_model.layers
    decoder[1].mlp.down_proj.weight = decoder[2].mlp.down_proj.weight
    assert "is tied" in refusal(model, tmp_path)


def test_nothing_is_written_over_and_options_are_checked(tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError, match="give a new folder"):
        care_hf.merge(repaired("llava"), tmp_path / "merged")
    with pytest.raises(ValueError, match="compare='eyes' is not known"):
        care_hf.merge(repaired("llava"), tmp_path / "other", compare="eyes")
    with pytest.raises(ValueError, match="failed on what it is to be compared on"):
        care_hf.merge(repaired("llava"), tmp_path / "other", inputs={"pixels": torch.zeros(1)})


def test_what_is_not_the_repaired_model_is_removed(tmp_path, monkeypatch):
    model = repaired("llava", beta=0.0, strength=3.0)
    with monkeypatch.context() as patched:
        patched.setattr("care_hf.merging.fold", lambda model, plan: ())
        message = refusal(model, tmp_path)
    assert "differ from the repaired model's by" in message and "so it was removed" in message
    original = Affine.folded
    monkeypatch.setattr(Affine, "__call__", lambda self, h: 1.01 * original(self, h.double().mT).mT)
    assert "from the map that would be merged" in refusal(model, tmp_path)


def test_a_checkpoint_that_loads_otherwise_is_removed(tmp_path, monkeypatch):
    saving = type(FAMILIES["llava"].model).save_pretrained

    def without_flag(model, folder, **options):
        saving(model, folder, **options)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["mlp_bias"] = False
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(type(FAMILIES["llava"].model), "save_pretrained", without_flag)
    assert "tensors are not as merged" in refusal(repaired("llava"), tmp_path)


def test_ends_and_flags():
    ends = find_ends(FAMILIES["llama4"].model, Site(3, "ffn"))
    assert ends.single is None and len(ends.linears) == 1 and ends.stacks[0][1]
    assert not find_ends(FAMILIES["qwen3_vl_moe"].model, Site(3, "ffn")).stacks[0][1]
    assert find_ends(FAMILIES["instructblip"].model, Site(1, "ffn")).single.endswith("layers.1.fc2")
    assert not biases_by_flag(FAMILIES["qwen2"].model, "ffn")
    assert len(biases_by_flag(FAMILIES["gemma"].model, "attention")) == 16


def test_experts_one_by_one_and_what_is_unknown_beside_them():
    def mlp(leaf="down_proj", width=8):
        return torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 6), leaf: torch.nn.Linear(6, width)})

    block = torch.nn.ModuleDict({"gate": torch.nn.Linear(8, 2), "experts": torch.nn.ModuleList([mlp("w2"), mlp("w2")])})
    block["shared_experts"] = mlp()
    ends = _ends(block, "mlp", FFN_ENDS, 8)
    assert ends.linears == ("mlp.experts.0.w2", "mlp.experts.1.w2", "mlp.shared_experts.down_proj") and not ends.single
    block["memory"] = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"mixture of experts has \['memory'\]"):
        _ends(block, "mlp", FFN_ENDS, 8)
    for other, message in ((mlp(width=4), "in Linear"), (mlp("last"), "not in a linear layer of")):
        with pytest.raises(ValueError, match=message):
            _ends(other, "mlp", FFN_ENDS, 8)
    block = torch.nn.ModuleDict({"experts": mlp()})
    with pytest.raises(ValueError, match="are not stacked in a known way"):
        _ends(block, "mlp", FFN_ENDS, 8)
