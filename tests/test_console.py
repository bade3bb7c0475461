"""The real `care`, in processes of its own: in a terminal, without one, interrupted, and given nonsense."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub import TOKEN, serving
from terminal import run_in_terminal
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from care_hf import CareForConditionalGeneration, SafetySubspaces, fit, load_adapter
from care_hf.answers import generate_answers
from care_hf.fit_job import KEPT, UPDATING
from care_hf.inspection_text import told_bytes
from care_hf.prompt_sources import read_source
from care_hf.rates import Rate
from care_hf.recipe import Recipe
from care_hf.samples import Sample
from care_hf.testbed import load_testbed
from care_hf.testbed.files import write_files
from care_hf.testbed.world import ATTACKS
from care_hf_console.app import app
from care_hf_console.voice import duration

CARE = [str(Path(sys.executable).with_name("care"))]
# Sums of as many threads as here are equal to the last bit.
WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The testbed as files: a model and prompts."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, 0, 4)
    malicious = write_files(folder / "more", 0, 24)["malicious"]
    lines = (folder / "more" / "malicious.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == malicious == 24
    for name, rows in (("malicious", lines), ("first", lines[:20]), ("later", lines[20:])):
        (folder / "more" / f"{name}.jsonl").write_text("".join(rows))
    return folder


def fit_command(files, out, *more, malicious="malicious"):
    prompts = ["--benign", files / "benign.jsonl", "--malicious", files / "more" / f"{malicious}.jsonl"]
    return ["fit", files / "model", *prompts, "--out", out, *more]


def run(*arguments, **options):
    given = {**os.environ, **WITHOUT_NETWORK, "COLUMNS": "80", **options.pop("environment", {})}
    command = [*CARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=given, stdin=subprocess.DEVNULL, **options)


def invoke(*arguments):
    """The same in this process, which has torch loaded already."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def digest(folder):
    return SafetySubspaces.from_model(CareForConditionalGeneration.from_pretrained(folder)).digest


@pytest.fixture(scope="module")
def by_function(files):
    """The fit that the commands below make, made by the function."""
    sources = {"benign": files / "benign.jsonl", "malicious": files / "more" / "malicious.jsonl"}
    prompts = {name: read_source(str(path)).prompts for name, path in sources.items()}
    model, processor = load_testbed(0)
    return fit(model, processor=processor, **prompts)


@pytest.fixture(scope="module")
def expected(by_function):
    return SafetySubspaces.from_model(by_function).digest


