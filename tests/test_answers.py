from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_hf.answers import gate_fires, generate_answers, next_token_log_probabilities
from care_hf.gating import Gate
from care_hf.judges import REFUSALS, is_refusal
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.rates import Rate
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site, record
from care_hf.subspace import SafetySubspaces


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_the_closed_form(counts):
    count, n = counts
    z, p = 1.959963984540054, count / n
    centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = Rate(count, n).interval
    assert abs(low - max(0, (centre - spread) / (1 + z * z / n))) < 1e-9
    assert abs(high - min(1, (centre + spread) / (1 + z * z / n))) < 1e-9


def test_rates_pool():
    assert Rate(1, 4) + Rate(2, 6) == Rate(3, 10)


def test_batched_answers_are_the_single_answers(testbed, world):
    model, processor = testbed
    samples = [world.attack("icon", "test", 3)[2], world.plain("test", 2)[1], *world.benign("count", "test", 3)]
    batched = generate_answers(model, processor, samples, 12)
    assert batched == [generate_answers(model, processor, [s], 12)[0] for s in samples]


def test_batches_that_do_not_fit_are_halved(testbed, world):
    model, processor = testbed
    samples = [*world.plain("test", 4), *world.benign("count", "test", 3)]
    expected = [read(model, processor, samples) for read in ANSWERING]
    sizes = []

    def full(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        found = [read(model, processor, samples) for read in ANSWERING]
    finally:
        handle.remove()
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
    # Each prompt once, after what did not fit.
    assert sizes[:2] == [7, 3] and [size for size in sizes if size <= 2][-7:] == [1] * 7


ANSWERING = [
    lambda model, processor, samples: generate_answers(model, processor, samples, 4),
    next_token_log_probabilities,
]


@pytest.mark.parametrize("beginning", REFUSALS)
def test_a_refusal_is_one_whatever_its_case_quotes_and_apostrophes(beginning):
    for answer in (
        beginning,
        beginning.capitalize(),
        f' \n"{beginning.upper()} do that."',
        beginning.replace("'", "\u2019"),
    ):
        assert is_refusal(answer)
    assert not is_refusal(f"sure. {beginning}") and not is_refusal(beginning[:-1])


@pytest.mark.parametrize(
    "answer", ["", "   ", "step one mix salt with clay .", "I can help.", "As a cook, I cannot wait."]
)
def test_what_answers_is_no_refusal(answer):
    assert not is_refusal(answer)


def test_the_gate_fires_where_its_scores_do(testbed, world):
    model, processor = testbed
    samples = [*world.attack("icon", "fit", 3), *world.benign("recipe", "fit", 4)]
    site, readers = Site(2, "residual"), torch.randn(128, 1, generator=torch.Generator().manual_seed(0))
    scores = []
    for sample in samples:
        with record(model, [site]) as activations, torch.no_grad():
            model(**collate(processor, [Sample(sample.messages)], ()).inputs)
        scores.append(float(activations[site][0, -1] @ readers[:, 0]))
    middle = sum(sorted(scores)[2:4]) / 2
    gate = Gate(generation_prompt(processor), readers, torch.tensor([middle]))
    places = {"last": Subspace(torch.eye(128)[:, :2], torch.zeros(128))}
    gated = SafetySubspaces({Site(3, "residual"): places}, gate=gate, gate_site=site)
    repaired = CareForConditionalGeneration.from_base(model, gated)
    assert gate_fires(repaired, processor, samples, batch_size=3).tolist() == [score > middle for score in scores]
    with pytest.raises(ValueError, match="has no gate"):
        gate_fires(
            CareForConditionalGeneration.from_base(model, SafetySubspaces.random(model, [1], 2)), processor, samples
        )
