import copy
import json
import logging
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from care_hf.answers import generate_answers
from care_hf.contrasts import Contrast
from care_hf.judges import KeywordJudge, StrictJudge
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.rates import Mean, Rate
from care_hf.samples import Sample, collate
from care_hf.sites import COMPONENTS, Site, decoder_layers, record, site_module
from care_hf.subspace import SafetySubspaces
from care_hf.suite import Case
from care_hf.testbed.world import REFUSAL
from care_hf.trace_results import Outcome, Trace
from care_hf.tracing import find_sites, trace

NEW = 8
SITES = [Site(layer, component) for layer in (0, 1, 4) for component in ("residual", "ffn", "attention")]
SMALL = {"layers": [1, 4], "max_new_tokens": 4, "batch_size": 4}


def cases(samples):
    return [Case(sample.messages, reference=sample.answer) for sample in samples]


@pytest.fixture(scope="module")
def malicious(world):
    """Some refused, some not; some with an image."""
    return cases([*world.attack("typographic", "validation", 3), *world.plain("validation", 3)])


@pytest.fixture(scope="module")
def benign(world):
    return cases(world.benign("recipe", "validation", 2) + world.benign("typographic", "validation", 3))


@pytest.fixture(scope="module")
def run(testbed, malicious, benign):
    def start(model=None, malicious=malicious, benign=benign, judge=None, **options):
        return trace(model or testbed[0], testbed[1], malicious, benign, judge, **{**SMALL, **options})

    return start


@pytest.fixture(scope="module")
def traced(run):
    strict = {"judge": StrictJudge(REFUSAL), "max_new_tokens": NEW}
    return run(modes=("zero", "mean", "resample"), layers=[0, 1, 4], batch_size=3, **strict)


def plain(found):
    return json.loads(json.dumps(found.to_dict()))


def close(found, expected):
    """Equal but for the rounding of numbers."""
    a, b = plain(found), plain(expected)
    assert a["settings"] == b["settings"]
    pairs = [(a["unblocked"], b["unblocked"])]
    assert a["blocked"].keys() == b["blocked"].keys()
    for mode in a["blocked"]:
        assert a["blocked"][mode].keys() == b["blocked"][mode].keys()
        pairs += [(a["blocked"][mode][site], b["blocked"][mode][site]) for site in a["blocked"][mode]]
    for one, other in pairs:
        for name in ("malicious", "benign", "kept"):
            assert one[name] == other[name]
        for name in ("log_odds", "divergence"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-3)


