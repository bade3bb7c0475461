"""The model card, reproduce.json, and what becomes of a README that is there already."""

import copy
import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub import TOKEN, serving
from huggingface_hub import ModelCard, constants
from test_hostile_files import Killed, build_versions, interrupted_at

import care_hf
from care_hf import CareForConditionalGeneration, SafetySubspaces, model_card
from care_hf.card_results import chosen_defence, eval_results, read_report
from care_hf.model_card import Card
from care_hf.provenance import data_digest
from care_hf.report import Report
from care_hf.resume import model_fingerprint
from care_hf.samples import load_samples
from care_hf.testbed.prompts import fit_prompts

THEIRS = b"---\nlicense: mit\n---\r\n# Mine, with no newline at the end  \xe2\x82\xac"


@pytest.fixture
def repaired(llava):
    return CareForConditionalGeneration.from_base(llava, SafetySubspaces.random(llava, layers=[2], rank=4))


@pytest.fixture
def hub(monkeypatch):
    with serving() as server:
        for name, value in (("ENDPOINT", server.url), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def sets(*counts):
    """Attacks, harmful, benign: verdicts in this order."""
    names = ("attack/icon", "harmful", "benign/name")
    said = [["complied"] * a + ["refused"] * b + ["other"] * c for a, b, c in counts]
    return {n: {"answers": ["secret"] * len(v), "verdicts": {"words": v}} for n, v in zip(names, said, strict=True)}


def report(*more, gradient=False):
    row = {"family": "icon", "eps": 16, "steps": 40, "optimiser": "pgd", "weight": 0.0}
    rows = [{**row, "verdicts": {"words": ["complied"] * 3 + ["refused"]}}] if gradient else []

    def found(name, *counts):
        own = [{**one, "through": name} for one in rows]
        return {"sets": sets(*counts), "divergence": 0.0, "latency": None, "gradient": own}

    results = {
        "undefended": found("undefended", (9, 1, 0), (0, 10, 0), (10, 0, 0)),
        "repaired": found("repaired", (3, 6, 1), (0, 10, 0), (9, 1, 0)),
        **{name: found(name, (8, 1, 1), (0, 10, 0), (10, 0, 0)) for name in more},
    }
    budget = {"cases": 10, "max_new_tokens": 8, "eps": [16], "steps": 40, "restarts": 1, "optimisers": ["pgd"]}
    budget |= {"weights": [0.0], "gradient_cases": 4}
    settings = {"suite": "mine", "source": {"split": "test"}, "seed": 5, "judges": {"words": {}}, "budget": budget}
    return Report(results, {**settings, "defences": {}, "environment": {"python": "3"}})


# What a card says


def test_a_card_holds_what_was_measured_and_reads_back(repaired, tmp_path):
    measured = report("random subspace", gradient=True)
    repaired.card = Card(measured, base_model="org/base", license="mit", datasets=["org/prompts"], command="make it")
    repaired.save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.license == "mit" and card.data.datasets == ["org/prompts"] and "care_hf" in card.data.tags
    expected = eval_results(measured, "repaired", "image-text-to-text")
    assert card.data.eval_results == expected and card.data.model_name == "mine"
    attack, harmful, right, refused = expected
    assert (attack.metric_type, attack.metric_value) == ("attack_success_rate", 0.3)
    low, high = measured.rate("repaired", "attack/icon", "complied").interval
    told = {"count": 3, "n": 10, "interval_95": [round(low, 4), round(high, 4)], "undefended": 0.9}
    assert attack.metric_args == told
    assert [one.metric_value for one in (harmful, right, refused)] == [1.0, 0.9, 0.1]
    for text in (
        "| attack/icon: attack success (lower is better) | 10 | 90 (59-99) | 30 (10-61) |",
        "| random subspace | 80 |",
        "| 2.ffn | image tokens, text tokens | 4, 4 |",
        "75 (30-96) % of 4 prompts",
        "make it",
        "random, seed 0",
        'from_pretrained("mine", trust_remote_code=True)',
    ):
        assert text in card.text, text
    assert "No control" not in card.text and "No gradient" not in card.text and "not found" not in card.text
    files = [path for path in (tmp_path / "mine").iterdir() if path.suffix in (".md", ".json")]
    assert not any(b"secret" in path.read_bytes() for path in files)


def test_a_card_claims_nothing_that_was_not_measured(repaired, tmp_path):
    repaired.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and card.data.base_model is None and card.data.get("model_name") is None
    assert "Nothing was measured" in card.text and "license of the base was not found" in card.text
    care_hf.write_card(tmp_path, Card(report()))
    card = ModelCard.load(tmp_path / "README.md")
    assert "No control was measured" in card.text and "No gradient attack through the repair" in card.text
    assert len(card.data.eval_results) == 4


def test_reports_are_read_from_files_and_values(tmp_path):
    made = report(gradient=True)
    made.save(tmp_path)
    for given in (tmp_path, str(tmp_path / "report.json"), made.to_dict()):
        read = read_report(given)
        assert eval_results(read, "repaired", "t") == eval_results(made, "repaired", "t")
        assert read.markdown() == made.markdown()
    for broken in (tmp_path / "absent", {"results": {"a": {}}, "settings": {}}, {}):
        with pytest.raises(ValueError, match="no report"):
            read_report(broken)
    assert chosen_defence(report("other")) == "repaired" and chosen_defence(report("other"), "other") == "other"
    with pytest.raises(ValueError, match="must name the model's row"):
        Card(made, defence="undefended")


def test_figures_lie_beside_the_card_and_missing_ones_are_named(repaired, tmp_path):
    report(gradient=True).save(tmp_path / "evaluation")
    (tmp_path / "report.png").write_bytes(b"mine")
    repaired.card = Card(tmp_path / "evaluation", figures=[tmp_path / "report.png"])
    repaired.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    for name in ("report.png", "1_report.png"):
        assert f"](figures/{name})" in text and (tmp_path / "model" / "figures" / name).is_file()
    with pytest.raises(FileNotFoundError, match="absent"):
        Card(figures=[tmp_path / "absent.png"])


# reproduce.json


def test_a_fit_says_how_to_do_it_again(testbed, world, tmp_path):
    model, processor = testbed
    prompts = fit_prompts(world, 24)
    made = care_hf.fit(model, **prompts, processor=processor)
    made.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "reproduce.json").read_text())
    assert care_hf.Recipe(**told["recipe"]) == care_hf.Recipe() and told["seeds"] == {"fit": 0}
    assert told["prompts"] == {name: len(items) for name, items in prompts.items()}
    data = {name: data_digest(load_samples(items, name)) for name, items in prompts.items()}
    assert told["hashes"]["data"] == data
    loaded = CareForConditionalGeneration.from_pretrained(tmp_path)
    assert told["hashes"]["base"] == told["hashes"]["saved base"] == model_fingerprint(model)
    assert model_fingerprint(loaded.vlm) == told["hashes"]["base"]
    assert told["hashes"]["repair"] == SafetySubspaces.from_model(loaded).digest
    for versions in told["environment"].values():
        assert {"python", "care_hf", "torch", "transformers"} <= set(versions)
    assert told["base"] == {"name": None, "revision": None} and told["origin"]["judge"].endswith("is_refusal")
    assert "exposed=exposed, neutral=neutral" in told["command"]
    text = (tmp_path / "README.md").read_text()
    assert told["command"] in text and all(one[:12] in text for one in data.values())
    # Saved again, by whoever loaded it, it says the same.
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "reproduce.json").read_text())
    assert again["hashes"] == told["hashes"] and again["command"] == told["command"]
    other = copy.deepcopy(made).half()
    other.save_pretrained(tmp_path / "half")
    hashes = json.loads((tmp_path / "half" / "reproduce.json").read_text())["hashes"]
    assert hashes["base"] == told["hashes"]["base"] != hashes["saved base"]