def assert_equal_up_to_rounding(folder, repaired):
    """The same gate, anchors and spans of the bases."""
    loaded = CareForConditionalGeneration.from_pretrained(folder)
    for site, groups in repaired.subspaces().items():
        for name, subspace in groups.items():
            found = loaded.subspaces()[site][name]
            cosines = torch.linalg.svdvals(found.basis.mT @ subspace.basis)
            torch.testing.assert_close(cosines, torch.ones(subspace.rank), atol=1e-5, rtol=0)
            torch.testing.assert_close(found.mean, subspace.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded.gate.readers, repaired.gate.readers, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    """Fitted without a terminal."""
    out = tmp_path_factory.mktemp("fitted") / "repaired"
    finished = run(*fit_command(files, out))
    assert finished.returncode == 0, finished.stderr
    return out, finished


def test_a_fit_without_a_terminal(files, fitted, expected):
    out, finished = fitted
    assert digest(out) == expected
    text = finished.stdout
    assert text.startswith(f"Fits a repair of {files / 'model'}.\n")
    for fact in (
        "6 decoder layers of width 128",
        "1,456,320 in float32 on cpu",
        "gated: rank 4 at 4.residual; gate at 3.residual",
        "24 prompts from",
        "GiB free",
        "fired, malicious  24 of 24 held-out prompts",
        "24 benign, 24 malicious, 24 refused",
        f"care chat {out}",
        f"care push {out} org/name",
    ):
        assert fact in " ".join(text.split()) or fact in text, fact
    assert "\x1b" not in text + finished.stderr and "\r" not in text + finished.stderr
    assert all(len(line) <= 80 for line in text.splitlines() if "/" not in line)


def test_a_fit_in_a_terminal(files, by_function, tmp_path):
    command = [*CARE, *map(str, fit_command(files, tmp_path / "out", "--seed", "0", "--batch-size", "auto"))]
    code, text = run_in_terminal(command, environment=WITHOUT_NETWORK)
    assert code == 0, text
    assert_equal_up_to_rounding(tmp_path / "out", by_function)
    assert re.search(r"Recording turns: 100%\|.+\| 48/48 \[\d\d:\d\d<00:00, .*prompt/s\]", text), text
    assert re.search(r"^Fitted in \d+ (s|min)", text, re.MULTILINE)


def test_json_is_all_that_a_script_reads(files, expected, tmp_path):
    finished = run(*fit_command(files, tmp_path / "out", "--json", "--quiet"))
    told = json.loads(finished.stdout)
    assert told["out"] == str(tmp_path / "out") and told["digest"] == expected == digest(tmp_path / "out")
    assert told["prompts"]["malicious"] == 24
    assert "Recording" not in finished.stderr and "Fits" not in finished.stderr


def test_quiet_says_nothing(files, fitted):
    out, _ = fitted
    assert invoke(*fit_command(files, out, "--quiet")).output == ""  # of what is collected already


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fit_goes_on(files, expected, tmp_path, number):
    out = tmp_path / "out"
    # So that there is something to interrupt, and it is kept at once.
    code = (
        "import time, torch, care_hf.resume as resume; from care_hf.testbed.world import World\n"
        "from transformers import LlavaModel as M; resume.SAVE_SECONDS = 0; forward = M.forward\n"
        "def slow(*args, **kwargs):\n    time.sleep(0.3); return forward(*args, **kwargs)\n"
        "M.forward = slow\nfrom care_hf_console.app import app; app(prog_name='care')"
    )
    command = [sys.executable, "-c", code, *map(str, fit_command(files, out, "--batch-size", "4"))]
    process = subprocess.Popen(command, env={**os.environ, **WITHOUT_NETWORK}, stderr=subprocess.PIPE, text=True)
    kept = out / KEPT
    deadline = time.monotonic() + 240
    while not kept.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first = kept.stat().st_mtime_ns
    while kept.stat().st_mtime_ns == first and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "Interrupted. What was finished is kept; the same command goes on" in errors
        assert "Traceback" not in errors
    assert not (out / "config.json").exists()
    result = invoke(*fit_command(files, out, "--batch-size", "4"))
    assert result.exit_code == 0 and "what an earlier run collected is taken up" in " ".join(result.output.split())
    same = invoke(*fit_command(files, tmp_path / "whole", "--batch-size", "4"))
    assert same.exit_code == 0 and digest(out) == digest(tmp_path / "whole")


def test_an_update_is_a_fit_from_scratch(files, by_function, tmp_path):
    out = tmp_path / "out"
    assert invoke(*fit_command(files, out, "--json", malicious="first")).exit_code == 0
    updating = ["fit", files / "model", "--malicious", files / "more" / "later.jsonl", "--out", out, "--update"]
    result = invoke(*updating)
    assert result.exit_code == 0, result.output
    assert "as before: rank 4" in result.output and not (out / UPDATING).exists()
    assert_equal_up_to_rounding(out, by_function)
    again = invoke(*updating)
    assert again.exit_code == 2 and "already" in again.output


def test_an_adapter_alone(files, expected, tmp_path):
    result = invoke(*fit_command(files, tmp_path, "--adapter", "--json"))
    assert result.exit_code == 0, result.output
    model, _ = load_testbed(0)
    assert SafetySubspaces.from_model(load_adapter(model, tmp_path)).digest == expected
    assert not (tmp_path / "config.json").exists()


# What somebody may get wrong


PROMPTS = "--benign B --malicious M --out OUT"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fit MODEL --out OUT", "A fit needs --benign and --malicious: prompts to grant and to refuse"),
        ("fit nowhere/at/all --out OUT", "'nowhere/at/all' is no folder, and no id of a model on the Hub"),
        ("fit FILES --out OUT", "holds no config.json, so no model"),
        ("fit MODEL --benign x.jsonl --malicious M --out OUT", "There is no file x.jsonl."),
        ("fit MODEL --out FILES", "is not empty and holds no earlier fit"),
        ("fit MODEL --out B", "is a file; name a folder"),
        ("fit MODEL --out OUT --update", f"holds no {KEPT}, to which prompts could be added"),
        ("fit MODEL --out OUT --recipe gate", "Did you mean 'gated'"),
        ("fit MODEL --out OUT --batch-size many", "--batch-size many must be 'auto' or a whole number"),
        (f"fit REPAIRED {PROMPTS}", "is repaired already"),
        (f"fit MODEL {PROMPTS} --device gpu", "device='gpu' cannot be used here"),
        (f"fit MODEL {PROMPTS} --dtype int4", "dtype='int4' is not known"),
        ("fit MODEL --benign B --malicious B --out OUT", "A prompt is in both"),
        ("fit MODEL --benign M --malicious B --out OUT", "The model refuses 0 of 24 malicious prompts"),
        ("info MODEL", "an ordinary checkpoint of a 'llava', without a repair"),
        ("info OUT", "is neither a file nor a folder"),
        ("merge REPAIRED --out OUT", "cannot be merged"),
        ("merge REPAIRED --out FILES", "give a new folder"),
        ("evaluate MODEL --suite testbed --out OUT", "is not repaired, so there is nothing to compare"),
        ("evaluate REPAIRED --out OUT", "give --suite, what is asked"),
        ("push MODEL org/name", "is no repaired model but a 'llava'"),
        ("push REPAIRED org/name --report OUT", "OUT"),
        ("convert basis", "There is no converter 'basis'; choose one of astra-vectors, bases"),
    ],
)
def test_mistakes_are_told_in_a_sentence(files, fitted, tmp_path, command, message):
    places = {
        "MODEL": files / "model",
        "FILES": files,
        "REPAIRED": fitted[0],
        "OUT": tmp_path / "OUT",
        "B": files / "benign.jsonl",
        "M": files / "more" / "malicious.jsonl",
    }
    arguments = [places.get(word, word) for word in command.split()]
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "OUT" / "config.json").exists()


