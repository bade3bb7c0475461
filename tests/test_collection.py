"""Files of what was collected: resumed after real interruptions, and updated by further prompts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import care_hf
from care_hf import turns
from care_hf.fitting import collect, collect_turns
from care_hf.recipe import Recipe
from care_hf.samples import load_samples
from care_hf.sites import Site
from care_hf.testbed.prompts import fit_prompts

PAPER = Recipe.load("paper").replace(rank=4, batch_size=4)
GATED = Recipe(steps=4, batch_size=4)


@pytest.fixture(scope="module")
def pair(world):
    """Old and new prompts for the recipe "paper", the old ones in whole batches."""
    attacks = fit_prompts(world, 12, ["typographic", "wrapper"], exposure=False)
    old = {"benign": attacks["benign"][8:32], "malicious": attacks["malicious"][8:20]}
    return old, {"benign": attacks["benign"][36:42], "malicious": attacks["malicious"][20:31]}


@pytest.fixture(scope="module")
def classes(world):
    """Old and new prompts of all classes for a gated recipe; of the malicious ones the first are refused."""
    many = fit_prompts(world, 24, ["typographic"])
    old = {name: items[: 8 * 24 : 2] for name, items in many.items()}
    new = {name: items[1 : 4 * 24 : 8] for name, items in many.items()}
    return {**old, "malicious": many["malicious"][:32]}, {**new, "malicious": many["malicious"][32:]}


@pytest.fixture(scope="module")
def some(classes):
    """Few of them, enough to record."""
    old, new = classes
    old = {name: items[:8] if name != "malicious" else items[:20] for name, items in old.items()}
    return old, {name: items[:6] for name, items in new.items()}


def both(old, new):
    return {name: [*items, *new.get(name, [])] for name, items in old.items()}


def assert_same(first, second):
    assert first.cells == second.cells and first.groups == second.groups
    assert torch.equal(first.refused, second.refused) and torch.equal(first.gate, second.gate)
    for site, tensor in first.repaired.items():
        assert torch.equal(tensor.nan_to_num(), second.repaired[site].nan_to_num())
    assert first.origin == second.origin


def plain_tokens(model, processor, prompts, layer):
    """What a plain forward of each prompt has at an FFN, without control tokens, float64 (n, d)."""
    found = []
    for sample in load_samples(prompts):
        inputs = processor.apply_chat_template(
            sample.messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        caught = []
        handle = model.model.language_model.layers[layer].mlp.register_forward_hook(
            lambda m, a, out, caught=caught: caught.append(out[0])
        )
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        ids = inputs["input_ids"][0]
        skipped = torch.tensor([*processor.tokenizer.all_special_ids, model.config.image_token_id])
        found.append(caught[0][~torch.isin(ids, skipped)].double().numpy())
    return np.concatenate(found)


# Updating moments


@pytest.mark.parametrize("attribution", ["kernel", "random"])
def test_an_updated_collection_is_that_of_all_prompts_from_scratch(testbed, pair, tmp_path, attribution):
    model, processor = testbed
    old, new = pair
    recipe, kept = PAPER.replace(attribution=attribution), tmp_path / "old.safetensors"
    collect(model, processor=processor, recipe=recipe, resume=kept, **old)
    before = kept.read_bytes()
    updated = collect(model, processor=processor, recipe=recipe, update=kept, **new)
    scratch = collect(model, processor=processor, recipe=recipe, **both(old, new))
    # The old prompts are in whole batches, so that not even rounding differs.
    assert updated.solve(recipe).digest == scratch.solve(recipe).digest
    assert (updated.prompts, updated.origin) == (scratch.prompts, scratch.origin) and kept.read_bytes() == before
    uneven = collect(model, processor=processor, recipe=recipe.replace(batch_size=5), update=kept, **new)
    for site, places in uneven.solve(recipe).sites.items():
        for modality, subspace in places.items():
            other = scratch.solve(recipe).sites[site][modality]
            bases = (one.basis.double().numpy() for one in (subspace, other))
            assert scipy.linalg.subspace_angles(*bases).max() < 1e-5


def test_updated_moments_are_what_numpy_computes_from_all_tokens_at_once(testbed, pair, tmp_path):
    model, processor = testbed
    old, new = pair
    recipe = PAPER.replace(layers=(2,), modalities=("text",), attribution="all")
    first, second = tmp_path / "first.safetensors", tmp_path / "new" / "second.safetensors"
    collect(model, processor=processor, recipe=recipe, resume=first, **old)
    collect(model, None, new["malicious"][:5], processor, recipe, update=first, resume=second)
    again = collect(model, None, new["malicious"][5:], processor, recipe, update=second)
    for name, prompts in (("benign", old["benign"]), ("malicious", [*old["malicious"], *new["malicious"]])):
        tokens = plain_tokens(model, processor, prompts, 2)
        moments = again.moments[Site(2, "ffn")]["text"][name]
        assert moments.count == len(tokens)
        np.testing.assert_allclose(moments.mean.numpy(), tokens.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(moments.covariance().numpy(), np.cov(tokens.T, bias=True), rtol=1e-4, atol=1e-7)


# Updating turns


def test_an_updated_fit_is_that_of_all_prompts_from_scratch(testbed, classes, tmp_path):
    model, processor = testbed
    old, new = classes
    kept, updated = tmp_path / "old.safetensors", tmp_path / "updated.safetensors"
    collect_turns(model, processor=processor, recipe=GATED, resume=kept, **old)
    found = care_hf.fit(model, processor=processor, recipe=GATED, update=kept, resume=updated, **new)
    scratch = care_hf.fit(model, processor=processor, recipe=GATED, **both(old, new))
    assert torch.equal(found.gate.thresholds, scratch.gate.thresholds)
    for site, places in scratch.subspaces().items():
        for name, subspace in places.items():
            assert torch.equal(found.subspaces()[site][name].basis, subspace.basis)
            assert torch.equal(found.subspaces()[site][name].mean, subspace.mean)
    told = {name: found.config.origin[name] for name in ("data", "prompts", "calibration", "recipe", "judge")}
    assert told == {name: scratch.config.origin[name] for name in told}
    # Solved anew by another recipe, without any prompt.
    other = GATED.replace(rank=2, false_alarms=0.01)
    anew = care_hf.fit(model, processor=processor, recipe=other, update=updated)
    expected = care_hf.fit(model, processor=processor, recipe=other, **both(old, new))
    assert torch.equal(anew.gate.thresholds, expected.gate.thresholds)
    assert anew.config.origin["data"] == expected.config.origin["data"]


@pytest.fixture
def wordy(monkeypatch):
    """Makes every refusal of a malicious prompt another text, as those of real models are."""
    answer = turns.answer_batch

    def answers(model, processor, samples, *rest):
        found = answer(model, processor, samples, *rest)
        return [f"i cannot {sample.text} ." if text.startswith("i cannot") else text
                for sample, text in zip(samples, found, strict=True)]  # fmt: skip

    monkeypatch.setattr(turns, "answer_batch", answers)


def told(prompts):
    """Samples with the text of their prompts, from which `wordy` makes answers."""
    made = []
    for prompt in prompts:
        sample = load_samples([prompt])[0]
        texts = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        object.__setattr__(sample, "text", " ".join(texts))
        made.append(sample)
    return made


@pytest.mark.usefixtures("wordy")
def test_which_refusals_are_recorded_does_not_change_when_prompts_are_added(testbed, some, classes, tmp_path):
    model, processor = testbed
    old, new = ({name: told(items) for name, items in part.items()} for part in some)
    new["malicious"] = told([*classes[0]["malicious"][20:24], *classes[1]["malicious"][:4]])
    kept = tmp_path / "old.safetensors"
    first = collect_turns(model, processor=processor, recipe=GATED, resume=kept, **old)
    updated = collect_turns(model, processor=processor, recipe=GATED, update=kept, **new)
    scratch = collect_turns(model, processor=processor, recipe=GATED, **both(old, new))
    assert updated.refused.sum() > first.refused.sum() >= turns.MIN_REFUSED
    assert_same(updated, scratch)
    site = Site(4, "residual")
    after = first.repaired[site][first.of("neutral")][:, 1:]
    assert torch.equal(updated.repaired[site][updated.of("neutral")][: len(after), 1:], after)
    # Different prompts have different refusals after them.
    assert len({tuple(row.flatten().tolist()) for row in after}) == len(after)


def test_prompts_known_to_be_refused_come_first_in_an_update_too(testbed, some, classes, tmp_path):
    model, processor = testbed
    old, new = some
    known = classes[0]["malicious"][20:24]
    kept = tmp_path / "old.safetensors"

    def recorded(**options):
        return collect_turns(model, processor=processor, recipe=GATED, **options)

    rest = {name: items for name, items in old.items() if name != "malicious"}
    recorded(malicious=old["malicious"], refused=known[:2], resume=kept, **rest)
    updated = recorded(update=kept, benign=None, malicious=new["malicious"], refused=known[2:])
    scratch = recorded(malicious=[*old["malicious"], *new["malicious"]], refused=known, **rest)
    assert updated.cells == scratch.cells and updated.groups == scratch.groups
    assert torch.equal(updated.refused, scratch.refused) and updated.origin == scratch.origin
    torch.testing.assert_close(updated.gate, scratch.gate, rtol=1e-4, atol=1e-4)
    site = Site(4, "residual")
    torch.testing.assert_close(updated.repaired[site], scratch.repaired[site], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_classes_may_be_added_to_a_fit_without_them(testbed, some, tmp_path):
    model, processor = testbed
    old, _ = some
    kept = tmp_path / "old.safetensors"
    requests = {name: old[name] for name in ("benign", "malicious")}
    with pytest.raises(ValueError, match="give both or neither"):
        collect_turns(model, processor=processor, recipe=GATED, exposed=old["exposed"], **requests)
    collect_turns(model, processor=processor, recipe=GATED, resume=kept, **requests)
    rest = {"benign": None, "malicious": None, "exposed": old["exposed"]}
    with pytest.raises(ValueError, match="give both or neither"):
        collect_turns(model, processor=processor, recipe=GATED, update=kept, **rest)
    updated = collect_turns(model, processor=processor, recipe=GATED, update=kept, neutral=old["neutral"], **rest)
    assert_same(updated, collect_turns(model, processor=processor, recipe=GATED, **old))


# What is refused


def test_what_does_not_fit_an_earlier_fit_is_refused_before_any_forward(testbed, some, tmp_path):
    model, processor = testbed
    old, new = some
    kept, files = tmp_path / "old.safetensors", {name: tmp_path / name for name in ("unfinished", "cut", "strange")}
    collect_turns(model, processor=processor, recipe=GATED, resume=kept, **old)
    content = kept.read_bytes()
    files["cut"].write_bytes(content[: len(content) // 2])
    save_file({"gate": torch.zeros(2)}, files["strange"])
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, processor, old, files["unfinished"])
    handle = model.model.register_forward_pre_hook(lambda *_: pytest.fail("work had begun"))

    def refused(message, error=ValueError, model=model, processor=processor, recipe=GATED, update=kept, **changes):
        with pytest.raises(error, match=message):
            care_hf.fit(model, processor=processor, recipe=recipe, update=update, **{**new, **changes})

    class Other:
        chat_template = "{{ messages }}"

        def __getattr__(self, name):
            return getattr(processor, name)

    again = [*new["malicious"], *old["malicious"][:2]]
    try:
        refused("2 of the 26 prompts given are in .*old.*2 of `malicious` as `malicious`.*only new", malicious=again)
        refused("1 of `neutral` as `benign`", neutral=old["benign"][:1])
        refused("both `exposed` and `neutral`", neutral=new["exposed"])
        refused(r"another collection \(another model\)", model=care_hf.load_testbed(1)[0])
        refused(r"another collection \(another chat template\)", processor=Other())
        refused("steps=4 there, 5 here", recipe=GATED.replace(steps=5))
        refused(r"sites=\['4.residual'\] there, \['5.residual'\] here", recipe=GATED.replace(layers=(5,)))
        refused("gate_site='3.residual' there, '2.residual' here", recipe=GATED.replace(gate_layer=2))
        refused("no use for", recipe=PAPER)
        refused("kind='turns' there, 'moments' here", recipe=PAPER, exposed=None, neutral=None)
        refused("update=.*nowhere.* does not exist", FileNotFoundError, update=tmp_path / "nowhere")
        refused("not finished: it holds 0 of 44 prompts.*Run the fit", update=files["unfinished"])
        refused("no whole safetensors file", update=files["cut"])
        refused("holds no collection", update=files["strange"])
        refused("both .*old.safetensors; name another file", resume=kept)
        refused("is a folder; name a file in it", IsADirectoryError, resume=tmp_path)
        refused("`malicious` is empty", malicious=[])
        first = iter([False])
        refused("earlier was with another judge", judge=lambda answer: next(first, True))
    finally:
        handle.remove()
    assert kept.read_bytes() == content
    with pytest.raises(TypeError, match="`benign` is a NoneType"):
        care_hf.fit(model, malicious=new["malicious"], processor=processor, recipe=GATED)


def interrupted(model, processor, prompts, kept):
    """A fit in which the second batch of prompts is interrupted."""
    calls = []

    def forward(*_):
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(forward)
    try:
        collect_turns(model, processor=processor, recipe=GATED, resume=kept, **prompts)
    finally:
        handle.remove()


def test_an_interrupted_update_goes_on_from_its_own_file(testbed, some, tmp_path):
    model, processor = testbed
    old, new = some
    kept, updated = tmp_path / "old.safetensors", tmp_path / "updated.safetensors"
    collect_turns(model, processor=processor, recipe=GATED, resume=kept, **old)
    calls, options = [], {"processor": processor, "recipe": GATED, "update": kept, "resume": updated}

    def forward(*_):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(forward)
    try:
        stop = None
        whole = collect_turns(model, **{**options, "resume": None}, **new)
        count = len(calls)
        calls.clear()
        stop = count - 2
        with pytest.raises(KeyboardInterrupt):
            collect_turns(model, **options, **new)
        calls.clear()
        assert_same(collect_turns(model, **options, **new), whole)
        assert len(calls) == 3
        calls.clear()
        assert_same(collect_turns(model, **options, **new), whole)
        assert not calls
    finally:
        handle.remove()
    with pytest.raises(ValueError, match=r"other prompts: 14 benign .* there, 13 benign .*here.*`update=`"):
        collect_turns(model, **options, **{**new, "benign": new["benign"][:5]})


# Real interruptions

CHILD = """
import sys, time
import torch
import care_hf
from care_hf import resume
from care_hf.recipe import Recipe
from care_hf.testbed import World
from test_collection import world_prompts

