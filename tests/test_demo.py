import json

import pytest
from transformers import AutoModel
from typer.testing import CliRunner

from care_hf import CareForConditionalGeneration, demo
from care_hf.cli import app
from care_hf.demo import CANDIDATES, Choice, choose, fit_prompts, measurements
from care_hf.evaluation import Rate
from care_hf.fitting import fit
from care_hf.recipe import RECIPES
from care_hf.testbed.measure import measure
from care_hf.testbed.world import ATTACKS, BENIGN_TASKS

DEFENCES = ["undefended", "CARE as printed", "CARE, best recipe", "random subspace", "mean difference"]


def test_a_small_demo_runs_from_the_console(testbed, monkeypatch, tmp_path):
    model, processor = testbed
    for name, value in {
        "FIT_PROMPTS": 24,
        "VALIDATION_PROMPTS": 4,
        "TEST_PROMPTS": 3,
        "CANDIDATES": CANDIDATES[:2],
    }.items():
        monkeypatch.setattr(demo, name, value)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--seed", "0"], catch_exceptions=False)
    assert result.exit_code == 0
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert list(counts) == DEFENCES
    assert all(sum(row.values()) == 3 for table in counts.values() for row in table.values())
    # The printed method, fitted by itself and measured here, is what the demo saved and measured in another process.
    fitted = fit(model, *fit_prompts(demo.World()), processor, RECIPES["paper"].replace(batch_size=32))
    assert counts["CARE as printed"] == measure(fitted, processor, "test", 3)
    assert counts["undefended"] == measure(model, processor, "test", 3)
    assert type(AutoModel.from_pretrained(tmp_path / "best")) is CareForConditionalGeneration
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


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([(0.5, 0.99), (0.2, 0.98), (0.0, 0.90)], 1),  # the lowest ASR that costs at most two points
        ([(0.5, 0.90), (0.2, 0.97), (0.0, 0.10)], 1),  # all cost more: the mildest
    ],
)
def test_the_choice(candidates, expected):
    choices = [
        Choice(RECIPES["paper"], Rate(round(100 * asr), 100), Rate(round(100 * benign), 100))
        for asr, benign in candidates
    ]
    assert choose(Choice(None, Rate(90, 100), Rate(100, 100)), *choices) is choices[expected]


def test_the_fit_sees_no_prompt_of_another_split(world):
    held_out = {c.word for split in ("validation", "test") for c in world.concepts if c.split == split}
    for prompts in fit_prompts(world):
        texts = {
            part["text"] for p in prompts for m in p["messages"] for part in m["content"] if part["type"] == "text"
        }
        assert not {word for text in texts for word in text.split()} & held_out
