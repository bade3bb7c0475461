"""Prompts and models by name: what the console opens."""

import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import LlavaForConditionalGeneration

from care_hf.opening import open_model
from care_hf.prompt_sources import read_source
from care_hf.samples import load_samples
from care_hf.testbed import DATA, load_testbed
from care_hf.testbed.files import write_files
from care_hf.testbed.prompts import fit_prompts

ROWS = [{"text": f"how are you {i} ?", "kind": "how"} for i in range(7)]


def texts(source):
    return [row["text"] for row in source.prompts]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    table = Dataset.from_list(ROWS)
    {".jsonl": table.to_json, ".json": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[suffix](path)
    source = read_source(str(path))
    assert texts(source) == [row["text"] for row in ROWS]
    assert str(source) == f"7 prompts from {path}"


def test_images_of_a_file_lie_beside_it_or_in_the_working_folder(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    rows = [
        {"text": "a", "image": "red.png"},
        {"text": "b", "image": str(tmp_path / "red.png")},
        {"text": "c", "image": None},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    samples = load_samples(read_source(str(tmp_path / "prompts.jsonl")).prompts)
    assert [sample.images[0].getpixel((0, 0)) if sample.images else None for sample in samples] == [
        (255, 0, 0), (255, 0, 0), None,
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "prompts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert load_samples(read_source("elsewhere/prompts.jsonl").prompts)[0].images  # found from where we are


def test_folders(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert texts(read_source(str(tmp_path / "saved"))) == [row["text"] for row in ROWS]
    (tmp_path / "plain").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "plain" / "train.parquet")
    assert len(read_source(str(tmp_path / "plain")).prompts) == 7
    DatasetDict(a=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match=r"holds the splits \['a'\]; name the folder"):
        read_source(str(tmp_path / "several"))
    assert len(read_source(str(tmp_path / "several" / "a")).prompts) == 7


def test_benchmark_sets_and_their_parts(tmp_path):
    rows = [
        {"prompt": f"{label} {i}", "focus": "", "type": "t", "note": "", "label": label}
        for label in ("safe", "unsafe")
        for i in range(3)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    settings = yaml.safe_load((DATA.parents[2] / "configs" / "datasets" / "xstest.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**settings, "id": str(tmp_path / "rows.jsonl")}))

    def asked(name):
        return [sample.messages[0]["content"][-1]["text"] for sample in load_samples(read_source(name).prompts)]

    assert asked(f"{path}:safe") == ["safe 0", "safe 1", "safe 2"]
    assert sorted(asked(str(path))) == sorted(row["prompt"] for row in rows)
    with pytest.raises(ValueError, match=r"no part 'odd'; it has \['safe', 'unsafe'\]"):
        read_source(f"{path}:odd")


def test_a_limit_spreads_over_the_set(tmp_path):
    Dataset.from_list(ROWS).to_json(tmp_path / "p.jsonl")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("p.jsonl", "saved"):
        assert texts(read_source(str(tmp_path / name), limit=3)) == [ROWS[i]["text"] for i in (0, 2, 4)]
        assert len(read_source(str(tmp_path / name), limit=9).prompts) == 7


def test_a_file_that_is_misspelt(tmp_path):
    (tmp_path / "benign.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*benin.jsonl. Did you mean 'benign.jsonl'\?"):
        read_source(str(tmp_path / "benin.jsonl"))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/there", "nothing", "a/b/c", "o/n:a:b:c"])
def test_names_of_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No prompts are called .*; give a file"):
        read_source(name)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"empty.csv cannot be read as rows of prompts, or has none"):
        read_source(str(tmp_path / "empty.csv"))


def test_the_testbeds_files_are_its_prompts(tmp_path, world):
    counts = write_files(tmp_path, 1, 3, ("icon",))
    for name, prompts in fit_prompts(world, 3, ("icon",)).items():
        read, meant = load_samples(read_source(str(tmp_path / f"{name}.jsonl")).prompts), load_samples(prompts)
        assert (read.digests, read.kinds, read.groups) == (meant.digests, meant.kinds, meant.groups)
        assert counts[name] == len(meant)
    stored = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype="auto")
    bundled, _ = load_testbed(1)
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), bundled.parameters(), strict=True))


# Models


def test_a_model_by_name():
    opened = open_model(str(DATA / "seed0"), "cpu", "bfloat16", repaired=False)
    assert opened.model.dtype == torch.bfloat16 and not opened.model.training
    assert opened.facts["model"].endswith("seed0: LlavaForConditionalGeneration, 6 decoder layers of width 128")
    assert f"{sum(p.numel() for p in opened.model.parameters()):,} in bfloat16 on cpu" == opened.facts["weights"]
    assert "GiB free" in opened.facts["memory"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("no/such/model/here",), FileNotFoundError, "is no folder, and no id"),
        (("../elsewhere",), FileNotFoundError, "is no folder, and no id"),
        ((str(DATA / "seed0"), "gpu"), ValueError, "device='gpu' cannot be used here"),
        ((str(DATA / "seed0"), "meta:x"), ValueError, "device='meta:x' cannot be used here"),
        ((str(DATA / "seed0"), "cpu", "float8"), ValueError, "dtype='float8' is not known"),
        ((str(DATA / "seed0"), "cpu", "auto", True), ValueError, "is no repaired model but a 'llava'"),
    ],
)
def test_models_that_cannot_be_opened(arguments, error, message):
    with pytest.raises(error, match=message):
        open_model(*arguments)


def test_a_folder_that_is_misspelt(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"no folder 'models/lava' here\. Did you mean 'llava'\? As the id of a model"):
        open_model("models/lava")


def test_files_that_are_no_model(tmp_path):
    shutil.copy(DATA / "glyphs.png", tmp_path / "glyphs.png")
    with pytest.raises(FileNotFoundError):
        open_model(str(tmp_path / "glyphs.png"))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, so no model"):
        open_model(str(tmp_path))
