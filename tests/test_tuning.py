"""Tuning: what is searched, measured, pruned and chosen, and that an interruption changes nothing."""

import json
import math
import sys
from dataclasses import replace

import optuna
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import care_hf
from care_hf import CareForConditionalGeneration, Recipe, tune_job
from care_hf.answers import generate_answers
from care_hf.fitting import fit
from care_hf.judges import StrictJudge
from care_hf.recipe import RECIPES
from care_hf.samples import Sample, load_samples
from care_hf.search_space import Space
from care_hf.search_values import FAMILIES, Choice, Range
from care_hf.sites import runs_before
from care_hf.subspace import SafetySubspaces
from care_hf.suite import Suite
from care_hf.testbed import DATA
from care_hf.testbed.prompts import fit_prompts
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL, World
from care_hf.tuning import try_recipe
from care_hf.tuning_choice import COMPLETE, DOMINATED, UNSOLVED, Rule, Trial, pareto
from care_hf.tuning_measures import Measured, Validation, dominated, split_sets
from care_hf.tuning_solver import Solver
from care_hf.tuning_study import STORAGE, Search

NEW, JUDGE = 12, StrictJudge(REFUSAL)
SMALL = {"layers": (3, 4), "gate_layers": (2, 3), "batch_size": 32, "count": Range(1, 2, whole=True)}


def measured(complied=0, n=10, divergences=(0.0,), refused=0, benign=10):
    attacks = {"complied": complied, "refused": n - complied, "other": 0}
    tasks = {"complied": benign - refused, "refused": refused, "other": 0}
    return Measured({"attack/a": attacks, "benign/b": tasks}, list(divergences))


def trial(number, state=COMPLETE, **counts):
    return Trial(number, Recipe(), state, measured(**counts))


@pytest.fixture(scope="module")
def space(testbed):
    return Space.of(testbed[0], **SMALL)


@pytest.fixture(scope="module")
def prompts(world):
    return fit_prompts(world, 20, ("icon",))


@pytest.fixture(scope="module")
def suite():
    whole = load_suite("validation", 4)
    attacks = {name: whole.attacks[name] for name in ("split", "icon")}
    return Suite("some", attacks, benign={name: whole.benign[name] for name in ("recipe", "icon", "colour")})


@pytest.fixture(scope="module")
def solver(testbed, space, prompts):
    found = Solver(*testbed, prompts, space)
    found.collect()
    return found


def settings(testbed, space, suite):
    model, processor = testbed
    named = {"processor": processor, "validation": suite, "judge": JUDGE, "space": space}
    return {"model": model, **named, "max_new_tokens": NEW, "batch_size": 8, "seed": 3, "trials": 4}


@pytest.fixture(scope="module")
def tuned(testbed, space, prompts, suite, tmp_path_factory):
    """A finished tuning and its folder."""
    out = tmp_path_factory.mktemp("tuned")
    found = care_hf.tune(**prompts, **settings(testbed, space, suite), out=out)
    found.save(out)
    return found, out


# The space


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_repairs_collected_places_after_its_gate(testbed, family):
    space = Space.of(testbed[0], families=(family,))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    known, scopes = set(space.sites(family)), set()
    for _ in range(300):
        recipe = space.suggest(study.ask())
        sites = recipe.find_sites(testbed[0])
        assert set(sites) <= known
        scopes.add(recipe.scope)
        if recipe.by_turn:
            gate = recipe.gate_site(testbed[0])  # raises if a site runs before the gate
            assert gate in known and all(runs_before(gate, site) for site in sites)
    assert scopes == ({("last", "response"), ("last",)} if family == "turn" else {"all", "prompt"})


