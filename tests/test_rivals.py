import copy
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from care_hf import patches, rivals
from care_hf.answers import generate_answers
from care_hf.patches import attribute_patches, keep_patches, patch_count, sequence_logit
from care_hf.rivals import AstraSteering, astra_calibration, astra_vector, train_refusal_lora
from care_hf.samples import IGNORED, Sample, answered, collate
from care_hf.sites import Site, decoder_layers, record
from care_hf.testbed.world import REFUSAL

SITE = Site(2, "residual")


@pytest.fixture(scope="module")
def mixed(world):
    """Prompts of different lengths, with and without images."""
    return [*world.attack("icon", "fit", 2), *world.plain("fit", 2), *world.benign("split", "fit", 2)]


def pairs(world, n):
    refused = [(s, REFUSAL) for s in world.attack("icon", "fit", n)]
    return refused, [(s, s.answer) for s in world.benign("recipe", "fit", n)]


def single(testbed, sample, answer="", end=""):
    """Inputs of one prompt and its answer, written out in the testbed's chat format, and the answer's length."""
    processor = testbed[1]
    prompt = f"<s><user>{'<image>' * (sample.image is not None)}{sample.text}<assistant>"
    images = None if sample.image is None else [Image.fromarray(sample.image)]
    inputs, whole = (processor(text=t, images=images, return_tensors="pt") for t in (prompt, prompt + answer + end))
    return whole, whole["input_ids"].shape[1] - inputs["input_ids"].shape[1]


@torch.no_grad()
def single_logits(testbed, *args):
    """Logits that predict each token of the answer, and those tokens."""
    inputs, length = single(testbed, *args)
    return testbed[0](**inputs).logits[0, -length - 1 : -1].double(), inputs["input_ids"][0, -length:]


# Prompts with answers


def test_answers_follow_their_prompts_and_they_alone_are_labelled(testbed, mixed):
    model, processor = testbed
    answers = [s.answer if i % 2 else REFUSAL for i, s in enumerate(mixed)]
    inputs, labels = answered(processor, mixed, answers)
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    for row, (sample, answer) in enumerate(zip(mixed, answers, strict=True)):
        expected, tokens = single_logits(testbed, sample, answer, "</s>")
        places = (labels[row] != IGNORED).nonzero()[:, 0]
        assert labels[row, places].tolist() == tokens.tolist()
        torch.testing.assert_close(logits[row, places - 1], expected, atol=1e-4, rtol=1e-4)
    unended = answered(processor, mixed, answers, end=False)[1]
    assert ((unended != IGNORED).sum(1) + 1 == (labels != IGNORED).sum(1)).all()


# Refusal fine-tuning


@pytest.fixture(scope="module")
def tuned(testbed, world):
    """The fine-tuned model, and the base's weights as they were before."""
    before = copy.deepcopy(testbed[0].state_dict())
    return tune(testbed, world), before


def tune(testbed, world, seed=0):
    refused, benign = pairs(world, 12)
    return train_refusal_lora(*testbed, refused, benign, steps=8, rank=4, lr=3e-3, batch_size=8, seed=seed)


def loss(model, testbed, labelled):
    losses = []
    for sample, answer in labelled:
        logits, tokens = single_logits((model, testbed[1]), sample, answer, "</s>")
        losses += (-logits.log_softmax(-1)[range(len(tokens)), tokens]).tolist()
    return np.mean(losses)


def test_fine_tuning_leaves_the_base_as_it_was(testbed, tuned):
    model, before = testbed[0], tuned[1]
    merged = copy.deepcopy(tuned[0]).merge_and_unload()
    for state in (model.state_dict(), before):
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
    weights = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    linear = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    layers = range(len(decoder_layers(model)))
    assert weights == {f"model.language_model.layers.{i}.{name}.weight" for i in layers for name in linear.split()}


def test_merging_the_tuned_model_itself_leaves_the_base_as_it_was(testbed, world):
    before = copy.deepcopy(testbed[0].state_dict())
    refused, benign = pairs(world, 2)
    train_refusal_lora(*testbed, refused, benign, steps=2, rank=2, lr=1e-2, batch_size=2).merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in testbed[0].state_dict().items())


def test_fine_tuning_lowers_the_loss_of_the_refusals_and_keeps_the_answers(testbed, tuned, world):
    refused, benign = pairs(world, 6)
    assert loss(tuned[0], testbed, refused) < 0.5 * loss(testbed[0], testbed, refused)
    assert loss(tuned[0], testbed, benign) < 0.5
    assert not tuned[0].training


