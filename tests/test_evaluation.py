import base64
import copy
import io
import json
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import random_subspace
from PIL import Image
from scipy.special import rel_entr

from care_hf import evaluation_run, measuring
from care_hf.answers import gate_fires, generate_answers
from care_hf.budget import Budget
from care_hf.defences import CannedRefusal, FineTuned, Repair, Steered, Undefended
from care_hf.evaluation import evaluate
from care_hf.gating import Gate
from care_hf.judges import KeywordJudge, StrictJudge
from care_hf.measuring import divergence
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site, record
from care_hf.steering_vectors import SteeringVectors
from care_hf.subspace import SafetySubspaces
from care_hf.suite import Case, Suite
from care_hf.testbed.measure import measure
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL

ATTACKS, TASKS, PICTURED = ("wrapper", "icon"), ("recipe", "count"), ("plain", "icon")
NEW, EPS, STEPS = 12, 16, 3
SMALL = Budget(
    max_new_tokens=NEW,
    gradient_cases=2,
    universal_cases=1,
    steps=STEPS,
    restarts=1,
    eps=(EPS,),
    optimisers=("mi-fgsm",),
    weights=(0.0, 1.0),
    curve_steps=(2,),
)
WITHOUT = replace(SMALL, gradient_cases=0)
VERDICTS = {"correct": "complied", "refused": "refused", "wrong": "other"}


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measuring, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def suite():
    whole = load_suite("validation", 4)
    return replace(
        whole,
        attacks={name: whole.attacks[name] for name in ATTACKS},
        benign={name: whole.benign[name] for name in TASKS},
        pictured={name: whole.pictured[name] for name in PICTURED},
        corpus=whole.corpus[:1],
    )


@pytest.fixture(scope="module")
def small(suite):
    """Two sets, no images to attack."""
    return replace(suite, attacks={"wrapper": suite.attacks["wrapper"]}, benign={"count": suite.benign["count"]})


def own_hooks(module):
    """Those of this package; transformers leaves some of its own where hidden states were asked for."""
    return [hook for hook in module._forward_hooks.values() if hook.__module__.startswith("care_hf")]


def strong(seed):
    return Subspace(random_subspace(seed, rank=64).basis, 40 * random_subspace(seed + 1).mean)


@pytest.fixture(scope="module")
def gated(testbed, small):
    """A repair whose gate fires on half of the prompts."""
    model, processor = testbed
    readers, site = torch.randn(128, 1, generator=torch.Generator().manual_seed(1)), Site(2, "residual")
    with record(model, [site]) as activations, torch.no_grad():
        prompts = [Sample(case.messages) for cases in small.sets.values() for case in cases]
        model(**collate(processor, prompts, (4,)).inputs)
        threshold = (activations[site][:, -1] @ readers).median(dim=0).values + 1e-3
    gate = Gate(generation_prompt(processor), readers, threshold)
    return SafetySubspaces({Site(4, "residual"): {"last": strong(0)}}, gate=gate, gate_site=Site(2, "residual"))


@pytest.fixture(scope="module")
def printed():
    return SafetySubspaces({Site(4, "residual"): {"text": strong(4)}}, fusion="constant")


VECTOR = 10 * torch.randn(128, generator=torch.Generator().manual_seed(5))


def steered():
    return Steered(lambda model: SteeringVectors(model, {Site(3, "residual"): VECTOR}), {"vector": 5})


def steered_by_hand(model):
    other = copy.deepcopy(model)
    other.model.language_model.layers[3].register_forward_hook(
        lambda module, args, out: (out[0] + VECTOR, *out[1:]) if isinstance(out, tuple) else out + VECTOR
    )
    return other


@pytest.fixture(scope="module")
def defences(gated):
    return {"steered": steered(), "gated": Repair(gated), "canned": CannedRefusal(gated, REFUSAL)}