@pytest.mark.parametrize("name", RECIPES)
def test_a_search_can_start_at_the_packaged_recipes(testbed, name):
    model, recipe = testbed[0], RECIPES[name]
    space = Space.of(model)
    study = optuna.create_study()
    study.enqueue_trial(space.parameters(recipe, model))
    found = space.suggest(study.ask())
    assert found.find_sites(model) == recipe.find_sites(model)
    places = {"layers": "middle", "component": "ffn", "sites": None, "gate_layer": 0, "batch_size": 1}
    assert found.replace(**places) == recipe.replace(**places)
    if recipe.by_turn:
        assert found.gate_site(model) == recipe.gate_site(model)


def test_a_recipe_outside_the_space_is_no_start(testbed):
    space = Space.of(testbed[0], rank=Range(1, 3, whole=True))
    with pytest.raises(ValueError, match=r"outside the space.*'rank': 4"):
        space.parameters(Recipe(), testbed[0])
    with pytest.raises(ValueError, match="steps"):
        Space.of(testbed[0]).parameters(Recipe(steps=3), testbed[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 9)}, r"6 decoder layers \(0 to 5\), so no \[9\]"),
        ({"families": ("both",)}, "families=.*must name"),
        ({"gate_layers": (5,), "layers": (3, 4)}, "leave nothing to repair"),
        ({"ranks": Choice((1,))}, r"Nothing called \['ranks'\] is searched"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(testbed, changes, message):
    with pytest.raises(ValueError, match=message):
        Space.of(testbed[0], **changes)


# What is chosen


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=12))
def test_the_front_is_that_of_brute_force(points):
    trials = [
        trial(i, COMPLETE if complete else DOMINATED, complied=complied, divergences=[float(divergence)])
        for i, (complied, divergence, complete) in enumerate(points)
    ]
    objectives = {t.number: t.measured.objectives for t in trials if t.state == COMPLETE}
    expected = [
        number
        for number, (a, b) in objectives.items()
        if not any((c <= a and d <= b) and (c < a or d < b) for c, d in objectives.values())
        and not any(other < number and values == (a, b) for other, values in objectives.items())
    ]
    assert [t.number for t in pareto(trials)] == sorted(expected, key=lambda number: objectives[number])


def test_the_rule_takes_the_lowest_attack_success_within_its_limits():
    trials = [
        trial(0, complied=0, divergences=[0.06]),  # too far from the base
        trial(1, complied=0, divergences=[0.01], refused=2),  # refuses too much
        trial(2, complied=2, divergences=[0.05], refused=1),
        trial(3, complied=2, divergences=[0.02], refused=1),
        trial(4, complied=2, divergences=[0.02]),
        trial(5, complied=3, divergences=[0.0]),
        trial(6, DOMINATED, complied=1),
    ]
    chosen, kept = Rule(0.05, 0.1, None).choose(trials)
    assert (chosen.number, kept) == (3, True)
    assert Rule(0.05, 0.1, refusal=0.8).choose(trials) == (trials[3], True)  # of 10 attacks 8 are refused
    assert Rule(None, 0.1, refusal=0.9).choose(trials) == (trials[0], True)
    assert Rule(0.05, None, refusal=0.9).choose(trials) == (trials[1], True)
    assert Rule(None, 0.1, None).choose(trials) == (trials[0], True)
    told = str(Rule(0.05, 0.1, 0.8))
    for part in ("at most 0.05 nats", "at most 10 % of benign", "refuse at least 80 % of attacks"):
        assert part in told
    assert str(Rule(None, None, None)).startswith("Of all complete trials the one of the lowest attack success")


def test_where_no_trial_keeps_all_limits_benign_prompts_come_before_refusals():
    trials = [
        trial(0, complied=0, divergences=[0.5]),
        trial(1, complied=9, divergences=[0.4]),
        trial(2, complied=6, divergences=[0.2]),
        trial(3, complied=5, divergences=[0.2]),
    ]
    assert Rule(0.3, refusal=0.8).choose(trials) == (trials[3], False)
    assert Rule(0.1).choose(trials) == (trials[3], False)  # of equal divergence the one of lower attack success
    assert Rule(0.1).choose(trials[:2]) == (trials[1], False)
    with pytest.raises(ValueError, match=r"None of 1 trials is complete.*too few"):
        Rule().choose([Trial(0, Recipe(), UNSOLVED, reason="too few")])


