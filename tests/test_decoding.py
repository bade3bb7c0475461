"""A gated repair in every way of decoding, against a decoder that is written here anew: the base with plain hooks.

`Reference` runs the whole sequence without a cache, one prompt at a time, is told where the prompts end, and does the
algebra of the repair densely in float64.
"""

import copy
import functools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CompileConfig, DynamicCache, Qwen2Config, StaticCache

from care_hf import CareForConditionalGeneration, Recipe, SafetySubspaces, fit, repair_state
from care_hf.gating import Gate, unpack
from care_hf.projection import Subspace, repair
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import Site, record, site_module
from care_hf.testbed import load_testbed
from care_hf.testbed.prompts import fit_prompts

GATE_SITE = Site(1, "residual")
SITES = (GATE_SITE, Site(2, "ffn"), Site(3, "attention"), Site(4, "residual"))
STEPS, NEW, RANK = 4, 9, 32
IMAGE = 4  # the id of its token
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
FULL = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}


class Reference:
    """The base, repaired by plain hooks that are told where prompts end."""

    def __init__(self, base, subspaces: SafetySubspaces):
        self.model, self.subspaces = copy.deepcopy(base), subspaces
        self.ends: list[int] = []
        self.fired: dict[int, bool] = {}
        for site in sorted({subspaces.gate_site, *subspaces.sites}):
            self._module(site).register_forward_hook(self._hook(site))

    def _module(self, site):
        layer = self.model.model.language_model.layers[site.layer]
        return {"residual": layer, "ffn": layer.mlp, "attention": layer.self_attn}[site.component]

    def _hook(self, site):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            if site == self.subspaces.gate_site:
                self.fired = {end: self._fires(h[0, end].double(), end) for end in self.ends}
            repaired = h.clone()
            for position in range(min(self.ends), h.shape[1]):
                repaired[0, position] = self._repair(site, h[0, position], position)
            return (repaired, *output[1:]) if isinstance(output, tuple) else repaired

        return hook

    def _fires(self, h, end):
        gate, pictured = self.subspaces.gate, bool((self.ids[0, : end + 1] == IMAGE).any())
        scores = gate.readers.double().T @ h - gate.thresholds.double()
        asked = [*range(gate.required), gate.required + pictured]
        return all(scores[i] > 0 for i in asked)

    def _repair(self, site, h, position):
        end = max(end for end in self.ends if end <= position)
        if site not in self.subspaces.sites or not self.fired[end] or position - end > self.steps(site):
            return h
        by_place, step = self.subspaces.sites[site], position - end
        part = by_place["last"] if step == 0 else by_place["response"]
        mean = part.mean if step == 0 else part.mean[step - 1]
        basis, reader = part.basis.double(), (part.basis if part.reader is None else part.reader).double()
        unsafe = basis @ reader.T  # (d, d)
        target = part.beta * mean.double()
        return (h.double() + self.subspaces.strength * unsafe @ (target - h.double())).to(h.dtype)

    def steps(self, site):
        return max(part.steps for part in self.subspaces.sites[site].values())

    def logits(self, inputs, ends) -> torch.Tensor:
        """Of every token of one sequence, (S, V)."""
        self.ends, self.ids = list(ends), inputs["input_ids"]
        return self.model(**inputs, use_cache=False).logits[0]

    @torch.no_grad()
    def answer(self, inputs, ends=None) -> SimpleNamespace:
        """The greedy answer to one prompt, its logits, and whether the gate fires at its end."""
        inputs, eos = dict(inputs), self.model.generation_config.eos_token_id
        ends = [inputs["input_ids"].shape[1] - 1] if ends is None else ends
        tokens, logits = [], []
        for _ in range(NEW):
            logits.append(self.logits(inputs, ends)[-1])
            tokens.append(int(logits[-1].index_fill(0, torch.tensor(eos), -torch.inf).argmax()))
            inputs = extended(inputs, [tokens[-1]])
        return SimpleNamespace(tokens=tokens, logits=torch.stack(logits), fires=self.fired[ends[-1]])