def run(testbed, suite, defences=None, budget=SMALL, **options):
    judge = options.pop("judge", [StrictJudge(REFUSAL), KeywordJudge()])
    return evaluate(testbed[0], suite, defences, judge, budget, processor=testbed[1], **options)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def report(testbed, suite, defences, cells):
    return run(testbed, suite, defences, adaptive=["gated"], out=cells)


def plain(results):
    """All that must not depend on the clock."""
    return {
        name: {key: value for key, value in found.items() if key != "latency"}
        | {"timed": found["latency"] and sorted(found["latency"])}
        for name, found in results.items()
    }


# What is measured


def test_verdicts_are_those_of_the_testbeds_own_judge(testbed, report, gated):
    repaired = CareForConditionalGeneration.from_base(testbed[0], gated)
    for name, model in (
        ("undefended", testbed[0]),
        ("steered", steered_by_hand(testbed[0])),
        ("gated", repaired),
    ):
        counts = measure(model, testbed[1], "validation", 4, attacks=ATTACKS, tasks=TASKS)
        found = report.results[name]["sets"]
        assert [*found] == [{"plain": "harmful"}.get(label, label) for label in counts]
        for (label, expected), told in zip(counts.items(), found.values(), strict=True):
            said = Counter(told["verdicts"]["strict"])
            assert {verdict: said[VERDICTS[verdict]] for verdict in expected} == expected, (name, label)
            assert set(told["verdicts"]) == {"strict", "keywords"}
    assert len({json.dumps(found["sets"]) for found in report.results.values()}) == 4


def test_a_canned_refusal_stands_where_the_gate_fires(testbed, suite, report, gated):
    repaired = CareForConditionalGeneration.from_base(testbed[0], gated)
    all_fires = []
    for name, cases in suite.sets.items():
        fires = gate_fires(repaired, testbed[1], cases).tolist()
        own = report.results["undefended"]["sets"][name]["answers"]
        expected = [REFUSAL if fire else answer for fire, answer in zip(fires, own, strict=True)]
        assert report.results["canned"]["sets"][name]["answers"] == expected
        all_fires += fires
    assert {*all_fires} == {False, True}
    assert report.results["canned"]["divergence"] is None


def next_token(model, processor, cases):
    """Distributions in float64, one prompt at a time."""
    with torch.no_grad():
        logits = [model(**collate(processor, [Sample(case.messages)], ()).inputs).logits[0, -1] for case in cases]
    return torch.stack(logits).double().softmax(-1).numpy()


def expected_divergence(base, model, processor, suite):
    benign = [case for task in TASKS if task in suite.benign for case in suite.benign[task]]
    return rel_entr(next_token(base, processor, benign), next_token(model, processor, benign)).sum(1).mean()


def test_side_effects_are_told_from_the_base(testbed, suite, report, gated):
    base, processor = testbed
    assert report.results["undefended"]["divergence"] == 0
    repaired = CareForConditionalGeneration.from_base(base, gated)
    for name, model in (("steered", steered_by_hand(base)), ("gated", repaired)):
        expected = expected_divergence(base, model, processor, suite)
        assert expected > 0.1
        assert report.results[name]["divergence"] == pytest.approx(expected, rel=1e-3)
    for found in report.results.values():
        time = found["latency"]
        assert min(time["base"], time["defended"]) > 0 and time["batch"] == 8
        assert time["ratio"] == time["defended"] / time["base"]


def test_divergence_is_the_relative_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 6, 40, generator=generator)
    logits[:, :, 3] = -torch.inf  # impossible under both
    base, other = logits.log_softmax(-1)
    p, q = (x.double().exp().numpy() for x in (base, other))
    assert divergence(base, other) == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-4)
    assert divergence(base, base) == 0
    missing = other.clone()
    missing[2, 7] = -torch.inf
    assert divergence(base, missing) == torch.inf
    assert divergence(missing, base) < torch.inf