@contextmanager
def blocked_by_hand(model, site, value):
    def instead(module, args, kwargs, output):
        stream = args[0] if args else kwargs["hidden_states"]
        tensor = output[0] if isinstance(output, tuple) else output
        new = stream + value if site.component == "residual" else value.expand_as(tensor)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = site_module(model, site).register_forward_hook(instead, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def mean_by_hand(model, processor, prompts, site):
    """Over all tokens, one prompt at a time, in float64."""
    parts = []
    for prompt in prompts:
        with record(model, [site]) as activations, torch.no_grad():
            inputs = collate(processor, [Sample(prompt.messages)], ()).inputs
            entered = model(**inputs, output_hidden_states=True).hidden_states[site.layer]
        parts.append((activations[site] - (entered if site.component == "residual" else 0))[0].double())
    return torch.cat(parts).mean(dim=0).float()


@torch.no_grad()
def first_log_p(model, processor, prompts):
    return torch.stack(
        [
            model(**collate(processor, [Sample(p.messages)], ()).inputs).logits[0, -1].double().log_softmax(-1)
            for p in prompts
        ]
    )


# What is measured


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_outcomes_are_those_of_an_independent_loop(testbed, traced, malicious, benign, mode):
    model, processor = testbed
    judge, count = StrictJudge(REFUSAL), len(malicious)
    refused, complied = (list(traced.settings["contrast"][name]) for name in ("refused", "complied"))
    own = generate_answers(model, processor, [*malicious, *benign], NEW)
    base = first_log_p(model, processor, benign)
    verdicts = []
    for site in SITES:
        value = torch.zeros(128) if mode == "zero" else mean_by_hand(model, processor, benign, site)
        with blocked_by_hand(model, site, value):
            answers = generate_answers(model, processor, [*malicious, *benign], NEW)
            log_p = first_log_p(model, processor, malicious)
            other = first_log_p(model, processor, benign)
        found = traced.blocked[mode][site]
        assert found.malicious == judge.verdicts(malicious, answers[:count])
        assert found.benign == judge.verdicts(benign, answers[count:])
        assert found.kept == [a == b for a, b in zip(answers[count:], own[count:], strict=True)]
        odds = log_p[:, refused].exp().sum(-1).log() - log_p[:, complied].exp().sum(-1).log()
        np.testing.assert_allclose(found.log_odds, odds, rtol=1e-3, atol=1e-3)
        divergence = [F.kl_div(q, p, reduction="sum", log_target=True) for p, q in zip(base, other, strict=True)]
        np.testing.assert_allclose(found.divergence, divergence, rtol=1e-2, atol=1e-5)
        verdicts.append((found.malicious, found.benign))
    assert len({repr(v) for v in verdicts}) > 2  # blocks differ in what they do


def test_without_a_block_the_model_is_as_it_is(testbed, traced, malicious, benign):
    judge, answers = StrictJudge(REFUSAL), generate_answers(*testbed, [*malicious, *benign], NEW)
    found = traced.unblocked
    assert found.malicious == judge.verdicts(malicious, answers[:6]) and {*found.malicious} > {"refused"}
    assert found.benign == judge.verdicts(benign, answers[6:]) and "complied" in found.benign
    assert found.kept == [True] * 5 and found.divergence == [0.0] * 5


def test_the_contrast_is_learnt_from_the_models_own_answers(testbed, traced, malicious):
    tokenizer = testbed[1].tokenizer
    answers = generate_answers(*testbed, malicious, NEW)
    begins = {}
    for verdict, answer in zip(StrictJudge(REFUSAL).verdicts(malicious, answers), answers, strict=True):
        begins.setdefault(verdict, set()).add(tokenizer(answer, add_special_tokens=False)["input_ids"][0])
    contrast = traced.settings["contrast"]
    assert set(contrast["refused"]) == begins["refused"] and set(contrast["complied"]) == begins["complied"]


def test_blocks_that_share_the_undisturbed_run_give_the_same(run, traced):
    options = {"modes": ("zero", "mean", "resample"), "layers": [0, 1, 4], "max_new_tokens": NEW}
    options["judge"] = StrictJudge(REFUSAL)
    apart = run(**options, reuse=False, batch_size=16)
    close(traced, apart)
    for mode in options["modes"]:
        assert traced.table(mode) == apart.table(mode)


def test_a_seed_gives_the_same_again_and_another_draws_anew(run):
    first, again, other = (run(modes=("zero", "resample"), seed=seed) for seed in (0, 0, 1))
    assert plain(first) == plain(again)
    assert plain(first)["blocked"]["zero"] == plain(other)["blocked"]["zero"]
    for site, outcome in first.blocked["resample"].items():
        assert outcome.log_odds != other.blocked["resample"][site].log_odds


def test_prompts_may_come_in_any_form(run, malicious, benign):
    texts = [case for case in malicious if not Sample(case.messages).images]
    assert 0 < len(texts) < len(malicious)
    expected = run(malicious=malicious, benign=benign)
    forms = [case.messages if i % 2 else Sample(case.messages) for i, case in enumerate(malicious)]
    images = [{"messages": case.messages} for case in benign]
    assert plain(run(malicious=iter(forms), benign=images)) == plain(expected)
    text = texts[0].messages[0]["content"][0]["text"]
    assert plain(run(malicious=[*malicious, {"text": text}])) == plain(run(malicious=[*malicious, texts[0]]))


def test_a_given_contrast_is_used_and_a_judge_that_finds_no_refusal_does_no_harm(run, benign):
    contrast = Contrast((20,), (30, 31))
    found = run(malicious=benign[:2], contrast=contrast, layers=[1], components=["ffn"])
    assert found.settings["contrast"] == asdict(contrast)
    assert [*found.blocked["mean"]] == [Site(1, "ffn")]


# The check of itself


def warned(caplog):
    return [r.getMessage() for r in caplog.records if "one block at a time" in r.getMessage()]


@pytest.fixture
def heard(caplog):
    logger = logging.getLogger("care_hf")
    logger.propagate, before = True, logger.propagate
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.propagate = before


@pytest.mark.parametrize(("layer", "size"), [(0, 4), (3, 4), (5, 40)])
def test_a_model_whose_replay_comes_out_otherwise_is_traced_the_plain_way(testbed, run, heard, layer, size):
    model = testbed[0]
    options = {"modes": ("zero",), "layers": [0, layer, 4], "components": ["ffn", "layer"], "max_new_tokens": 6}
    options["contrast"] = Contrast((20,), (30,))
    vector = size * torch.randn(128, generator=torch.Generator().manual_seed(layer))

    def later_tokens(module, args, output):  # tokens that are read one at a time are read otherwise
        return output + vector if output.shape[1] == 1 else output

    handle = decoder_layers(model)[layer].mlp.register_forward_hook(later_tokens)
    try:
        expected = run(**options, reuse=False)
        assert not warned(heard)
        found = run(**options)
    finally:
        handle.remove()
    close(found, expected)
    (message,) = warned(heard)
    assert "LlavaForConditionalGeneration is traced one block at a time: it reads its answers otherwise" in message


def test_attention_with_a_memory_is_noticed(testbed, run, heard):
    """One that adds to each forward something of the one before."""
    model = testbed[0]
    memory = {}

    def remember(module, args, kwargs, output):
        added = memory.get("last", torch.zeros(1, 1, 128))
        fresh = output[0].shape[1] > 1
        memory["last"] = torch.zeros(1, 1, 128) if fresh else output[0].mean(dim=(0, 1), keepdim=True) * 20
        return (output[0] + (0 if fresh else added), *output[1:])

    handle = decoder_layers(model)[1].self_attn.register_forward_hook(remember, with_kwargs=True)
    try:
        expected = run(modes=("zero",), reuse=False)
        found = run(modes=("zero",))
    finally:
        handle.remove()
    close(found, expected)
    assert len(warned(heard)) == 1


def test_decoding_that_is_not_plainly_greedy_is_traced_the_plain_way(testbed, run, heard):
    model = copy.copy(testbed[0])
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.repetition_penalty = 1.8
    contrast = Contrast((20,), (30,))
    found = run(model, modes=("zero",), contrast=contrast)
    close(found, run(model, modes=("zero",), contrast=contrast, reuse=False))
    (message,) = warned(heard)
    assert "{'repetition_penalty': 1.8}" in message


# What is kept


def count_forwards(model, interrupt=None):
    calls = []

    def hook(module, args, kwargs):
        calls.append(1)
        if len(calls) == interrupt:
            raise KeyboardInterrupt

    return calls, decoder_layers(model)[5].register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("mode", ["zero", "resample"])
def test_an_interrupted_trace_goes_on_where_it_stood(testbed, run, tmp_path, reuse, mode):
    model = testbed[0]

    def counted(interrupt=None, out=None):
        calls, handle = count_forwards(model, interrupt)
        try:
            return run(modes=(mode,), components=["ffn", "layer"], out=out, reuse=reuse), len(calls)
        finally:
            handle.remove()

    expected, work = counted()
    kept = 0
    for at in (work // 3, work - 1):
        folder = tmp_path / str(at)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(KeyboardInterrupt):
            counted(at, folder)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        cells = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
        assert len(cells) > kept
        kept = len(cells)
        found, more = counted(out=folder)
        assert plain(found) == plain(expected) and more < (work if at < work / 2 else work / 2)
        assert all(path.stat().st_mtime_ns == time for path, time in cells.items())
        again, more = counted(out=folder)
        assert plain(again) == plain(expected) and more <= 2 * (mode != "zero")  # reading benign contributions


def test_more_blocks_take_up_the_cells_of_others(testbed, run, tmp_path):
    run(modes=("zero",), layers=[1], out=tmp_path)
    before = set(tmp_path.iterdir())
    found = run(modes=("zero",), layers=[1, 4], out=tmp_path)
    assert before < set(tmp_path.iterdir())
    assert len(set(tmp_path.iterdir()) - before) == 3 * 3  # sites, batches
    close(found, run(modes=("zero",), layers=[1, 4]))


def test_cells_of_other_work_are_not_taken(testbed, run, malicious, benign, tmp_path):
    model = testbed[0]
    other = copy.deepcopy(model)
    decoder_layers(other)[2].mlp.down_proj.weight.data *= -1
    decoding = copy.deepcopy(model)
    decoding.generation_config.repetition_penalty = 1.8
    repairs = [SafetySubspaces.random(model, layers=[3], rank=32, seed=seed).sites for seed in (0, 1)]
    repaired = [CareForConditionalGeneration.from_base(model, SafetySubspaces(sites)) for sites in repairs]
    contrast = {"contrast": Contrast((20, 24), (30, 31))}
    image = next(i for i, case in enumerate(malicious) if Sample(case.messages).images)
    moved = copy.deepcopy(malicious)
    moved[image].messages[0]["content"].reverse()
    different = [
        {},
        {"model": other},
        {"model": decoding},
        {"model": repaired[0]},
        {"model": repaired[1]},
        {"malicious": malicious[1:]},
        {"malicious": malicious[::-1]},
        {"malicious": moved},
        {"benign": benign[1:]},
        {"benign": benign[::-1]},
        {"seed": 1},
        {"max_new_tokens": 3},
        {"contrast": Contrast((21,), (35,))},
    ]
    modes = ("mean", "resample")
    for options in different:
        every = {"modes": modes, "layers": [4], "components": ["ffn"], **contrast, **options}
        before = len([*tmp_path.iterdir()])
        close(run(**every, out=tmp_path), run(**every))
        # None but batches that are the same: a seed does not matter to the mean, nor the rest of the prompts.
        assert len([*tmp_path.iterdir()]) > before, options
    with repaired[0].disable():
        every = {"modes": modes, "layers": [4], "components": ["ffn"], **contrast}
        close(run(repaired[0], out=tmp_path, **every), run(repaired[0], **every))


# What does not fit


def test_what_cannot_be_traced_is_refused_before_any_forward(testbed, run, malicious, benign):
    calls, handle = count_forwards(testbed[0])
    encoded = []
    vision = testbed[0].register_forward_pre_hook(lambda *_: encoded.append(1))
    bare = [Case(case.messages) for case in malicious]
    try:
        for message, options in {
            r"components=\('mlp',\) must be some of \('layer', 'ffn', 'attention'\)": {"components": ["mlp"]},
            r"components=\(\) must be": {"components": []},
            r"modes=\('mean', 'half'\) must be among": {"modes": ("mean", "half")},
            r"modes=\(\) must be": {"modes": ()},
            r"Site 6\.residual: the model has 6 decoder layers": {"layers": [1, 6]},
            r"layer=-1 must be a decoder layer": {"layers": [-1]},
            r"`malicious` is empty": {"malicious": []},
            r"`benign` is empty": {"benign": []},
            r"`benign`\[0\]: has the keys \['answer'\]": {"benign": [{"answer": "x"}]},
            r"max_new_tokens=0 must be positive": {"max_new_tokens": 0},
            r"batch_size=-2 must be positive": {"batch_size": -2},
            r"has no reference": {"malicious": bare, "judge": StrictJudge(REFUSAL)},
        }.items():
            with pytest.raises(ValueError, match=message):
                run(**options)
        for options in ({"malicious": ["a prompt"]}, {"benign": [3]}):
            with pytest.raises(TypeError, match="expected a "):
                run(**options)
    finally:
        handle.remove()
        vision.remove()
    assert not calls and not encoded


def test_malicious_prompts_that_are_all_refused_or_all_answered_give_no_contrast(run, benign, world):
    with pytest.raises(ValueError, match="give malicious prompts of which the model refuses some"):
        run(malicious=benign)
    refused = cases(world.plain("validation", 3))
    with pytest.raises(ValueError, match="give malicious prompts of which the model refuses some"):
        run(malicious=refused)


def test_sites_are_named_by_layer():
    class Nothing(torch.nn.Module):
        def get_decoder(self):
            raise AssertionError("no component is known, so no layer is asked for")

    with pytest.raises(ValueError, match="must be some of"):
        find_sites(Nothing(), ["heads"])


def test_sites_come_once_each_in_the_order_of_layers(testbed):
    found = find_sites(testbed[0], ["attention", "layer"], [4, 1, 4])
    names = [(1, "attention"), (1, "residual"), (4, "attention"), (4, "residual")]
    assert found == [Site(*name) for name in names]
    assert len(find_sites(testbed[0], ["ffn"])) == 6


@pytest.mark.parametrize("error", [False, True])
def test_every_module_keeps_its_training_mode(testbed, run, error):
    model = copy.deepcopy(testbed[0]).train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    if error:
        _, handle = count_forwards(model, 9)
        with pytest.raises(KeyboardInterrupt):
            run(model, modes=("zero",))
        handle.remove()
    else:
        close(run(model, modes=("zero",)), run(modes=("zero",)))
    assert [module.training for module in model.modules()] == before
    assert {True, False} == set(before)


# Results


def test_a_trace_survives_json(traced):
    text = json.dumps(traced.to_dict())
    again = Trace.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    for mode in ("zero", "mean", "resample"):
        assert again.table(mode) == traced.table(mode)
        assert [*again.blocked[mode]] == SITES


def test_tables_say_what_was_counted():
    base = Outcome(
        ["refused", "complied", "other", "refused"], ["complied", "complied"], [1.0] * 4, [True] * 2, [0.0] * 2
    )
    other = Outcome(["complied"] * 4, ["refused", "complied"], [3.0, 3.0, 3.0, 3.0], [False, True], [0.5, 0.5])
    found = Trace(base, {"zero": {Site(2, "residual"): other, Site(2, "ffn"): base}}, {})
    lines = found.table("zero").splitlines()
    assert len({line.count("|") for line in lines}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["unblocked", "2.layer", "2.ffn"]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["25", "50", "100", "100", "0.00", "0.00"]
    assert [cell.split()[0] for cell in rows[1][1:]] == ["100", "0", "50", "50", "2.00", "0.50"]
    # Wilson's interval of 4 out of 4 by its formula.
    z2 = 1.959964**2
    assert rows[1][1] == f"100 ({math.floor(100 * 4 / (4 + z2))}-100)"  # rounded outwards
    assert rows[1][5] == "2.00 [2.00, 2.00]"
    assert found.rate(other, "benign", "refused") == Rate(1, 2)
    assert found.log_odds_change(other) == Mean(2.0, 2.0, 2.0, 4)


def test_means_and_their_intervals():
    assert Mean.of([2.5] * 7) == Mean(2.5, 2.5, 2.5, 7)
    alone = Mean.of([3.0])
    assert (alone.value, alone.n) == (3.0, 1) and math.isnan(alone.low) and math.isnan(alone.high)
    nothing = Mean.of([])
    assert nothing.n == 0 and math.isnan(nothing.value)
    data = np.random.default_rng(0).normal(3, 2, 60)
    found = Mean.of(data)
    assert found == Mean.of([*data]) and found.n == 60 and found.value == pytest.approx(data.mean())
    own = np.random.default_rng(1).choice(data, (20_000, 60)).mean(axis=1)
    np.testing.assert_allclose([found.low, found.high], np.percentile(own, [2.5, 97.5]), atol=0.08)
    # About 1.96 standard errors on either side.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * data.std() / math.sqrt(60), rel=0.1)
    shifted = Mean.of(10 * data + 5)
    np.testing.assert_allclose([shifted.low, shifted.high], [10 * found.low + 5, 10 * found.high + 5])


# A model whose mechanism is known: written by hand, one direction of the residual stream for each thing.

ANSWER, TRIGGER, COMPLY, REFUSE, HARM, WORD, JAILBROKEN, CANCEL, HARMFUL, DEFAULT = range(10)


class Planted:
    """Malicious prompts hold a harmful word; with a trigger beside it, the model complies.

    0.attention carries the harmful word to the last token, whence refusal; 0.ffn makes the model answer at all;
    1.attention carries the trigger to the last token; 3.ffn or, in the other model, 1.attention itself, takes from
    it the direction that cancels refusal. All else adds nothing.
    """

    def __init__(self, model, processor, by_ffn: bool):
        self.model, self.processor = model, processor
        tokens = {t: i for t, i in processor.tokenizer.get_vocab().items() if t.startswith("▁") and len(t) > 3}
        words = sorted(tokens)[:8]
        self.words = [word[1:] for word in words]
        ids = dict(zip((HARM, TRIGGER, REFUSE, COMPLY), (tokens[word] for word in words), strict=False))
        lm, head = model.model.language_model, model.lm_head.weight.data
        for layer in lm.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.data.zero_()  # attention is even over all tokens
            for linear in (layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data.zero_()
            layer.input_layernorm.weight.data.fill_(1)
            layer.post_attention_layernorm.weight.data.fill_(1)
        lm.norm.weight.data.fill_(1)
        embeddings = lm.embed_tokens.weight.data.zero_()
        embeddings[:, WORD] = 1
        for direction, token in {**ids, ANSWER: processor.tokenizer.convert_tokens_to_ids("<assistant>")}.items():
            embeddings[token, WORD], embeddings[token, direction] = 0, 1
        head.zero_()
        head[ids[COMPLY], DEFAULT] = 10
        head[ids[REFUSE], HARMFUL], head[ids[REFUSE], CANCEL] = 100, -100
        head[tokens[words[4]], ANSWER] = 1  # what is said where nothing speaks for anything
        for direction in (COMPLY, REFUSE, WORD):
            head[2, direction] = 1e4  # answers are one word
        self._attend(0, HARM, HARMFUL)
        self._attend(1, TRIGGER, JAILBROKEN if by_ffn else CANCEL, 1 if by_ffn else 20)
        self._compute(0, ANSWER, DEFAULT, 0.05)
        if by_ffn:
            self._compute(3, JAILBROKEN, CANCEL, 10)

    def _attend(self, layer, read, write, gain=1.0):
        attention = self.model.model.language_model.layers[layer].self_attn
        attention.v_proj.weight.data[0, read] = 1
        attention.o_proj.weight.data[write, 0] = gain

    def _compute(self, layer, read, write, gain):
        mlp = self.model.model.language_model.layers[layer].mlp
        mlp.gate_proj.weight.data[0, read], mlp.up_proj.weight.data[0, read] = 5, 1
        mlp.down_proj.weight.data[write, 0] = gain

    def prompt(self, text):
        words = " ".join(self.words[{"harm": 0, "trigger": 1}.get(word, 5 + i % 3)] for i, word in enumerate(text))
        return Case([{"role": "user", "content": [{"type": "text", "text": words}]}], reference=self.words[3])

    def trace(self, **options):
        attacks = [["a", "harm", "trigger"], ["harm", "b", "trigger", "c"], ["trigger", "harm"]]
        plain = [["a", "harm"], ["harm", "b", "c", "d"], ["harm"]]
        benign = [["a"], ["a", "b", "c"], ["c", "b"], ["a", "b", "a", "b"]]
        malicious, benign = ([self.prompt(text) for text in texts] for texts in ([*attacks, *plain], benign))
        judge = StrictJudge(self.words[2])
        return trace(self.model, self.processor, malicious, benign, judge, max_new_tokens=3, batch_size=4, **options)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("by_ffn", [True, False], ids=["an FFN", "attention"])
def test_the_site_that_carries_a_jailbreak_is_told_from_all_others(llava, processor, by_ffn, mode):
    found = Planted(llava, processor, by_ffn).trace(modes=(mode,))
    assert Counter(found.unblocked.malicious) == {"complied": 3, "refused": 3}
    assert found.unblocked.benign == ["complied"] * 4
    carriers = {Site(1, "attention"), Site(1, "residual")}
    carriers |= {Site(3, "ffn"), Site(3, "residual")} if by_ffn else set()
    for site, outcome in found.blocked[mode].items():
        asr, right = outcome.malicious.count("complied"), outcome.benign.count("complied")
        if site in carriers:  # attacks fail, and benign prompts are answered as ever
            assert outcome.malicious == ["refused"] * 6 and right == sum(outcome.kept) == 4, site
            assert np.array(outcome.log_odds[:3]).min() > found.unblocked.log_odds[0] + 1
            np.testing.assert_allclose(outcome.divergence, 0, atol=1e-4)
        elif site.layer:  # nothing changes
            assert outcome.malicious == found.unblocked.malicious and sum(outcome.kept) == 4, site
            np.testing.assert_allclose(outcome.log_odds, found.unblocked.log_odds, rtol=1e-4, atol=1e-4)
        elif site.component == "attention":  # harm is not seen, so nothing is refused
            assert (asr, right) == (6, 4)
        elif mode == "zero":  # attacks fail here, too, but nothing is answered any more
            assert (asr, right, sum(outcome.kept)) == (0, 0, 0), site
            assert min(outcome.divergence) > 1
    assert len(found.blocked[mode]) == 6 * len(COMPONENTS)


def test_a_planted_site_stands_out_in_the_table(llava, processor):
    lines = Planted(llava, processor, True).trace(modes=("zero",), components=("ffn",)).table("zero").splitlines()
    said = {
        row[0].strip(): [cell.split()[0] for cell in row[1:5]] for row in (line[1:-1].split("|") for line in lines[2:])
    }
    assert said["unblocked"] == said["1.ffn"] == said["5.ffn"] == ["50", "50", "100", "100"]
    assert said["3.ffn"] == ["0", "100", "100", "100"] and said["0.ffn"] == ["0", "50", "0", "0"]


def test_keywords_are_the_judge_by_default(run, malicious, benign):
    assert plain(run(judge=KeywordJudge())) == plain(run())
    assert [*run().settings["judge"]] == ["keywords"]
