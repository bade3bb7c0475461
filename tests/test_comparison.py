"""Comparisons in files, from the YAML to the report."""

import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from care_hf import comparison, evaluate_job, evaluation_run
from care_hf.answers import generate_answers
from care_hf.budget import Budget
from care_hf.comparison import Comparison, compare
from care_hf.judges import StrictJudge
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.preference_steering import train_preference_steering
from care_hf.rivals import astra_vector, train_refusal_lora
from care_hf.sites import Site, decoder_layers, site_module
from care_hf.suite import Suite
from care_hf.testbed.suite import FitPrompts, load_suite
from care_hf.testbed.world import ATTACKS, REFUSAL
from care_hf.training import Specification, Trainer
from care_hf_console.app import app

FILES = sorted((Path(__file__).parents[1] / "configs" / "evaluation").glob("*.yaml"))
# What a rival's training takes, beside what the trainer takes for itself.
OWN = {
    "astra": (astra_vector, {"site", "alpha", "images", "max_new_tokens"}),
    "spo-style": (train_preference_steering, {"max_new_tokens"}),
    "refusal lora": (train_refusal_lora, {"max_new_tokens"}),
}


def written(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


# Files


def test_there_are_files():
    assert {file.stem for file in FILES} >= {"main", "ablations", "transfer"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_can_be_trained_on_the_testbed(file, testbed):
    model, plan = testbed[0], Comparison.load(file)
    assert plan.budget.max_new_tokens >= 8 and "undefended" not in plan.defences
    told = [json.dumps(one.settings, sort_keys=True) for one in plan.defences.values()]
    assert len(set(told)) == len(told)  # no defence is measured twice
    for specification in plan.defences.values():
        assert set(specification.families) <= set(ATTACKS)
        for site in specification.full_recipe.find_sites(model):
            site_module(model, site)
        if specification.full_recipe.by_turn:
            specification.full_recipe.gate_site(model)
        function, taken = OWN.get(specification.kind, (lambda: None, set()))
        assert set(specification.options) - taken <= set(inspect.signature(function).parameters)
        if specification.kind == "astra":
            assert site_module(model, Site.parse(specification.options["site"]))
        assert all(layer < len(decoder_layers(model)) for layer in specification.options.get("layers", ()))


def test_a_file_says_what_it_says(tmp_path):
    text = """
families: &seen [icon, split]
defences:
  one: {kind: repair, families: *seen, changes: {rank: 2, layers: [4, 5]}, adaptive: true}
  two: {kind: random, recipe: paper, exposure: false}
budget: {cases: 7, eps: [8, 16], weights: [0.0, 2.0]}
"""
    plan = Comparison.load(written(tmp_path, text))
    one = Specification("repair", "gated", {"rank": 2, "layers": [4, 5]}, ("icon", "split"), adaptive=True)
    assert plan.defences == {"one": one, "two": Specification("random", "paper", exposure=False)}
    assert plan.budget == Budget(cases=7, eps=(8, 16), weights=(0.0, 2.0))
    assert Comparison.load(written(tmp_path, "defences: {one: {kind: undefended}}")).budget == Budget()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"some\.yaml: missing fields \['defences'\]"),
        ("budget: {cases: 2}", r"some\.yaml: missing fields \['defences'\]"),
        ("defences: {a: {kind: repair}}\ndefense: {}", r"some\.yaml: unknown fields \['defense'\]; known"),
        ("[a, b]", r"some\.yaml holds \['a', 'b'\]; it needs fields"),
        ("defences: [repair]", r"some\.yaml: defences holds \['repair'\]"),
        ("defences: {a: {kind: repair}, b c: }", r"some\.yaml: 'b c' holds None"),
        (
            "defences: {a: {kind: repair}, b: {kind: repair, rank: 2}}",
            r"some\.yaml: 'b': unknown fields \['rank'\]; known are .*'kind'",
        ),
        ("defences: {b: {recipe: paper}}", r"some\.yaml: 'b': .*'kind'"),
        ("defences: {b: {kind: prayer}}", r"some\.yaml: 'b': kind='prayer'"),
        ("defences: {b: {kind: repair, changes: {rnk: 2}}}", r"some\.yaml: 'b': .*\['rnk'\]"),
        ("defences: {b: {kind: repair, changes: {rank: two}}}", r"some\.yaml: 'b': rank='two'"),
        ("defences: {b: {kind: repair, changes: {beta: two}}}", r"some\.yaml: 'b': beta='two'"),
        ("defences: {b: {kind: repair, recipe: secret}}", r"some\.yaml: 'b': Recipe 'secret'"),
        ("defences: {b: {kind: repair, families: icon}}", r"some\.yaml: 'b': families='icon'"),
        (
            "defences: {b: {kind: repair}}\nbudget: {case: 2}",
            r"budget: unknown fields \['case'\]; known are .*mean 'cases'",
        ),
        ("defences: {b: {kind: repair}}\nbudget: {cases: 0}", r"some\.yaml: budget: cases=0"),
        ("defences: {b: {kind: repair}}\nbudget: {weights: [1.0]}", r"some\.yaml: budget: weights=\(1\.0,\)"),
        ("defences: {b: {kind: repair, changes: {sites: auto}}}", r"some\.yaml: 'b': sites='auto' needs a diagnosis"),
        ("defences: {b: [}", r"some\.yaml is not YAML: "),
    ],
)
def test_what_a_file_may_not_hold_is_named_with_the_file_and_the_defence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Comparison.load(written(tmp_path, text))


