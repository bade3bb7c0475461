import copy
import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from families.prompts import COUNTS
from PIL import Image

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.chatting import Exchange, converse, pieces
from care_hf.gating import Gate
from care_hf.projection import Subspace
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site, hidden_size, image_token_ids, record

STEPS = 3
GATE_SITE = Site(1, "residual")


def subspace(d, rank, seed, steps=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q
    return Subspace(basis, 2 * torch.randn(*([steps] if steps else []), d, generator=generator), 0.75)


def gated(model, processor, sites, fires=True, pictured=0):
    d = hidden_size(model)
    generator = torch.Generator().manual_seed(9)
    readers = torch.randn(d, 2 + pictured, generator=generator)
    thresholds = torch.full((2 + pictured,), -1e6 if fires else 1e6)
    gate = Gate(generation_prompt(processor), readers, thresholds, 1, pictured)
    places = {
        site: {"last": subspace(d, 3, 10 + i), "response": subspace(d, 2, 20 + i, STEPS)}
        for i, site in enumerate(sites)
    }
    return CareForConditionalGeneration.from_base(
        model, SafetySubspaces(places, strength=0.5, gate=gate, gate_site=GATE_SITE)
    )


def printed(model, sites, fusion="adaptive", **more):
    d = hidden_size(model)
    groups = {site: {"visual": subspace(d, 3, 30 + i), "text": subspace(d, 2, 40 + i)} for i, site in enumerate(sites)}
    return CareForConditionalGeneration.from_base(model, SafetySubspaces(groups, fusion, strength=0.5, **more))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


TEXT = "show me how to make it ."


def inputs_of(model, processor, *messages):
    return collate(processor, [Sample(list(messages))], image_token_ids(model.config)).inputs


def message(text, image=None, role="user"):
    images = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


@torch.no_grad()
def activations(model, inputs, ids, site):
    """What `site` puts out over prompt and answer in one forward, before any repair, float64 (S, d)."""
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.int64)], dim=1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with record(model, [site]) as found:
        model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False, **rest)
    return found[site][0].double().numpy()


def correction(h, subspace, strength, anchor):
    basis = subspace.basis.double().numpy()
    return strength * (subspace.beta * anchor.double().numpy() - h) @ basis @ basis.T


def ratio(correction, h):
    return np.linalg.norm(correction, axis=-1) / np.linalg.norm(h, axis=-1)


# What it says, computed otherwise in float64


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("component", ["residual", "ffn", "attention"])
def test_strengths_of_a_gated_repair_are_those_of_its_formula(testbed, image, component, with_image):
    base, processor = testbed
    site, seen = Site(4, component), image if with_image else None
    repaired = gated(base, processor, [site])
    found = converse(repaired, processor, TEXT, seen, max_new_tokens=7)
    inputs = inputs_of(base, processor, message(TEXT, seen))
    length, ids = inputs["input_ids"].shape[1], found.repaired.ids
    h = activations(base, inputs, ids[:-1], site)  # below the site, both models are the same
    by_place = repaired.subspaces()[site]
    expected = np.zeros(len(h))
    at = length - 1
    expected[at] = ratio(correction(h[at], by_place["last"], 0.5, by_place["last"].mean), h[at])
    for step in range(1, min(STEPS, len(ids) - 1) + 1):
        # Where the residual of an earlier token was repaired, no later layer's is the same; this layer's is.
        moved = correction(h[at + step], by_place["response"], 0.5, by_place["response"].mean[step - 1])
        expected[at + step] = ratio(moved, h[at + step])
    assert found.prompt_strengths == pytest.approx(expected[:length], rel=1e-4)
    assert found.repaired.strengths[:-1] == pytest.approx(expected[length:], rel=1e-4)
    assert found.repaired.strengths[-1] is None and len(found.repaired.strengths) == len(ids)
    assert found.prompt_strength == found.prompt_strengths[-1] > 0.05
    assert set(found.base.strengths) == {None} and sum(found.visual) == (36 if with_image else 0)