def test_mistakes_are_json_for_scripts(files):
    result = invoke("info", files / "model", "--json")
    told = json.loads(result.stdout)
    assert told["exit_code"] == result.exit_code == 2 and "without a repair" in told["error"]


def test_a_traceback_for_who_wants_one(files, tmp_path, monkeypatch):
    monkeypatch.setenv("CARE_TRACEBACK", "1")
    result = invoke("info", files / "model")
    assert result.exit_code == 2 and "Traceback (most recent call last)" in result.stderr


def test_a_lack_of_memory_is_told_in_a_sentence(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("Memory does not suffice for one prompt alone.")

    monkeypatch.setattr("care_hf.inspecting.inspect", full)
    result = invoke("info", tmp_path)
    assert result.exit_code == 2 and result.stderr == "Memory does not suffice for one prompt alone.\n"


def test_what_nobody_foresaw_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr("care_hf.inspecting.inspect", lambda *args, **kwargs: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        invoke("info", tmp_path)


def test_options_that_are_unknown_are_usage_errors():
    finished = run("fit", "--reciep", "gated")
    assert finished.returncode == 2 and "No such option: --reciep" in finished.stderr


# Help


def test_help_needs_no_torch():
    code = (
        "import sys; from care_hf_console.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'care_hf', 'datasets'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"
    for command in ("demo", "diagnose", "fit", "tune", "evaluate", "chat", "merge", "push", "convert", "info"):
        assert re.search(rf"^│ {command} ", finished.stdout, re.MULTILINE), command
    assert "Exit codes: 0 done" in finished.stdout


@pytest.mark.parametrize("command", ["demo", "diagnose", "fit", "tune", "evaluate", "chat", "merge", "push", "info"])
def test_every_command_has_a_page_of_help(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0 and "Usage: " in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_shells_complete_commands():
    for words, found in (("care f", "fit"), ("care in", "info")):
        completing = {"_CARE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
        assert run(environment=completing).stdout.split() == [found]


def test_the_module_is_the_command():
    finished = subprocess.run([sys.executable, "-m", "care_hf", "info", "/nowhere"], capture_output=True, text=True)
    assert finished.returncode == 2 and "neither a file nor a folder" in finished.stderr


# The other commands


def test_a_chat_in_a_terminal(fitted, world, tmp_path):
    (attack,) = world.attack("icon", "validation", 1)
    Sample(attack.messages).images[0].save(tmp_path / "attack.png")
    lines = f"/image {tmp_path / 'nothing.png'}\n/image {tmp_path / 'attack.png'}\n{attack.text}\n/new\nhello\n/quit\n"
    command = [*CARE, "chat", str(fitted[0]), "--max-new-tokens", "8"]
    code, text = run_in_terminal(command, stdin=lines, environment=WITHOUT_NETWORK)
    assert code == 0, text
    text = text[text.index("/quit ends") :]
    assert "There is no image" in text and text.count("gate") == text.count("strength") == 2
    assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)


def test_a_chat_without_a_terminal_reads_lines(fitted, world):
    (plain,) = world.plain("validation", 1)
    (benign,) = world.benign("recipe", "validation", 1)
    texts = [sample.text for sample in (plain, benign)]
    arguments = ["chat", str(fitted[0]), "--json", "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, arguments, input="\n".join(texts) + "\n", catch_exceptions=False)
    told = json.loads(result.stdout)["exchanges"]
    assert [exchange["prompt"]["text"] for exchange in told] == texts
    repaired = CareForConditionalGeneration.from_pretrained(fitted[0])
    processor = load_testbed(0)[1]
    for side, switched in (("base", repaired.disable), ("repaired", repaired.enable)):
        with switched():
            (answer,) = generate_answers(repaired, processor, [Sample([chat_message(texts[0])])], 8, 1)
        assert told[0][side]["text"].strip() == answer.strip()
    strengths = told[0]["repaired"]["strengths"]
    assert strengths[-1] is None and all(0 < s < 2 for s in strengths[:5])


def chat_message(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def test_info_in_a_terminal(fitted):
    out, _ = fitted
    code, text = run_in_terminal([*CARE, "info", str(out)], environment=WITHOUT_NETWORK)
    assert code == 0
    text = text[text.index("Checkpoint\n") :]  # after what libraries warn of as they are imported
    assert all(len(line) <= 80 for line in text.splitlines())
    for told in ("Site 4.residual", "rank 4, orthogonal, beta 1", "eigenvalues", "0 required, 1 alarms, 1 more"):
        assert told in " ".join(text.split())


def test_a_merge_is_loaded_by_the_stock_class(files, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        json.dumps(Recipe.load("paper").replace(fusion="constant", rank=2, modalities=("text",)).to_dict())
    )
    assert invoke(*fit_command(files, tmp_path / "out", "--recipe", recipe)).exit_code == 0
    result = invoke("merge", tmp_path / "out", "--out", tmp_path / "merged", "--base", files / "model", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"] < 1e-4
    repaired = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(repaired.vlm)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, repaired(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def test_push_checkpoint_and_adapter(files, fitted, tmp_path):
    (tmp_path / "adapter").mkdir()
    assert invoke(*fit_command(files, tmp_path / "adapter", "--adapter")).exit_code == 0
    with serving() as hub:
        online = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        finished = run("push", fitted[0], "org/whole", "--license", "mit", environment=online)
        assert finished.returncode == 0, finished.stderr
        assert 'AutoModelForImageTextToText.from_pretrained("org/whole")' in finished.stdout
        finished = run("push", tmp_path / "adapter", "org/adapter", "--json", "--private", environment=online)
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout)["whole"] is False
        assert "license: mit" in hub.files["org/whole"]["README.md"].decode()
        assert {"model.safetensors", "config.json", "modeling_care.py", "chat_template.jinja"} <= set(
            hub.files["org/whole"]
        )
        assert (
            hub.files["org/adapter"]["care_adapter.safetensors"]
            == (tmp_path / "adapter" / "care_adapter.safetensors").read_bytes()
        )
        assert hub.repos["org/adapter"].private
        found = run("info", "org/whole", "--json", environment=online)
        assert json.loads(found.stdout)["digest"] == digest(fitted[0])


def test_a_repaired_model_is_measured_with_its_control(fitted, tmp_path):
    result = invoke("evaluate", fitted[0], "--suite", "testbed", "--split", "validation", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())["results"]
    assert list(report) == ["undefended", "repaired", "gate + canned refusal"]
    n = 24 * len(ATTACKS)

    def count(defence, verdict):
        sets = (report[defence]["sets"][f"attack/{family}"]["strict"] for family in ATTACKS)
        return sum(verdicts.get(verdict, 0) for verdicts in sets)

    told = " ".join(result.output.split())
    for defence in report:
        assert f"{defence} {Rate(count(defence, 'complied'), n).percent} % of {n} attacks succeed" in told
    assert count("repaired", "refused") > count("undefended", "refused")


def test_a_small_tuning(tmp_path):
    arguments = ["tune", "--trials", 2, "--n", 2, "--family", "turn", "--max-new-tokens", 8, "--out", tmp_path]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert Recipe.load(tmp_path / "recipe.yaml") and "these prompts chose the recipe" in " ".join(result.output.split())


def test_conversion_by_name(fitted, tmp_path):
    result = invoke("convert", "full-and-adapter", "adapter", fitted[0], "--out", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    model, _ = load_testbed(0)
    assert SafetySubspaces.from_model(load_adapter(model, tmp_path / "adapter")).digest == digest(fitted[0])
    assert "usage: " in run("convert", "bases", "--help").stdout
    assert "original-llava" in invoke("convert", "unknown").stderr


def test_words_for_numbers():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 7500)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
    assert [told_bytes(n) for n in (0, 999, 1000, 2_913_000, 14_200_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "2.91 MB",
        "14.2 GB",
    ]