@pytest.mark.parametrize(
    "budget",
    [Budget(cases=2, gradient_cases=0, universal_cases=0, steps=3), Budget(weights=(1.0, 10.0, 0.0)), Budget()],
)
def test_a_quick_budget_is_nowhere_larger(budget):
    quick = budget.quick()
    for name in ("cases", "gradient_cases", "universal_cases", "steps", "restarts"):
        assert getattr(quick, name) <= getattr(budget, name)
    for name in ("eps", "optimisers", "weights"):
        assert set(getattr(quick, name)) <= set(getattr(budget, name))
    assert quick.max_new_tokens == budget.max_new_tokens and 0 in quick.weights
    assert Budget().quick().cases == 24 and Budget().quick().gradient_cases == 4


# Comparing


def test_every_defence_of_a_comparison_is_trained_and_measured(testbed, tmp_path):
    model, processor = testbed
    data, whole = FitPrompts(20), load_suite("validation", 6)
    tasks = {"typographic": whole.benign["typographic"], "count": whole.benign["count"]}
    suite = Suite("small", {"typographic": whole.attacks["typographic"]}, whole.harmful, tasks)
    gated = Specification("repair", exposure=False)
    plan = Comparison({"nothing": Specification("undefended"), "gated": gated}, Budget(6, 12, 16, 0))
    report = compare(model, processor, suite, data, plan, judge=StrictJudge(REFUSAL), seed=3, out=tmp_path)
    assert list(report.results) == ["undefended", "nothing", "gated"]
    trained = Trainer(model, processor, data, 16, seed=3).train(gated).subspaces
    repaired = CareForConditionalGeneration.from_base(model, trained)
    for name, cases in suite.sets.items():
        own = generate_answers(model, processor, cases, 12)
        found = {defence: result["sets"][name] for defence, result in report.results.items()}
        assert found["undefended"] == found["nothing"] and found["undefended"]["answers"] == own
        assert found["gated"]["answers"] == generate_answers(repaired, processor, cases, 12)
        expected = [
            "complied" if a == c.reference else "refused" if a == REFUSAL else "other"
            for a, c in zip(found["gated"]["answers"], cases, strict=True)
        ]
        assert found["gated"]["verdicts"] == {"strict": expected}
    attacked = report.rate("gated", "attack/", "complied").count, report.rate("undefended", "attack/", "complied").count
    assert attacked[0] < attacked[1]
    assert report.results["nothing"]["divergence"] == 0 and report.results["gated"]["divergence"] >= 0
    told = report.settings["defences"]["gated"]
    assert {**gated.settings, "seed": 3} == {name: value for name, value in told.items() if name != "prompts"}