def images_in(folder):
    """Kept attacks with their images, by (whose, family's cases, eps)."""
    for path in folder.glob("*.json"):
        cell = json.loads(path.read_text())
        if "attack" in cell["key"]:
            decoded = {
                steps: [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
                for steps, images in cell["value"]["images"].items()
            }
            yield cell, decoded


def test_attacked_images_are_8_bit_and_within_their_radius(suite, report, cells):
    shown = {family: [Sample(case.messages).images[0] for case in suite.pictured[family][:2]] for family in PICTURED}
    originals = [[np.asarray(image).astype(int) for image in images] for images in shown.values()]
    one_of_each = [images[0] for images in originals]  # given a toxic target
    originals += [[image for images in originals for image in images], one_of_each]  # the former by universal ones
    seen = []
    for cell, by_steps in images_in(cells):
        for images in by_steps.values():
            pixels = [np.asarray(image).astype(int) for image in images]
            assert all(image.mode == "RGB" and image.format == "PNG" and image.size == (48, 48) for image in images)
            distances = [
                max(np.abs(a - b).max() for a, b in zip(pixels, clean, strict=True))
                for clean in originals
                if len(clean) == len(pixels)
            ]
            assert 0 < min(distances) <= EPS
        seen.append((cell["key"]["defence"][0], len(images), sorted(by_steps)))
    # Two families and the toxic target.
    pgd = [("undefended", 2, ["2", "3"])] * 3 + [("gated", 2, ["2", "3"])] * 6
    assert Counter(map(repr, seen)) == Counter(
        map(repr, pgd + [("undefended", 4, ["3"])] * 2 + [("gated", 4, ["3"])] * 4)
    )


def test_rows_are_what_the_defended_model_answers_to_the_images_that_were_found(testbed, suite, report, cells, gated):
    base, processor = testbed
    models = {
        "undefended": base,
        "steered": steered_by_hand(base),
        "gated": CareForConditionalGeneration.from_base(base, gated),
    }
    found = {}  # by whose, family and weight
    for cell, by_steps in images_in(cells):
        attack = cell["key"]["attack"]
        if len(attack) == 3:
            digests = {evaluation_run._digest(suite.pictured[f][:2]): f for f in PICTURED}
            family = digests.get(attack[0], "toxic target")
        else:
            family = "universal jailbreak" if attack[2] == [suite.affirmation] else "universal toxic"
        found[cell["key"]["defence"][0], family, attack[-1]] = cell["value"], by_steps
    universal = ["universal jailbreak", "universal toxic"]
    for name, model in models.items():
        rows = report.results[name]["gradient"]
        own = [("gated", weight) for weight in SMALL.weights] if name == "gated" else []
        families = (*PICTURED, "toxic target", *universal)
        grid = [(f, through, w) for f in families for through, w in [("undefended", 0.0), *own]]
        grid = [(*key, steps) for key in grid for steps in ((3,) if key[0] in universal else (2, 3))]
        assert [(r["family"], r["through"], r["weight"], r["steps"]) for r in rows] == grid
        for row in rows:
            assert (row["eps"], row["optimiser"]) == (EPS, "mi-fgsm")
            value, by_steps = found[row["through"], row["family"], row["weight"]]
            cases = [c for f in PICTURED for c in suite.pictured[f][:2] if row["family"] in (f, *universal)]
            if row["family"] == "toxic target":  # one of each family, which is to say the corpus's only sentence
                cases = [replace(suite.pictured[f][0], reference=suite.corpus[0]) for f in PICTURED]
            shown = []
            for case, image in zip(cases, by_steps[str(row["steps"])], strict=True):
                parts = [p for message in case.messages for p in message["content"]]
                parts = [{"type": "image", "image": image} if p["type"] == "image" else p for p in parts]
                shown.append(Case([{"role": "user", "content": parts}], reference=case.reference))
            assert row["answers"] == generate_answers(model, processor, shown, NEW)
            assert row["verdicts"]["strict"] == StrictJudge(REFUSAL).verdicts(shown, row["answers"])
            assert ("loss" in row) == (row["steps"] == STEPS) and row.get("loss") in (None, value["loss"])


def test_weights_are_swept_at_the_first_radius_alone(testbed, small, gated):
    suite = replace(small, pictured={"icon": small.pictured["icon"]}, corpus=())
    budget = replace(SMALL, eps=(16, 32), gradient_cases=1, universal_cases=0, steps=1, curve_steps=())
    rows = run(testbed, suite, {"gated": Repair(gated)}, budget, adaptive=["gated"]).results["gated"]["gradient"]
    through = [(row["eps"], row["weight"]) for row in rows if row["through"] == "gated"]
    assert through == [(16, 0.0), (16, 1.0), (32, 1.0)]


def test_without_a_folder_and_again_the_report_is_the_same(testbed, suite, report, defences):
    again = run(testbed, suite, defences, adaptive=["gated"])
    assert plain(again.results) == plain(report.results)
    assert again.settings == report.settings
    assert again.settings["budget"] == asdict(SMALL) and [*again.settings["judges"]] == ["strict", "keywords"]
    assert again.settings["defences"]["steered"] == {"vector": 5}


def test_the_model_stays_as_it_is(testbed, report):
    model = testbed[0]
    fresh = type(model).from_pretrained(model.config._name_or_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    assert not any(own_hooks(module) for module in model.model.language_model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


# Going on


@contextmanager
def watching():
    """Every piece of work that is finished inside, by what it is done on."""
    done = []

    def of_cases(model, processor, cases, *_, **options):
        return type(model).__name__, evaluation_run._digest(cases), options.get("eps"), options.get("weight")

    def counted(name, note):
        original = getattr(evaluation_run, name)

        def call(*args, **options):
            result = original(*args, **options)
            done.append((name, note(*args, **options)))
            return result

        patched.setattr(evaluation_run, name, call)

    with pytest.MonkeyPatch.context() as patched:
        for name in ("generate_answers", "next_tokens", "gradient_attack", "universal_attack"):
            counted(name, of_cases)
        counted("latency", lambda *_: None)
        yield done


class Interrupting(KeywordJudge):
    """Raises at its n-th call."""

    def __init__(self, at=None):
        self.at, self.finished = at, []

    def verdicts(self, cases, answers):
        if len(self.finished) + 1 == self.at:
            raise KeyboardInterrupt
        self.finished.append((evaluation_run._digest(cases), tuple(answers)))
        return super().verdicts(cases, answers)


@pytest.fixture(scope="module")
def long_run(testbed, small, gated):
    """Gives a run with two defences that have to be made, and what was made, done and judged in it."""
    suite = replace(small, pictured={"icon": small.pictured["icon"]}, corpus=())
    budget = replace(SMALL, weights=(0.0,))

    def go(folder, at=None):
        made, judge = [], Interrupting(at if isinstance(at, int) else None)

        def due(name, defence):
            def make():
                if name == at:
                    raise KeyboardInterrupt
                made.append(name)
                return defence

            make.settings = defence.settings
            return make

        defences = {"gated": due("gated", Repair(gated)), "steered": due("steered", steered())}
        with watching() as work, pytest.raises(KeyboardInterrupt) if at else nullcontext():
            found = run(testbed, suite, defences, budget, judge=judge, adaptive=["gated"], out=folder)
        return made, Counter(work), Counter(judge.finished), None if at else found

    return go


@pytest.fixture(scope="module")
def whole(long_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return long_run(folder), folder


def test_what_is_finished_is_not_done_again(long_run, whole):
    (made, work, judged, report), folder = whole
    assert made == ["gated", "steered"] and set(judged.values()) == {1}
    assert work["latency", None] == 3 and {name for name, _ in work} == {
        "generate_answers",
        "next_tokens",
        "gradient_attack",
        "universal_attack",
        "latency",
    }
    again = long_run(folder)
    assert again[:3] == ([], Counter(), Counter())
    assert again[3].results == report.results and again[3].settings == report.settings


@pytest.mark.parametrize("at", [2, 8, "steered"])
def test_an_interrupted_run_goes_on(long_run, whole, tmp_path, at):
    _, work, judged, report = whole[0]
    made, before, first, _ = long_run(tmp_path, at)
    assert before and first and before.total() < work.total() and first.total() < judged.total()
    more, after, second, resumed = long_run(tmp_path)
    assert plain(resumed.results) == plain(report.results)
    assert first + second == judged
    # The base's next tokens alone are not kept.
    assert not work - (before + after)
    again = before + after - work
    assert {name for name, _ in again} <= {"next_tokens"} and again.total() <= 1
    assert {*made, *more} == {"gated", "steered"} and (isinstance(at, int) or (at in more and at not in made))
    assert at != "steered" or more == ["steered"]  # the other is finished


def test_a_resumed_run_tells_defences_from_the_base_and_not_from_themselves(testbed, small, tmp_path):
    run(testbed, small, budget=WITHOUT, out=tmp_path)
    found = run(testbed, small, {"steered": steered()}, WITHOUT, out=tmp_path).results["steered"]
    expected = expected_divergence(testbed[0], steered_by_hand(testbed[0]), testbed[1], small)
    assert found["divergence"] == pytest.approx(expected, rel=1e-3) and expected > 0.1


def test_time_is_told_from_the_base_without_the_defence(testbed, small, gated, monkeypatch):
    seen, original = [], measuring.generate_answers

    def watched(model, *args):
        steered = bool(own_hooks(testbed[0].model.language_model.layers[3]))
        seen.append((type(model).__name__, steered, getattr(model, "care_state", None) and model.care_state.enabled))
        return original(model, *args)

    monkeypatch.setattr(measuring, "generate_answers", watched)
    bare, name = ("LlavaForConditionalGeneration", False, None), "CareForConditionalGeneration"
    run(testbed, small, {"steered": steered(), "gated": Repair(gated)}, WITHOUT)
    expected = [[bare, bare], [bare, (bare[0], True, None)], [bare, (name, False, True)]]
    assert seen == [one for pair in expected for one in pair * 2]
    seen.clear()
    run((CareForConditionalGeneration.from_base(testbed[0], gated), testbed[1]), small, None, WITHOUT)
    off, on = ((name, False, enabled) for enabled in (False, True))
    assert seen == [off, off] * 2 + [off, on] * 2


# What tells cells apart


def answers(report, defence):
    return {name: found["answers"] for name, found in report.results[defence]["sets"].items()}


@pytest.fixture(scope="module")
def bare(small):
    """Without benign prompts, which take longest."""
    return replace(small, benign={})


def test_defences_of_one_name_are_told_apart(testbed, bare, gated, printed, tmp_path):
    tuned = copy.deepcopy(testbed[0])
    torch.nn.init.normal_(tuned.lm_head.weight, generator=torch.Generator().manual_seed(0))
    everywhere = replace(gated, gate=gated.gate.ungated())
    several = [Undefended(), Repair(gated), Repair(printed), CannedRefusal(everywhere, "no ."), FineTuned(tuned)]
    several += [CannedRefusal(everywhere, "one .")]
    apart = [answers(run(testbed, bare, {"same": one}, WITHOUT), "same") for one in several]
    assert len(set(map(str, apart))) == len(several)
    kept = [answers(run(testbed, bare, {"same": one}, WITHOUT, out=tmp_path), "same") for one in several]
    assert kept == apart


def test_models_are_told_apart_by_all_that_their_answers_depend_on(testbed, bare, gated, printed, tmp_path):
    base, processor = testbed
    deaf = copy.deepcopy(processor)
    deaf.chat_template = processor.chat_template.replace("{{ part.text }}", "count the shapes .")
    assert deaf.chat_template != processor.chat_template
    hesitant = copy.deepcopy(base)
    hesitant.generation_config.repetition_penalty = 50.0
    weaker = CareForConditionalGeneration.from_base(base, printed)
    weaker.strength = 0.5
    several = [testbed, (base, deaf), (hesitant, processor), (weaker, processor)]
    several += [(CareForConditionalGeneration.from_base(base, s), processor) for s in (gated, printed)]
    apart = [run(each, bare, None, WITHOUT) for each in several]
    kept = [run(each, bare, None, WITHOUT, out=tmp_path) for each in several]
    assert [plain(report.results) for report in kept] == [plain(report.results) for report in apart]
    assert len({str(answers(report, [*report.results][-1])) for report in apart}) == len(several)


def test_cases_are_told_apart_by_all_that_is_asked_and_judged(world):
    (sample,) = world.attack("icon", "validation", 1)
    image, text = sample.messages[0]["content"]
    other = Image.fromarray(255 - np.asarray(image["image"]))

    def chat(*content, role="user"):
        return [{"role": role, "content": list(content)}]

    case = Case(chat(image, text), "request", "reference", "target", "category", ("a", "b"))
    cases = [case, replace(case, request="x"), replace(case, reference=None), replace(case, target=None)]
    cases += [replace(case, category="x"), replace(case, choices=("ab",)), replace(case, choices=("b", "a"))]
    cases += [replace(case, messages=chat(text, image)), replace(case, messages=chat(image, text, role="system"))]
    cases += [replace(case, messages=chat(text)), replace(case, messages=chat({"type": "image", "image": other}, text))]
    two = [replace(case, messages=chat(image, image, text)), replace(case, messages=chat(image, text, image))]
    digests = [evaluation_run._digest([each]) for each in (*cases, *two)]
    digests += [evaluation_run._digest(some) for some in ([], cases[:2], cases[1::-1], [case, case])]
    assert len(set(digests)) == len(digests)
    assert evaluation_run._digest([copy.deepcopy(case)]) == digests[0]


def test_attacked_cases_keep_all_that_is_known_of_them(suite):
    case = replace(suite.pictured["icon"][0], category="kitchen", choices=("a", "b"))
    (image,) = Sample(case.messages).images
    (again,) = measuring.with_images([case], [measuring._png(image)])
    assert evaluation_run._digest([again]) == evaluation_run._digest([case])


# A repaired model in the place of the undefended one


@pytest.mark.parametrize("off", [False, True])
def test_a_repaired_model_is_measured_without_and_with_its_repair(testbed, suite, report, gated, off):
    model = CareForConditionalGeneration.from_base(testbed[0], gated)
    if off:  # how it was left does not matter
        model.disable()
    budget, sets = (WITHOUT, replace(suite, pictured={})) if off else (SMALL, suite)
    found = run((model, testbed[1]), sets, None, budget).results
    assert model.care_state.enabled != off
    expected = plain({"undefended": report.results["undefended"], "repaired": report.results["gated"]})
    rows = [
        row if row["through"] == "undefended" else {**row, "through": "repaired"}
        for row in expected["repaired"]["gradient"]
    ]
    expected["repaired"]["gradient"] = rows
    if off:
        for each in expected.values():
            each["gradient"] = []
    assert plain(found) == expected


# What is refused


def refused(message, testbed, suite, *args, **options):
    called = []

    class Watched(KeywordJudge):
        def verdicts(self, cases, answers):
            called.append(1)
            return super().verdicts(cases, answers)

    with pytest.raises(ValueError, match=message):
        run(testbed, suite, *args, **{"judge": Watched(), "budget": WITHOUT, **options})
    assert not called


def test_what_cannot_be_measured_is_refused_before_anything_runs(testbed, small, gated):
    case = small.pictured["icon"][0]
    text = Case([{"role": "user", "content": [{"type": "text", "text": "how ?"}]}], target="step one")
    images = Case([{"role": "user", "content": case.messages[0]["content"][:1] * 2}], target="step one")
    refused(r"\['undefended'\] are taken", testbed, small, {"undefended": Undefended(), "x": Undefended()})
    repaired = CareForConditionalGeneration.from_base(testbed[0], gated), testbed[1]
    refused(r"\['repaired'\] are taken", repaired, small, {"repaired": Undefended()})
    refused(r"\['y'\] names no defence; known are \['x'\]", testbed, small, {"x": Undefended()}, adaptive=["x", "y"])
    refused(r"\['undefended'\] names no defence", testbed, small, adaptive=["undefended"])
    refused("share a name", testbed, small, judge=[StrictJudge(), StrictJudge(REFUSAL)])
    refused("`judge` is an empty list", testbed, small, judge=[])
    refused("'bare' has no cases", testbed, Suite("bare", pictured={"icon": [case]}))
    for bad in (replace(case, target=None), replace(case, target=""), text, images):
        refused(r"pictured\['icon'\]\[1\] needs exactly one", testbed, replace(small, pictured={"icon": [case, bad]}))
    image = {"type": "image", "image": Image.new("RGB", (64, 64))}
    other = replace(case, messages=[{"role": "user", "content": [image, *case.messages[0]["content"][1:]]}])
    sizes, budget = replace(small, pictured={"icon": [case, other]}), replace(SMALL, gradient_cases=1)
    refused(r"sizes \[\(48, 48\), \(64, 64\)\]", testbed, sizes, budget=budget)
    # "repaired" is taken on a repaired model alone.
    assert [*run(testbed, small, {"repaired": Undefended()}, WITHOUT).results] == ["undefended", "repaired"]


# Budget


def test_at_most_so_many_cases(testbed, small):
    found = run(testbed, small, None, replace(WITHOUT, cases=3)).results["undefended"]["sets"]
    assert {len(told["answers"]) for told in found.values()} == {3}


@pytest.mark.parametrize("name", ["cases", "max_new_tokens", "batch_size", "steps", "restarts"])
def test_numbers_of_a_budget_are_positive(name):
    assert getattr(Budget(**{name: 1}), name) == 1
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
            Budget(**{name: value})


@pytest.mark.parametrize("name", ["gradient_cases", "universal_cases"])
def test_attacks_may_be_left_out(name):
    assert getattr(Budget(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name}=-1"):
        Budget(**{name: -1})


def test_a_budget_needs_an_attack_without_the_penalty_and_an_optimiser():
    for bad in ({"weights": (1.0,)}, {"weights": ()}, {"optimisers": ()}):
        with pytest.raises(ValueError, match="must hold 0"):
            Budget(**bad)
    # As YAML gives it.
    assert Budget(eps=[8, 16], weights=[0, 2.0]) == Budget(eps=(8, 16), weights=(0, 2.0))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(),
        SMALL,
        WITHOUT,
        Budget(cases=3, universal_cases=0, weights=(10.0, 1.0, 0.0), curve_steps=()),
        Budget(weights=(0,)),
    ],
)
def test_a_quick_budget_is_a_share_of_it(budget):
    quick = budget.quick()
    for name in ("cases", "gradient_cases", "universal_cases", "steps", "restarts"):
        assert getattr(quick, name) <= getattr(budget, name)
    for name in ("eps", "optimisers", "weights"):
        assert set(getattr(quick, name)) <= set(getattr(budget, name)) and len(getattr(quick, name)) <= 2
    assert (quick.eps, quick.optimisers) == (budget.eps[:1], budget.optimisers[:1])
    assert (quick.max_new_tokens, quick.batch_size) == (budget.max_new_tokens, budget.batch_size)
    assert len(quick.weights) == min(2, len(budget.weights))
    assert quick.steps == min(10, budget.steps) and quick.cases == min(24, budget.cases)
