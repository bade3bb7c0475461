"""The artefact of a diagnosis, what `diagnose` puts into it, and the sites that a recipe takes from it."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import care_hf
from care_hf import diagnosing, diagnosis
from care_hf.contrasts import Contrast
from care_hf.diagnosing import diagnose
from care_hf.diagnosis import TENSORS, VALUES, Diagnosis, describe
from care_hf.image_grids import ImageGrid
from care_hf.judges import StrictJudge
from care_hf.mediation import Effects, Mediation, mediate, pair_prompts
from care_hf.neuron_runs import UnitRuns
from care_hf.neurons import NeuronRanking, VerifiedNeuron, rank_neurons
from care_hf.pair_runs import GROUPS, PairRuns
from care_hf.recipe import Recipe
from care_hf.separability import Separability, measure_separability
from care_hf.separation import MEASURES, SiteSeparability
from care_hf.site_choice import choose_site, with_chosen_sites
from care_hf.sites import Site, decoder_layers
from care_hf.suite import Case
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL
from care_hf.token_attribution import TokenAttribution, attribute
from care_hf.trace_results import Outcome, Trace
from care_hf.tracing import trace

INF, NAN = float("inf"), float("nan")
JUDGE = StrictJudge(REFUSAL)
ONE_PASS = {"components": ("layer", "ffn"), "layers": [3, 4], "max_new_tokens": 12}
QUICK = {**ONE_PASS, "top_neurons": 3}
FEW = {**QUICK, "components": ("ffn",)}


# The artefact


def hand_made(**changes) -> Diagnosis:
    """Every part, with the numbers that JSON does not have wherever a part may hold them."""
    plain = Outcome(["refused", "complied"], ["complied"], [1.5, -INF], [True], [0.0])
    blocked = Outcome(["other", "complied"], ["other"], [0.25, NAN], [False], [INF])
    site = Site(3, "residual")
    absent = {group: Effects([None, None], [None, None]) for group in GROUPS}
    effects = {**absent, "last": Effects([0.5, INF], [None, 0.1]), "generated": Effects([0.25, -INF], [NAN, 1.0])}
    values = SiteSeparability(0.5, INF, INF, 1.0, dict.fromkeys(MEASURES, (0.5, INF)))
    verified = [VerifiedNeuron(3, 1, 0.5, -0.25, None, None, "top"), VerifiedNeuron(4, 0, 0.5, 0.1, NAN, 1.0, "random")]
    ranking = NeuronRanking(
        {3: torch.tensor([0.1, 0.5]), 4: torch.tensor([0.5, NAN, 1e-30])},
        verified,
        {"top": None, "random": NAN, "both": 1.0},
        0.5,
        {"layers": [3, 4], "top": 1},
    )
    token = TokenAttribution(
        ["nan", "inf", " a"],
        torch.tensor([1, 2, 5]),
        torch.tensor([True, True, False]),
        torch.tensor([0.1, INF, -1.0]),
        "ablation",
        "embedding",
        "inf",
        -INF,
        [ImageGrid(None, torch.tensor([0, 1]), (1, 2)), ImageGrid(None, torch.tensor([], dtype=torch.int64), None)],
    )
    parts = {
        "model": {"class": "Llava", "layers": 6, "fingerprint": "ab"},
        "trace": Trace(plain, {"mean": {site: blocked, Site(3, "ffn"): plain}}, {"contrast": {"refused": [1]}}),
        "mediation": Mediation([1.0, INF], [-2.0, NAN], {site: effects, Site(4, "ffn"): absent}, {"pairs": 2}),
        "neurons": ranking,
        "separability": Separability({site: values}, {"4.ffn": "none"}, {"folds": 2}),
        "attributions": {"refused": token},
        "left_out": {"nothing": "at all"},
        "settings": {"seed": 0, "words": ["nan", "inf"]},
    }
    return Diagnosis(**{**parts, **changes})


def told(found: Diagnosis) -> str:
    """All that a diagnosis holds as text, in which NaN is equal to NaN; numbers are exact."""
    parts = {name: getattr(found, name) and getattr(found, name).to_dict() for name in diagnosis.PARTS}
    neurons = found.neurons and [
        found.neurons.to_dict(),
        {name: (str(values.dtype), values.tolist()) for name, values in found.neurons.tensors().items()},
    ]
    attributions = {name: one.to_dict() for name, one in found.attributions.items()}
    return json.dumps([found.model, parts, neurons, attributions, found.left_out, found.settings])


def in_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"neurons": None, "attributions": {}, "left_out": {}},
        *({name: None} for name in ("trace", "mediation", "separability")),
        dict.fromkeys(("trace", "mediation", "separability", "neurons")),
    ],
    ids=lambda changes: "without " + ", ".join(changes) if changes else "whole",
)
def test_what_is_saved_is_what_is_loaded_in_strict_json(tmp_path, changes):
    one = hand_made(**changes)
    one.save(tmp_path / "new" / "folder")

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    json.loads((tmp_path / "new" / "folder" / VALUES).read_text(), parse_constant=refuse)
    loaded = Diagnosis.load(tmp_path / "new" / "folder")
    assert told(loaded) == told(one)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [VALUES, TENSORS]
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / VALUES).read_bytes() == (tmp_path / "new" / "folder" / VALUES).read_bytes()


def test_loaded_parts_have_the_types_of_measured_ones(tmp_path):
    hand_made().save(tmp_path)
    loaded = Diagnosis.load(tmp_path)
    assert list(loaded.mediation.effects) == [Site(3, "residual"), Site(4, "ffn")]
    assert loaded.mediation.effects[Site(3, "residual")]["last"] == Effects([0.5, INF], [None, 0.1])
    assert loaded.trace.blocked["mean"][Site(3, "residual")].divergence == [INF]
    assert loaded.separability.sites == hand_made().separability.sites
    assert loaded.attributions["refused"].images[0].grid == (1, 2)
    assert loaded.attributions["refused"].tokens == ["nan", "inf", " a"]  # words stay words
    assert loaded.settings["words"] == ["nan", "inf"]


def edit(change):
    def damage(folder):
        values = json.loads((folder / VALUES).read_text())
        change(values)
        (folder / VALUES).write_text(json.dumps(values))

    return damage


def without(*path):
    def change(values):
        for name in path[:-1]:
            values = values[name]
        del values[path[-1]]

    return edit(change)


def put(value, *path):
    def change(values):
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = value

    return edit(change)


def rewrite(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def retied(change):
    """Tensors that are tied to the JSON as a save would, but are of another content."""

    def damage(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        digest = diagnosis.hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        put(digest, "tensors")(folder)

    return damage


LAST = ("mediation", "effects", "3.residual", "last")
MEAN = ("trace", "blocked", "mean", "3.residual")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / VALUES).unlink(), FileNotFoundError, r"has no diagnosis\.json"),
        (lambda folder: (folder / TENSORS).unlink(), FileNotFoundError, r"has no diagnosis\.safetensors"),
        (shutil.rmtree, FileNotFoundError, r"has no diagnosis\.json"),
        (rewrite(VALUES, lambda data: data[: len(data) // 2]), ValueError, r"diagnosis\.json is no whole JSON"),
        (rewrite(VALUES, lambda data: b""), ValueError, "is no whole JSON"),
        (rewrite(VALUES, lambda data: b"\xff\xfe\x00"), ValueError, "is no whole JSON"),
        (rewrite(VALUES, lambda data: b"[" * 200_000), ValueError, "is no whole JSON"),
        (rewrite(VALUES, lambda data: data.replace(b"0.25", b"NaN")), ValueError, "NaN is no JSON"),
        (rewrite(VALUES, lambda data: data.replace(b"0.25", b"-Infinity")), ValueError, "-Infinity is no JSON"),
        (put({"non-finite": "large"}, *MEAN, "divergence"), ValueError, "is no whole JSON"),
        (put({"non-finite": [1]}, *MEAN, "divergence"), ValueError, "is no whole JSON"),
        (rewrite(VALUES, lambda data: b"[1]"), ValueError, "has the format None"),
        (put("care_hf.diagnosis.v9", "format"), ValueError, r"the format 'care_hf\.diagnosis\.v9'; this version reads"),
        (without("format"), ValueError, "has the format None"),
        (rewrite(TENSORS, lambda data: data[:-4]), ValueError, r"diagnosis\.safetensors is damaged, or of another"),
        (rewrite(TENSORS, lambda data: b""), ValueError, "is damaged, or of another diagnosis"),
        (without("tensors"), ValueError, "is damaged, or of another diagnosis"),
        (retied(lambda tensors: tensors.pop("neurons.4.estimate")), ValueError, r"neurons\.4\.estimate.* are missing"),
        (
            retied(lambda tensors: tensors.update({"neurons.4.estimate": torch.zeros(0)})),
            ValueError,
            "'neurons' does not fit",
        ),
        *(
            (without(*path), ValueError, rf"lacks or garbles a field \(.*{path[-1]}")
            for path in [
                *((name,) for name in ("model", "trace", "mediation", "separability", "neurons", "attributions")),
                ("left_out",),
                ("settings",),
                ("model", "fingerprint"),
                ("trace", "unblocked"),
                ("trace", "settings"),
                (*MEAN, "kept"),
                ("mediation", "jailbroken"),
                (*LAST, "direct"),
                ("neurons", "outcome"),
                ("neurons", "settings", "layers"),
                ("neurons", "verified", 0, "effect"),
                ("separability", "sites", "3.residual", "auc"),
                ("attributions", "refused", "scores"),
            ]
        ),
        (without(*LAST[:-1], "image"), ValueError, "'mediation' does not fit"),
        (put([1.0], "mediation", "jailbroken"), ValueError, "'mediation' does not fit"),
        (put([1.0, "x"], *LAST, "indirect"), ValueError, "'mediation' does not fit"),
        (put([0.5], *LAST, "indirect"), ValueError, "'mediation' does not fit"),
        (put({}, "mediation", "effects", "3.mlp"), ValueError, "component='mlp'"),
        (put("refused", *MEAN, "malicious"), ValueError, "'trace' does not fit"),
        (put(["granted", "refused"], *MEAN, "malicious"), ValueError, "'trace' does not fit"),
        (put([0.5], *MEAN, "log_odds"), ValueError, "'trace' does not fit"),
        (put([[1]], *MEAN, "divergence"), ValueError, "'trace' does not fit"),
        (put("much", "separability", "sites", "3.residual", "auc"), ValueError, "could not convert string to float"),
        (put(2, "neurons", "verified", 0, "unit"), ValueError, "'neurons' does not fit"),
        (put(7, "neurons", "verified", 0, "layer"), ValueError, r"lacks or garbles a field \(KeyError\(7\)"),
        (put(["a"], "attributions", "refused", "tokens"), ValueError, "'attributions' does not fit"),
        (put("high", "attributions", "refused", "scores"), ValueError, "lacks or garbles a field"),
        (put("six", "model", "layers"), ValueError, "'model' does not fit"),
        (put([], "settings"), ValueError, "'settings' does not fit"),
        (put(3, "trace"), ValueError, "lacks or garbles a field"),
    ],
)
def test_a_broken_artefact_is_refused(tmp_path, damage, error, message):
    folder = tmp_path / "found"
    hand_made().save(folder)
    damage(folder)
    with pytest.raises(error, match=message):
        Diagnosis.load(folder)


def test_two_saves_are_not_mixed_up(tmp_path):
    one, other = hand_made(), hand_made(neurons=None)
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS, tmp_path / "one" / TENSORS)
    with pytest.raises(ValueError, match=r"of another diagnosis than diagnosis\.json"):
        Diagnosis.load(tmp_path / "one")


@pytest.mark.parametrize("files", [0, 1])
def test_a_save_that_fails_leaves_the_old_artefact(tmp_path, monkeypatch, files):
    hand_made().save(tmp_path)
    write, written = Path.write_bytes, []

    def fill_the_disk(path, data):
        if len(written) == files:
            write(path, data[:10])
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        hand_made(neurons=None, settings={"seed": 1}).save(tmp_path)
    assert told(Diagnosis.load(tmp_path)) == told(hand_made())
    monkeypatch.undo()
    hand_made(neurons=None).save(tmp_path)
    assert told(Diagnosis.load(tmp_path)) == told(hand_made(neurons=None))


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    hand_made().save(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        hand_made(settings={"judge": object()}).save(tmp_path)
    assert told(Diagnosis.load(tmp_path)) == told(hand_made())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_diagnosis_of_another_model_is_refused_and_what_differs_is_named(testbed, llava):
    model, _ = testbed
    found = Diagnosis(describe(model))
    found.check_model(model)
    found.check_model(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"another model .*\{'fingerprint': \('\w+', '\w+'\)\}; diagnose this one"):
        found.check_model(care_hf.load_testbed(1)[0])
    with pytest.raises(ValueError, match="'fingerprint'"):
        found.check_model(llava)
    with pytest.raises(ValueError, match=r"'class': \('Other', 'Llava\w+'\), 'layers': \(7, 6\)"):
        Diagnosis({**describe(model), "class": "Other", "layers": 7}).check_model(model)


def test_the_names_of_diagnosis_are_the_packages():
    assert care_hf.diagnose is diagnose and care_hf.trace is trace
    assert care_hf.attribute is attribute and care_hf.Diagnosis is Diagnosis
    assert {"diagnose", "trace", "attribute", "Diagnosis"} <= set(care_hf.__all__) & set(dir(care_hf))


# The choice of sites


def mediation(**effects) -> Mediation:
    """Of two pairs, by site ("at3_ffn") the indirect effects through the last and through the generated tokens."""
    zero = [0.0, 0.0]
    made = {}
    for name, (last, generated) in effects.items():
        by = {group: Effects(zero, zero) for group in GROUPS}
        made[Site.parse(name.removeprefix("at").replace("_", "."))] = {
            **by,
            "image": Effects([100.0, 100.0], zero),  # what no repair by turn changes
            "prompt": Effects([100.0, 100.0], zero),
            "last": Effects(last, zero),
            "generated": Effects(generated, zero),
        }
    return Mediation([1.0, 1.0], [0.0, 0.0], made, {})


def both(value):
    return [value, value]


GROWING = mediation(
    at5_residual=(both(6.0), both(4.0)),
    at4_residual=(both(5.0), both(4.0)),  # exactly 90 %
    at4_ffn=(both(4.0), both(4.9)),
    at4_attention=(both(9.9), both(-5.0)),
    at3_residual=(both(4.0), both(4.99)),
)


def test_the_earliest_place_with_nine_tenths_of_the_largest_effect_is_chosen():
    assert choose_site(GROWING) == Site(4, "residual")
    more = {**GROWING.effects, **mediation(at3_ffn=(both(0.0), both(9.0)), at2_ffn=(both(8.9), both(0.0))).effects}
    assert choose_site(Mediation([1.0, 1.0], [0.0, 0.0], more, {})) == Site(3, "ffn")


def test_within_a_layer_attention_runs_before_ffn_and_the_stream_last():
    order = ["at2_residual", "at2_ffn", "at2_attention"]
    for start, expected in enumerate(["attention", "ffn", "residual"]):
        kept = {name: (both(1.0), both(1.0)) for name in order[: 3 - start]}
        assert choose_site(mediation(**kept)) == Site(2, expected)


def test_the_gate_cuts_off_what_runs_before_it_but_not_its_own_place():
    early = mediation(at2_residual=(both(9.0), both(9.0)), at3_residual=(both(1.0), both(1.0)))
    assert choose_site(early) == Site(2, "residual")
    assert choose_site(early, Site(2, "residual")) == Site(2, "residual")
    # What runs before the gate does not count as the largest either.
    assert choose_site(early, Site(3, "attention")) == Site(3, "residual")
    assert choose_site(early, Site(3, "residual")) == Site(3, "residual")
    with pytest.raises(ValueError, match=r"Of the places \[\] after the gate at 4\.ffn none carries refusal"):
        choose_site(early, Site(4, "ffn"))


def test_pairs_without_a_token_and_effects_that_are_no_number_are_left_out():
    some = mediation(
        at1_residual=([None, 4.0], [None, 5.5]), at2_residual=(both(3.0), [None, None]), at3_residual=(both(5), both(5))
    )
    assert choose_site(some) == Site(1, "residual")  # 9.5 of 10, of the pair that is there
    assert choose_site(mediation(at1_ffn=(both(NAN), both(1.0)), at2_ffn=(both(1.0), both(1.0)))) == Site(2, "ffn")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_without_an_effect_no_place_is_chosen(value):
    with pytest.raises(ValueError, match=r"\['1\.ffn', '2\.ffn'\] after the gate at None none carries refusal"):
        choose_site(mediation(at1_ffn=(both(value), both(0.0)), at2_ffn=(both(value), both(value))))


def test_a_recipe_gets_the_place_that_runs_after_its_gate(testbed, tmp_path):
    model, _ = testbed
    known = Diagnosis(describe(model), mediation=GROWING)
    known.save(tmp_path)
    for given in (known, tmp_path, str(tmp_path)):
        assert with_chosen_sites(Recipe(sites="auto"), given, model) == Recipe(sites=("4.residual",))
    assert with_chosen_sites(Recipe(sites="auto", gate_layer=5), known, model).sites == ("5.residual",)
    for recipe in (Recipe(), Recipe(sites=("2.ffn",)), Recipe.load("paper")):
        assert with_chosen_sites(recipe, None, model) is recipe
        assert with_chosen_sites(recipe, "no such folder", model) is recipe


def test_a_recipe_that_cannot_get_its_sites_says_why(testbed, tmp_path):
    model, _ = testbed
    auto, known = Recipe(sites="auto"), describe(model)
    paper = Recipe.load("paper").replace(sites="auto")
    for recipe, given, message in [
        (auto, None, "sites='auto' needs a diagnosis"),
        (auto, Diagnosis({**known, "fingerprint": "0"}, mediation=GROWING), "is of another model"),
        (auto, Diagnosis(known, left_out={"mediation": "2 pairs"}), r"holds no patching \(2 pairs\); name the sites"),
        (paper, Diagnosis(known, mediation=GROWING), "not scope='all'; name the sites"),
        (auto.replace(gate_layer=5), Diagnosis(known, mediation=mediation(at4_ffn=(both(1), both(1)))), "none carries"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_chosen_sites(recipe, given, model)
    with pytest.raises(FileNotFoundError, match="has no diagnosis"):
        with_chosen_sites(auto, tmp_path, model)


# Diagnosing


@pytest.fixture(scope="module")
def prompts():
    suite = load_suite("validation", 2)
    malicious = [*suite.harmful, *(case for cases in suite.attacks.values() for case in cases)]
    return malicious, [case for cases in suite.benign.values() for case in cases]


@pytest.fixture(scope="module")
def found(testbed, prompts):
    model, processor = testbed
    return diagnose(model, *prompts, processor, JUDGE, **QUICK)


@pytest.fixture(scope="module")
def few(testbed, prompts, tmp_path_factory):
    """Of fewer places, and the folder that keeps what is finished."""
    out = tmp_path_factory.mktemp("few")
    return out, diagnose(testbed[0], *prompts, testbed[1], JUDGE, **FEW, out=out)


def test_the_parts_are_what_the_single_functions_give(testbed, prompts, found):
    model, processor = testbed
    malicious, benign = prompts
    traced = trace(model, processor, malicious, benign, JUDGE, **ONE_PASS)
    assert in_json(found.trace.to_dict()) == in_json(traced.to_dict()) and found.left_out == {}
    by_verdict = {
        verdict: [c for c, v in zip(malicious, traced.unblocked.malicious, strict=True) if v == verdict]
        for verdict in ("refused", "complied")
    }
    pairs = pair_prompts(*by_verdict.values())
    assert len(pairs[0]) >= 4
    patched = mediate(model, processor, *pairs, **ONE_PASS)
    assert found.mediation.to_dict() == in_json(patched.to_dict())
    contrast = Contrast(*(tuple(found.trace.settings["contrast"][name]) for name in ("refused", "complied")))
    ranked = rank_neurons(model, processor, malicious, benign, contrast, layers=[3, 4], top=3)
    assert found.neurons.to_dict() == in_json(ranked.to_dict())
    for layer, values in ranked.estimates.items():
        assert torch.equal(found.neurons.estimates[layer], values)
    sites = [Site(layer, component) for layer in (3, 4) for component in ("residual", "ffn")]
    groups = {"malicious": [c.request for c in malicious], "benign": [c.request for c in benign]}
    folds = min(5, *(min(len(set(own)), len(own) // 2) for own in groups.values()))
    apart = measure_separability(model, processor, malicious, benign, sites=sites, groups=groups, folds=folds)
    assert found.separability.to_dict() == apart.to_dict()
    assert set(found.attributions) == {"refused", "jailbroken"}
    for name, verdict in (("refused", "refused"), ("jailbroken", "complied")):
        alone = attribute(model, processor, by_verdict[verdict][0], max_new_tokens=12)
        assert found.attributions[name].tokens == alone.tokens and found.attributions[name].answer == alone.answer
        torch.testing.assert_close(found.attributions[name].scores, alone.scores, atol=1e-4, rtol=1e-4)
    assert found.attributions["refused"].answer == REFUSAL != found.attributions["jailbroken"].answer
    assert found.settings["malicious"] == 16 and found.settings["pairs"] == len(pairs[0])
    found.check_model(model)
    assert not model.training


def test_a_measured_diagnosis_is_saved_and_loaded_and_has_its_tables(found, tmp_path):
    found.save(tmp_path)
    loaded = Diagnosis.load(tmp_path)
    assert told(loaded) == told(found)
    text = loaded.markdown(["trace.png"])
    assert text == found.markdown(["trace.png"]) and text.count("\n### ") == 5
    for table in (found.trace.table("mean"), found.mediation.table(), found.separability.table()):
        assert table in text


def test_the_model_stays_as_it_is(llava, processor, world):
    llava.train()
    before, prompts = describe(llava), (world.plain("validation", 4), world.benign("recipe", "validation", 4))
    hooks = []
    for _ in range(2):  # transformers leaves hooks of its own the first time
        with pytest.raises(ValueError, match="must each hold a first token"):  # an untrained model refuses nothing
            diagnose(llava, *prompts, processor, **QUICK)
        assert llava.training and describe(llava) == before
        hooks.append(hooks_of(llava))
    assert hooks[0] == hooks[1]


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def forbid(monkeypatch, *names):
    def again(*_, **__):
        raise AssertionError("what was finished is done again")

    for name in names:
        monkeypatch.setattr(name, again)


@pytest.mark.parametrize(
    ("kind", "method", "calls"), [(PairRuns, "patched", 2), (UnitRuns, "effects", 0)], ids=["patching", "ranking"]
)
def test_an_interrupted_diagnosis_goes_on_where_it_was(
    testbed, prompts, few, tmp_path, monkeypatch, kind, method, calls
):
    model, processor = testbed
    real, done = getattr(kind, method), []

    def interrupted(self, *args, **kwargs):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, *prompts, processor, JUDGE, **FEW, out=tmp_path)
    monkeypatch.undo()
    forbid(monkeypatch, "care_hf.tracing.generate_blocked", "care_hf.tracing.Replay")
    if kind is UnitRuns:
        forbid(monkeypatch, "care_hf.mediation.PairRuns.patched")
    resumed = diagnose(model, *prompts, processor, JUDGE, **FEW, out=tmp_path)
    assert told(resumed) == told(few[1])


def test_a_second_run_takes_what_is_kept_and_measures_anew_what_other_settings_change(
    testbed, prompts, few, monkeypatch
):
    (model, processor), (out, first) = testbed, few
    with monkeypatch.context() as patched:
        forbid(patched, "care_hf.tracing.generate_blocked", "care_hf.mediation.PairRuns.patched")
        forbid(patched, "care_hf.diagnosing.rank_neurons", "care_hf.diagnosing.measure_separability")
        assert told(diagnose(model, *prompts, processor, JUDGE, **FEW, out=out)) == told(first)
    forbid(monkeypatch, "care_hf.tracing.generate_blocked", "care_hf.diagnosing.measure_separability")
    other = diagnose(model, *prompts, processor, JUDGE, **{**FEW, "top_neurons": 2}, out=out)
    assert len(other.neurons.verified) == 4 and len(first.neurons.verified) == 6


def test_text_alone_is_diagnosed_and_what_has_too_few_prompts_is_left_out_with_the_reason(testbed, world):
    model, processor = testbed
    plain = [{"text": s.text} for s in world.plain("validation", 40) if s.image is None][:3]
    ciphers = [{"text": s.text} for s in world.attack("cipher", "validation", 12)]
    benign = [{"text": s.text} for s in world.benign("split", "validation", 3)]
    result = diagnose(model, [*plain, *ciphers], benign, processor, **{**FEW, "layers": [4], "max_pairs": 3})
    counts = [result.trace.unblocked.malicious.count(verdict) for verdict in ("refused", "complied")]
    assert sum(counts) == 15 and min(counts) >= 3
    assert result.neurons is not None and result.mediation is None and result.separability is None
    assert result.left_out == {
        "mediation": "3 pairs of a refused and a jailbroken prompt with the same request; 4 are needed.",
        "separability": "{'malicious': '15 prompts of 15 requests', 'benign': '3 prompts of 3 requests'}; each class "
        "needs 4 prompts of 2 requests.",
    }
    assert set(result.attributions) == {"refused", "jailbroken"}
    assert not any(one.visual.any() for one in result.attributions.values())
    assert "No separability: " in result.markdown()


def test_a_request_that_all_prompts_share_is_not_held_out(testbed, prompts):
    malicious, benign = prompts
    same = [Case(case.messages, "the one", case.reference) for case in malicious]
    model, processor = testbed
    result = diagnose(model, same, benign, processor, JUDGE, **{**FEW, "layers": [4]})
    assert "'malicious': '16 prompts of 1 requests'" in result.left_out["separability"]
    assert result.mediation is not None and set(result.left_out) == {"separability"}


class Experts(nn.Module):
    """Two FFNs, of which the second has no say."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, h):
        return self.experts[0](h)


