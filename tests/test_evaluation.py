from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_hf.evaluation import REFUSALS, Rate, correction_size, generate_answers, is_refusal
from care_hf.gating import Gate
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import Subspace
from care_hf.sites import Site
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


def test_the_size_of_a_correction_has_a_closed_form_where_everything_is_projected_out(testbed, world):
    model, processor = testbed
    samples = [*world.benign("icon", "fit", 2), *world.benign("recipe", "fit", 3)]
    identity, nothing = torch.eye(128), torch.zeros(128)

    def size(sites, **more):
        return correction_size(
            CareForConditionalGeneration.from_base(model, SafetySubspaces(sites, **more)), processor, samples
        )

    everything = {
        Site(1, "ffn"): {"text": Subspace(identity, nothing)},
        Site(4, "residual"): {"text": Subspace(identity, nothing)},
    }
    assert size(everything) == pytest.approx(1, abs=1e-5)
    assert size(everything, strength=0.25) == pytest.approx(0.25, abs=1e-5)
    assert size(everything, strength=0.0) == 0
    # Routed by modality, the share is that of the text tokens.
    inputs = [
        processor.apply_chat_template(s.messages, tokenize=True, return_dict=True, return_tensors="pt") for s in samples
    ]
    ids = torch.cat([i["input_ids"][0] for i in inputs])
    ids = ids[~torch.isin(ids, torch.tensor([1, 5, 6]))]  # control tokens
    share = (ids != model.config.image_token_id).float().mean().item()
    assert size(everything, fusion="route") == pytest.approx(share, abs=1e-5)


def test_the_size_of_a_correction_of_some_tokens_alone_is_refused(testbed, world):
    model, processor = testbed
    gate, gate_site = Gate((6,), torch.zeros(128, 0), torch.zeros(0)), Site(1, "residual")
    everything = Subspace(torch.eye(128), torch.zeros(128))
    for places, scope in (({"last": everything}, "all"), ({"text": everything}, "prompt")):
        subspaces = SafetySubspaces({Site(2, "ffn"): places}, gate=gate, gate_site=gate_site, scope=scope)
        repaired = CareForConditionalGeneration.from_base(model, subspaces)
        with pytest.raises(ValueError, match="smaller scope"):
            correction_size(repaired, processor, world.benign("icon", "fit", 2))


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