def extended(inputs, tokens):
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def anchored(seed, oblique, steps=0, size=128):
    """A random subspace whose correction is strong, with an anchor of its own per step."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, RANK, generator=generator, dtype=torch.float64)).Q
    mean = 6 * torch.randn(*((steps, size) if steps else (size,)), generator=generator)
    other = torch.randn(size, RANK, generator=generator, dtype=torch.float64) / size**0.5
    return Subspace(basis, mean, 0.9, basis + other - basis @ (basis.mT @ other) if oblique else None)


def mixed_gate(base, singles, prompt_end) -> Gate:
    """Random detectors that fire on half of the prompts, of those with and of those without an image."""
    readers = torch.randn(128, 2, generator=torch.Generator().manual_seed(3))
    scores: tuple[list, list] = ([], [])
    for inputs in singles:
        with record(base, [GATE_SITE]) as activations, torch.no_grad():
            base(**inputs)
        pictured = int("pixel_values" in inputs)
        scores[pictured].append(float(activations[GATE_SITE][0, -1] @ readers[:, pictured]))
    middles = [sum(sorted(some)[(len(some) - 1) // 2 :][:2]) / 2 for some in scores]
    return Gate(prompt_end, readers, torch.tensor(middles), pictured=1)


@pytest.fixture(scope="session")
def samples(world):
    return [
        Sample(s.messages)
        for s in (
            *world.attack("icon", "fit", 2),
            *world.attack("typographic", "fit", 2),
            *world.attack("cipher", "fit", 2),
            *world.attack("wrapper", "fit", 2),
        )
    ]


@pytest.fixture(scope="session")
def case(testbed, samples):
    """Base, repaired model, reference and prompts, with what the reference answers."""
    base, processor = testbed
    singles = [collate(processor, [sample], ()).inputs for sample in samples]
    gate = mixed_gate(base, singles, generation_prompt(processor))
    sites = {
        site: {"last": anchored(2 * i, i % 2 == 0), "response": anchored(2 * i + 1, i % 2 == 1, STEPS)}
        for i, site in enumerate(SITES)
    }
    subspaces = SafetySubspaces(sites, gate=gate, gate_site=GATE_SITE)
    reference = Reference(base, subspaces)
    answers = [reference.answer(inputs) for inputs in singles]
    return SimpleNamespace(
        base=base,
        processor=processor,
        subspaces=subspaces,
        model=CareForConditionalGeneration.from_base(base, subspaces),
        reference=reference,
        samples=samples,
        singles=singles,
        answers=answers,
    )


@pytest.fixture(scope="session")
def long_end(case):
    """The same with prompts without images that end with three tokens, which also occur in other orders before."""
    first, second, last = end = (11, 12, *case.subspaces.gate.prompt_end)
    singles = []
    for inputs in case.singles:
        if "pixel_values" not in inputs:
            ids = inputs["input_ids"][0, :-1].tolist()
            whole = [*ids, second, last, first, last, first, first, second, *end]
            singles.append(extended({**inputs, "input_ids": torch.empty(1, 0, dtype=torch.int64)}, whole))
    gate = mixed_gate(case.base, singles, end)
    subspaces = replace(case.subspaces, gate=gate)
    reference = Reference(case.base, subspaces)
    answers = [reference.answer(inputs) for inputs in singles]
    model = CareForConditionalGeneration.from_base(case.base, subspaces)
    return SimpleNamespace(
        base=case.base, subspaces=subspaces, model=model, reference=reference, singles=singles, answers=answers
    )


def padded(case, rows=None, side="left"):
    """A batch of unequal prompts."""
    chosen = case.samples if rows is None else [case.samples[i] for i in rows]
    return collate(case.processor, chosen, (), padding_side=side).inputs


def row(case, pictured, fires):
    """The first prompt of that kind."""
    kinds = [("pixel_values" in x, a.fires) for x, a in zip(case.singles, case.answers, strict=True)]
    return kinds.index((pictured, fires))


def of_each_kind(case):
    return [row(case, pictured, fires) for pictured in (False, True) for fires in (False, True)]


def assert_answers(output, answers):
    """What `generate` gave with `FULL` is what the reference answers."""
    assert output.sequences[:, -NEW:].tolist() == [a.tokens for a in answers]
    expected = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=1e-5, atol=5e-5)


# The reference itself


def test_the_prompts_tell_every_error_apart(case, long_end):
    assert {("pixel_values" in x, a.fires) for x, a in zip(case.singles, case.answers, strict=True)} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert len({x["input_ids"].shape[1] for x in case.singles}) >= 3
    assert {a.fires for a in long_end.answers} == {False, True}
    for part in (case, long_end):
        for inputs, answer in zip(part.singles, part.answers, strict=True):
            unrepaired = part.base.generate(**inputs, **GREEDY)[0, -NEW:].tolist()
            assert (unrepaired == answer.tokens) != answer.fires


def test_the_repair_is_dense_algebra_at_its_tokens_and_nothing_elsewhere(case):
    for i in of_each_kind(case):
        inputs = extended(case.singles[i], case.answers[i].tokens)
        end = case.singles[i]["input_ids"].shape[1] - 1
        with record(case.model.vlm, SITES) as ours, torch.no_grad():
            case.model(**inputs)
        with record(case.reference.model, SITES) as expected, torch.no_grad():
            case.reference.logits(inputs, [end])
        with record(case.base, SITES) as unrepaired, torch.no_grad():
            case.base(**inputs)
        for site in SITES:
            torch.testing.assert_close(ours[site], expected[site], rtol=1e-5, atol=1e-4)
        changed = (ours[GATE_SITE] != unrepaired[GATE_SITE]).any(-1)[0].nonzero()[:, 0].tolist()
        assert changed == (list(range(end, end + STEPS + 1)) if case.answers[i].fires else [])


# Ways of decoding


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_batch_of_mixed_prompts_is_answered_row_by_row(case, options):
    assert_answers(case.model.generate(**padded(case), **FULL, **options), case.answers)
    for i in of_each_kind(case):
        assert_answers(case.model.generate(**case.singles[i], **FULL, **options), [case.answers[i]])


def test_prompts_without_an_end_are_warned_of(case, caplog):
    ids = case.singles[-1]["input_ids"]
    with caplog.at_level("WARNING"):
        case.model.generate(ids, max_new_tokens=1)
        assert not caplog.records
        case.model.generate(input_ids=torch.cat([ids[:, :-1]] * 2), max_new_tokens=1)
    (record,) = caplog.records
    assert "2 of 2 prompts hold no generation prompt" in record.getMessage()


def test_padding_on_the_right_changes_no_logits(case):
    inputs = padded(case, side="right")
    logits = case.model(**inputs).logits
    for of_row, mask, single in zip(logits, inputs["attention_mask"].bool(), case.singles, strict=True):
        expected = case.reference.logits(single, [single["input_ids"].shape[1] - 1])
        torch.testing.assert_close(of_row[mask], expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_chunks_of_the_prompt_may_cut_its_end(long_end, chunk, options):
    for inputs, answer in zip(long_end.singles, long_end.answers, strict=True):
        output = long_end.model.generate(**inputs, **FULL, **options, prefill_chunk_size=chunk)
        assert_answers(output, [answer])


def beams_of(reference, inputs, width):
    """Beam search as it is told: `width` best continuations by their sum of log-probabilities."""
    ends, eos = [inputs["input_ids"].shape[1] - 1], reference.model.generation_config.eos_token_id
    beams = [((), 0.0)]
    for _ in range(NEW):
        further = []
        for tokens, score in beams:
            logp = reference.logits(extended(inputs, tokens) if tokens else inputs, ends)[-1].log_softmax(-1)
            logp[eos] = -torch.inf
            best = logp.topk(width)
            further += [
                ((*tokens, t), score + p) for p, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(further, key=lambda beam: -beam[1])[:width]
    return beams


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_beams_carry_their_decisions(case, options):
    rows = of_each_kind(case)
    options = options | {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    output = case.model.generate(**padded(case, rows), **FULL, **options)
    new = output.sequences[:, -NEW:].unflatten(0, (-1, 3))
    for of_row, scores, i in zip(new, output.sequences_scores.unflatten(0, (-1, 3)), rows, strict=True):
        expected = beams_of(case.reference, case.singles[i], 3)
        assert of_row.tolist() == [list(tokens) for tokens, _ in expected]
        torch.testing.assert_close(scores, torch.tensor([score / NEW for _, score in expected]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_samples_come_from_the_repaired_distribution(case):
    rows = of_each_kind(case)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    output = case.model.generate(**padded(case, rows), **(FULL | options))
    logits = torch.stack(output.logits, 1).unflatten(0, (-1, 3))
    for of_row, tokens, i in zip(logits, output.sequences[:, -NEW:].unflatten(0, (-1, 3)), rows, strict=True):
        assert len({tuple(answer) for answer in tokens.tolist()}) == 3
        end = case.singles[i]["input_ids"].shape[1] - 1
        for given, answer in zip(of_row, tokens.tolist(), strict=True):
            expected = case.reference.logits(extended(case.singles[i], answer), [end])[end:-1]
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", ["base", "repaired", "lookup"])
def test_guessed_tokens_that_are_taken_back_leave_no_trace(case, kind):
    options = {"prompt_lookup_num_tokens": 3}
    if kind != "lookup":
        other = case.subspaces.only("last") if kind == "repaired" else None
        assistant = CareForConditionalGeneration.from_base(case.base, other) if other else copy.deepcopy(case.base)
        options = {"assistant_model": assistant}
    for i in of_each_kind(case):
        assert_answers(case.model.generate(**case.singles[i], **FULL, **options), [case.answers[i]])


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_every_turn_of_a_conversation_is_decided_anew(case, cache):
    seen = set()
    for i in of_each_kind(case):
        inputs = case.singles[i]
        first = inputs["input_ids"].shape[1] - 1
        text = next(x for x in case.singles[i + 1 :] + case.singles if "pixel_values" not in x)["input_ids"][0, 1:]
        made = {} if cache is DynamicCache else {"max_cache_len": 256}
        kept = cache(config=case.base.config.get_text_config(), **made)
        output = case.model.generate(**inputs, **FULL, past_key_values=kept)
        assert_answers(output, [case.answers[i]])
        second = extended({**inputs, "input_ids": output.sequences}, text.tolist())
        ends = [first, second["input_ids"].shape[1] - 1]
        answer = case.reference.answer(second, ends)
        continued = {name: second[name] for name in ("input_ids", "attention_mask")}
        assert_answers(case.model.generate(**continued, **FULL, past_key_values=output.past_key_values), [answer])
        assert_answers(case.model.generate(**second, **FULL, use_cache=False), [answer])
        seen.add((case.answers[i].fires, answer.fires))
    assert len(seen) >= 3


def test_embeddings_in_place_of_ids(case):
    for i in of_each_kind(case):
        inputs = dict(case.singles[i])
        inputs["inputs_embeds"] = case.base.get_input_embeddings()(inputs.pop("input_ids")).detach()
        assert_answers(case.model.generate(**inputs, **FULL), [case.answers[i]])


def test_an_eight_bit_cache_keeps_exact_decisions(case):
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    output = case.model.generate(**padded(case), **FULL, **options)
    ids, fires = decisions(output.past_key_values)
    assert torch.equal(ids, output.sequences[:, :-1])
    assert fires[:, -NEW].tolist() == [answer.fires for answer in case.answers]


def decisions(cache):
    (layer,) = (layer for layer in cache.layers if getattr(layer, "holds_turns", False))
    return layer.keys[:, 0, :, 0], unpack(layer.values[:, 0, :, 0])[1]


@torch.no_grad()
def test_a_repair_by_modality_may_end_with_the_prompt(case):
    by_modality = {"visual": anchored(20, False), "text": anchored(21, True)}
    sites = {Site(2, "ffn"): by_modality, Site(4, "residual"): {"text": anchored(22, False)}}
    subspaces = SafetySubspaces(sites, "route", gate=case.subspaces.gate, gate_site=GATE_SITE, scope="prompt")
    model, base, end = CareForConditionalGeneration.from_base(case.base, subspaces), copy.deepcopy(case.base), 0

    def repaired(site):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            changed = repair(h, sites[site], "route", visual_mask=ids == IMAGE)
            return torch.cat([changed[:, : end + 1], h[:, end + 1 :]], dim=1)

        return hook

    for site in sites:
        site_module(base, site).register_forward_hook(repaired(site))
    rows = of_each_kind(case)
    together = model.generate(**padded(case, rows), **FULL)
    for i, tokens, logits in zip(rows, together.sequences[:, -NEW:], torch.stack(together.logits, 1), strict=True):
        whole, end = extended(case.singles[i], tokens.tolist()), case.singles[i]["input_ids"].shape[1] - 1
        ids = whole["input_ids"]
        expected = base(**whole, use_cache=False).logits[0, end:-1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=5e-5)
        assert not torch.allclose(logits, case.base(**whole).logits[0, end:-1], atol=1e-2)


def test_a_fitted_repair_decodes_exactly(case, world):
    model = fit(case.base, processor=case.processor, recipe=Recipe(batch_size=64), **fit_prompts(world, n=24))
    reference = Reference(case.base, SafetySubspaces.from_model(model))
    answers = [reference.answer(inputs) for inputs in case.singles]
    assert {answer.fires for answer in answers} == {False, True}
    assert_answers(model.generate(**padded(case), **FULL), answers)
    assert_answers(model.generate(**padded(case), **FULL, cache_implementation="static"), answers)


@torch.no_grad()
def test_qwen_decodes_with_a_gate_as_without_a_cache(qwen, qwen_inputs, tmp_path):
    inputs = {**qwen_inputs, "input_ids": qwen_inputs["input_ids"].clone()}
    inputs["input_ids"][:, -2:] = torch.tensor([7, 8])
    at, readers = Site(0, "residual"), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    with record(qwen, [at]) as activations:
        qwen(**inputs)
    margins = (activations[at][:, -1] @ readers)[torch.tensor([0, 1]), torch.tensor([1, 0])]
    sites = {Site(layer, "ffn"): {"last": narrow(layer), "response": narrow(layer + 5, STEPS)} for layer in (1, 2)}
    base = qwen.generate(**inputs, **FULL)
    for fires in (0, 1):  # the row with an image, whose alarm is the second, or the one without
        thresholds = margins.flip(0) + torch.tensor([1.0, -1.0] if fires == 0 else [-1.0, 1.0])
        gate = Gate((7, 8), readers, thresholds, pictured=1)
        model = CareForConditionalGeneration.from_base(qwen, SafetySubspaces(sites, gate=gate, gate_site=at))
        expected = model.generate(**inputs, **FULL, use_cache=False)
        same = (torch.stack(expected.logits) - torch.stack(base.logits)).abs().amax((0, 2)) < 1e-4
        assert same.tolist() == [row != fires for row in (0, 1)]
        model.save_pretrained(tmp_path)
        for other in (model, AutoModel.from_pretrained(tmp_path)):
            for options in ({}, {"cache_implementation": "static"}):
                output = other.generate(**inputs, **FULL, **options)
                assert torch.equal(output.sequences, expected.sequences)
                torch.testing.assert_close(
                    torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-5, atol=5e-5
                )


def narrow(seed, steps=0):
    """`anchored` for a hidden size of 64."""
    return anchored(seed, False, steps, 64)


# Caches that are not whole


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_cache_with_tokens_that_the_gate_did_not_see_is_refused(case, cache):
    made = {} if cache is DynamicCache else {"max_cache_len": 64}
    inputs = case.singles[row(case, False, True)]
    start, rest = inputs["input_ids"][:, :-2], inputs["input_ids"][:, -2:]

    def new():
        return cache(config=case.base.config.get_text_config(), **made)

    of_base = case.base(input_ids=start, past_key_values=new()).past_key_values
    with case.model.disable():
        switched_off = case.model(input_ids=start, past_key_values=new()).past_key_values
    with pytest.raises(ValueError, match="has not seen"):
        case.model(input_ids=rest, past_key_values=of_base)
    with pytest.raises(ValueError, match="has not seen"):
        case.model(input_ids=rest, past_key_values=switched_off)
    kept = case.model(input_ids=start, past_key_values=new()).past_key_values
    with case.model.disable():
        case.model(input_ids=rest[:, :1], past_key_values=kept)
    with pytest.raises(ValueError, match="has not seen"):
        case.model(input_ids=rest[:, 1:], past_key_values=kept)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_is_copied_pickled_and_used_again(case, cache):
    made = {} if cache is DynamicCache else {"max_cache_len": 64}
    i = row(case, False, True)
    inputs, answer = case.singles[i], case.answers[i]
    kept = cache(config=case.base.config.get_text_config(), **made)
    # A forward that is told not to use a cache still fills the one that it is given.
    for tokens in (inputs["input_ids"], *torch.tensor(answer.tokens[:2])[:, None, None]):
        case.model(input_ids=tokens, past_key_values=kept, use_cache=False)
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), kept):
        logits = [
            case.model(input_ids=torch.tensor([[t]]), past_key_values=other).logits[0, -1] for t in answer.tokens[2:]
        ]
        torch.testing.assert_close(torch.stack(logits[:-1]), answer.logits[3:], rtol=1e-5, atol=5e-5)
    kept.reset()
    i = row(case, False, False)
    output = case.model.generate(**case.singles[i], **FULL, past_key_values=kept)
    assert_answers(output, [case.answers[i]])


@pytest.mark.skipif(repair_state.DummyLayer is None, reason="refused before transformers 5.23")
def test_an_offloaded_cache_counts_on_its_own_layers_only(case):
    cache = case.model(**case.singles[0]).past_key_values
    called = []
    for index, layer in enumerate(cache.layers):
        layer.prefetch = functools.partial(called.append, index)
    cache.prefetch_stream = nullcontext()
    depth = case.base.config.text_config.num_hidden_layers
    assert len(cache.layers) == depth + 1
    for index in range(1, depth + 1):
        cache.prefetch(index)
    assert called == [*range(1, depth), 0]


@pytest.mark.parametrize("types", [["sliding_attention"] * 3, ["sliding_attention", "full_attention"] * 2])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_windows_shorter_than_the_conversation(llava, types, options):
    config = copy.deepcopy(llava.config)
    text = {"layer_types": types, "num_hidden_layers": len(types), "use_sliding_window": True, "sliding_window": 6}
    sizes = {n: getattr(llava.config.text_config, n) for n in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "initializer_range": 0.1}
    config.text_config = Qwen2Config(**text, **sizes, **heads)
    torch.manual_seed(0)
    base = type(llava)(config).eval()
    gate = Gate((7, 8), torch.zeros(128, 1), torch.tensor([-1.0]))
    sites = {Site(1, "residual"): {"last": anchored(0, False), "response": anchored(1, False, STEPS)}}
    model = CareForConditionalGeneration.from_base(
        base, SafetySubspaces(sites, gate=gate, gate_site=Site(0, "residual"))
    )
    ids = torch.tensor([[*range(20, 50), 7, 8]])
    options = FULL | {"max_new_tokens": 20, "min_new_tokens": 20} | options
    plain = {k: v for k, v in options.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")}
    expected = model.generate(ids, **plain, use_cache=False)
    assert expected.sequences.tolist() != base.generate(ids, **plain).sequences.tolist()
    output = model.generate(ids, **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-5, atol=5e-5)


# What cannot be told is refused


def test_parts_and_packed_sequences_are_refused(case):
    inputs = case.singles[row(case, False, True)]
    with pytest.raises(ValueError, match="not on one of its parts"):
        case.model.vlm.model(**inputs)
    with pytest.raises(ValueError, match="packed"):
        case.model(**inputs, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    model = copy.deepcopy(case.model)
    model.vlm.model.compile(backend="eager")
    with pytest.raises(ValueError, match="not on one of its parts"):
        model(**inputs)
    model = copy.deepcopy(case.model).train()
    model.vlm.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="not on one of its parts"):
        model(**inputs).logits.sum().backward()


# The model as a whole


def test_gradients_are_those_of_the_algebra(case):
    i = row(case, True, True)
    end = case.singles[i]["input_ids"].shape[1] - 1
    whole = extended(case.singles[i], case.answers[i].tokens)
    weight = torch.randn(case.base.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))

    def gradient(logits_of):
        pixels = whole["pixel_values"].clone().requires_grad_(True)
        (logits_of({**whole, "pixel_values": pixels})[end:] @ weight).sum().backward()
        return pixels.grad

    ours = gradient(lambda x: case.model(**x).logits[0])
    torch.testing.assert_close(ours, gradient(lambda x: case.reference.logits(x, [end])), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(ours, gradient(lambda x: case.base(**x).logits[0]), rtol=1e-1)
    case.model.zero_grad(), case.base.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(case, reentrant):
    def gradients(model):
        model = copy.deepcopy(model).train()
        loss = model(**padded(case)).logits.square().mean()
        # What is repaired when the parts run again is what was repaired at first, whatever happened in between.
        with model.disable():
            model(**padded(case, [0]))
            loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    checkpointed = copy.deepcopy(case.model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(case.model), gradients(checkpointed)
    assert checkpointed.vlm.is_gradient_checkpointing and expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    base = gradients(CareForConditionalGeneration.from_base(case.base, SafetySubspaces.random(case.base, [1], 1)))
    assert not all(torch.equal(base[name], expected[name]) for name in expected)


def test_copies_and_pickles_of_the_model_stand_alone(case):
    # From a base that has not run yet: what transformers installs to capture a vision tower's states is not pickled.
    pickled = pickle.dumps(CareForConditionalGeneration.from_base(load_testbed()[0], case.subspaces))
    for other in (copy.deepcopy(case.model), pickle.loads(pickled)):
        assert other.care_state is not case.model.care_state and other.vlm.care_state is other.care_state
        assert_answers(other.generate(**padded(case), **FULL), case.answers)
        with other.disable():
            assert case.model.care_state.enabled
            assert (
                other.generate(**padded(case), **GREEDY).tolist()
                != case.model.generate(**padded(case), **GREEDY).tolist()
            )


def test_saved_and_loaded_it_is_the_same(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_answers(loaded.generate(**padded(case), **FULL), case.answers)
    assert torch.equal(loaded(**padded(case)).logits, case.model(**padded(case)).logits)
    halves = (
        AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        AutoModel.from_pretrained(tmp_path).to(torch.bfloat16),
    )
    for half in halves:
        buffers = {
            n: b for n, b in half.named_buffers() if (".care." in n or ".care_gate." in n) and b.is_floating_point()
        }
        assert {b.dtype for b in buffers.values()} == {torch.float32} and any(".care_gate." in n for n in buffers)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert torch.equal(half.gate.readers, case.subspaces.gate.readers)
        inputs = padded(case)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        cached = half.generate(**inputs, **GREEDY)
        assert cached.shape == (len(case.samples), inputs["input_ids"].shape[1] + NEW)


def test_a_checkpoint_whose_gate_is_not_whole_does_not_load(case, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    case.model.save_pretrained(whole)
    weights, config = load_file(whole / "model.safetensors"), json.loads((whole / "config.json").read_text())
    readers, thresholds = (
        next(n for n in weights if n.endswith(f"care_gate.{leaf}")) for leaf in ("readers", "thresholds")
    )
    broken.mkdir()

    def refused(message, new_weights=None, new_gate=None, **options):
        save_file(new_weights or weights, broken / "model.safetensors", metadata={"format": "pt"})
        gate = config["gate"] if new_gate is None else new_gate or None
        (broken / "config.json").write_text(json.dumps({**config, "gate": gate}))
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            AutoModel.from_pretrained(broken, **options)

    for name in (readers, thresholds):
        refused("lacks", {k: v for k, v in weights.items() if k != name})
        refused("not finite", {**weights, name: weights[name] * torch.nan})
        narrow = {**weights, name: weights[name][..., :1].contiguous()}
        refused("mismatch|shape", narrow)
        refused("another shape", narrow, ignore_mismatched_sizes=True)
    refused(
        "unknown to its config.json", {**weights, readers.replace("layers.1", "layers.2"): weights[readers].clone()}
    )
    gate = config["gate"]
    refused("ask a gate", new_gate={})
    refused("must be a dict", new_gate={k: v for k, v in gate.items() if k != "alarms"})
    refused("after sites", new_gate={**gate, "site": "2.residual"})
    refused("lacks", new_gate={**gate, "site": "0.residual"})
    refused("mismatch|shape", new_gate={**gate, "alarms": 2})
    refused("counts of detectors", new_gate={**gate, "required": -1, "alarms": 2})
    refused("token ids in prompt_end", new_gate={**gate, "prompt_end": []})
    refused("another tokenizer", new_gate={**gate, "prompt_end": [100000]})


@torch.no_grad()
def test_it_compiles_to_one_graph(case):
    inputs = padded(case, [i for i, single in enumerate(case.singles) if "pixel_values" not in single])
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, case.model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_decoding_compiles_to_one_graph(case):
    torch._dynamo.reset()
    i, options = row(case, False, True), CompileConfig(backend="eager", mode=None, fullgraph=True)
    options._compile_all_devices = True  # transformers compiles on accelerators only
    more = {"cache_implementation": "static", "compile_config": options}
    assert_answers(case.model.generate(**case.singles[i], **FULL, **more), [case.answers[i]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@torch.no_grad()
def test_a_compiled_forward_refuses_a_cache_that_the_gate_did_not_see(case):
    torch._dynamo.reset()
    ids = case.singles[row(case, False, True)]["input_ids"]
    kept = StaticCache(config=case.base.config.get_text_config(), max_cache_len=64)
    case.model(input_ids=ids, past_key_values=kept)
    with case.model.disable():
        case.model(input_ids=ids[:, :1], past_key_values=kept)
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="has not seen"):
        compiled(input_ids=ids[:, :1], past_key_values=kept)


def test_answers_given_at_the_same_time_do_not_mix(case):
    rows = of_each_kind(case) * 3
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda i: case.model.generate(**case.singles[i], **FULL), rows))
    for i, output in zip(rows, outputs, strict=True):
        assert_answers(output, [case.answers[i]])