def test_a_digest_of_data_tells_kinds_and_order_apart():
    first, second = {"text": "a", "kind": "x"}, {"text": "b", "kind": "x"}
    digests = {
        data_digest(load_samples(items, "benign"))
        for items in ([first, second], [second, first], [first, {**second, "kind": "y"}], [first])
    }
    assert len(digests) == 4


# What is there already


def test_a_readme_of_somebody_else_stays_byte_for_byte(repaired, tmp_path):
    (tmp_path / "README.md").write_bytes(THEIRS)
    repaired.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == THEIRS
    assert (tmp_path / "reproduce.json").is_file()


def test_an_own_card_is_replaced_until_it_is_edited(repaired, tmp_path):
    repaired.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    repaired.card = Card(license="mit")
    repaired.save_pretrained(tmp_path)
    assert "license: mit" in readme.read_text()
    edited = readme.read_bytes().replace(b"## Results", b"## My results")
    readme.write_bytes(edited)
    repaired.save_pretrained(tmp_path)
    assert readme.read_bytes() == edited


@pytest.mark.parametrize("place", ["reproduction", "_described"])
def test_a_card_that_fails_does_not_lose_the_model(repaired, tmp_path, monkeypatch, caplog, place):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(model_card, place, fail)
    with caplog.at_level(logging.WARNING), _propagating():
        repaired.save_pretrained(tmp_path)
    assert "without a new model card: RuntimeError: no ink" in caplog.text
    assert not (tmp_path / "README.md").exists()
    CareForConditionalGeneration.from_pretrained(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("place", ["reproduction", "_license", "_described", "replace_file"])
def test_a_card_that_is_killed_leaves_the_old_checkpoint_with_its_card(repaired, tmp_path, monkeypatch, place):
    def kill(*_):
        raise Killed

    repaired.save_pretrained(tmp_path / "c")
    before = contents(tmp_path / "c")
    repaired.strength, repaired.card = 0.5, Card(intended_use="None.")
    monkeypatch.setattr(model_card, place, kill)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(Killed):
        repaired.save_pretrained(tmp_path / "c")
    assert contents(tmp_path / "c") == before and "README.md" in before


@pytest.mark.parametrize("subfolder", [False, True])
def test_a_killed_save_leaves_no_old_card_beside_a_new_checkpoint(tmp_path, subfolder):
    """Killed at each of the calls that change the disk."""
    versions = build_versions()
    for number, model in enumerate(versions):
        model.card = Card(intended_use=f"Use {number}.")
        model.save_pretrained(tmp_path / f"saved{number}")
    repairs = [json.loads((tmp_path / f"saved{n}" / "config.json").read_text())["repair_digest"] for n in (0, 1)]
    found, step, killed = [], 1, True
    while killed:
        folder = Path(shutil.copytree(tmp_path / "saved0", tmp_path / str(step)))
        if subfolder:  # files are replaced one by one
            (folder / "notes").mkdir()
        with pytest.MonkeyPatch.context() as patched:
            interrupted_at(patched, step, Killed())
            try:
                versions[1].save_pretrained(folder)
                killed = False
            except Killed:
                pass
        if (folder / "config.json").exists():  # else it does not load
            found.append(repairs.index(json.loads((folder / "config.json").read_text())["repair_digest"]))
            repair = json.loads((folder / "reproduce.json").read_text())["hashes"]["repair"]
            assert repair == SafetySubspaces.from_model(versions[found[-1]]).digest
            assert f"Use {found[-1]}." in (folder / "README.md").read_text()
        step += 1
    assert found == sorted(found) and set(found) == {0, 1}


class _propagating:
    """transformers' loggers keep to themselves."""

    logger = logging.getLogger("care_hf")

    def __enter__(self):
        self.before, self.logger.propagate = self.logger.propagate, True
        logging.getLogger("transformers").propagate = True

    def __exit__(self, *_):
        self.logger.propagate = self.before
        logging.getLogger("transformers").propagate = False


# On the way to the Hub


def test_a_push_carries_the_card_which_the_hub_finds_valid(hub, repaired):
    repaired.card = Card(report(), base_model="org/base")
    huggingface_hub.HfApi(token=TOKEN).create_repo("org/base")
    hub.repos["org/base"].commit("main", {"README.md": b"---\nlicense: llama2\nlicense_name: x\n---\n# Base\n"})
    repaired.push_to_hub("org/care", token=TOKEN, tags="mine")
    readme = hub.files["org/care"]["README.md"]
    card = ModelCard(readme.decode())
    card.validate()
    assert "POST /api/validate-yaml" in hub.requests
    assert (card.data.license, card.data.license_name) == ("llama2", "x") and "mine" in card.data.tags
    assert card.data.model_name == "care" and 'from_pretrained("org/care"' in card.text
    assert {"reproduce.json", "report.json", "report.md"} <= set(hub.files["org/care"])
    repaired.card = None
    repaired.push_to_hub("org/care", token=TOKEN)
    assert b"Nothing was measured" in hub.files["org/care"]["README.md"]


def test_a_push_leaves_the_readme_that_is_there(hub, repaired):
    huggingface_hub.HfApi(token=TOKEN).create_repo("org/care")
    old = "model-00001-of-00009.safetensors"
    hub.repos["org/care"].commit("main", {"README.md": THEIRS, old: b"old", "a.txt": b""})
    repaired.push_to_hub("org/care", token=TOKEN, commit_message="new")
    files = hub.files["org/care"]
    assert files["README.md"] == THEIRS and "reproduce.json" in files
    assert {"a.txt", "model.safetensors"} <= set(files) and old not in files


@pytest.mark.parametrize("place", ["reproduction", "TEMPLATE"])
def test_a_failing_card_does_not_stop_the_push(hub, repaired, monkeypatch, caplog, place):
    monkeypatch.setattr(model_card, place, None)
    with caplog.at_level(logging.WARNING), _propagating():
        repaired.push_to_hub("org/care", token=TOKEN)
    assert "without a new model card" in caplog.text
    assert "model.safetensors" in hub.files["org/care"] and "README.md" not in hub.files["org/care"]


def test_a_card_that_the_hub_refuses_does_not_stop_the_push(hub, repaired, caplog):
    repaired.card = Card(license="No Such License")
    with caplog.at_level(logging.WARNING), _propagating():
        repaired.push_to_hub("org/care", token=TOKEN)
    assert "license must be an id" in caplog.text
    assert "model.safetensors" in hub.files["org/care"] and "README.md" not in hub.files["org/care"]


def test_saving_with_a_push_uploads_the_model_and_nothing_else_of_the_folder(hub, repaired, tmp_path):
    (tmp_path / "care").mkdir()
    (tmp_path / "care" / "notes.txt").write_text("private")
    repaired.save_pretrained(tmp_path / "care", push_to_hub=True, token=TOKEN, private=True)
    repo = hub.repos["tester/care"]
    assert repo.private and "notes.txt" not in repo.files
    assert {"README.md", "model.safetensors", "modeling_care.py"} <= set(repo.files)
    assert (tmp_path / "care" / "model.safetensors").is_file()