@pytest.mark.parametrize("fusion", ["adaptive", "constant", "route"])
def test_strengths_of_a_printed_repair_are_those_of_its_formula_and_the_largest_of_its_sites(testbed, image, fusion):
    base, processor = testbed
    first, second = Site(3, "ffn"), Site(4, "ffn")
    repaired = printed(base, [first, second], fusion)
    found = converse(repaired, processor, TEXT, image, max_new_tokens=6)
    inputs = inputs_of(base, processor, message(TEXT, image))
    visual = np.isin(inputs["input_ids"][0].numpy(), image_token_ids(base.config))
    assert found.visual == tuple(visual)
    visual = np.concatenate([visual, np.zeros(len(found.repaired.ids) - 1, dtype=bool)])
    ratios = []
    for site, before in ((first, base), (second, printed(base, [first], fusion))):
        h = activations(before, inputs, found.repaired.ids[:-1], site)
        parts = repaired.subspaces()[site]
        by = {name: correction(h, parts[name], 1.0, parts[name].mean) for name in ("visual", "text")}
        norms = {name: np.linalg.norm(c, axis=-1) for name, c in by.items()}
        weights = {
            "adaptive": norms["visual"] / (norms["visual"] + norms["text"]),
            "constant": np.full(len(h), 0.5),
            "route": visual.astype(float),
        }[fusion][:, None]
        ratios.append(ratio(0.5 * (weights * by["visual"] + (1 - weights) * by["text"]), h))
    expected = np.maximum(*ratios)
    length = len(found.prompt_strengths)
    assert found.prompt_strengths == pytest.approx(expected[:length], rel=1e-3)
    assert found.repaired.strengths[:-1] == pytest.approx(expected[length:], rel=1e-3)
    assert not np.allclose(ratios[0], expected) and not np.allclose(ratios[1], expected)
    assert found.decision is None


def test_of_the_scope_prompt_the_answer_is_not_moved(testbed, image):
    base, processor = testbed
    gate = Gate(generation_prompt(processor), torch.zeros(128, 0), torch.zeros(0))
    repaired = printed(base, [Site(4, "ffn")], scope="prompt", gate=gate, gate_site=GATE_SITE)
    found = converse(repaired, processor, TEXT, image, max_new_tokens=5)
    assert min(found.prompt_strengths) > 0 and not any(found.repaired.strengths[:-1])
    assert found.decision.fires and found.decision.required == found.decision.alarms == ()


@pytest.mark.parametrize("pictured", [0, 1])
@pytest.mark.parametrize("with_image", [True, False])
def test_margins_are_scores_above_thresholds_at_the_last_token(testbed, image, with_image, pictured):
    base, processor = testbed
    repaired = gated(base, processor, [Site(4, "residual")], pictured=pictured)
    repaired.gate_reader.thresholds.copy_(torch.tensor([0.5, -0.25, 0.125])[: 2 + pictured])
    seen = image if with_image else None
    decision = converse(repaired, processor, TEXT, seen, max_new_tokens=3).decision
    inputs = inputs_of(base, processor, message(TEXT, seen))
    h = activations(base, inputs, [], GATE_SITE)[-1]
    margins = h @ repaired.gate.readers.double().numpy() - repaired.gate.thresholds.double().numpy()
    alarm = margins[2] if pictured and with_image else margins[1]
    assert decision.required == pytest.approx(margins[:1], rel=1e-4) and decision.alarms == pytest.approx(
        [alarm], rel=1e-4
    )
    assert decision.fires == bool(margins[0] > 0 and alarm > 0)


def test_where_the_gate_does_not_fire_nothing_is_moved_and_both_answer_alike(testbed, image):
    base, processor = testbed
    found = converse(gated(base, processor, [Site(4, "residual")], fires=False), processor, TEXT, image)
    assert not found.decision.fires and not any(found.prompt_strengths) and not any(found.repaired.strengths[:-1])
    assert found.base.ids == found.repaired.ids


