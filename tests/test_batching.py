import copy
import logging
import weakref

import pytest
import scipy.linalg
import torch

import care_hf
from care_hf import memory, resume
from care_hf.batching import first_size, run_batches
from care_hf.fitting import collect, collect_turns
from care_hf.recipe import Recipe
from care_hf.testbed.prompts import fit_prompts
from care_hf.turn_repair import solve_turns

FITS = 2  # how many prompts fit into the memory of `crowded`


@pytest.fixture(scope="module")
def gated_prompts(world):
    many = fit_prompts(world, 16)
    return {name: items if name == "malicious" else items[:: len(items) // 24] for name, items in many.items()}


@pytest.fixture(scope="module")
def paper_prompts(world):
    """Of unequal length, some without an image, no whole number of batches."""
    many = fit_prompts(world, 5, ["typographic", "icon"], exposure=False)
    return {name: items[:29] for name, items in many.items()}


@pytest.fixture(scope="module")
def exact(testbed):
    """The bundled model in float64, where batches differ by less than what collecting in float32 sees."""
    return copy.deepcopy(testbed[0]).double(), testbed[1]


@pytest.fixture
def crowded():
    """Makes a model run out of memory on more than `FITS` prompts; how many each of its forwards had."""
    sizes, handles = [], []

    def make(model):
        def forward(module, args, kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > FITS:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        handles.append(model.model.register_forward_pre_hook(forward, with_kwargs=True))
        return sizes

    yield make
    for handle in handles:
        handle.remove()


def angle(first, second):
    """The largest principal angle between bases of the same places."""
    assert {s: tuple(by) for s, by in first.sites.items()} == {s: tuple(by) for s, by in second.sites.items()}
    pairs = [(by[m].basis, second.sites[s][m].basis) for s, by in first.sites.items() for m in by]
    return max(scipy.linalg.subspace_angles(*(basis.double().numpy() for basis in pair)).max() for pair in pairs)


# Results do not depend on the size of batches


@pytest.mark.parametrize("attribution", ["kernel", "random"])
def test_moments_do_not_depend_on_the_size_of_batches(exact, paper_prompts, crowded, attribution):
    model, processor = exact
    recipe = Recipe.load("paper").replace(rank=4, attribution=attribution)

    def fitted(size):
        return collect(model, processor=processor, recipe=recipe.replace(batch_size=size), **paper_prompts).solve(
            recipe
        )

    single = fitted(1)
    for size in (3, "auto"):
        assert angle(single, fitted(size)) < 1e-6
    sizes = crowded(model)
    assert angle(single, fitted("auto")) < 1e-6
    assert sizes[1:6] == [16, 8, 4, 2, 2] and max(sizes[4:]) == FITS  # the first checks the places


def test_turns_do_not_depend_on_the_size_of_batches(testbed, gated_prompts, crowded, caplog, monkeypatch):
    model, processor = testbed
    recipe = Recipe(steps=4)

    def recorded(size):
        return collect_turns(model, processor=processor, recipe=recipe.replace(batch_size=size), **gated_prompts)

    single = recorded(1)
    solved = solve_turns(single, recipe)
    sizes, tried = crowded(model), []
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for size in (3, "auto"):
        sizes.clear()
        with caplog.at_level(logging.WARNING):
            found = recorded(size)
        assert found.cells == single.cells and torch.equal(found.refused, single.refused)
        torch.testing.assert_close(found.gate, single.gate, rtol=1e-4, atol=1e-4)
        other = solve_turns(found, recipe)
        assert angle(solved, other) < 1e-6
        torch.testing.assert_close(other.gate.thresholds, solved.gate.thresholds, rtol=0, atol=1e-5)
        tried.append(sum(n > FITS for n in sizes))
    # Once where prompts are answered and once where turns are recorded; 16, 8 and 4 of "auto".
    assert tried == [2, 6]
    halved = [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]
    assert halved[0] == "A batch of 3 prompts does not fit into memory; halved to 1." and len(halved) == 2 + 6


def test_auto_begins_with_many_and_more_on_an_accelerator(testbed):
    model, _ = testbed
    assert first_size("auto", model) == 16 and first_size(5, model) == 5

    class OnGpu:
        device = torch.device("cuda")

    assert first_size("auto", OnGpu()) == 128
    assert Recipe(batch_size="auto").batch_size == "auto"
    for size in ("large", 0, -1):
        with pytest.raises(ValueError, match=r"batch_size=.* must be a whole number of at least 1, or 'auto'"):
            Recipe(batch_size=size)
    for size in (2.0, True, None):
        with pytest.raises(TypeError, match=r"batch_size=.* must be a whole number or text"):
            Recipe(batch_size=size)


# Out of memory


def test_a_prompt_that_does_not_fit_alone_is_named_and_what_was_collected_kept(
    testbed, paper_prompts, monkeypatch, tmp_path
):
    model, processor = testbed
    recipe = Recipe.load("paper").replace(rank=4, batch_size=4)
    kept = tmp_path / "collected.safetensors"
    forwards = []

    def forward(module, args, kwargs):
        forwards.append(len(kwargs["input_ids"]))
        if len(forwards) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"one prompt alone, number 8 of `benign`.*2\.00 GiB.*Shorten"):
            care_hf.fit(model, processor=processor, recipe=recipe, resume=kept, **paper_prompts)
    finally:
        handle.remove()
    assert forwards == [1, 4, 4, 4, 2, 1]
    resumed = care_hf.fit(model, processor=processor, recipe=recipe.replace(batch_size=1), resume=kept, **paper_prompts)
    whole = care_hf.fit(model, processor=processor, recipe=recipe, **paper_prompts)
    places = whole.subspaces()
    for site, by_modality in resumed.subspaces().items():
        for modality, subspace in by_modality.items():
            other = places[site][modality].basis.double().numpy()
            assert scipy.linalg.subspace_angles(subspace.basis.double().numpy(), other).max() < 1e-5


def test_other_errors_are_not_taken_for_a_lack_of_memory(testbed):
    model, _ = testbed
    tried = []

    def compute(name, start, stop):
        tried.append(stop - start)
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        run_batches(model, {"a": [range(8)]}, compute, lambda *_: None, size=8, description="", save=None)
    assert tried == [8]


def test_what_a_failed_batch_held_is_freed_before_the_next(testbed, monkeypatch):
    model, _ = testbed
    alive, large = [], weakref.WeakSet()
    monkeypatch.setattr(memory, "clear_device_cache", lambda garbage_collection: alive.append(len(large)))

    class Large:
        pass

    def compute(name, start, stop):
        activations = Large()
        large.add(activations)
        if stop - start > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return start, stop, activations is None

    ranges = []
    todo = {"a": [range(1, 5)], "b": [range(3)]}
    run_batches(model, todo, compute, lambda *found: ranges.append(found), size=8, description="")
    assert alive == [0]
    assert ranges == [("a", (1, 3, False)), ("a", (3, 5, False)), ("b", (0, 2, False)), ("b", (2, 3, False))]


# Keeping


def test_what_was_kept_is_saved_in_time_and_when_anything_is_raised_and_only_then(testbed, monkeypatch):
    model, _ = testbed
    kept, saved = [], []

    def run(stop_at=None, **options):
        def compute(name, start, stop):
            if start == stop_at:
                raise KeyboardInterrupt
            assert not model.training and not torch.is_grad_enabled()
            return start

        kept.clear(), saved.clear()
        run_batches(
            model, {"a": options.pop("todo", [range(6)])}, compute, lambda name, start: kept.append(start), size=2,
            description="", save=lambda: saved.append(len(kept)), **options,
        )  # fmt: skip

    model.train()
    try:
        run()
        assert (kept, saved) == ([0, 2, 4], [3]) and model.training
    finally:
        model.eval()
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=4)
    assert saved == [2]
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=0)
    run(todo=[])
    assert (kept, saved) == ([], [])
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0)
    run()
    assert saved == [1, 2, 3]
