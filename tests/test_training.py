"""Defences trained from a specification: each against the work done by hand on the bundled model."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import care_hf
from care_hf import training
from care_hf.answers import gate_fires, generate_answers
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.recipe import Recipe
from care_hf.rivals import AstraSteering
from care_hf.samples import Sample, collate, load_samples
from care_hf.sites import Site, record
from care_hf.subspace import SafetySubspaces
from care_hf.testbed.suite import FitPrompts
from care_hf.testbed.world import REFUSAL
from care_hf.training import KINDS, Specification, Trainer

SEEN = ("typographic",)
GATED = Specification("repair", families=SEEN)
PRINTED = Specification("repair", "paper", {"rank": 4}, families=SEEN)
SITE = Site(4, "residual")  # that of the recipe "gated" on six layers


@pytest.fixture(scope="module")
def data():
    return FitPrompts(20)


@pytest.fixture(scope="module")
def trainer(testbed, data):
    return Trainer(*testbed, data, batch_size=32)


@pytest.fixture(scope="module")
def printed(testbed):
    """A trainer on fewer prompts, which the printed method makes do with."""
    return Trainer(*testbed, FitPrompts(4), batch_size=32)


@pytest.fixture(scope="module")
def gated(trainer):
    return trainer.train(GATED).subspaces


class Given:
    """Training prompts that are just these, by class."""

    refusal = REFUSAL

    def __init__(self, **prompts):
        self.given, self.asked = prompts, []

    def prompts(self, families, exposure):
        self.asked.append((tuple(families), exposure))
        return self.given

    def is_refusal(self, answer):
        return answer == REFUSAL


@pytest.fixture(scope="module")
def few(world):
    """Six prompts of each class: the first malicious ones are refused in plain words, the others are not."""
    malicious = [s for s in world.plain("fit", 8) if s.image is None][:3] + world.attack("typographic", "fit", 3)
    kept = {name: [{"messages": s.messages} for s in world.benign(name, "fit", 6)] for name in ("typographic", "count")}
    malicious = [{"messages": s.messages} for s in malicious]
    return {"malicious": malicious, "benign": kept["typographic"], "neutral": kept["count"]}


def assert_same(first, second):
    """That two repairs are the same, to the last bit."""
    assert first.sites.keys() == second.sites.keys() and first.scope == second.scope
    assert (first.strength, first.fusion) == (second.strength, second.fusion)
    for site, by_name in first.sites.items():
        assert by_name.keys() == second.sites[site].keys()
        for name, subspace in by_name.items():
            other = second.sites[site][name]
            assert torch.equal(subspace.basis, other.basis) and torch.equal(subspace.mean, other.mean)
            assert subspace.beta == other.beta
    assert (first.gate is None) == (second.gate is None) and first.gate_site == second.gate_site
    if first.gate is not None:
        assert torch.equal(first.gate.readers, second.gate.readers)
        assert torch.equal(first.gate.thresholds, second.gate.thresholds)


# Specifications


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "prayer"}, r"kind='prayer' is not a defence; choose one of .*'refusal lora'"),
        ({"kind": "repair", "recipe": "secret"}, "Recipe 'secret' is neither a YAML file of settings nor one of"),
        ({"kind": "repair", "changes": {"rnk": 2}}, r"recipe: unknown fields \['rnk'\]; known are .*mean 'rank'"),
        ({"kind": "repair", "changes": {"rank": 0}}, "rank=0"),
        ({"kind": "repair", "changes": {"scope": "all"}}, "needs basis='filter'"),
        ({"kind": "repair", "families": "icon"}, "families='icon' must be a list"),
        ({"kind": "ungated", "recipe": "paper"}, "kind='ungated' needs a recipe with a gate"),
        ({"kind": "canned refusal", "recipe": "paper"}, "kind='canned refusal' needs a recipe with a gate"),
        ({"kind": "canned refusal", "adaptive": True}, "no gradient goes through a canned refusal"),
    ],
)
def test_what_cannot_be_trained_is_named_at_once(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Specification(**given)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_plain_and_make_it_again(kind):
    changes = {"rank": 2, "layers": [4, 5], "false_alarms": 0.01}
    options = {"site": "3.residual", "text": None, "alpha": 2.0}
    first = Specification(kind, "gated", changes, ["icon", "split"], exposure=False, options=options)
    kept = json.loads(json.dumps(first.settings))
    assert kept == first.settings
    again = Specification(kept["kind"], "paper", kept["recipe"], kept["families"], kept["exposure"], kept["options"])
    assert again.settings == kept
    assert again.full_recipe == Recipe(rank=2, layers=(4, 5), false_alarms=0.01)
    for other in (
        Specification(kind, "gated", {**changes, "beta": 0.5}, ["icon", "split"], False, options),
        Specification(kind, "gated", changes, ["icon"], False, options),
        Specification(kind, "gated", changes, ["icon", "split"], True, options),
        Specification(kind, "gated", changes, ["icon", "split"], False, {**options, "alpha": 1.0}),
    ):
        assert other.settings != kept


# Repairs and their controls


def test_a_gated_repair_is_what_fit_gives(testbed, data, gated):
    model, processor = testbed
    prompts = data.prompts(SEEN, True)
    fitted = care_hf.fit(
        model, **prompts, processor=processor, recipe=Recipe(batch_size=32), judge=lambda answer: answer == REFUSAL
    )
    assert_same(gated, SafetySubspaces.from_model(fitted))
    assert gated.sites[SITE]["last"].basis.shape == (128, 4)


@pytest.mark.parametrize("changes", [{}, {"scope": "prompt", "layers": (3,), "gate_layer": 2}])
def test_a_printed_repair_is_what_fit_gives(testbed, printed, changes):
    model, processor = testbed
    specification = replace(PRINTED, changes={"rank": 4, **changes})
    prompts = printed.data.prompts(SEEN, False)  # of which it has a use for two classes alone
    recipe = Recipe.load("paper").replace(batch_size=32, rank=4, **changes)
    fitted = care_hf.fit(model, prompts["benign"], prompts["malicious"], processor, recipe)
    repair = printed.train(specification)
    assert_same(repair.subspaces, SafetySubspaces.from_model(fitted))
    assert repair.subspaces.scope == changes.get("scope", "all") and repair.settings == specification.settings
    rival = printed.train(replace(specification, kind="mean difference")).subspaces
    assert (rival.scope, rival.gate_site) == (repair.subspaces.scope, repair.subspaces.gate_site)


def test_turns_are_recorded_once_for_all_that_is_solved_from_them(testbed, data, monkeypatch):
    recorded = []
    monkeypatch.setattr(training, "collect_turns", lambda *a, **k: recorded.append(k) or len(recorded))
    trainer = Trainer(*testbed, data, batch_size=32, seed=5)
    assert trainer.turns(GATED) == 1
    same = {"rank": 1, "basis": "filter", "anchor": "benign", "beta": 0.5, "strength": 0.5, "gate_ridge": 0.1}
    same |= {"false_alarms": 0.1, "centring": "own", "gate": "none", "layers": (4,)}
    for name, value in same.items():
        assert trainer.turns(replace(GATED, changes={name: value})) == 1
    for kind in ("random", "mean difference", "canned refusal", "ungated"):
        assert trainer.turns(replace(GATED, kind=kind)) == 1
    others = [replace(GATED, changes=c) for c in ({"layers": (5,)}, {"component": "ffn"}, {"gate_layer": 2})]
    others += [replace(GATED, changes=c) for c in ({"steps": 2}, {"scope": ("last",)})]
    others += [replace(GATED, families=()), replace(GATED, exposure=False)]
    assert [trainer.turns(one) for one in others] == list(range(2, 2 + len(others)))
    assert [trainer.turns(one) for one in others] == list(range(2, 2 + len(others)))
    assert {k["recipe"].batch_size for k in recorded} == {32} and {k["recipe"].seed for k in recorded} == {5}
    assert [len(recorded[i]["malicious"]) for i in (0, -2, -1)] == [40, 20, 40]
    assert "exposed" in recorded[0] and "exposed" not in recorded[-1]


def states(testbed, prompts, subspaces=None):
    """By hand: the residual stream after layer 4 at the last token of every prompt, (n, 128), one prompt at a time.

    With `subspaces`: how far their repair moves it, whatever the gate says.
    """
    model, processor = testbed
    if subspaces is not None:
        model = CareForConditionalGeneration.from_base(model, replace(subspaces, gate=subspaces.gate.ungated()))
    rows = []
    for prompt in prompts:
        inputs = processor.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            if subspaces is None:
                rows.append(model(**inputs, output_hidden_states=True).hidden_states[5][0, -1])
            else:
                (part,) = model.care_modules().values()
                moved = []
                hook = part.register_forward_hook(lambda _, args, out, to=moved: to.append((out - args[0])[0, -1]))
                model(**inputs)
                hook.remove()
                rows.append(moved[0])
    return torch.stack(rows)


@pytest.fixture(scope="module")
def classes(testbed, data):
    """The malicious prompts that are refused, and all prompts that are complied with."""
    prompts = data.prompts(SEEN, True)
    answers = generate_answers(*testbed, load_samples(prompts["malicious"]), 12)
    refused = [p for p, answer in zip(prompts["malicious"], answers, strict=True) if answer == REFUSAL]
    complied = [p for p, answer in zip(prompts["malicious"], answers, strict=True) if answer != REFUSAL]
    assert len(refused) >= 20 and len(complied) >= 10
    return refused, [*prompts["benign"], *complied]


def test_a_random_control_moves_complying_prompts_as_far_through_the_same_gate(testbed, trainer, gated, classes):
    control = trainer.train(replace(GATED, kind="random")).subspaces
    assert torch.equal(control.gate.readers, gated.gate.readers)
    assert torch.equal(control.gate.thresholds, gated.gate.thresholds)
    for name, subspace in gated.sites[SITE].items():
        other = control.sites[SITE][name]
        assert other.basis.shape == subspace.basis.shape and torch.equal(other.mean, subspace.mean)
        assert torch.linalg.matrix_norm(other.basis.mT @ subspace.basis, 2) < 0.9
    far = [states(testbed, classes[1], one).norm(dim=1).mean().item() for one in (gated, control)]
    assert far[0] > 1 and far[1] == pytest.approx(far[0], rel=1e-3)
    assert control.strength > 1.5  # else the control would be gentler


def test_a_random_control_of_an_oblique_repair_moves_as_far(testbed, trainer, classes):
    changes = {"basis": "filter", "projector": "oblique", "beta": 0.5}
    pair = [trainer.train(replace(GATED, kind=kind, changes=changes)).subspaces for kind in ("repair", "random")]
    assert pair[0].sites[SITE]["last"].reader is not None
    far = [states(testbed, classes[1], one).norm(dim=1).mean().item() for one in pair]
    assert far[1] == pytest.approx(far[0], rel=1e-3)


def test_a_printed_random_control_has_equal_ranks(printed):
    repair, control = (printed.train(replace(PRINTED, kind=kind)).subspaces for kind in ("repair", "random"))
    assert control.gate is None and control.strength == repair.strength == 1
    assert control.sites.keys() == repair.sites.keys()
    for site, by_modality in repair.sites.items():
        for name, subspace in by_modality.items():
            other = control.sites[site][name]
            assert other.rank == subspace.rank == 4 and not torch.allclose(other.basis, subspace.basis, atol=0.1)


def test_a_gated_mean_difference_is_that_of_complying_and_refused_prompts(testbed, trainer, gated, classes):
    rival = trainer.train(replace(GATED, kind="mean difference")).subspaces
    refused, complying = (states(testbed, prompts).mean(dim=0) for prompts in classes)
    subspace = rival.sites[SITE]["last"]
    assert subspace.basis.shape == (128, 1) and rival.sites[SITE]["response"].rank == 1
    cosine = torch.cosine_similarity(subspace.basis[:, 0].float(), complying - refused, dim=0)
    assert cosine > 0.9999
    torch.testing.assert_close(subspace.mean.flatten(), refused, rtol=1e-3, atol=1e-3)
    assert torch.equal(rival.gate.readers, gated.gate.readers) and rival.strength == gated.strength


@pytest.mark.parametrize("anchor", ["benign", "none"])
def test_a_printed_mean_difference_is_that_of_the_image_tokens(testbed, printed, anchor):
    model, processor = testbed
    changes = {"attribution": "all", "modalities": ("visual",), "layers": (3,), "anchor": anchor}
    repair, rival = (
        printed.train(Specification(kind, "paper", {**changes, "rank": 4}, SEEN)).subspaces
        for kind in ("repair", "mean difference")
    )
    means, site = {}, Site(3, "ffn")
    for name, prompts in printed.data.prompts(SEEN, False).items():
        tokens = []
        for sample in load_samples(prompts):
            if sample.images:
                inputs = collate(processor, [Sample(sample.messages)], ()).inputs
                with record(model, [site]) as caught, torch.no_grad():
                    model(**inputs)
                shown = inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
                tokens.append(caught[site][0][shown])
        means[name] = torch.cat(tokens).double().mean(dim=0)
    subspace = rival.sites[site]["visual"]
    assert subspace.basis.shape == (128, 1)
    cosine = torch.cosine_similarity(subspace.basis[:, 0].double(), means["malicious"] - means["benign"], dim=0)
    assert cosine > 0.9999
    assert subspace.beta == repair.sites[site]["visual"].beta == {"benign": 1, "none": 0}[anchor]
    assert torch.equal(subspace.mean, repair.sites[site]["visual"].mean)


@pytest.fixture(scope="module")
def asked(world):
    """Prompts of the test split, some of which the gate should let pass."""
    samples = [*world.plain("test", 8), *world.attack("typographic", "test", 8), *world.benign("recipe", "test", 8)]
    return [Sample(s.messages) for s in samples]


def test_a_canned_refusal_is_given_exactly_where_the_same_gate_fires(testbed, trainer, gated, asked):
    model, processor = testbed
    defence = trainer.train(replace(GATED, kind="canned refusal"))
    repaired = CareForConditionalGeneration.from_base(model, gated)
    fires = gate_fires(repaired, processor, asked).tolist()
    assert 8 <= sum(fires) <= 16 and not any(fires[16:])
    own = generate_answers(model, processor, asked, 12)
    with defence.applied(model, processor) as defended:
        answers = generate_answers(defended, processor, asked, 12)
    assert answers == [REFUSAL if fire else answer for fire, answer in zip(fires, own, strict=True)]
    assert answers != own


def test_an_ungated_repair_is_the_same_one_everywhere(testbed, trainer, gated, asked):
    ungated = trainer.train(replace(GATED, kind="ungated")).subspaces
    assert gate_fires(CareForConditionalGeneration.from_base(testbed[0], ungated), testbed[1], asked).all()
    for name, subspace in gated.sites[SITE].items():
        assert torch.equal(subspace.basis, ungated.sites[SITE][name].basis)


def test_undefended_is_the_model_itself(testbed, trainer):
    with trainer.train(Specification("undefended")).applied(*testbed) as model:
        assert model is testbed[0]


# Rivals with a frame of their own


def astra(**options):
    return Specification("astra", families=SEEN, options={"site": "3.residual", "target": "step one", **options})


def test_astra_is_given_prompts_with_one_image_from_all_over(testbed, data, monkeypatch):
    given = {}

    def vector(model, processor, attacks, site, *, seed, **options):
        given["attacks"], given["site"], given["seed"], given["options"] = attacks, site, seed, options
        return torch.arange(1.0, 129)

    def calibration(model, processor, benign, site, *, text, max_new_tokens):
        given["benign"], given["calibrated"] = benign, (site, text, max_new_tokens)
        return torch.full((128,), 2.0)

    monkeypatch.setattr(training, "astra_vector", vector)
    monkeypatch.setattr(training, "astra_calibration", calibration)
    specification = astra(images=6, alpha=3.0, text=None, max_new_tokens=5, masks=8)
    defence = Trainer(*testbed, data, seed=4).train(specification)
    for name, class_ in (("attacks", "malicious"), ("benign", "benign")):
        known = {s.digest for s in load_samples(data.prompts(SEEN, True)[class_])}
        digests = [s.digest for s in given[name]]
        assert len(digests) == 6 == len(set(digests)) and set(digests) <= known
        assert all(len(s.images) == 1 for s in given[name])
    # Plain requests beside an image, and attacks.
    assert {s.kind for s in given["attacks"]} == {"recipe", "typographic"}
    assert given["site"] == Site(3, "residual") and given["seed"] == 4
    assert given["calibrated"] == (Site(3, "residual"), None, 5)
    assert given["options"] == {"target": "step one", "text": None, "masks": 8}
    steering = defence.steering(testbed[0])
    assert isinstance(steering, AstraSteering) and steering.alpha == 3.0
    assert torch.equal(steering.h0, torch.full((128,), 2.0)) and steering.unit[-1] / steering.unit[0] == 128
    assert specification.options["images"] == 6  # what was given is as it was


def test_astra_steers_the_bundled_model_and_leaves_it(testbed, few, asked):
    specification = astra(images=2, masks=16, text=None, max_new_tokens=8, alpha=9.0)
    defence = Trainer(*testbed, Given(**few), 32).train(specification)
    own = generate_answers(*testbed, asked[8:], 8)
    with defence.applied(*testbed) as model:
        assert model is testbed[0] and generate_answers(model, testbed[1], asked[8:], 8) != own
    assert generate_answers(*testbed, asked[8:], 8) == own


@pytest.mark.parametrize("lacking", ["malicious", "benign"])
def test_astra_without_images_is_told(testbed, few, lacking):
    texts = [{"messages": [{"role": "user", "content": [{"type": "text", "text": f"how {i} ?"}]}]} for i in range(3)]
    with pytest.raises(ValueError, match="ASTRA needs attacks and benign prompts with one image each; name families"):
        Trainer(*testbed, Given(**{**few, lacking: texts})).train(astra())


def watch(monkeypatch, name):
    """Call a rival's training as it is, and keep what it was given."""
    given, function = [], getattr(training, name)
    monkeypatch.setattr(training, name, lambda *a, **k: given.append((a, k)) or function(*a, **k))
    return given