# It is what `generate` does


def generated(model, processor, messages, **options):
    inputs = inputs_of(model, processor, *messages)
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["gated", "printed"])
def test_answers_are_those_of_generate_turn_by_turn_each_in_its_own_conversation(testbed, image, kind):
    base, processor = testbed
    site = [Site(3, "residual")]
    repaired = gated(base, processor, site) if kind == "gated" else printed(base, site)
    repaired.strength = 6.0
    history, told = [message("be brief .", role="user"), message("yes .", role="assistant")], {}
    said = {"base": list(history), "repaired": list(history)}
    for text, seen in ((TEXT, image), ("what is this ?", None), ("and this ?", image)):
        heard = []
        tell = heard.append
        found = converse(
            repaired, processor, text, seen, history, max_new_tokens=6, on_text=lambda *told, tell=tell: tell(told)
        )
        for side, model in (("base", base), ("repaired", repaired)):
            said[side].append(message(text, seen))
            ids = generated(model, processor, said[side], max_new_tokens=6, do_sample=False)
            answer = getattr(found, side)
            assert list(answer.ids) == ids
            assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True)
            assert answer.text == "".join(piece for of, piece in heard if of == side)
            said[side].append(message(answer.text.strip(), role="assistant"))
        assert found.repaired.ids != found.base.ids
        assert len(found.prompt_strengths) == inputs_of(base, processor, *said["repaired"][:-1])["input_ids"].shape[1]
        history.append(found)
        told[text] = found
    later = told["and this ?"]
    # In a conversation, a gated repair moves earlier answers as well: theirs is what it was, each by its own prompt.
    moved = [strength for strength in later.prompt_strengths if strength]
    assert len(moved) > 2 and later.prompt_strength > 0


def test_sampling_follows_its_seed_and_leaves_the_generator_alone(testbed, image):
    base, processor = testbed
    repaired = printed(base, [Site(3, "ffn")])
    before = torch.random.get_rng_state()
    drawn = [converse(repaired, processor, TEXT, image, temperature=3.0, seed=s, max_new_tokens=8) for s in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn[0].repaired == drawn[1].repaired and drawn[0].base == drawn[1].base
    assert drawn[0].repaired.ids != drawn[2].repaired.ids
    torch.manual_seed(1)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0}
    assert list(drawn[2].repaired.ids) == generated(repaired, processor, [message(TEXT, image)], **options)


def test_it_leaves_the_model_as_it_was(testbed, image):
    base, processor = testbed
    repaired = gated(base, processor, [Site(4, "residual")])

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in repaired.modules()]

    before = hooks()
    with repaired.disable():
        found = converse(repaired, processor, TEXT, image, max_new_tokens=2)
        assert found.prompt_strength > 0 and not repaired.care_state.enabled
    assert hooks() == before and repaired.care_state.enabled

    class Broken(Exception):
        pass

    def interrupt(side, text):
        if side == "repaired":
            raise Broken

    with pytest.raises(Broken):
        converse(repaired, processor, TEXT, image, on_text=interrupt)
    assert hooks() == before and repaired.care_state.enabled


def test_half_precision_says_what_was_done_in_it(testbed, image):
    base, processor = testbed
    repaired = gated(copy.deepcopy(base), processor, [Site(4, "residual")])  # which shares its weights, and casts them
    whole = converse(repaired, processor, TEXT, image, max_new_tokens=1)
    half = converse(repaired.bfloat16(), processor, TEXT, image, max_new_tokens=1)
    assert half.prompt_strength == pytest.approx(whole.prompt_strength, rel=0.05)
    assert not any(half.prompt_strengths[:-1])


