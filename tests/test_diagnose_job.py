"""`care diagnose` on the console: what it writes, what it takes up again, and how it fails."""

import json
import re
import sys

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from care_hf import diagnose_job
from care_hf.diagnosis import Diagnosis
from care_hf.testbed import DATA
from care_hf_console.app import app

CONFIGS = DATA.parents[2] / "configs" / "datasets"
PARTS = ("trace", "mediation", "separability", "neurons", "attribution_refused", "attribution_jailbroken")


def run(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("diagnosed") / "new"
    return out, run("--out", out, "--n", "2", "--max-new-tokens", "8")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def xstest(tmp_path, world):
    """Requests in the testbed's words that are safe, and some that it refuses."""
    asked = [("safe", s.text) for s in world.benign("split", "validation", 4)]
    asked += [("unsafe", s.text) for s in world.plain("validation", 16) if s.image is None][:4]
    rows = [{"prompt": t, "focus": "", "type": "t", "note": "", "label": label} for label, t in asked]
    write_rows(tmp_path / "test.jsonl", rows)
    source = yaml.safe_load((CONFIGS / "xstest.yaml").read_text())
    (tmp_path / "xstest.yaml").write_text(yaml.safe_dump({**source, "id": str(tmp_path / "test.jsonl")}))
    return tmp_path / "xstest.yaml"


@pytest.fixture
def figstep(tmp_path):
    """Attacks alone."""
    columns = "dataset,category_id,task_id,category_name,question,instruction"
    rows = [f"safebench,1,{i},Harmless,how do i make salt?,Steps to make salt. {i}" for i in (1, 2)]
    (tmp_path / "safebench.csv").write_text("\n".join([columns, *rows]))
    source = yaml.safe_load((CONFIGS / "figstep.yaml").read_text())
    local = {**source, "id": str(tmp_path / "safebench.csv"), "data_files": None}
    (tmp_path / "figstep.yaml").write_text(yaml.safe_dump(local))
    return tmp_path / "figstep.yaml"


def test_a_run_writes_artefact_tables_and_figures_of_every_part(made, testbed):
    out, result = made
    assert result.exit_code == 0, result.output
    assert "16 malicious and 26 benign prompts of testbed" in result.output
    assert f"Written to {out}" in result.output and "No " not in result.output
    figures = {f"{name}{suffix}" for name in PARTS for suffix in (".png", ".svg")}
    written = {path.name for path in out.iterdir()}
    assert written == {*figures, "cells", "diagnosis.md", "diagnosis.json", "diagnosis.safetensors"}
    for name in PARTS:
        with Image.open(out / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 100 and len(set(image.convert("L").tobytes())) > 10  # drawn on
        assert "<svg" in (out / f"{name}.svg").read_text()
    found = Diagnosis.load(out)
    found.check_model(testbed[0])
    assert found.left_out == {} and set(found.attributions) == {"refused", "jailbroken"}
    assert found.settings["max_new_tokens"] == 8 and found.settings["malicious"] == 16
    # Every figure is in the tables' file, and every file that it names is there.
    text = (out / "diagnosis.md").read_text()
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [f"{name}.png" for name in PARTS]
    assert found.mediation.table() in text and found.trace.table("mean") in text


def test_a_second_run_takes_up_what_is_kept_and_comes_out_the_same(made, monkeypatch):
    out, _ = made
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def again(*_, **__):
        raise AssertionError("what was finished is done again")

    for name in ("tracing.Replay", "tracing.generate_blocked", "mediation.PairRuns.patched"):
        monkeypatch.setattr(f"care_hf.{name}", again)
    for name in ("rank_neurons", "measure_separability"):
        monkeypatch.setattr(f"care_hf.diagnosing.{name}", again)
    monkeypatch.setattr(diagnose_job, "SUFFIXES", (".png",))  # to be quick
    result = run("--out", out, "--n", "2", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    for name in ("diagnosis.json", "diagnosis.safetensors", "diagnosis.md"):
        assert (out / name).read_bytes() == before[name]


def test_an_interrupted_run_leaves_no_artefact(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("care_hf.tracing.Replay", interrupted)
    assert run("--out", tmp_path / "out", "--n", "2").exit_code != 0
    assert not (tmp_path / "out" / "diagnosis.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some/model"], "For the model 'some/model' give --suite, harmful and benign data sets."),
        (["--split", "fit"], "split='fit' must be one of ('validation', 'test')."),
        (["--seed", "7"], "No testbed of seed 7 is bundled"),
        (["--suite", "xstest"], "--suite ['xstest'] is for a model that is named"),
        (["some/model", "--suite", "no-such-set"], "no-such-set"),
    ],
)
def test_names_that_do_not_fit_are_told_without_a_traceback(tmp_path, arguments, message):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--n", "--batch-size", "--max-new-tokens"])
def test_numbers_that_do_not_fit_are_told(tmp_path, option):
    result = run("--out", tmp_path / "out", option, "0")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_data_without_benign_prompts_are_told_before_the_model_is_loaded(tmp_path, figstep):
    result = run(tmp_path / "no-model", "--suite", figstep, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "2 malicious and 0 benign prompts" in result.output and "both are needed" in result.output


def test_a_model_that_is_not_there_is_told(tmp_path, xstest):
    result = run(tmp_path / "no-model", "--suite", xstest, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "no-model" in result.output and "Traceback" not in result.output


def test_a_model_in_a_folder_that_refuses_everything_is_told_what_is_missing(tmp_path, xstest):
    result = run(DATA / "seed0", "--suite", xstest, "--out", tmp_path / "out", "--max-new-tokens", "8")
    assert "4 malicious and 4 benign prompts" in result.output
    assert result.exit_code == 2 and "complied=() must each hold a first token" in result.output
    assert "Traceback" not in result.output


def test_what_is_not_installed_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--out", tmp_path / "out", "--n", "2")
    assert result.exit_code == 2 and "pip install matplotlib" in result.output


def test_help_shows_it():
    text = CliRunner().invoke(app, ["--help"]).output
    assert "diagnose" in text
    text = run("--help").output
    for option in ("--out", "--suite", "--split", "--max-new-tokens", "--batch-size", "--seed"):
        assert option in text


def test_a_layer_that_is_not_there_is_told(tmp_path):
    result = run("--out", tmp_path, "--n", "2", "--layer", "3", "--layer", "9")
    assert result.exit_code == 2 and "9" in result.output and "0 to 5" in result.output
    assert "Traceback" not in result.output
