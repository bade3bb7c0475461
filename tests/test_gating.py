import copy

import numpy as np
import pytest
import torch
from conftest import random_subspace
from hypothesis import given, settings
from hypothesis import strategies as st

from care_hf.gating import Gate, GateReader, TurnProjection, prompt_ends, turn_steps
from care_hf.projection import Subspace

D, T = 24, 3
PLACES = (("last",), ("response",), ("last", "response"))
seeds = st.integers(0, 2**31)


def gate(required=1, alarms=2, seed=0, prompt_end=(7,)):
    generator = torch.Generator().manual_seed(seed)
    columns = required + alarms
    return Gate(
        prompt_end, torch.randn(D, columns, generator=generator), torch.randn(columns, generator=generator), required
    )


def turn_subspaces(seed, places=PLACES[2], rank=3, oblique=(), beta=0.75):
    """Random subspaces of the places, that of the response with an anchor per step."""
    found = {}
    for name in places:
        one = random_subspace(seed + len(found), D, rank, name in oblique, beta)
        anchors = torch.randn(T, D, generator=torch.Generator().manual_seed(seed + 7))
        found[name] = Subspace(one.basis, anchors if name == "response" else one.mean, beta, one.reader)
    return found


# Gate and GateReader


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_the_gate_fires_where_a_loop_over_its_detectors_does(seed, required, alarms, own_of_images):
    random = gate(required, alarms + own_of_images, seed)
    given = Gate(random.prompt_end, random.readers, random.thresholds, required, own_of_images)
    assert (given.required, given.alarms, given.pictured) == (required, alarms, own_of_images)
    reader = GateReader.from_gate(given)
    generator = torch.Generator().manual_seed(seed + 1)
    h, pictured = torch.randn(2, 5, D, generator=generator), torch.rand(2, 5, generator=generator) < 0.5
    fires = reader(h, pictured)
    assert fires.shape == pictured.shape and fires.dtype == torch.bool
    weights, limits = given.readers.double().numpy(), given.thresholds.double().numpy()
    for index in np.ndindex(2, 5):
        margins = [float(h[index].double().numpy() @ weights[:, i] - limits[i]) for i in range(len(limits))]
        np.testing.assert_allclose(reader.margins(h[index]), margins, atol=1e-4)
        if any(abs(margin) < 1e-4 for margin in margins):
            continue
        agreed = all(margin > 0 for margin in margins[:required])
        shared, own = margins[required : required + alarms], margins[required + alarms :]
        asked = own if own_of_images and pictured[index] else shared
        loud = any(margin > 0 for margin in asked) or not (alarms or own_of_images)
        assert bool(fires[index]) == (agreed and loud)


def test_a_score_at_its_threshold_does_not_fire():
    reader = GateReader.from_gate(Gate((1,), torch.eye(D)[:, :1], torch.tensor([0.5])))
    h = torch.zeros(2, D)
    h[:, 0] = torch.tensor([0.5, 0.5000001])
    assert reader(h, torch.zeros(2, dtype=torch.bool)).tolist() == [False, True]


def test_a_score_that_is_no_number_does_not_fire():
    reader = GateReader.from_gate(gate(1, 1))
    assert not reader(torch.full((1, D), torch.nan), torch.zeros(1, dtype=torch.bool)).any()


def test_without_detectors_it_fires_everywhere():
    plain = gate(1, 2).ungated()
    assert (plain.required, plain.alarms, plain.prompt_end) == (0, 0, (7,))
    assert GateReader.from_gate(plain)(torch.randn(3, D), torch.zeros(3, dtype=torch.bool)).all()


def test_half_precision_activations_are_scored_in_single():
    given, h = gate(1, 2), torch.randn(50, D).bfloat16()
    reader = GateReader.from_gate(given).bfloat16()
    assert {b.dtype for b in reader.buffers()} == {torch.float32}
    torch.testing.assert_close(reader.margins(h), h.float() @ given.readers - given.thresholds)