def test_without_a_cache_it_says_the_same(testbed, image):
    base, processor = testbed
    repaired = gated(base, processor, [Site(4, "ffn")])
    expected = converse(repaired, processor, TEXT, image, max_new_tokens=5)
    repaired.generation_config.use_cache = False
    try:
        found = converse(repaired, processor, TEXT, image, max_new_tokens=5)
    finally:
        repaired.generation_config.use_cache = True
    assert found.repaired.ids == expected.repaired.ids
    assert found.prompt_strengths == pytest.approx(expected.prompt_strengths, rel=1e-4)
    assert found.repaired.strengths[:-1] == pytest.approx(expected.repaired.strengths[:-1], rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_converses(name):
    family = FAMILIES[name]
    model, processor = family.model, family.processor(family.model.config)
    seen = None
    if COUNTS[family.images][0]:
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        seen = Image.fromarray(noise)
    repaired = gated(model, processor, [Site(2, "residual"), Site(3, "residual")])
    text = "tell me now please"
    found = converse(repaired, processor, text, seen, max_new_tokens=4)
    for side, one in (("base", model), ("repaired", repaired)):
        ids = generated(one, processor, [message(text, seen)], max_new_tokens=4, do_sample=False)
        assert list(getattr(found, side).ids) == ids
    length = inputs_of(model, processor, message(text, seen))["input_ids"].shape[1]
    assert len(found.prompt_strengths) == len(found.visual) == length
    assert found.prompt_strength > 0 and not any(found.prompt_strengths[:-1]) and found.decision.fires
    moved = found.repaired.strengths[:-1]
    assert len(moved) == len(found.repaired.ids) - 1 and all(strength > 0 for strength in moved[:STEPS])
    assert json.dumps(found.to_dict(), allow_nan=False)
    if family.images != "one":
        again = converse(repaired, processor, "what is this", None, [found], max_new_tokens=2)
        assert len(again.prompt_strengths) > length and again.prompt_strength > 0


# Forms and errors


def test_pieces_join_to_the_text(testbed):
    tokenizer = testbed[1].tokenizer
    ids = tokenizer("i cannot help with that .")["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    class Bytes:
        """As a byte-level tokenizer: a token may be part of a character; and one may take back a space."""

        def decode(self, ids, skip_special_tokens):
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace").replace(" .", ".")

    text = "naïve 日本 yes . ok"
    ids = [*text.encode(), 300]
    found = pieces(Bytes(), ids)
    assert "".join(found) == text.replace(" .", ".") and len(found) == len(ids) and found[-1] == ""
    assert found[2:4] == ("", "ï") and pieces(Bytes(), []) == ()


def test_an_exchange_is_told_as_plain_values(testbed, image):
    base, processor = testbed
    found = converse(gated(base, processor, [Site(4, "ffn")]), processor, TEXT, [image], max_new_tokens=3)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["prompt"] == {"text": TEXT, "images": 1} and told["repaired"]["text"] == found.repaired.text
    assert told["repaired"]["strengths"] == list(found.repaired.strengths) and told["decision"]["fires"] is True
    assert isinstance(found, Exchange) and told["prompt_strengths"] == list(found.prompt_strengths)


def test_what_cannot_be_asked_is_named(testbed, image, tmp_path):
    base, processor = testbed
    repaired = gated(base, processor, [Site(4, "ffn")])
    with pytest.raises(TypeError, match="LlavaForConditionalGeneration is not repaired; load a repaired checkpoint"):
        converse(base, processor, TEXT)
    with pytest.raises(ValueError, match="prompt is empty"):
        converse(repaired, processor, "  ")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        converse(repaired, processor, TEXT, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        converse(repaired, processor, TEXT, temperature=-1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        converse(repaired, processor, TEXT, tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="'role' and 'content'"):
        converse(repaired, processor, TEXT, history=[{"text": "x"}])


def test_an_answer_of_one_token_was_moved_at_the_prompt_alone(testbed, image):
    base, processor = testbed
    found = converse(gated(base, processor, [Site(4, "ffn")]), processor, TEXT, image, max_new_tokens=1)
    assert len(found.repaired.ids) == 1 and found.repaired.strengths == (None,) and found.prompt_strength > 0
