import copy
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import qwen_config
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from care_hf.contrasts import Contrast
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.neuron_runs import UnitShare
from care_hf.neurons import NeuronRanking, VerifiedNeuron, down_projection, rank_neurons
from care_hf.samples import Sample, collate
from care_hf.sites import Site, decoder_layers, image_token_ids
from care_hf.subspace import SafetySubspaces

UNITS = 288
CONTRAST = Contrast((20, 21), (30, 31, 32))


@pytest.fixture(scope="module")
def malicious(world):
    """Of unequal length, two with an image."""
    return [*world.attack("typographic", "validation", 2), *world.plain("validation", 2)]


@pytest.fixture(scope="module")
def benign(world):
    return world.benign("recipe", "validation", 2) + world.benign("typographic", "validation", 1)


@pytest.fixture
def double(llava, monkeypatch):
    def norm(self, h):  # transformers' own computes in float32
        return self.weight * h * (h.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    return llava.double()


def alone(processor, model, samples):
    """The inputs of each prompt by itself, so without padding."""
    tokens = image_token_ids(model.config)
    return [collate(processor, [Sample(s.messages)], tokens).inputs for s in samples]


def log_odds(model, inputs):
    p = model(**inputs, use_cache=False).logits[0, -1].double().softmax(-1)
    return p[list(CONTRAST.refused)].sum().log() - p[list(CONTRAST.complied)].sum().log()


def mean_units(model, inputs, layer):
    """From what enters the FFN, by its formula."""
    mlp, entered = decoder_layers(model)[layer].mlp, []
    handle = mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0][0]))
    with torch.no_grad():
        for one in inputs:
            model(**one)
    handle.remove()
    x = torch.cat(entered)
    return (nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)).mean(0)


@contextmanager
def share_ablated(model, layer, unit, reference, share):
    """`share` of the way from the unit's values to `reference`."""

    def change(module, args):
        mask = torch.arange(args[0].shape[-1]) == unit
        return (args[0] + share * mask * (reference - args[0]),)

    handle = decoder_layers(model)[layer].mlp.down_proj.register_forward_pre_hook(change)
    yield
    handle.remove()


def effect_by_weights(model, layer, unit, inputs, reference=0.0):
    """Of each prompt: the unit's column is taken out of the weights, what the reference adds is put in the bias."""
    module = down_projection(model, layer)
    weight, bias = module.weight.data, module.bias
    column = weight[:, unit].clone()
    with torch.no_grad():
        before = torch.stack([log_odds(model, one) for one in inputs])
        weight[:, unit] = 0
        module.bias = nn.Parameter(reference * column + (0 if bias is None else bias))
        after = torch.stack([log_odds(model, one) for one in inputs])
    weight[:, unit], module.bias = column, bias
    return after - before


def check_effects(ranking, model, inputs, atol=1e-5):
    assert max(abs(n.effect) for n in ranking.verified) > 50 * atol  # or the comparison would say nothing
    for neuron in ranking.verified:
        expected = effect_by_weights(model, neuron.layer, neuron.unit, inputs)
        assert neuron.effect == pytest.approx(float(expected.mean()), abs=atol)
        assert neuron.estimate == float(ranking.estimates[neuron.layer][neuron.unit])
    with torch.no_grad():
        outcome = torch.stack([log_odds(model, one) for one in inputs]).mean()
    assert ranking.outcome == pytest.approx(float(outcome), abs=atol)


