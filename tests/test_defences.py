import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_subspace

from care_hf.answers import gate_fires, generate_answers, next_token_log_probabilities
from care_hf.defences import CannedRefusal, FineTuned, Repair, Steered, Undefended
from care_hf.gating import Gate
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site, record
from care_hf.steering_vectors import SteeringVectors
from care_hf.subspace import SafetySubspaces

NEW = 12
SITE = Site(2, "residual")
REFUSALS = ("no", "i cannot help with that .", "i cannot help with that . " * 4)
KINDS = ("undefended", "repair", "printed", "steered", "fine-tuned", "canned")


@pytest.fixture(scope="module")
def prompts(world):
    """Of unequal length, with images and without."""
    samples = [*world.attack("icon", "fit", 2), *world.attack("wrapper", "fit", 2), *world.plain("fit", 1)]
    return [*samples, *world.benign("count", "fit", 2), *world.benign("recipe", "fit", 1)]


@pytest.fixture(scope="module")
def gated(testbed, prompts):
    """A repair by hand whose gate fires on half of the prompts."""
    model, processor = testbed
    readers, scores = torch.randn(128, 1, generator=torch.Generator().manual_seed(3)), []
    for sample in prompts:
        with record(model, [SITE]) as activations, torch.no_grad():
            model(**collate(processor, [Sample(sample.messages)], ()).inputs)
        scores.append(float(activations[SITE][0, -1] @ readers[:, 0]))
    middle = sum(sorted(scores)[len(scores) // 2 - 1 :][:2]) / 2
    gate = Gate(generation_prompt(processor), readers, torch.tensor([middle]))
    strong = Subspace(random_subspace(0, rank=64).basis, 40 * random_subspace(1).mean)
    subspaces = SafetySubspaces({Site(4, "residual"): {"last": strong}}, gate=gate, gate_site=SITE)
    return subspaces, [score > middle for score in scores]


@pytest.fixture(scope="module")
def base_answers(testbed, prompts):
    return [generate_answers(*testbed, [sample], NEW)[0] for sample in prompts]


def vectors(model):
    return {Site(3, "residual"): 10 * torch.randn(128, generator=torch.Generator().manual_seed(5)).to(model.device)}


def steered():
    return Steered(lambda model: SteeringVectors(model, vectors(model)), {"of": "test"})


def tuned(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
    return other


@pytest.fixture(scope="module")
def defences(testbed, gated):
    return {
        "undefended": Undefended(),
        "repair": Repair(gated[0]),
        "printed": Repair(SafetySubspaces.random(testbed[0], [1, 3], 32)),
        "steered": steered(),
        "fine-tuned": FineTuned(tuned(testbed[0])),
        "canned": CannedRefusal(gated[0], REFUSALS[0]),
    }


def state(model, processor, prompts):
    """All that could tell that something was left on it."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    logits = next_token_log_probabilities(model, processor, prompts)
    return SimpleNamespace(
        weights=weights,
        plain=(modules, hooks, grads),
        answers=generate_answers(model, processor, prompts, NEW),
        l=logits,
    )


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_as_before(testbed, prompts, defences, kind, raised):
    model, processor = testbed
    before = state(model, processor, prompts)

    @contextmanager
    def expected():
        if not raised:
            yield
        else:
            with pytest.raises(KeyError, match="inside"):
                yield

    with expected(), defences[kind].applied(model, processor) as defended:
        answers = generate_answers(defended, processor, prompts, NEW)
        assert (answers == before.answers) == (kind == "undefended")
        if raised:
            raise KeyError("inside")
    after = state(model, processor, prompts)
    assert after.plain == before.plain and after.answers == before.answers and torch.equal(after.l, before.l)
    assert after.weights.keys() == before.weights.keys()
    assert all(torch.equal(tensor, before.weights[name]) for name, tensor in after.weights.items())


def test_a_repair_is_the_model_made_by_hand(testbed, prompts, defences, base_answers):
    model, processor = testbed
    for kind in ("repair", "printed"):
        by_hand = CareForConditionalGeneration.from_base(model, defences[kind].subspaces)
        expected = generate_answers(by_hand, processor, prompts, NEW)
        with defences[kind].applied(model, processor) as defended:
            assert generate_answers(defended, processor, prompts, NEW) == expected != base_answers
            logits = next_token_log_probabilities(defended, processor, prompts)
            # Its modules are its own: while it is there, the model is the base.
            assert generate_answers(model, processor, prompts, NEW) == base_answers
            shared = {parameter.data_ptr() for parameter in model.parameters()}
            assert {parameter.data_ptr() for parameter in defended.parameters()} == shared
        assert torch.equal(logits, next_token_log_probabilities(by_hand, processor, prompts))


def test_steering_is_the_hook_by_hand_and_on_only_inside(testbed, prompts):
    model, processor = testbed
    (vector,) = vectors(model).values()
    other = copy.deepcopy(model)
    other.model.language_model.layers[3].register_forward_hook(
        lambda module, args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    with steered().applied(model, processor) as defended:
        assert defended is model
        answers = generate_answers(defended, processor, prompts, NEW)
        logits = next_token_log_probabilities(defended, processor, prompts)
    assert answers == generate_answers(other, processor, prompts, NEW)
    assert torch.equal(logits, next_token_log_probabilities(other, processor, prompts))


def test_a_fine_tuned_model_stands_in_the_others_place(testbed, defences):
    with defences["fine-tuned"].applied(*testbed) as defended:
        assert defended is defences["fine-tuned"].tuned is not testbed[0]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_canned_refusal_is_the_refusal_where_the_gate_fires(testbed, prompts, gated, base_answers, refusal):
    model, processor = testbed
    subspaces, fires = gated
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    assert gate_fires(repaired, processor, prompts).tolist() == fires and {*fires} == {False, True}
    expected = [refusal.strip() if fire else own for fire, own in zip(fires, base_answers, strict=True)]
    with CannedRefusal(subspaces, refusal).applied(model, processor) as defended:
        assert generate_answers(defended, processor, prompts, NEW) == expected
        assert generate_answers(defended, processor, prompts, NEW, batch_size=3) == expected
        assert [generate_answers(defended, processor, [sample], NEW)[0] for sample in prompts] == expected
    count = len(processor.tokenizer(refusal, add_special_tokens=False)["input_ids"])
    lengths = [len(processor.tokenizer(own, add_special_tokens=False)["input_ids"]) for own in base_answers]
    assert (count < min(lengths)) == (refusal == REFUSALS[0]) and (count > max(lengths)) == (refusal == REFUSALS[2])


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_canned_batch_keeps_its_prompts_and_ends_in_padding(testbed, prompts, gated, refusal):
    model, processor = testbed
    batch = collate(processor, [Sample(sample.messages) for sample in prompts], (4,)).inputs
    assert (batch["attention_mask"][:, 0] == 0).any()  # left padding
    start, pad = batch["input_ids"].shape[1], processor.tokenizer.pad_token_id
    own = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with CannedRefusal(gated[0], refusal).applied(model, processor) as defended:
        output = defended.generate(**batch, max_new_tokens=NEW, do_sample=False)
    ids = processor.tokenizer(refusal, add_special_tokens=False)["input_ids"]
    for row, fire in enumerate(gated[1]):
        expected = ids if fire else own[row, start:].tolist()
        expected = expected + [pad] * (output.shape[1] - start - len(expected))
        assert output[row].tolist() == [*batch["input_ids"][row].tolist(), *expected]


def test_a_canned_refusal_needs_a_gate(testbed):
    defence = CannedRefusal(SafetySubspaces.random(testbed[0], [1], 2), REFUSALS[0])
    with pytest.raises(ValueError, match="needs a repair with a gate"), defence.applied(*testbed):
        pass


def test_digests_tell_what_settings_do_not(testbed, gated):
    model = testbed[0]
    some, other = (SafetySubspaces.random(model, [1], 4, seed) for seed in (0, 1))
    gate = gated[0].gate
    louder = replace(gated[0], gate=Gate(gate.prompt_end, gate.readers, gate.thresholds + 1))
    sets = [
        some,
        other,
        some.only("text"),
        replace(some, fusion="union"),
        replace(some, strength=0.5),
        gated[0],
        louder,
    ]
    sets += [replace(gated[0], gate_site=Site(1, "residual"))]
    assert len({subspaces.digest for subspaces in sets}) == len(sets)
    assert len({Repair(subspaces).digest for subspaces in sets}) == len(sets)
    for subspaces in sets:  # and nothing else
        again = SafetySubspaces.from_model(CareForConditionalGeneration.from_base(model, subspaces))
        assert replace(again, metadata={"a": "b"}).digest == subspaces.digest
    assert len({CannedRefusal(s, text).digest for s in (gated[0], louder) for text in REFUSALS}) == 6
    assert FineTuned(tuned(model)).digest != FineTuned(model).digest == FineTuned(copy.deepcopy(model)).digest