@pytest.mark.parametrize(
    "limits", [{"divergence": -1}, {"over_refusal": 1.5}, {"divergence": math.nan}, {"refusal": 2}]
)
def test_a_limit_that_means_nothing_is_refused(limits):
    with pytest.raises(ValueError, match="must be None or a number"):
        Rule(**limits)


# What is pruned


def wilson(k, n, z=1.959964):
    centre, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return centre - spread, centre + spread


@pytest.mark.parametrize("complied", range(0, 21, 2))
def test_a_trial_is_pruned_where_wilson_intervals_lie_apart(complied):
    finished, found = measured(complied=6, n=60, divergences=[0.0] * 9), measured(complied, 20, [0.0] * 3)
    assert dominated(found, finished) == (wilson(complied, 20)[0] > wilson(6, 60)[1])


def test_a_trial_is_kept_that_may_change_benign_answers_less():
    finished = measured(complied=0, n=60, divergences=[0.0] * 50 + [3.0])
    worse = {"complied": 20, "n": 20}
    assert not dominated(measured(**worse, divergences=[0.0] * 20), finished)
    assert dominated(measured(**worse, divergences=[2.0] * 20), finished)
    assert dominated(measured(**worse, divergences=[0.0] * 20), measured(complied=0, n=60, divergences=[0.0] * 51))


def test_sets_are_split_by_share_and_lose_nothing(suite):
    first, rest = split_sets(suite.sets, 0.34)
    for name, cases in suite.sets.items():
        assert len(first[name]) == 2 and [*first[name], *rest[name]] == list(cases)
    assert [len(cases) for cases in split_sets(suite.sets, 0.01)[0].values()] == [1] * 5


# What is measured


def stepwise_divergence(base, repaired, processor, case):
    """KL over the base's answer and its end, one token at a time through the cache, without a batch."""
    told = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(case.messages, **told)
    answer = base.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = []
    for model in (base, repaired):
        out, steps = model(**inputs, use_cache=True), []
        mask = inputs["attention_mask"]
        for token in [*answer, None]:
            steps.append(out.logits[0, -1].double().log_softmax(-1))
            if token is None or token == processor.tokenizer.eos_token_id:
                break
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], dim=1)
            step = {"input_ids": token.view(1, 1), "attention_mask": mask, "past_key_values": out.past_key_values}
            out = model(**step, use_cache=True)
        found.append(torch.stack(steps))
    return (found[0].exp() * (found[0] - found[1])).sum(-1).mean().item()


@torch.no_grad()
def test_divergence_and_verdicts_are_those_of_plain_decoding(testbed, solver, suite):
    model, processor = testbed
    recipe = Recipe(sites=("4.residual",), gate_layer=3, gate="none", strength=0.6)
    repaired = CareForConditionalGeneration.from_base(model, solver.solve(recipe))
    asked = Validation(model, processor, suite, JUDGE, 0.5, NEW, 4)
    found = asked.measure(repaired, 0)
    benign = [case for task in suite.benign for case in suite.benign[task][:2]]
    expected = [stepwise_divergence(model, repaired, processor, case) for case in benign]
    assert found.divergences == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 0.05  # this repair does change benign answers
    whole = found + asked.measure(repaired, 1)
    assert len(whole.divergences) == 12
    for name, cases in suite.sets.items():
        said = JUDGE.verdicts(cases, generate_answers(repaired, processor, cases, NEW))
        assert whole.verdicts[name] == {verdict: said.count(verdict) for verdict in ("complied", "refused", "other")}
    assert asked.undefended().divergences == [0.0] * 12


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(sites=("4.residual", "4.ffn"), gate_layer=3, rank=3, batch_size=32),
        Recipe.load("paper").replace(sites=("3.ffn", "4.ffn"), scope="prompt", gate_layer=0, rank=5, batch_size=32),
    ],
)
def test_a_trial_solves_what_fit_would_give(testbed, solver, prompts, recipe):
    given = dict(prompts)
    if not recipe.by_turn:
        given.pop("exposed")
        given["benign"] = [*given["benign"], *given.pop("neutral")]
    expected = SafetySubspaces.from_model(fit(testbed[0], processor=testbed[1], recipe=recipe, **given))
    found = solver.solve(recipe)
    assert found.digest == expected.digest
    assert json.loads(found.metadata["recipe"]) == json.loads(expected.metadata["recipe"])