@pytest.mark.parametrize("reference", ["zero", "mean"])
def test_estimates_are_the_derivatives_by_each_unit(double, processor, malicious, benign, reference):
    ranking = rank_neurons(double, processor, malicious, benign, CONTRAST, reference=reference, top=1)
    assert {layer: tuple(e.shape) for layer, e in ranking.estimates.items()} == dict.fromkeys(range(6), (UNITS,))
    inputs, others = alone(processor, double, malicious), alone(processor, double, benign)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 3, 5):
        references = mean_units(double, others, layer) if reference == "mean" else torch.zeros(UNITS)
        for unit in torch.randint(UNITS, (2,), generator=generator).tolist():
            derivative = 0
            for one in inputs:
                share = torch.zeros((), dtype=torch.float64, requires_grad=True)
                with share_ablated(double, layer, unit, references[unit].detach(), share):
                    derivative += torch.autograd.grad(log_odds(double, one), share)[0] / len(inputs)
            assert abs(derivative) > 1e-9
            assert float(ranking.estimates[layer][unit]) == pytest.approx(float(derivative), rel=1e-4)


def test_estimates_are_the_effects_of_infinitesimal_ablations(double, processor, malicious):
    ranking = rank_neurons(double, processor, malicious, None, CONTRAST, reference="zero", top=3)
    inputs, step = alone(processor, double, malicious), 1e-3
    for neuron in ranking.verified:
        ends = []
        for share in (step, -step):
            with share_ablated(double, neuron.layer, neuron.unit, 0.0, share), torch.no_grad():
                ends.append(sum(log_odds(double, one) for one in inputs) / len(inputs))
        assert neuron.estimate == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-8)


def test_where_the_outcome_is_linear_the_estimate_is_the_effect(double, processor, malicious):
    double.model.language_model.norm = nn.Identity()
    ranking = rank_neurons(
        double, processor, malicious, None, Contrast((20,), (30,)), reference="zero", layers=[5], top=4
    )
    read = []
    handle = down_projection(double, 5).register_forward_pre_hook(lambda module, args: read.append(args[0][0, -1]))
    with torch.no_grad():
        for one in alone(processor, double, malicious):
            double(**one)
    handle.remove()
    toward = (double.lm_head.weight[20] - double.lm_head.weight[30]).detach()
    expected = -torch.stack(read).mean(0) * (toward @ down_projection(double, 5).weight.detach())
    torch.testing.assert_close(ranking.estimates[5].double(), expected, rtol=1e-5, atol=1e-7)
    assert [n.effect for n in ranking.verified] == pytest.approx([float(expected[n.unit]) for n in ranking.verified])
    assert ranking.correlation == pytest.approx({"top": 1.0, "random": 1.0, "both": 1.0})


def test_effects_are_those_of_weights_without_the_unit(llava, processor, malicious, benign):
    inputs, others = (alone(processor, llava, prompts) for prompts in (malicious, benign))
    zero = rank_neurons(llava, processor, malicious, None, CONTRAST, reference="zero", layers=[4, 1], top=3)
    assert list(zero.estimates) == [1, 4]
    check_effects(zero, llava, inputs)
    mean = rank_neurons(llava, processor, malicious, benign, CONTRAST, layers=[2], top=3)
    references = mean_units(llava, others, 2).detach()
    for neuron in mean.verified:
        expected = effect_by_weights(llava, 2, neuron.unit, inputs, references[neuron.unit])
        assert neuron.effect == pytest.approx(float(expected.mean()), abs=1e-5)


def test_a_repaired_model_is_followed_with_its_repair(llava, processor, malicious):
    bases = {"visual": random_subspace(0), "text": random_subspace(1)}
    repaired = CareForConditionalGeneration.from_base(
        llava, SafetySubspaces({Site(2, "ffn"): bases, Site(4, "residual"): bases}, "route")
    )
    ranking, base = (
        rank_neurons(model, processor, malicious, None, CONTRAST, reference="zero", layers=[1, 2], top=3, batch_size=9)
        for model in (repaired, llava)
    )
    check_effects(ranking, repaired, alone(processor, repaired, malicious))
    assert abs(ranking.outcome - base.outcome) > 1e-3