@pytest.fixture
def unchanged(testbed):
    """Afterwards the weights are as they were, to the last bit."""
    model = testbed[0]
    before = copy.deepcopy(model.state_dict())
    yield
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training


def labelled(pairs):
    return [(sample.digest, *answers) for sample, *answers in pairs]


def test_refusal_lora_learns_the_refusal_and_the_models_own_answers(testbed, few, asked, monkeypatch, unchanged):
    model, processor = testbed
    given = watch(monkeypatch, "train_refusal_lora")
    data = Given(**few, refused=few["malicious"][:1])
    specification = Specification("refusal lora", families=SEEN, options={"steps": 2, "max_new_tokens": 6, "rank": 2})
    defence = Trainer(model, processor, data, 32, seed=7).train(specification)
    (((_, _, refused, kept), options),) = given
    assert options == {"steps": 2, "rank": 2, "lr": 1e-3, "seed": 7} and data.asked == [(SEEN, True)]
    samples = load_samples([*few["benign"], *few["neutral"]])
    own = generate_answers(model, processor, samples, 6)
    assert sorted(labelled(kept)) == sorted((s.digest, answer) for s, answer in zip(samples, own, strict=True))
    harmful = [s.digest for s in load_samples([*few["malicious"], *few["malicious"][:1]])]
    assert labelled(refused) == [(digest, REFUSAL) for digest in harmful]
    inputs = collate(processor, asked[:4], ()).inputs
    with defence.applied(model, processor) as tuned, torch.no_grad():
        assert tuned is not model and not torch.equal(tuned(**inputs).logits, model(**inputs).logits)


