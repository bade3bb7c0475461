import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from care_hf import blocking
from care_hf.blocking import Blocker, Contributions, collect_contributions, generate_blocked
from care_hf.contrasts import Contrast
from care_hf.interventions import contribution, rewritten, with_contribution
from care_hf.samples import Sample, collate
from care_hf.sites import COMPONENTS, Site, decoder_layers, record

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 11, 12, 13, 14]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
SITES = [Site(layer, component) for layer in range(3) for component in COMPONENTS]


def randomised(model, scale=0.3, seed=3):
    """With weights large enough for answers to vary."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(**SIZES, intermediate_size=48, eos_token_id=2, pad_token_id=0)
    return randomised(LlamaForCausalLM(config).double())


@pytest.fixture(scope="module")
def opt():
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, eos_token_id=2, pad_token_id=0)
    return randomised(OPTForCausalLM(config).double())


def by_hand(model, ids, changed):
    """Logits of one row without padding; `changed` maps sites to what they add instead, given what they add."""
    h = model.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    rotation = model.model.rotary_emb(h, position_ids=places)
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=h.dtype).triu(1)[None, None]
    for index, layer in enumerate(model.model.layers):
        put = [changed.get(Site(index, component), lambda added: added) for component in COMPONENTS]
        attended, _ = layer.self_attn(layer.input_layernorm(h), position_embeddings=rotation, attention_mask=mask)
        between = h + put[1](attended)
        after = between + put[0](layer.mlp(layer.post_attention_layernorm(between)))
        h = h + put[2](after - h)
    return model.lm_head(model.model.norm(h))


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Rewrites


@pytest.mark.parametrize("site", SITES, ids=str)
@torch.no_grad()
def test_a_blocked_site_adds_what_it_is_told_to(llama, site):
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = by_hand(llama, IDS[:1], {})
    torch.testing.assert_close(llama(IDS[:1]).logits, plain)
    for value in (torch.zeros(()), vector):
        expected = by_hand(llama, IDS[:1], {site: lambda added, value=value: torch.zeros_like(added) + value})
        with rewritten(llama, site, lambda h, stream, value=value: with_contribution(site, value, stream)):
            found = llama(IDS[:1]).logits
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, plain)
    torch.testing.assert_close(llama(IDS[:1]).logits, plain)


@pytest.mark.parametrize("site", SITES, ids=str)
@torch.no_grad()
def test_a_rewrite_sees_what_a_site_adds_and_what_it_adds_it_to(llama, site):
    seen, entered = [], []
    expected = {}

    def keep(added):
        expected[site] = added
        return added

    by_hand(llama, IDS[:1], {site: keep})
    handle = decoder_layers(llama)[site.layer].register_forward_pre_hook(lambda module, args: entered.append(args[0]))

    def rewrite(output, stream):
        seen.append((contribution(site, output, stream), stream))
        return output

    with rewritten(llama, site, rewrite):
        llama(IDS[:1])
    handle.remove()
    ((added, stream),) = seen
    torch.testing.assert_close(added, expected[site])
    assert torch.equal(stream, entered[0])


@torch.no_grad()
def test_a_whole_layer_that_adds_nothing_is_as_if_it_were_not_there(llama):
    site = Site(1, "residual")
    with (
        rewritten(llama, site, lambda h, stream: with_contribution(site, torch.zeros(()), stream)),
        record(llama, [Site(0, "residual"), site]) as activations,
    ):
        llama(IDS, attention_mask=MASK)
    assert torch.equal(activations[site], activations[Site(0, "residual")])


@pytest.mark.parametrize("site", [site for site in SITES if site.layer == 1], ids=str)
@torch.no_grad()
def test_ffns_on_flattened_tokens_are_rewritten_too(opt, site):
    """OPT's FFN ends in `fc2`, which sees (B * S, d)."""
    shapes, vector = [], torch.arange(32.0, dtype=torch.float64)
    layer = decoder_layers(opt)[1]
    handle = layer.fc2.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with rewritten(opt, site, lambda h, stream: with_contribution(site, vector, stream)):
        found = opt(IDS[:1]).logits
    handle.remove()
    assert shapes == [(6, 32)]

    def instead(module, args, output):
        if site.component == "residual":
            return args[0] + vector
        new = vector.expand_as(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    module = {"ffn": layer.fc2, "attention": layer.self_attn, "residual": layer}[site.component]
    handle = module.register_forward_hook(instead)
    torch.testing.assert_close(found, opt(IDS[:1]).logits)
    handle.remove()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(COMPONENTS),
    st.sampled_from([(), (4,), (2, 3, 4)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_what_is_added_can_be_read_back(component, shape, dtype, seed):
    generator, site = torch.Generator().manual_seed(seed), Site(0, component)
    # Whole numbers, so that sums are exact in every dtype.
    value = torch.randint(-9, 9, shape, generator=generator).double()
    stream = torch.randint(-9, 9, (2, 3, 4), generator=generator).to(dtype)
    output = with_contribution(site, value, stream)
    assert output.dtype == dtype and output.shape == stream.shape
    assert torch.equal(contribution(site, output, stream).double(), value.expand(2, 3, 4))


@torch.no_grad()
def test_rewrites_of_one_site_follow_one_another_in_the_order_of_entry(llama):
    site = Site(1, "ffn")
    with (
        rewritten(llama, site, lambda h, stream: h + 1),
        rewritten(llama, site, lambda h, stream: 3 * h),
    ):
        found = llama(IDS[:1]).logits
    torch.testing.assert_close(found, by_hand(llama, IDS[:1], {site: lambda added: 3 * (added + 1)}))


def test_nothing_is_left_of_a_rewrite(llama):
    before = count_hooks(llama)
    with pytest.raises(ValueError, match="3 decoder layers"), rewritten(llama, Site(3, "ffn"), lambda h, stream: h):
        pass

    def fail(h, stream):
        raise RuntimeError("inside")

    for site in SITES:
        with pytest.raises(RuntimeError, match="inside"), rewritten(llama, site, fail):
            llama(IDS)
        with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
            stack.enter_context(rewritten(llama, site, lambda h, stream: h))
            assert count_hooks(llama) == before + 2
            raise KeyboardInterrupt
        assert count_hooks(llama) == before


# Contrasts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 30))
def test_log_odds_are_those_of_the_probabilities(seed, refused, complied, scale):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(20, generator=generator).tolist()
    contrast = Contrast(tuple(ids[:refused]), tuple(ids[refused : refused + complied]))
    logits = (scale * torch.randn(3, 20, generator=generator, dtype=torch.float64)).requires_grad_()
    found = contrast.log_odds(logits)
    log_p = logits.detach().numpy() - logsumexp(logits.detach().numpy(), axis=1, keepdims=True)
    expected = logsumexp(log_p[:, contrast.refused], axis=1) - logsumexp(log_p[:, contrast.complied], axis=1)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    # The share of each token within its side.
    found.sum().backward()
    share = torch.zeros(3, 20, dtype=torch.float64)
    for side, sign in ((contrast.refused, 1), (contrast.complied, -1)):
        share[:, list(side)] = sign * logits.detach()[:, list(side)].softmax(dim=1)
    torch.testing.assert_close(logits.grad, share)
    swapped = Contrast(contrast.complied, contrast.refused).log_odds(logits + 7)
    torch.testing.assert_close(swapped, -found)


def test_log_odds_of_half_precision_are_taken_in_single_precision():
    logits = torch.tensor([3.0, 1.0, 200.0]).bfloat16()
    assert Contrast((0,), (1,)).log_odds(logits).dtype == torch.float32
    assert Contrast((0, 2), (1,)).log_odds(logits).item() == pytest.approx(199)


def test_a_contrast_needs_tokens_on_both_sides_that_differ():
    for sides in [((), (1,)), ((1,), ()), ((), ())]:
        with pytest.raises(ValueError, match="must each hold a first token; give malicious prompts"):
            Contrast(*sides)
    with pytest.raises(ValueError, match=r"Tokens \[2\] begin refusals and other answers alike"):
        Contrast((1, 2), (2, 3))


def test_tokens_are_learnt_from_how_answers_begin():
    tokens, verdicts = [7, 3, 5, 9, 5, 7], ["refused", "complied", "complied", "other", "refused", "refused"]
    assert Contrast.of_first_tokens(tokens, verdicts) == Contrast((7,), (3,))  # 5 begins both, 9 neither
    for few in ((tokens[:1], verdicts[:1]), ([5, 5], ["refused", "complied"])):
        with pytest.raises(ValueError, match=r"must each hold.*pass `contrast=`"):
            Contrast.of_first_tokens(*few)
    with pytest.raises(ValueError):
        Contrast.of_first_tokens(tokens, verdicts[:2])


# Contributions of benign prompts


@pytest.fixture(scope="module")
def prompts(world):
    """Of unequal lengths, some with an image."""
    return [*world.benign("recipe", "validation", 3), *world.benign("typographic", "validation", 2)]


@pytest.fixture(scope="module")
def added(testbed, prompts):
    """What every site adds at every token, one prompt at a time, in float64."""
    model, processor = testbed
    sites = [Site(layer, component) for layer in (0, 3) for component in COMPONENTS]
    parts = {site: [] for site in sites}
    for prompt in prompts:
        inputs = collate(processor, [Sample(prompt.messages)], ()).inputs
        with record(model, sites) as activations, torch.no_grad():
            entered = model(**inputs, output_hidden_states=True).hidden_states
        for site in sites:
            before = entered[site.layer] if site.component == "residual" else 0
            parts[site].append((activations[site] - before)[0].double())
    return {site: torch.cat(rows) for site, rows in parts.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_means_are_over_every_token_that_is_there(testbed, prompts, added, batch_size):
    found = collect_contributions(*testbed, prompts, list(added), batch_size)
    assert len({len(Sample(p.messages).images) for p in prompts}) == 2
    for site, rows in added.items():
        assert found.mean[site].dtype == torch.float32
        torch.testing.assert_close(found.mean[site].double(), rows.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_pool_holds_what_sites_added_at_some_tokens_the_same_for_all(testbed, prompts, added):
    found = collect_contributions(*testbed, prompts, list(added), 2)
    picked = []
    for site, rows in added.items():
        distance = torch.cdist(found.pool[site].double(), rows)
        assert distance.min(dim=1).values.max() < 1e-3
        picked.append(distance < 1e-3)
        assert len(found.pool[site]) == blocking.POOL // len(prompts) * len(prompts)
    # Tokens before the image may be alike; one that is picked is picked at every site.
    assert torch.stack(picked).all(dim=0).any(dim=1).all()
    again = collect_contributions(*testbed, prompts, list(added), 3)
    other = collect_contributions(*testbed, prompts, list(added), 3, seed=1)
    for site in added:
        torch.testing.assert_close(again.pool[site], found.pool[site], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(other.pool[site], found.pool[site], atol=1e-2)


def test_a_pool_is_not_larger_than_it_may_be(testbed, prompts, monkeypatch):
    monkeypatch.setattr(blocking, "POOL", 3)
    found = collect_contributions(*testbed, prompts, [Site(0, "ffn")], 2)
    assert found.pool[Site(0, "ffn")].shape == (3, 128)


# Blocks


def random_contributions(sites, dimension=32, size=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(8)
    mean = {site: torch.randn(dimension, generator=generator, dtype=dtype) for site in sites}
    return Contributions(mean, {site: torch.randn(size, dimension, generator=generator, dtype=dtype) for site in sites})


def test_a_block_needs_a_known_mode_and_its_contributions():
    site, other = Site(1, "ffn"), Site(2, "ffn")
    with pytest.raises(ValueError, match=r"mode='half' is not known; choose one of \('zero', 'mean', 'resample'\)"):
        Blocker(site, "half")
    for mode in ("mean", "resample"):
        for given_ in (None, random_contributions([other])):
            with pytest.raises(ValueError, match=r"needs benign contributions of site 1\.ffn; collect them"):
                Blocker(site, mode, given_)
    assert Blocker(site, "zero").value() == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5)
)
def test_draws_depend_on_prompt_and_place_alone(numbers, length, later, seed):
    site = Site(1, "ffn")
    of = random_contributions([site])
    whole = Blocker(site, "resample", of, seed)
    columns = torch.arange(-length, later).expand(len(numbers), -1)
    whole.place(torch.tensor(numbers), columns)
    values = whole.value()
    assert values.shape == (len(numbers), length + later, 32)
    assert (values[..., None, :] == of.pool[site]).all(dim=-1).any(dim=-1).all()
    for row, number in enumerate(numbers):
        for column in (0, length - 1, length + later - 1):
            alone = Blocker(site, "resample", of, seed)
            alone.place(torch.tensor([number]), columns[:1, column : column + 1])
            assert torch.equal(alone.value()[0, 0], values[row, column])


def test_draws_differ_by_seed_layer_prompt_and_place():
    sites = [Site(1, "ffn"), Site(2, "ffn")]
    of = random_contributions(sites)
    of = Contributions(of.mean, dict.fromkeys(sites, torch.arange(500.0)[:, None]))

    def draws(site, seed):
        blocker = Blocker(site, "resample", of, seed)
        blocker.place(torch.arange(20), torch.arange(-30, 0).expand(20, -1))
        return blocker.value()[..., 0]

    base = draws(sites[0], 0)
    assert torch.equal(base, draws(sites[0], 0))
    for other in (draws(sites[0], 7), draws(sites[1], 0), base.roll(1, 0), base.roll(1, 1)):
        assert (base == other).float().mean() < 0.05
    # From all over the pool, evenly.
    counts = torch.histc(base, bins=10, min=0, max=500)
    assert (counts - 60).abs().max() < 5 * math.sqrt(60)


@pytest.mark.parametrize("mode", blocking.MODES)
@pytest.mark.parametrize("site", [Site(0, "attention"), Site(1, "ffn"), Site(2, "residual")], ids=str)
@torch.no_grad()
def test_blocked_answers_are_those_of_each_prompt_alone_without_a_cache(llama, site, mode):
    of = random_contributions([site], dtype=torch.float64)
    blocker = Blocker(site, mode, of, seed=2)
    numbers, tokens = torch.tensor([31, 4]), 7
    found, first = generate_blocked(llama, {"input_ids": IDS, "attention_mask": MASK}, blocker, numbers, tokens)
    for row, number in enumerate(numbers.tolist()):
        ids = IDS[row][MASK[row].bool()][None]
        length = ids.shape[1]
        for step in range(found.shape[1]):
            value = torch.zeros(32, dtype=torch.float64)
            if mode == "mean":
                value = of.mean[site]
            elif mode == "resample":
                at = Blocker(site, mode, of, seed=2)
                at.place(torch.tensor([number]), torch.arange(-length, step)[None])
                value = at.value()
            logits = by_hand(llama, ids, {site: lambda added, value=value: torch.zeros_like(added) + value})[0, -1]
            if step == 0:
                torch.testing.assert_close(first[row], logits.float(), rtol=1e-4, atol=1e-4)
            assert found[row, step] == logits.argmax()
            if found[row, step] == 2:
                assert (found[row, step + 1 :] == 0).all()
                break
            ids = torch.cat([ids, found[row, step].reshape(1, 1)], dim=1)


@torch.no_grad()
def test_without_a_block_answers_are_those_of_generate(llama):
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    found, first = generate_blocked(llama, inputs, None, torch.arange(2), 5)
    assert torch.equal(found, llama.generate(**inputs, do_sample=False, max_new_tokens=5)[:, 6:])
    torch.testing.assert_close(first, llama(**inputs).logits[:, -1].float())


def test_nothing_is_left_of_a_blocked_generation_that_fails(llama):
    before = count_hooks(llama)

    class Failing(Blocker):
        def rewrite(self, output, stream):
            if stream.shape[1] == 1:
                raise KeyboardInterrupt
            return super().rewrite(output, stream)

    for site in SITES:
        with pytest.raises(KeyboardInterrupt):
            generate_blocked(
                llama, {"input_ids": IDS, "attention_mask": MASK}, Failing(site, "zero"), torch.arange(2), 5
            )
        assert count_hooks(llama) == before