def test_a_planted_unit_is_found(llava, processor, malicious, benign):
    planted, decoy, token = (3, 17), (2, 40), processor.tokenizer.convert_tokens_to_ids("<assistant>")
    with torch.no_grad():
        for layer in range(6):
            down_projection(llava, layer).weight.mul_(0.01)
        embedded = llava.get_input_embeddings().weight[token]
        head = llava.lm_head.weight
        refused, complied = head[list(CONTRAST.refused)].mean(0), head[list(CONTRAST.complied)].mean(0)
        both = torch.stack([refused, complied])
        aside = head[50] - both.T @ torch.linalg.lstsq(both.T, head[50][:, None]).solution[:, 0]
        # Both fire as strongly; only what the decoy writes does not tell refusal and compliance apart.
        for (layer, unit), writes in ((planted, refused - complied), (decoy, aside)):
            mlp = decoder_layers(llava)[layer].mlp
            for module in (mlp.gate_proj, mlp.up_proj):
                module.weight[unit] = embedded / embedded.norm()
            mlp.down_proj.weight[:, unit] = writes / writes.norm()
    for reference in ("zero", "mean"):
        ranking = rank_neurons(llava, processor, malicious, benign, CONTRAST, reference=reference, top=5)
        first, *others = ranking.verified
        assert (first.layer, first.unit, first.chosen) == (*planted, "top")
        assert first.effect < 0 and first.estimate < 0 and first.high < 0
        assert abs(first.effect) > 3 * max(abs(n.effect) for n in others)
        assert ranking.table().splitlines()[2].startswith("| 3 | 17 | top |")


def test_batches_and_padding_change_nothing(llava, processor, malicious, benign):
    llava.get_input_embeddings().weight.data[processor.tokenizer.pad_token_id] = 50.0
    options = {"top": 3, "layers": [0, 3, 5]}
    whole = rank_neurons(llava, processor, malicious, benign, CONTRAST, **options)
    for batch_size in (1, 3, 64):
        other = rank_neurons(llava, processor, malicious, benign, CONTRAST, batch_size=batch_size, **options)
        for layer, estimates in whole.estimates.items():
            torch.testing.assert_close(other.estimates[layer], estimates, rtol=1e-3, atol=1e-6)
        assert [(n.layer, n.unit, n.chosen) for n in other.verified] == [
            (n.layer, n.unit, n.chosen) for n in whole.verified
        ]
        for ours, theirs in zip(whole.verified, other.verified, strict=True):
            assert (theirs.effect, theirs.low, theirs.high) == pytest.approx(
                (ours.effect, ours.low, ours.high), abs=1e-5
            )