def test_the_merged_model_is_the_adapted_one(testbed, tuned, mixed):
    inputs = collate(testbed[1], [Sample(s.messages) for s in mixed], ()).inputs
    merged = copy.deepcopy(tuned[0]).merge_and_unload()
    with torch.no_grad():
        adapted, base = tuned[0](**inputs).logits, testbed[0](**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, adapted, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(base, adapted, atol=0.1)
        with tuned[0].disable_adapter():
            assert torch.equal(tuned[0](**inputs).logits, base)


def test_fine_tuning_is_a_function_of_its_seed(testbed, tuned, world):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = (tune(testbed, world, seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in tuned[0].state_dict().items())
    assert any(not torch.equal(value, other[name]) for name, value in again.items())


def test_half_of_every_batch_is_benign(testbed, world, monkeypatch):
    refused, benign = pairs(world, 6)
    drawn = []
    monkeypatch.setattr(
        rivals, "answered", lambda p, *batch: drawn.append(list(zip(*batch, strict=True))) or answered(p, *batch)
    )
    train_refusal_lora(*testbed, refused, benign, steps=3, rank=1, lr=1e-3, batch_size=4)
    assert all(set(batch[:2]) <= set(refused) and set(batch[2:]) <= set(benign) for batch in drawn)
    assert len({pair for batch in drawn for pair in batch}) == 12


def test_every_pair_comes_once_before_any_comes_again():
    draw = rivals._endlessly("abcde", 3)
    drawn = [item for _ in range(10) for item in next(draw)]
    assert all(sorted(drawn[i : i + 5]) == list("abcde") for i in range(0, 30, 5))


def test_what_fine_tuning_cannot_use_is_named(testbed, world, monkeypatch):
    refused, benign = pairs(world, 2)
    settings = {"steps": 1, "rank": 2, "lr": 1e-3}
    with pytest.raises(ValueError, match="batch_size=3"):
        train_refusal_lora(*testbed, refused, benign, **settings, batch_size=3)
    with pytest.raises(ValueError, match="`benign`"):
        train_refusal_lora(*testbed, refused, [], **settings)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        train_refusal_lora(*testbed, refused, benign, **settings)


# Steering


@pytest.fixture(scope="module")
def direction():
    """v and h0, of no particular length."""
    return 3 * torch.randn(2, 128, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def residual(model, processor, samples):
    inputs = collate(processor, [Sample(s.messages) for s in samples], ()).inputs
    with record(model, [SITE]) as activations:
        logits = model(**inputs).logits
    return activations[SITE], logits


def test_steering_is_its_formula_at_the_last_position_alone(testbed, mixed, direction):
    v, h0 = direction.double().tolist()
    before, _ = residual(*testbed, mixed)
    with AstraSteering(testbed[0], SITE, *direction, alpha=7.0):
        after, _ = residual(*testbed, mixed)
    assert torch.equal(after[:, :-1], before[:, :-1])
    lengths = []
    for h, steered in zip(before[:, -1].double().tolist(), after[:, -1].tolist(), strict=True):
        off = [a - b for a, b in zip(h, h0, strict=True)]
        norm_v, norm_h, norm_off = (math.sqrt(sum(x * x for x in values)) for values in (v, h, off))
        cosine = sum(a * b for a, b in zip(off, v, strict=True)) / (norm_off * norm_v)
        lengths.append(min(max(cosine, 0), 1))
        expected = [x - 7.0 * lengths[-1] * norm_h * y / norm_v for x, y in zip(h, v, strict=True)]
        assert steered == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(set(lengths)) > 2


def test_what_does_not_lie_along_the_vector_is_left_alone(testbed, mixed, direction):
    before, logits = residual(*testbed, mixed)
    away = -(before[:, -1] - direction[1]).mean(0)
    with AstraSteering(testbed[0], SITE, away, direction[1], alpha=7.0):
        assert torch.equal(residual(*testbed, mixed)[1], logits)


def test_batched_steering_is_the_single_one(testbed, mixed, direction):
    with AstraSteering(testbed[0], SITE, *direction, alpha=7.0):
        after, _ = residual(*testbed, mixed)
        answers = generate_answers(*testbed, mixed, 6)
        for row, sample in enumerate(mixed):
            alone, _ = residual(*testbed, [sample])
            torch.testing.assert_close(after[row, -1], alone[0, -1], atol=1e-4, rtol=1e-4)
        assert answers == [generate_answers(*testbed, [sample], 6)[0] for sample in mixed]
    assert answers != generate_answers(*testbed, mixed, 6)


def test_alpha_0_and_leaving_give_the_model_back(testbed, mixed, direction):
    model, base = testbed[0], residual(*testbed, mixed)[1]
    hooks = [len(layer._forward_hooks) for layer in decoder_layers(model)]  # transformers leaves some of its own
    with AstraSteering(model, SITE, *direction, alpha=0):
        assert torch.equal(residual(*testbed, mixed)[1], base)
    steering = AstraSteering(model, SITE, *direction, alpha=7.0)
    for _ in range(2):
        with pytest.raises(KeyError), steering:
            assert not torch.equal(residual(*testbed, mixed)[1], base)
            raise KeyError
        assert torch.equal(residual(*testbed, mixed)[1], base)
        assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == hooks
    with steering, pytest.raises(RuntimeError, match="already"), steering:
        pass
    assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == hooks


def test_only_active_rows_are_steered_and_every_forward_asks(testbed, mixed, direction):
    rows = torch.tensor([True, False, False, True, True, False])
    base = residual(*testbed, mixed)[1]
    with AstraSteering(testbed[0], SITE, *direction, alpha=7.0):
        steered = residual(*testbed, mixed)[1]
    calls = []
    with AstraSteering(testbed[0], SITE, *direction, 7.0, lambda: calls.append(0) or rows):
        logits = residual(*testbed, mixed)[1]
        assert torch.equal(logits[rows], steered[rows]) and torch.equal(logits[~rows], base[~rows])
        inputs = collate(testbed[1], [Sample(s.messages) for s in mixed], ()).inputs
        testbed[0].generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(calls) == 1 + 3
    for wrong in (rows[:1], rows.float()):
        with AstraSteering(testbed[0], SITE, *direction, 7.0, lambda: wrong), pytest.raises(ValueError, match="active"):  # noqa: B023
            residual(*testbed, mixed)


def test_what_cannot_steer_is_named(testbed, direction):
    v, h0 = direction
    for site, vector, mean, match in (
        (Site(2, "ffn"), v, h0, "residual"),
        (Site(6, "residual"), v, h0, "6 decoder layers"),
        (SITE, v[:5], h0, "`vector`"),
        (SITE, v, h0 / 0, "`h0`"),
        (SITE, 0 * v, h0, "is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            AstraSteering(testbed[0], site, vector, mean, 1.0)


# The vector


def test_patches_that_are_not_kept_are_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 17, 3), dtype=np.uint8)
    kept = np.random.default_rng(1).random(9) < 0.5
    image = Image.fromarray(pixels)
    assert patch_count(image, 8) == 9
    grey, out = round(float(pixels.mean())), np.asarray(keep_patches(image, kept, 8))
    for y in range(20):
        for x in range(17):
            expected = pixels[y, x].tolist() if kept[3 * (y // 8) + x // 8] else [grey] * 3
            assert out[y, x].tolist() == expected


def test_the_sequence_logit_is_that_of_single_prompts(testbed, mixed):
    logits = sequence_logit(*testbed, mixed, "step one", batch_size=4)
    for sample, logit in zip(mixed, logits.tolist(), strict=True):
        scores, tokens = single_logits(testbed, sample, "step one")
        assert len(tokens) == 2
        log_p = scores.log_softmax(-1)[range(2), tokens].sum().item()
        assert logit == pytest.approx(log_p - math.log(-math.expm1(log_p)), abs=1e-3)


def test_attribution_finds_the_patches_that_raise_the_response():
    rng = np.random.default_rng(0)
    kept = rng.random((64, 36)) < 0.5
    kept[:, 9] = True
    effects = np.zeros(36)
    effects[[3, 7, 20, 30]] = 5, 1, 3, -4
    responses = 100 + 40 * (kept @ effects + 0.05 * rng.standard_normal(64))
    found = attribute_patches(kept, responses, 0.01, 15)
    assert found[:3].tolist() == [3, 20, 7] and len(found) <= 15 and not {9, 30} & set(found.tolist())
    assert attribute_patches(kept, responses, 0.01, 2).tolist() == [3, 20]
    assert not len(attribute_patches(kept, np.ones(64), 0.01, 15))


def test_attribution_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        attribute_patches(np.ones((2, 2), bool), np.ones(2), 0.01, 1)


@torch.no_grad()
def hidden(testbed, sample, text, pixels):
    """The residual stream after layer 2 at the last token, from transformers' own record."""
    changed = copy.copy(sample)
    object.__setattr__(changed, "text", text)
    object.__setattr__(changed, "image", pixels)
    inputs, _ = single(testbed, changed)
    return testbed[0](**inputs, output_hidden_states=True).hidden_states[3][0, -1].double()


@pytest.mark.parametrize("text", ["", None])
def test_the_vector_is_the_mean_difference(testbed, world, monkeypatch, text):
    attacks = world.attack("typographic", "fit", 3)
    removed = iter([[0, 8], [], [35, 7, 20]])  # one image without attributed patches
    chosen = [[0, 8], [], [35, 7, 20]]
    monkeypatch.setattr(rivals, "attribute_patches", lambda *_: np.array(next(removed), dtype=int))
    vector = astra_vector(*testbed, attacks, SITE, target="step one", masks=2, text=text, batch_size=2)
    total = torch.zeros(128, dtype=torch.float64)
    for attack, indices in zip(attacks, chosen, strict=True):
        pixels = attack.image.copy()
        for i in indices:
            pixels[8 * (i // 6) : 8 * (i // 6) + 8, 8 * (i % 6) : 8 * (i % 6) + 8] = round(float(attack.image.mean()))
        read = attack.text if text is None else text
        total += hidden(testbed, attack, read, attack.image) - hidden(testbed, attack, read, pixels)
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector.double(), total / 3, atol=1e-4, rtol=1e-4)


def test_the_masks_are_a_function_of_the_seed_and_find_what_is_written(testbed, world, monkeypatch):
    attacks, found = world.attack("typographic", "fit", 2), []

    def attribute(*args):
        found.append(set(patches.attribute_patches(*args).tolist()))
        return np.array(sorted(found[-1]))

    monkeypatch.setattr(rivals, "attribute_patches", attribute)
    first, again, other = (
        astra_vector(*testbed, attacks, SITE, target="step one", masks=64, top=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    hits = sum(len(f & set(a.tiles)) for f, a in zip(found[:2], attacks, strict=True)) / sum(map(len, found[:2]))
    assert hits > 3 * 5 / 36  # words cover 5 of the 36 patches


def test_what_gives_no_vector_is_named(testbed, world, monkeypatch):
    with pytest.raises(ValueError, match="has 0 images"):
        astra_vector(*testbed, world.attack("cipher", "fit", 1), SITE)
    monkeypatch.setattr(rivals, "attribute_patches", lambda *_: np.array([], dtype=int))
    with pytest.raises(ValueError, match="No patch"):
        astra_vector(*testbed, world.attack("icon", "fit", 1), SITE, masks=1)
    bare = copy.copy(testbed[1])
    bare.patch_size = None
    with pytest.raises(ValueError, match="patch_size"):
        astra_vector(testbed[0], bare, world.attack("icon", "fit", 1), SITE)


@pytest.mark.parametrize("text", ["what colour do you see ?", None])
def test_the_calibration_is_the_mean_over_answer_tokens(testbed, world, text):
    samples = [*world.benign("icon", "fit", 2), *world.benign("colour", "fit", 1)]
    h0 = astra_calibration(*testbed, samples, SITE, text=text, max_new_tokens=10, batch_size=2)
    tokens = []
    for sample in samples:
        changed = copy.copy(sample)
        object.__setattr__(changed, "text", text or sample.text)
        inputs, _ = single(testbed, changed)
        begin = inputs["input_ids"].shape[1]
        ids = testbed[0].generate(**inputs, max_new_tokens=10, do_sample=False)[:, :-1]  # without the end of sequence
        with torch.no_grad():
            whole = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
            tokens += testbed[0](**whole, output_hidden_states=True).hidden_states[3][0, begin:].double()
    torch.testing.assert_close(h0.double(), torch.stack(tokens).mean(0), atol=1e-4, rtol=1e-4)


def test_what_cannot_calibrate_is_named(testbed, world, monkeypatch):
    with pytest.raises(ValueError, match="no image"):
        astra_calibration(*testbed, world.benign("cipher", "fit", 2), SITE)
    monkeypatch.setattr(rivals, "generate_answers", lambda *_: [""] * 2)
    with pytest.raises(ValueError, match="empty"):
        astra_calibration(*testbed, world.benign("icon", "fit", 2), SITE)