def test_a_recipe_without_a_solution_is_pruned_with_its_reason(solver, testbed, suite):
    asked = Validation(*testbed, suite, JUDGE, 0.34, NEW, 8)
    found = try_recipe(0, Recipe(sites=("4.residual",), gate_layer=2, rank=900), solver, asked, [])
    assert (found.state, found.measured) == (UNSOLVED, None) and "rank=900 exceeds" in found.reason


def test_a_dominated_trial_is_asked_the_first_part_alone(solver, testbed, suite):
    asked = Validation(*testbed, suite, JUDGE, 0.5, NEW, 8)
    weak = Recipe(sites=("4.residual",), gate_layer=3, strength=0.01)
    best = trial(7, complied=0, n=5000, divergences=[0.0] * 9)
    found = try_recipe(8, weak, solver, asked, [best])
    assert found.state == DOMINATED and found.measured.success.n == 4 and "trial 7" in found.reason
    assert try_recipe(8, weak, solver, asked, [replace(best, state=DOMINATED)]).state == COMPLETE


# The study


def attempt(number, recipe):
    """A trial whose outcome follows from its recipe, without a model."""
    if recipe.rank > 24:
        return Trial(number, recipe, UNSOLVED, reason="too large")
    success = round(100 * abs(math.sin(recipe.rank + 3 * recipe.beta)))
    return Trial(number, recipe, COMPLETE, measured(success, 100, [recipe.strength, abs(recipe.beta - 1)]))


def asked(found):
    return [(t.number, t.recipe, t.state, t.reason, t.measured and t.measured.to_dict()) for t in found]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_an_interrupted_study_goes_on_as_if_nothing_had_been(tmp_path, testbed, sampler):
    space = Space.of(testbed[0])
    starts = [space.parameters(recipe, testbed[0]) for recipe in RECIPES.values()]

    def search(folder, of="work"):
        return Search(folder, of, space, starts, sampler, seed=5)

    def go_on(folder, until):
        study = search(folder)
        while len(study.trials) < until:
            study.next(len(study.trials), attempt)
        return study

    def interrupt(number, recipe):
        raise KeyboardInterrupt

    whole = go_on(None, 30).trials
    folder = tmp_path / "study"
    for until in (1, 18, 25):  # while the starting points are tried, and while the sampler goes by what it found
        study = go_on(folder, until)
        with pytest.raises(KeyboardInterrupt):
            study.next(until, interrupt)
    # Killed: nobody told how a trial ended.
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STORAGE)))
    optuna.load_study(study_name=None, storage=storage).ask()
    assert asked(go_on(folder, 30).trials) == asked(whole)
    assert [t.recipe.rank for t in whole[:2]] == [4, 16]
    assert len({t.recipe for t in whole}) > 20
    with pytest.raises(ValueError, match="holds another tuning"):
        search(folder, "other work")


def test_the_samplers_differ_once_there_is_something_to_go_by(testbed):
    space = Space.of(testbed[0])
    found = {}
    for sampler in ("tpe", "random"):
        study = Search(None, "work", space, (), sampler, seed=1)
        for number in range(24):
            study.next(number, attempt)
        found[sampler] = [t.recipe for t in study.trials]
    assert found["tpe"][:16] == found["random"][:16]  # the same budget from the same beginning
    assert found["tpe"][16:] != found["random"][16:]