def test_a_seed_gives_the_same_and_another_other_random_units(llava, processor, malicious):
    options = {"reference": "zero", "layers": [3], "top": 4}
    first, again, other = (
        rank_neurons(llava, processor, malicious[2:], None, CONTRAST, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert first.to_dict() == again.to_dict()
    assert torch.equal(first.estimates[3], again.estimates[3]) and torch.equal(first.estimates[3], other.estimates[3])
    units = [[[n.unit for n in r.verified if n.chosen == why] for why in ("top", "random")] for r in (first, other)]
    assert units[0][0] == units[1][0] and set(units[0][1]) != set(units[1][1])
    by_size = first.estimates[3].abs().argsort(descending=True).tolist()
    assert units[0][0] == by_size[:4]
    assert len(set(units[0][1]) - set(by_size[:4])) == 4


def test_correlations_are_those_of_ranks(llava, processor, malicious):
    ranking = rank_neurons(llava, processor, malicious, None, CONTRAST, reference="zero", top=6)
    for name in ("top", "random", "both"):
        chosen = [n for n in ranking.verified if name in (n.chosen, "both")]
        ranks = [np.argsort(np.argsort([getattr(n, field) for n in chosen])) for field in ("estimate", "effect")]
        assert ranking.correlation[name] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_all_units_leave_none_to_draw(llava, processor, malicious):
    layer = decoder_layers(llava)[0]
    layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = (
        nn.Linear(128, 1),
        nn.Linear(128, 1),
        nn.Linear(1, 128),
    )
    ranking = rank_neurons(llava, processor, malicious, None, CONTRAST, reference="zero", layers=[0], top=1)
    assert [n.chosen for n in ranking.verified] == ["top"]
    assert ranking.correlation == {"top": None, "random": None, "both": None}


def test_intervals_of_few_prompts(llava, processor, malicious):
    options = {"reference": "zero", "layers": [5], "top": 2}
    (one,) = malicious[2:3]
    single, twice, pair = (
        rank_neurons(llava, processor, prompts, None, CONTRAST, **options)
        for prompts in ([one], [one, one], malicious[2:4])
    )
    assert all(n.low is None and n.high is None for n in single.verified)
    assert "| - |" in single.table()
    for n in twice.verified:
        assert (n.low, n.high) == pytest.approx((n.effect, n.effect), abs=1e-6)
    # Of two prompts, a quarter of the resamples holds the one alone, and a quarter the other.
    inputs = alone(processor, llava, malicious[2:4])
    for n in pair.verified:
        effects = effect_by_weights(llava, n.layer, n.unit, inputs)
        assert (n.low, n.high) == pytest.approx((float(effects.min()), float(effects.max())), abs=1e-5)


class WordProcessor:
    """Gives the token ids that are written in the text, and what is said of the images of the prompts."""

    chat_template = "words"
    tokenizer = SimpleNamespace(all_special_ids=[0])

    def __init__(self, image=None):
        self.image = image

    def apply_chat_template(self, conversations, **kwargs):
        parts = [conversation[0]["content"] for conversation in conversations]
        rows = [[int(word) for part in p if part["type"] == "text" for word in part["text"].split()] for p in parts]
        width = max(map(len, rows))
        found = {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }
        if self.image is not None:
            found["mm_token_type_ids"] = (found["input_ids"] == 90).long()
            pictured = [torch.full((16, 96), 0.0) + self.image(rows) for rows in rows if 90 in rows]
            if pictured:
                found["pixel_values"] = torch.cat(pictured)
                found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(pictured))
        return found


def words(*texts):
    return [Sample([{"role": "user", "content": [{"type": "text", "text": text}]}]) for text in texts]


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_images_of_patches_are_copied_with_their_prompts():
    """In Qwen2.5-VL pixel values have a row per patch, not per prompt."""
    torch.manual_seed(0)
    qwen = Qwen2_5_VLForConditionalGeneration(qwen_config(99, 90, 93, 91, 92, depth=5)).eval()
    with torch.no_grad():  # so that effects are far above rounding
        for parameter in qwen.model.parameters():
            parameter.mul_(4)
    assert [down_projection(qwen, i) for i in range(3)] == [layer.mlp.down_proj for layer in decoder_layers(qwen)]
    noise = torch.randn(99, 16, 96, generator=torch.Generator().manual_seed(1))
    processor = WordProcessor(lambda row: noise[row[0]])
    image = "91 90 90 90 90 92"
    prompts = words(f"5 {image} 6 7", "9 10 11", f"8 3 {image} 12")
    inputs = alone(processor, qwen, prompts)
    for chosen, options in ((slice(3), {"batch_size": 16}), (slice(1, 2), {"batch_size": 4})):
        ranking = rank_neurons(qwen, processor, prompts[chosen], None, CONTRAST, reference="zero", top=4, **options)
        check_effects(ranking, qwen, inputs[chosen])


def test_units_of_flattened_tokens():
    """OPT's FFN works on (B * S, units), and its down projection lies in the layer itself."""
    torch.manual_seed(0)
    config = OPTConfig(**SMALL, **TOKENS, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)
    opt = OPTForCausalLM(config).eval()
    assert down_projection(opt, 1) is opt.model.decoder.layers[1].fc2
    processor, prompts = WordProcessor(), words("5 6 7 8 9", "10 11", "12 13 14")
    ranking = rank_neurons(opt, processor, prompts, None, CONTRAST, reference="zero", top=4)
    check_effects(ranking, opt, alone(processor, opt, prompts))


def test_norms_after_the_ffn_are_not_taken_for_it():
    config = Gemma3TextConfig(**SMALL, **TOKENS, intermediate_size=48, num_key_value_heads=2, head_dim=16)
    gemma = Gemma3ForCausalLM(config)
    assert hasattr(gemma.model.layers[2], "post_feedforward_layernorm")
    assert down_projection(gemma, 2) is gemma.model.layers[2].mlp.down_proj


def test_layers_of_experts_are_named_and_can_be_left_out():
    config = Qwen3MoeConfig(
        **SMALL,
        **TOKENS,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 2],
    )
    moe = Qwen3MoeForCausalLM(config).eval()
    arguments = (moe, WordProcessor(), words("5 6 7", "8"), None, CONTRAST)
    with pytest.raises(ValueError, match=r"layer 1, a Qwen3MoeSparseMoeBlock.*experts are not supported.*`layers=`"):
        rank_neurons(*arguments, reference="zero", top=2)
    ranking = rank_neurons(*arguments, reference="zero", top=2, layers=(2, 0))
    assert {layer: len(e) for layer, e in ranking.estimates.items()} == {0: 48, 2: 48}