def test_spo_style_prefers_the_refusal_to_what_was_complied_with(testbed, few, asked, monkeypatch, unchanged):
    model, processor = testbed
    given = watch(monkeypatch, "train_preference_steering")
    options = {"layers": [2, 3], "steps": 2, "batch_size": 4, "max_new_tokens": 8}
    specification = Specification("spo-style", families=SEEN, options=options)
    defence = Trainer(model, processor, Given(**few), 32, seed=7).train(specification)
    (((_, _, harmful, kept), passed),) = given
    assert passed == {"layers": [2, 3], "steps": 2, "batch_size": 4, "seed": 7}
    own = generate_answers(model, processor, load_samples(few["malicious"]), 8)
    digests = [s.digest for s in load_samples(few["malicious"])]
    complied = [(d, REFUSAL, answer) for d, answer in zip(digests, own, strict=True) if answer != REFUSAL]
    assert labelled(harmful) == complied and 0 < len(complied) < 6 and len(kept) == 12
    inputs = collate(processor, asked[:4], ()).inputs
    with torch.no_grad():
        base = model(**inputs).logits
        with defence.applied(model, processor) as steered:
            assert not torch.equal(steered(**inputs).logits, base)
        assert torch.equal(model(**inputs).logits, base)


def test_spo_style_without_an_answer_to_disprefer_is_told(testbed, few, monkeypatch):
    data = Given(**few)
    monkeypatch.setattr(data, "is_refusal", lambda answer: True)
    with pytest.raises(ValueError, match=r"complies with no malicious prompt.*name attack families"):
        Trainer(*testbed, data, 32).train(Specification("spo-style", options={"layers": [3], "max_new_tokens": 4}))