@pytest.mark.parametrize("name", ["readers", "thresholds"])
def test_a_reader_is_empty_until_loaded_and_broken_ones_are_found(name):
    with pytest.raises(ValueError, match="not finite"):
        GateReader(D, 1, 1, 1).check()
    reader = GateReader.from_gate(gate())
    reader.check()
    getattr(reader, name).view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        reader.check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((7,), torch.zeros(D, 2), torch.zeros(2), 1, 2), "n of at least both"),
        (((7,), torch.zeros(D, 2), torch.zeros(2), 1, -1), "pictured=-1"),
        (((7,), torch.zeros(D, 1), torch.zeros(1), 2), "required=2"),
        (((7,), torch.zeros(D, 1), torch.zeros(1), -1), "required=-1"),
        (((7,), torch.zeros(D, 2), torch.zeros(3)), r"thresholds \(3,\)"),
        (((7,), torch.zeros(D), torch.zeros(1)), rf"readers \({D},\)"),
        (((), torch.zeros(D, 1), torch.zeros(1)), "at least one"),
        (((7, -1), torch.zeros(D, 1), torch.zeros(1)), "must be token ids"),
        (((7,), torch.full((D, 1), torch.nan), torch.zeros(1)), "not finite"),
        (((7,), torch.zeros(D, 1), torch.tensor([torch.inf])), "not finite"),
    ],
)
def test_impossible_gates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gate(*arguments)


# Where prompts end, and what follows


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_prompts_end_where_a_loop_finds_their_last_ids(rows, end):
    found = prompt_ends(torch.tensor(rows), end)
    assert found.dtype == torch.bool
    assert found.tolist() == [
        [column + 1 >= len(end) and row[column + 1 - len(end) : column + 1] == end for column in range(6)]
        for row in rows
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=7, max_size=7), min_size=1, max_size=3))
def test_steps_are_counted_from_the_latest_prompt_and_its_decision_is_held(rows):
    pairs = torch.tensor(rows)
    steps, held = turn_steps(pairs[..., 0], pairs[..., 1])
    for row, counted, decided in zip(rows, steps.tolist(), held.tolist(), strict=True):
        step, fired = -1, False
        for column, (last, fires) in enumerate(row):
            if last:
                step, fired = 0, fires
            elif step >= 0:
                step += 1
            assert (counted[column], decided[column]) == (step, fired)


# TurnProjection


def dense(h, step, subspaces, strength):
    """The repair of one token in float64, with a d x d matrix."""
    name = "last" if step == 0 else "response"
    if name not in subspaces or not 0 <= step <= T:
        return h.double()
    subspace = subspaces[name]
    basis = subspace.basis.double()
    reader = basis if subspace.reader is None else subspace.reader.double()
    anchor = subspace.mean.double() if step == 0 else subspace.mean[step - 1].double()
    unsafe = basis @ reader.mT
    repaired = (torch.eye(D, dtype=torch.float64) - unsafe) @ h.double() + subspace.beta * unsafe @ anchor
    return h.double() + strength * (repaired - h.double())


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(PLACES), st.sampled_from([0.25, 1.0, 2.0]), st.sets(st.sampled_from(PLACES[2])))
def test_each_token_is_projected_as_dense_matrices_do(seed, places, strength, oblique):
    subspaces = turn_subspaces(seed, places, oblique=oblique)
    module = TurnProjection.from_subspaces(subspaces, strength)
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 6, D, generator=generator)
    steps = torch.randint(-1, T + 3, (2, 6), generator=generator)
    repaired = module(h, steps)
    for index in np.ndindex(2, 6):
        step = int(steps[index])
        expected = dense(h[index], step, subspaces, strength)
        torch.testing.assert_close(repaired[index].double(), expected, rtol=1e-4, atol=1e-4)
        if step not in ({0} if "last" in places else set()) | (set(range(1, T + 1)) if "response" in places else set()):
            assert torch.equal(repaired[index], h[index])