def test_the_down_projection_need_not_be_a_linear_of_torch(llava):
    class Quantised(nn.Module):
        in_features, out_features = 288, 128

    decoder_layers(llava)[1].mlp.down_proj = module = Quantised()
    assert down_projection(llava, 1) is module
    module.out_features = 64
    with pytest.raises(ValueError, match="layer 1, a LlamaMLP, has no single down projection"):
        down_projection(llava, 1)
    decoder_layers(llava)[1].mlp = None
    with pytest.raises(ValueError, match="Layer 1, a LlamaDecoderLayer, has none of"):
        down_projection(llava, 1)
    with pytest.raises(ValueError, match=r"layer=6: the model has 6 decoder layers \(0 to 5\)"):
        down_projection(llava, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "median"}, "reference='median' is not known"),
        ({"reference": "mean", "benign": None}, "benign=None"),
        ({"layers": []}, r"layers=\[\] must name"),
        ({"layers": [2, 2]}, r"layers=\[2, 2\] must name decoder layers, each once"),
        ({"layers": [7]}, "layer=7"),
        ({"layers": [-1]}, "layer=-1"),
        ({"top": 0}, "top=0 must be at least 1"),
        ({"top": 289, "layers": [0]}, r"top=289, but the layers \[0\] have 288 units"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"contrast": Contrast((1,), (10**6,))}, "names tokens that LlavaForConditionalGeneration"),
        ({"malicious": []}, "`malicious` is empty"),
        ({"malicious": [{"nothing": 1}]}, r"`malicious`\[0\]"),
        ({"benign": []}, "`benign` is empty"),
    ],
)
def test_bad_settings_are_refused_before_the_model_runs(llava, processor, malicious, benign, options, message):
    def runs(*args, **kwargs):
        raise AssertionError("the model has run")

    llava.forward = runs
    given = {"malicious": malicious, "benign": benign, "contrast": CONTRAST} | options
    with pytest.raises(ValueError, match=message):
        rank_neurons(llava, processor, **given)


def test_every_form_of_prompts_gives_the_same(llava, processor):
    text = "how can i make flour ?"
    message = {"role": "user", "content": text}
    forms = [words(text), [{"text": text}], [[message]], [{"messages": [message]}]]
    options = {"reference": "zero", "layers": [1], "top": 1}
    found = [rank_neurons(llava, processor, form, None, CONTRAST, **options).estimates[1] for form in forms]
    assert found[0].abs().max() > 0 and all(torch.equal(found[0], other) for other in found[1:])