def test_gradient_attacks_go_through_those_that_are_to_be_adaptive(testbed, monkeypatch):
    asked = {}
    monkeypatch.setattr(comparison, "evaluate", lambda *a, **k: asked.update(k, given=a))
    plain, through = Specification("repair"), Specification("repair", adaptive=True)
    plan = Comparison({"a": plain, "b": through}, Budget())
    compare(*testbed, Suite("s"), FitPrompts(4), plan, seed=2)
    assert asked["adaptive"] == ["b"] and asked["processor"] is testbed[1]
    due = asked["given"][2]
    assert due["a"].settings == {**plain.settings, "seed": 2, "prompts": due["a"].settings["prompts"]}
    # What others were trained on is another defence, and shares no cell.
    compare(*testbed, Suite("s"), FitPrompts(5), plan, seed=2)
    assert asked["given"][2]["a"].settings["prompts"] != due["a"].settings["prompts"]


# The console

SMALL = """
defences:
  nothing: {kind: undefended}
  gated: {kind: repair, exposure: false}
budget: {cases: 2, max_new_tokens: 12, batch_size: 32, gradient_cases: 0, universal_cases: 0}
"""


@pytest.fixture
def console(monkeypatch):
    """The command, on few training prompts."""
    monkeypatch.setattr(evaluate_job, "FitPrompts", lambda n=20: FitPrompts(min(n, 20)))

    def run(*arguments, **options):
        return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], **options)

    return run


def test_the_console_writes_a_report_and_goes_on_from_its_cells(console, monkeypatch, tmp_path):
    asked = ["--comparison", written(tmp_path, SMALL), "--out", tmp_path / "out", "--quick", "--split", "validation"]
    result = console(*asked, catch_exceptions=False)
    assert result.exit_code == 0 and "report.md" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["source"]["split"] == "validation" and report["settings"]["budget"]["cases"] == 2
    assert list(report["results"]) == ["undefended", "nothing", "gated"]
    suite = load_suite("validation", 2)
    assert set(report["results"]["gated"]["sets"]) == set(suite.sets)
    for found in report["results"].values():
        assert all(sum(counts["strict"].values()) == 2 for counts in found["sets"].values())
        assert found["gradient"] == []
    assert report["results"]["gated"]["sets"]["harmful"] == {"strict": {"refused": 2}}
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| gated |" in markdown and "Images changed by gradient" not in markdown
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert answers["gated"]["harmful"] == [REFUSAL] * 2
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix in (".md", ".json")}

    def again(*_, **__):
        raise AssertionError("measured or trained again")

    for owner, name in ((evaluation_run, "generate_answers"), (evaluation_run, "latency"), (Trainer, "train")):
        monkeypatch.setattr(owner, name, again)
    assert console(*asked, catch_exceptions=False).exit_code == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    # Other training is another cell.
    written(tmp_path, SMALL.replace("exposure: false", "exposure: true"))
    with pytest.raises(AssertionError, match="again"):
        console(*asked, catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        (None, "test", "absent.yaml' is neither a YAML file"),
        ("defences: {b: {kind: prayer}}", "test", "'b': kind='prayer'"),
        ("defences: {b: [}", "test", "is not YAML"),
        (SMALL, "holdout", "split='holdout'"),
        (SMALL, "fit", "split='fit'"),
    ],
)
def test_the_console_tells_what_is_wrong_without_a_traceback(console, monkeypatch, tmp_path, text, split, message):
    monkeypatch.setattr(comparison, "compare", lambda *a, **k: pytest.fail("began all the same"))
    path = tmp_path / "absent.yaml" if text is None else written(tmp_path, text)
    result = console("--comparison", path, "--out", tmp_path / "out", "--split", split)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