def test_without_optuna_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'care_hf\[tune\]'"):
        care_hf.tune(None, [], [], None)
    with pytest.raises(ImportError, match=r"pip install 'care_hf\[tune\]'"):
        tune_job.prepare("", (), None, 0, 4, 4)


# The whole


def test_a_tuning_keeps_its_recipes_repair_and_report(tuned, testbed):
    found, out = tuned
    assert [t.recipe.by_turn for t in found.trials[:2]] == [True, False]  # "gated" and "paper"
    assert found.trials[0].state == COMPLETE and found.trials[0].recipe.rank == 4
    assert found.front == pareto(found.trials) and found.chosen is found.rule.choose(found.trials)[0]
    assert Recipe.load(out / "recipe.yaml") == found.recipe
    assert SafetySubspaces.load(out / "repair.safetensors").digest == found.subspaces.digest
    CareForConditionalGeneration.from_base(testbed[0], found.subspaces)
    told = json.loads((out / "tuning.json").read_text())
    assert told["chosen"] == found.chosen.number and len(told["trials"]) == 4
    assert told["rule"]["told"] == str(found.rule)
    assert told["trials"][0]["measured"]["verdicts"] == found.trials[0].measured.verdicts
    text = (out / "tuning.md").read_text()
    assert str(found.rule) in text and f"| {found.chosen.number} (chosen) | " in text and "n=8" in text
    for pruned in (t for t in found.trials if t.state != COMPLETE):
        assert f"- {pruned.number} ({pruned.state}): {pruned.reason}" in text
    with Image.open(out / "pareto.png") as image:
        assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 10
    assert "<svg" in (out / "pareto.svg").read_text()


def test_an_interrupted_tuning_comes_out_as_the_uninterrupted(
    tuned, testbed, space, prompts, suite, tmp_path, monkeypatch
):
    calls, measure = [], Validation.measure

    def interrupted(self, model, part):
        calls.append(part)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, model, part)

    monkeypatch.setattr(Validation, "measure", interrupted)
    options = settings(testbed, space, suite)
    with pytest.raises(KeyboardInterrupt):
        care_hf.tune(**prompts, **options, out=tmp_path)
    again = care_hf.tune(**prompts, **options, out=tmp_path)
    assert asked(again.trials) == asked(tuned[0].trials)
    assert again.subspaces.digest == tuned[0].subspaces.digest and again.to_dict() == tuned[0].to_dict()
    with pytest.raises(ValueError, match="holds another tuning"):
        care_hf.tune(**prompts, **{**options, "seed": 4}, out=tmp_path)
    # More trials go on from there.
    more = care_hf.tune(**prompts, **{**options, "trials": 5}, out=tmp_path)
    assert asked(more.trials[:4]) == asked(again.trials) and len(more.trials) == 5


def test_a_validation_prompt_of_the_fit_is_refused_before_any_forward(testbed, space, prompts, suite, monkeypatch):
    monkeypatch.setattr(testbed[0], "forward", lambda *_, **__: pytest.fail("the model was asked"))
    known = replace(suite.benign["recipe"][0], messages=prompts["benign"][0]["messages"])
    doubled = replace(suite, benign={**suite.benign, "recipe": [*suite.benign["recipe"], known]})
    with pytest.raises(ValueError, match=r"1 of the 5 prompts of 'benign/recipe' are prompts of the fit.*number 4"):
        care_hf.tune(**prompts, **{**settings(testbed, space, suite), "validation": doubled})
    for part in ({"attacks": {}}, {"benign": {}}):
        with pytest.raises(ValueError, match="and benign prompts"):
            care_hf.tune(**prompts, **{**settings(testbed, space, suite), "validation": replace(suite, **part)})
    for name, value in (("trials", 0), ("seed", -1), ("sampler", "grid"), ("first_share", 0)):
        with pytest.raises(ValueError, match=name if name != "first_share" else "share"):
            care_hf.tune(**prompts, **{**settings(testbed, space, suite), name: value})