@settings(max_examples=30, deadline=None)
@given(seeds, st.booleans())
def test_what_is_read_is_that_of_the_anchor_and_the_complement_stays(seed, oblique):
    subspaces = turn_subspaces(seed, oblique=PLACES[2] if oblique else (), beta=1.0)
    module = TurnProjection.from_subspaces(subspaces)
    h = torch.randn(1 + T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    once = module(h, torch.arange(1 + T))
    for step in range(1 + T):
        subspace = subspaces["last" if step == 0 else "response"]
        basis = subspace.basis.double()
        reader = basis if subspace.reader is None else subspace.reader.double()
        anchor = subspace.mean.double() if step == 0 else subspace.mean[step - 1].double()
        torch.testing.assert_close(reader.mT @ once[step], reader.mT @ anchor, rtol=1e-4, atol=1e-4)
        change = once[step] - h[step]
        torch.testing.assert_close(basis @ (basis.mT @ change), change, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(once, torch.arange(1 + T)), once, rtol=1e-4, atol=1e-4)


ODD = [torch.nan, torch.inf, -torch.inf, -0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ODD)
def test_tokens_outside_the_steps_keep_every_bit(dtype, value):
    module = TurnProjection.from_subspaces(turn_subspaces(0))
    h = torch.randn(1, 8, D).to(dtype)
    h[:, ::2] = value
    steps = torch.tensor([[-1, 0, T + 1, 1, -1, 2, T + 9, T]])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()]
    repaired = module(h, steps)
    assert repaired.dtype == dtype
    assert torch.equal(repaired[:, ::2].view(integers), h[:, ::2].view(integers))
    assert torch.isfinite(repaired[:, 1::2]).all() and not (repaired[:, 1::2] == h[:, 1::2]).all(dim=-1).any()
    module.strength.fill_(0)
    everywhere = torch.arange(8)[None].clamp(max=T)
    assert torch.equal(module(h, everywhere).view(integers), h.view(integers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    module = TurnProjection.from_subspaces(turn_subspaces(3)).to(dtype)
    assert {b.dtype for b in module.buffers()} == {torch.float32}
    h, steps = torch.randn(2, 4, D).to(dtype), torch.arange(4).expand(2, 4)
    assert torch.equal(module(h, steps), module(h.float(), steps).to(dtype))


def test_gradients_flow_through_repaired_and_kept_tokens():
    module = TurnProjection.from_subspaces(turn_subspaces(4))
    h = torch.randn(1, 4, D, requires_grad=True)
    module(h, torch.tensor([[-1, 0, 1, T + 1]])).sum().backward()
    assert torch.equal(h.grad[0, 0], torch.ones(D)) and torch.equal(h.grad[0, 3], torch.ones(D))
    basis = turn_subspaces(4)["last"].basis
    torch.testing.assert_close(h.grad[0, 1], torch.ones(D) - basis @ (basis.mT @ torch.ones(D)))


@pytest.mark.parametrize("places", PLACES)
def test_the_buffers_give_the_subspaces_back(places):
    subspaces = turn_subspaces(5, places, oblique=("last",) if "last" in places else ())
    module = copy.deepcopy(TurnProjection.from_subspaces(subspaces, 0.5))
    module.check()
    assert list(module.subspaces()) == list(places) and float(module.strength) == 0.5
    for name, other in module.subspaces().items():
        assert torch.equal(other.basis, subspaces[name].basis) and torch.equal(other.mean, subspaces[name].mean)
        assert other.beta == subspaces[name].beta and (other.reader is None) == (subspaces[name].reader is None)
        assert other.steps == (T if name == "response" else 0)


def test_it_is_empty_until_loaded_and_broken_buffers_are_found():
    with pytest.raises(ValueError, match="not finite"):
        TurnProjection(D, {"last": 2, "response": 2}, T).check()
    for name in dict(TurnProjection.from_subspaces(turn_subspaces(6, oblique=("last",))).named_buffers()):
        module = TurnProjection.from_subspaces(turn_subspaces(6, oblique=("last",)))
        module.get_buffer(name).view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            module.check()
    module = TurnProjection.from_subspaces(turn_subspaces(6))
    module.response.basis.mul_(1.01)
    with pytest.raises(ValueError, match="identity"):
        module.check()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TurnProjection(D, {}), "expected one or both"),
        (lambda: TurnProjection(D, {"text": 2}), r"\['text'\]"),
        (lambda: TurnProjection(D, {"last": 2, "visual": 2}), r"\['last', 'visual'\]"),
        (lambda: TurnProjection(D, {"response": 2}), "steps=0 must be positive"),
        (lambda: TurnProjection(D, {"last": 2}, 3), "steps=3 must be positive"),
        (lambda: TurnProjection.from_subspaces({"response": random_subspace(0, D)}), "steps=0 must be positive"),
        (lambda: TurnProjection.from_subspaces({}), r"share one hidden size; got \[\]"),
        (
            lambda: TurnProjection.from_subspaces(
                {"last": random_subspace(0, D + 1), "response": turn_subspaces(0)["response"]}
            ),
            rf"\[{D}, {D + 1}\]",
        ),
    ],
)
def test_impossible_turns_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
