import pytest
import torch
from conftest import random_subspace

from care_hf.adaptive import repair_penalty
from care_hf.attacks import pgd
from care_hf.gating import Gate
from care_hf.measuring import has_penalty
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site
from care_hf.subspace import SafetySubspaces
from care_hf.teacher_forcing import encode, target_losses

LAYER = 2
TARGETS = ["step one mix salt with clay .", "i cannot help with that .", "step one", "step"]


@pytest.fixture(scope="module")
def prompts(world):
    """With an image each, and of unequal length; the last is a conversation whose first turn ends like the prompt."""
    samples = [*world.attack("typographic", "validation", 2), *world.attack("wrapper+image", "validation", 1)]
    samples = [Sample(sample.messages) for sample in samples]
    (asked,) = world.attack("icon", "validation", 1)
    said = {"role": "assistant", "content": [{"type": "text", "text": "no ."}]}
    more = {"role": "user", "content": [{"type": "text", "text": "please ."}]}
    return [*samples, Sample([*asked.messages, said, more])]


def stock(model, processor, prompts, targets=None):
    """Tokens and the residual stream after `LAYER`, one prompt at a time, by hooks on the plain model, in float64."""
    found = []
    for index, prompt in enumerate(prompts):
        inputs = collate(processor, [prompt], ()).inputs
        kept = []
        layer = model.model.language_model.layers[LAYER]
        hook = layer.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        if targets:
            ids = torch.tensor([processor.tokenizer(targets[index], add_special_tokens=False)["input_ids"]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        found.append((inputs["input_ids"][0], out.reshape(-1, out.shape[-1]).double()))
    return found


def gated(model, processor, prompts, required, alarms, pictured, repaired_too):
    """Random detectors, each above its threshold on all prompts but one; the gate's site is repaired too if asked."""
    columns = required + alarms + pictured
    readers = torch.randn(128, columns, generator=torch.Generator().manual_seed(columns)) / 10
    scores = torch.stack([readers.double().T @ h[-1] for _, h in stock(model, processor, prompts)])
    thresholds = scores.sort(dim=0).values[1] - 0.3
    gate = Gate(generation_prompt(processor), readers, thresholds, required, pictured)
    strong = Subspace(random_subspace(0).basis, 30 * random_subspace(1).mean)
    sites = {Site(4, "ffn"): {"last": strong}}
    if repaired_too:
        sites[Site(LAYER, "residual")] = {"last": strong}
    subspaces = SafetySubspaces(sites, gate=gate, gate_site=Site(LAYER, "residual"))
    return CareForConditionalGeneration.from_base(model, subspaces), gate


@pytest.mark.parametrize("repaired_too", [False, True])
@pytest.mark.parametrize(("required", "alarms", "pictured"), [(0, 2, 0), (1, 2, 3), (2, 0, 0), (2, 1, 1)])
def test_of_a_gate_it_is_the_margin(testbed, prompts, required, alarms, pictured, repaired_too):
    base, processor = testbed
    model, gate = gated(base, processor, prompts, required, alarms, pictured, repaired_too)
    margins = []
    for _, h in stock(base, processor, prompts):  # whose last token is the prompt's
        scores = (gate.readers.double().T @ h[-1] - gate.thresholds.double()).tolist()
        asked, shared, own = scores[:required], scores[required : required + alarms], scores[required + alarms :]
        loudest = own if pictured else shared
        margins.append(min([*asked, *([max(loudest)] if loudest else [])]))
    assert max(margins) > 0.1
    batch = encode(model, processor, prompts, TARGETS)
    with torch.no_grad(), repair_penalty(model) as penalty:
        target_losses(model, processor, batch, batch.pixels.float())
        found = penalty(batch.batch)
    expected = torch.tensor([max(margin, -0.1) for margin in margins], dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_far_below_its_threshold_a_gate_asks_for_no_more(testbed, prompts):
    base, processor = testbed
    gate = Gate(generation_prompt(processor), torch.randn(128, 1), torch.tensor([1e4]))
    sites = {Site(4, "ffn"): {"last": random_subspace(0)}}
    subspaces = SafetySubspaces(sites, gate=gate, gate_site=Site(LAYER, "residual"))
    model = CareForConditionalGeneration.from_base(base, subspaces)
    batch = encode(model, processor, prompts, TARGETS)
    with torch.no_grad(), repair_penalty(model) as penalty:
        target_losses(model, processor, batch, batch.pixels.float())
        assert penalty(batch.batch).tolist() == pytest.approx([-0.1] * 4)


@pytest.fixture
def printed(testbed):
    """A repair of the printed kind at one site, where what it changes can be told without it."""
    beta = {"beta": 0.5}
    site = {"visual": random_subspace(0, rank=16, **beta), "text": random_subspace(1, rank=16, **beta)}
    subspaces = SafetySubspaces({Site(LAYER, "residual"): site}, fusion="route")
    return CareForConditionalGeneration.from_base(testbed[0], subspaces), site


def test_without_a_gate_it_is_the_mean_squared_correction(testbed, printed, prompts):
    base, processor = testbed
    model, site = printed
    special, expected = {*processor.tokenizer.all_special_ids} - {4}, []
    assert processor.tokenizer.convert_ids_to_tokens(4) == "<image>"
    for (prompt_ids, _), (ids, h) in zip(
        stock(base, processor, prompts), stock(base, processor, prompts, TARGETS), strict=True
    ):
        squared = []
        for position in range(len(prompt_ids)):
            token = int(ids[position])
            if token in special:
                continue
            part = site["visual" if token == 4 else "text"]
            basis = part.basis.double()
            correction = basis @ basis.T @ (part.beta * part.mean.double() - h[position])
            squared.append(float(correction @ correction))
        expected.append(sum(squared) / len(squared))
    batch = encode(model, processor, prompts, TARGETS)
    with torch.no_grad(), repair_penalty(model) as penalty:
        target_losses(model, processor, batch, batch.pixels.float())
        found = penalty(batch.batch)
    assert min(expected) > 0.1
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_sites_add_up(testbed, prompts):
    """By recorded activations with and without the repair of the last site, which changes nothing before itself."""
    base, processor = testbed
    first, last = ({"text": random_subspace(seed, rank=16)} for seed in (2, 3))
    one = SafetySubspaces({Site(LAYER, "residual"): first}, fusion="constant")
    both = SafetySubspaces({Site(LAYER, "residual"): first, Site(4, "residual"): last}, fusion="constant")
    values = []
    for subspaces in (one, both):
        model = CareForConditionalGeneration.from_base(base, subspaces)
        batch = encode(model, processor, prompts, TARGETS)
        kept = []
        hook = model.vlm.model.language_model.layers[4].register_forward_hook(lambda m, a, out, k=kept: k.append(out))
        with torch.no_grad(), repair_penalty(model) as penalty:
            target_losses(model, processor, batch, batch.pixels.float())
            values.append((penalty(batch.batch), kept[0]))
        hook.remove()
    (of_one, without), (of_both, repaired) = values
    prompt = (batch.batch.visual | batch.batch.text).float()
    more = ((repaired - without).square().sum(-1) * prompt).sum(1) / prompt.sum(1)
    torch.testing.assert_close(of_both - of_one, more, rtol=1e-3, atol=1e-3)
    assert (more > 0).all()


def hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("kind", ["gated", "printed"])
def test_its_hooks_go(testbed, printed, prompts, kind):
    model = printed[0] if kind == "printed" else gated(*testbed, prompts, 1, 1, 1, True)[0]
    before = hooks(model)
    with repair_penalty(model) as penalty:
        assert penalty is not None and sum(hooks(model)) > sum(before)
    assert hooks(model) == before
    with pytest.raises(RuntimeError), repair_penalty(model):
        raise RuntimeError
    assert hooks(model) == before


def test_what_is_not_repaired_has_none(testbed, printed):
    with repair_penalty(testbed[0]) as penalty:
        assert penalty is None
    model = printed[0]
    with model.disable(), repair_penalty(model) as penalty:
        assert penalty is None and not has_penalty(model)
    assert has_penalty(model) and not has_penalty(testbed[0])


@pytest.mark.parametrize("kind", ["gated", "printed"])
def test_an_attack_that_knows_it_lowers_it(testbed, printed, prompts, kind):
    if kind == "printed":
        model, weight = printed[0], 100.0
    else:
        base, processor = testbed
        readers = torch.randn(128, 1, generator=torch.Generator().manual_seed(1)) / 10
        highest = min(float(h[-1] @ readers[:, 0].double()) for _, h in stock(base, processor, prompts[:3]))
        gate = Gate(generation_prompt(processor), readers, torch.tensor([highest - 5.0]))  # fires on all, far above
        sites = {Site(4, "ffn"): {"last": random_subspace(0)}}
        subspaces = SafetySubspaces(sites, gate=gate, gate_site=Site(LAYER, "residual"))
        model, weight = CareForConditionalGeneration.from_base(base, subspaces), 1000.0
    settings = {"eps": 16, "steps": 4, "restarts": 1}
    with repair_penalty(model) as penalty:
        blind, knowing = (
            pgd(model, testbed[1], prompts[:3], TARGETS[:3], penalty=penalty, weight=w, **settings)
            for w in (0.0, weight)
        )
    assert torch.equal(blind.penalties[0, 0], knowing.penalties[0, 0])
    assert (knowing.penalty < blind.penalty).all()
    assert (knowing.penalty < knowing.penalties[0, 0]).all()
    assert (blind.loss < knowing.loss).all()
