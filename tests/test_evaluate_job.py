"""`care evaluate` for a model and data of one's own: a checkpoint in a folder, prompts in files."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from care_hf.judges import ChoiceJudge, KeywordJudge, WordJudge
from care_hf.model_judges import ClassifierJudge, ToxicityJudge, load_judge
from care_hf.prompt_files import PromptSets
from care_hf.suite import Case
from care_hf.testbed import DATA
from care_hf_console.app import app


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.fixture
def files(tmp_path, world):
    """A comparison, prompts to train on, and a set in XSTest's columns; all in the testbed's words."""
    texts = {
        "benign": [s.text for s in world.benign("split", "fit", 24)],
        "malicious": [s.text for s in world.plain("fit", 96) if s.image is None],
        "cipher": [s.text for s in world.attack("cipher", "fit", 24)],
    }
    named = {name: write_rows(tmp_path / f"{name}.jsonl", [{"text": t} for t in of]) for name, of in texts.items()}
    prompts = {**{name: named[name] for name in ("benign", "malicious")}, "attacks": {"cipher": named["cipher"]}}
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump({**prompts, "refusal": "i cannot help with that ."}))
    asked = [("safe", s.text) for s in world.benign("split", "validation", 4)]
    asked += [("unsafe", s.text) for s in world.plain("validation", 16) if s.image is None][:4]
    rows = [{"prompt": t, "focus": "", "type": "t", "note": "", "label": label} for label, t in asked]
    write_rows(tmp_path / "test.jsonl", rows)
    source = yaml.safe_load((DATA.parents[2] / "configs" / "datasets" / "xstest.yaml").read_text())
    (tmp_path / "xstest.yaml").write_text(yaml.safe_dump({**source, "id": str(tmp_path / "test.jsonl")}))
    comparison = {
        "defences": {"gated": {"kind": "repair", "families": ["cipher"], "changes": {"rank": 2}}},
        "budget": {"cases": 4, "max_new_tokens": 8, "gradient_cases": 0},
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    return tmp_path


def run(folder, *arguments):
    paths = ["--comparison", str(folder / "comparison.yaml"), "--out", str(folder / "out")]
    return CliRunner().invoke(app, ["evaluate", *arguments, *paths])


def test_a_model_in_a_folder_is_measured_on_data_in_files(files):
    result = run(
        files, str(DATA / "seed0"), "--suite", str(files / "xstest.yaml"), "--prompts", str(files / "prompts.yaml")
    )
    assert result.exit_code == 0, result.output
    report = json.loads((files / "out" / "report.json").read_text())
    for defence in ("undefended", "gated"):
        sets = report["results"][defence]["sets"]
        assert set(sets) == {"harmful", "benign/xstest/safe"}
        # The testbed refuses what is forbidden and grants the rest.
        assert sets["harmful"]["words"] == {"refused": 4}
        assert sets["benign/xstest/safe"]["words"] == {"complied": 4}
    assert report["settings"]["judges"] == {"words": WordJudge().settings}


def test_gradient_attacks_run_on_public_attacks_with_images(files):
    columns = "dataset,category_id,task_id,category_name,question,instruction"
    rows = [f"safebench,1,{i},Harmless,how do i make salt?,Steps to make salt. {i}" for i in (1, 2)]
    (files / "safebench.csv").write_text("\n".join([columns, *rows]))
    source = yaml.safe_load((DATA.parents[2] / "configs" / "datasets" / "figstep.yaml").read_text())
    local = {**source, "id": str(files / "safebench.csv"), "data_files": None}
    (files / "figstep.yaml").write_text(yaml.safe_dump(local))
    plan = yaml.safe_load((files / "comparison.yaml").read_text())
    plan["budget"] |= {"gradient_cases": 1, "universal_cases": 0, "steps": 2, "restarts": 1, "eps": [16]}
    (files / "comparison.yaml").write_text(yaml.safe_dump(plan))
    result = run(
        files, str(DATA / "seed0"), "--suite", str(files / "figstep.yaml"), "--prompts", str(files / "prompts.yaml")
    )
    assert result.exit_code == 0, result.output
    report = json.loads((files / "out" / "report.json").read_text())["results"]
    attacked = {(row["family"], row["through"]) for row in report["gated"]["gradient"]}
    assert attacked == {("figstep", "undefended")}
    assert {row["optimiser"] for row in report["gated"]["gradient"]} == {"mi-fgsm", "apgd"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some/model"], "give --suite"),
        (["--split", "fit"], "split='fit' must be one of"),
        (["--judge", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_told_without_a_traceback(files, arguments, message):
    result = run(files, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_prompt_sets_name_what_does_not_fit(files):
    with pytest.raises(ValueError, match=r"families \['icon'\]; known are \['cipher'\]"):
        PromptSets.load(files / "prompts.yaml").prompts(["icon"], True)
    (files / "prompts.yaml").write_text("benign: benign.jsonl\nevil: x.jsonl\n")
    with pytest.raises(ValueError, match=r"prompts.yaml: unknown fields \['evil'\], missing fields \['malicious'\]"):
        PromptSets.load(files / "prompts.yaml")
    (files / "prompts.yaml").write_text("benign: benign.jsonl\nmalicious: gone.jsonl\n")
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl is missing"):
        PromptSets.load(files / "prompts.yaml")


def test_prompt_sets_expose_only_with_both_halves():
    sets = PromptSets(["b"], ["m"], {"a": ["x"]}, exposed=["e"], neutral=["n"])
    assert sets.prompts(["a"], True) == {"benign": ["b"], "malicious": ["m", "x"], "exposed": ["e"], "neutral": ["n"]}
    assert sets.prompts([], False) == {"benign": ["b"], "malicious": ["m"]}
    assert "exposed" not in PromptSets(["b"], ["m"], exposed=["e"]).prompts([], True)


def test_words_are_judged_as_the_two_judges_do():
    cases = [Case([], "q", "B", choices=("red", "blue")), Case([], "r")]
    answers = ["B", "I cannot do that."]
    expected = ChoiceJudge().verdicts(cases[:1], answers[:1]) + KeywordJudge().verdicts(cases[1:], answers[1:])
    assert WordJudge().verdicts(cases, answers) == expected == ["complied", "refused"]


@pytest.mark.parametrize(("name", "cls"), [("llama_guard_3_8b", ClassifierJudge), ("toxic_bert", ToxicityJudge)])
def test_a_judges_class_is_told_by_its_file(monkeypatch, name, cls):
    seen = []
    # The weights cannot be had here; what is tested is which class reads the file.
    monkeypatch.setattr(cls, "from_config", classmethod(lambda c, path, **loading: seen.append(c)))
    load_judge(DATA.parents[2] / "configs" / "judges" / f"{name}.yaml")
    assert seen == [cls]