def test_experts_have_no_units_to_rank_and_a_part_that_fails_costs_no_other(testbed, prompts, few, monkeypatch):
    model, processor = copy.deepcopy(testbed[0]), testbed[1]
    layer = decoder_layers(model)[4]
    layer.mlp = Experts(layer.mlp)

    def fails(*_, **__):
        raise ValueError("The model's own answer is empty")

    monkeypatch.setattr(diagnosing, "attribute", fails)
    result = diagnose(model, *prompts, processor, JUDGE, **FEW)
    assert result.neurons is None and "down" in result.left_out["neurons"]
    assert result.attributions == {}
    for name in ("refused", "jailbroken"):
        assert result.left_out[f"attribution of a {name} prompt"] == "The model's own answer is empty"
    # The rest is that of the same model without the second expert.
    assert in_json(result.trace.to_dict()) == in_json(few[1].trace.to_dict())
    assert result.mediation.to_dict() == few[1].mediation.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, b: {"malicious": []}, "`malicious` is empty"),
        (lambda m, b: {"benign": [{"image": None}]}, r"`benign`\[0\]"),
        (lambda m, b: {"benign": [*b, m[3]]}, r"The malicious prompts \[3\] are benign ones, too"),
        (lambda m, b: {"benign": [Case(case.messages) for case in b]}, "reference"),
        (lambda m, b: {"layers": [6]}, "6 decoder layers"),
        (lambda m, b: {"components": ("mlp",)}, "components"),
        (lambda m, b: {"modes": ("median",)}, "modes"),
        (lambda m, b: {"top_neurons": 0}, "top_neurons=0 must be a whole number of at least 1"),
        (lambda m, b: {"top_neurons": 577}, r"top_neurons=577, but the layers \[3, 4\] have 576 units"),
        (lambda m, b: {"max_pairs": 0}, "max_pairs=0"),
        (lambda m, b: {"batch_size": 0}, "batch_size=0"),
        (lambda m, b: {"max_new_tokens": 1.5}, r"max_new_tokens=1\.5"),
        (lambda m, b: {"seed": -1}, "seed=-1 must be a whole number of at least 0"),
    ],
)
def test_bad_input_is_refused_before_any_forward(testbed, prompts, change, message):
    model, processor = testbed

    def forward_began(*_):
        raise AssertionError("bad input was found only after work had begun")

    given = {"malicious": prompts[0], "benign": prompts[1], "judge": JUDGE, **QUICK, **change(*prompts)}
    handle = model.model.register_forward_pre_hook(forward_began)
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            diagnose(model, processor=processor, **given)
    finally:
        handle.remove()


def test_without_scikit_learn_nothing_is_begun(testbed, prompts, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    forbid(monkeypatch, "care_hf.diagnosing.trace")
    with pytest.raises(ImportError, match="needs scikit-learn"):
        diagnose(testbed[0], *prompts, testbed[1], JUDGE, **QUICK)