name, kept, stop, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
resume.SAVE_SECONDS = 0
model, processor = care_hf.load_testbed()
calls = []

def forward(*_):
    calls.append(1)
    if len(calls) == stop:
        print("here", flush=True)
        time.sleep(120)

model.model.register_forward_pre_hook(forward)
care_hf.fit(model, processor=processor, recipe=Recipe.load(name), resume=kept, **world_prompts(World(), name))
"""


def world_prompts(world, name):
    """Prompts to fit the recipe of this name on."""
    if name == "paper":
        return {name: items[:40] for name, items in fit_prompts(world, 8, ["typographic"], exposure=False).items()}
    many = fit_prompts(world, 16)
    return {name: items if name == "malicious" else items[:: len(items) // 24] for name, items in many.items()}


@pytest.fixture(scope="module")
def whole_fits(testbed, world, tmp_path_factory):
    """Per recipe what the uninterrupted fit saves, and how many forwards it took."""
    found = {}
    for name in ("paper", "gated"):
        found[name] = saved(*testbed, world_prompts(world, name), name, tmp_path_factory.mktemp(name))
    return found


def saved(model, processor, prompts, name, folder, resume=None):
    calls = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        repaired = care_hf.fit(model, processor=processor, recipe=Recipe.load(name), resume=resume, **prompts)
    finally:
        handle.remove()
    care_hf.save_adapter(repaired, folder)
    # Not the file's bytes: safetensors writes metadata in another order every time.
    with safe_open(folder / "care_adapter.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        return (tensors, file.metadata()), len(calls)


@pytest.mark.parametrize(
    ("name", "stop", "end"),
    [
        ("paper", 6, signal.SIGINT),
        ("paper", 8, signal.SIGKILL),
        ("gated", 12, signal.SIGINT),  # while prompts are answered
        ("gated", 20, signal.SIGKILL),  # while turns are recorded
    ],
)
def test_a_killed_process_loses_one_batch_and_a_rerun_gives_the_same_repair(
    testbed, world, whole_fits, tmp_path, name, stop, end
):
    kept = tmp_path / "collected.safetensors"
    arguments = [name, str(kept), str(stop), str(torch.get_num_threads())]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=child_environment(),
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "here\n", child.stderr.read()
        child.send_signal(end)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == -end and ("KeyboardInterrupt" in errors) == (end == signal.SIGINT)
    again, calls = saved(*testbed, world_prompts(world, name), name, tmp_path / "adapter", kept)
    whole, all_calls = whole_fits[name]
    assert again == whole and all_calls - stop < calls < all_calls


def child_environment():
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