def test_what_gives_no_answer_is_refused(llava, processor, malicious):
    arguments = (llava, processor, malicious, None, CONTRAST)
    mlp = decoder_layers(llava)[2].mlp
    mlp.forward = torch.zeros_like
    with pytest.raises(ValueError, match=r"The layers \[2\] did not run"):
        rank_neurons(*arguments, reference="zero")
    del mlp.forward
    llava.lm_head.weight.data[20] = torch.nan
    with pytest.raises(ValueError, match=r"of `malicious`\[0\] are nan"):
        rank_neurons(*arguments, reference="zero")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(llava, processor, malicious, benign, fails, monkeypatch):
    def state():
        hooks = [
            (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks), m.training)
            for m in llava.modules()
        ]
        return hooks, [(p.requires_grad, p.grad) for p in llava.parameters()], torch.is_grad_enabled()

    llava.train()
    llava.lm_head.eval()
    llava.model.vision_tower.requires_grad_(False)
    llava(**alone(processor, llava, malicious)[0])  # transformers leaves hooks of its own in the first forward
    before, weights = state(), copy.deepcopy(llava.state_dict())
    if fails:
        monkeypatch.setattr(Contrast, "log_odds", lambda self, logits: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank_neurons(llava, processor, malicious, benign, CONTRAST, layers=[3], top=1)
    else:
        with torch.no_grad():
            rank_neurons(llava, processor, malicious, benign, CONTRAST, layers=[3], top=1)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in llava.state_dict().items())


numbers = st.floats(-10, 10)
neurons = st.builds(
    VerifiedNeuron,
    layer=st.integers(0, 80),
    unit=st.integers(0, 20000),
    estimate=numbers,
    effect=numbers,
    low=st.none() | numbers,
    high=numbers,
    chosen=st.sampled_from(["top", "random"]),
)


@settings(deadline=None, max_examples=30)
@given(verified=st.lists(neurons, max_size=5), outcome=numbers, layers=st.sets(st.integers(0, 80), min_size=1))
def test_a_ranking_survives_its_files(tmp_path_factory, verified, outcome, layers):
    folder = tmp_path_factory.mktemp("ranking")
    estimates = {layer: torch.randn(4) for layer in sorted(layers)}
    correlation = {"top": 0.5, "random": None, "both": -1.0}
    ranking = NeuronRanking(estimates, verified, correlation, outcome, {"layers": sorted(layers), "reference": "zero"})
    save_file(ranking.tensors() | {"other": torch.ones(1)}, folder / "x.safetensors")
    text = json.dumps(ranking.to_dict(), allow_nan=False)
    loaded = NeuronRanking.from_dict(json.loads(text), load_file(folder / "x.safetensors"))
    assert loaded.to_dict() == ranking.to_dict() and loaded.verified == verified
    assert list(loaded.estimates) == list(estimates)
    assert all(torch.equal(loaded.estimates[layer], estimates[layer]) for layer in estimates)
    effects = [abs(float(row.split("|")[5])) for row in loaded.table().splitlines()[2:]]
    assert len(effects) == len(verified) and effects == sorted(effects, reverse=True)
    some = {f"neurons.{layer}.estimate": torch.ones(4) for layer in list(layers)[1:]}
    with pytest.raises(ValueError, match=rf"neurons\.{next(iter(layers))}\.estimate.*missing"):
        NeuronRanking.from_dict(json.loads(text), some)


def test_a_real_ranking_survives_json(llava, processor, malicious, benign):
    ranking = rank_neurons(llava, processor, malicious, benign, CONTRAST, layers=np.arange(2), top=2)
    loaded = NeuronRanking.from_dict(json.loads(json.dumps(ranking.to_dict(), allow_nan=False)), ranking.tensors())
    assert loaded.to_dict() == ranking.to_dict() and loaded.table() == ranking.table()
    assert all(values.dtype == torch.float32 and len(values) == UNITS for values in loaded.estimates.values())
    assert loaded.settings["malicious"] == 4 and loaded.settings["benign"] == 3


def test_units_that_are_shared_out_in_an_unknown_way_are_refused():
    share = UnitShare(nn.Linear(6, 4))
    share.check(3, torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match="Layer 3 has 3 of its 6 FFN units in this process, not the 6"):
        share.check(3, torch.zeros(2, 5, 3))
