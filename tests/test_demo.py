import json

from transformers import AutoModel
from typer.testing import CliRunner

from care_hf import CareForConditionalGeneration, demo
from care_hf.demo import measurements
from care_hf.fitting import fit
from care_hf.rates import Rate
from care_hf.recipe import RECIPES
from care_hf.testbed.measure import measure
from care_hf.testbed.prompts import fit_prompts
from care_hf.testbed.world import ATTACKS, BENIGN_TASKS
from care_hf_console.app import app

DEFENCES = ["undefended", "gated repair", "gate + random subspace", "gate + mean difference", "CARE as printed"]


def test_a_small_demo_runs_from_the_console(testbed, monkeypatch, tmp_path):
    model, processor = testbed
    monkeypatch.setattr(demo, "FIT_PROMPTS", 24)
    monkeypatch.setattr(demo, "TEST_PROMPTS", 3)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--seed", "0"], catch_exceptions=False)
    assert result.exit_code == 0
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert list(counts) == DEFENCES
    assert all(sum(row.values()) == 3 for table in counts.values() for row in table.values())
    # The repair, fitted by itself and measured here, is what the demo saved and measured in another process.
    recipe = RECIPES["gated"].replace(batch_size=32)
    fitted = fit(model, processor=processor, recipe=recipe, **fit_prompts(demo.World(), 24))
    assert counts["gated repair"] == measure(fitted, processor, "test", 3)
    assert counts["undefended"] == measure(model, processor, "test", 3)
    assert type(AutoModel.from_pretrained(tmp_path / "gated")) is CareForConditionalGeneration
    table = (tmp_path / "table.md").read_text()
    for defence, row in counts.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {defence} |"))
        assert line.count("n=") == len(measurements(row))
    for row in measurements(counts["undefended"]):
        assert row in result.output


def test_measurements_count_what_they_name():
    row = {"correct": 1, "refused": 2, "wrong": 3}
    counts = (
        {f"attack/{family}": row for family in ATTACKS}
        | {f"benign/{task}": row for task in BENIGN_TASKS}
        | {"plain": row}
    )
    counts["attack/wrapper+image"] = {"correct": 6, "refused": 0, "wrong": 0}
    table = measurements(counts)
    assert (table["ASR wrapper"], table["ASR wrapper+image"]) == (Rate(1, 6), Rate(6, 6))
    assert table["ASR, all"] == Rate(len(ATTACKS) - 1 + 6, 6 * len(ATTACKS))
    assert table["attacks refused"] == Rate(2 * (len(ATTACKS) - 1), 6 * len(ATTACKS))
    assert table["attacks, wrong"] == Rate(3 * (len(ATTACKS) - 1), 6 * len(ATTACKS))
    assert table["plain refused"] == Rate(2, 6)
    assert table["over-refusal"] == Rate(2 * len(BENIGN_TASKS), 6 * len(BENIGN_TASKS))


def test_the_fit_sees_no_prompt_of_another_split(world):
    held_out = {c.word for split in ("validation", "test") for c in world.concepts if c.split == split}
    for prompts in fit_prompts(world, 24, ATTACKS).values():
        texts = {
            part["text"] for p in prompts for m in p["messages"] for part in m["content"] if part["type"] == "text"
        }
        assert not {word for text in texts for word in text.split()} & held_out