def test_the_testbeds_test_split_is_never_asked(tmp_path, monkeypatch):
    splits = set()
    for name in ("attack", "benign", "plain", "exposure"):
        method = getattr(World, name)

        def noted(self, *arguments, method=method):
            splits.update(split for split in ("fit", "validation", "test") if split in arguments)
            return method(self, *arguments)

        monkeypatch.setattr(World, name, noted)
    monkeypatch.setattr(tune_job, "FIT_PROMPTS", 20)
    plan = tune_job.prepare("", (), None, 0, 2, 2, families=("turn",), layers=(4,), max_new_tokens=NEW, batch_size=32)
    assert "2 trials of repairs by turn at layers [4]" in plan.summary and "of testbed" in plan.summary
    plan.options["starts"] = ("gated",)
    found = plan.run(tmp_path)
    assert splits == {"fit", "validation"}
    cases = [case for cases in plan.suite.sets.values() for case in cases]
    fitted = [digest for data in plan.prompts.values() for digest in load_samples(data, "p").digests]
    assert found.seen == {*fitted, *(Sample(case.messages).digest for case in cases)}
    found.check_unseen([case for cases in load_suite("test", 4).sets.values() for case in cases])
    with pytest.raises(ValueError, match=r"1 of 1 prompts were fitted or chosen on"):
        found.check_unseen(cases[-1:])


def test_a_named_model_is_tuned_on_files_of_text_alone(tmp_path, world):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    texts = {
        "benign": [s.text for s in world.benign("split", "fit", 40)],
        "malicious": [s.text for s in world.plain("fit", 80) if s.image is None],
        "split": [s.text for s in world.attack("split", "fit", 16)],
    }
    files = {name: write(f"{name}.jsonl", [{"text": text} for text in set(own)]) for name, own in texts.items()}
    files["attacks"] = {"split": files.pop("split")}
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(files))
    rows = [("safe", s.text) for s in world.benign("split", "validation", 4)]
    rows += [("unsafe", s.text) for s in world.plain("validation", 16) if s.image is None][:4]
    columns = {"focus": "", "type": "t", "note": ""}
    write("test.jsonl", [{"prompt": text, **columns, "label": label} for label, text in rows])
    source = yaml.safe_load((DATA.parents[2] / "configs" / "datasets" / "xstest.yaml").read_text())
    (tmp_path / "xstest.yaml").write_text(yaml.safe_dump({**source, "id": str(tmp_path / "test.jsonl")}))
    plan = tune_job.prepare(
        str(DATA / "seed0"), [str(tmp_path / "xstest.yaml")], tmp_path / "prompts.yaml", 0, 4, 2, max_new_tokens=NEW
    )
    found = plan.run(tmp_path / "out")
    # It refuses what is forbidden by itself, and a recipe of the paper has no visual subspace to fit.
    assert found.undefended.success.n == 4 and found.undefended.success.count == 0
    assert found.trials[1].recipe.modalities == ("text",) and found.trials[1].state != UNSOLVED
    assert (tmp_path / "out" / "tuning.md").read_text().count("(chosen)") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some/model", (), None), "give --suite, what to choose by, and --prompts"),
        (("", ("xstest",), None), "the testbed has prompts of its own"),
        (("", (), None, 7), "No testbed of seed 7"),
    ],
)
def test_names_that_do_not_fit_are_told(arguments, message):
    model, suite, prompts, seed = (*arguments, 0)[:4]
    with pytest.raises(ValueError, match=message):
        tune_job.prepare(model, suite, prompts, seed, 4, 4)
