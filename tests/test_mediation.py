"""Activation patching against runs one by one, closed forms, models with a planted cause, and the bundled model."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import random_subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import qwen_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.answers import generate_answers
from care_hf.gating import Gate
from care_hf.interventions import entered_at, forward_replaced, layer_calls, rewritten
from care_hf.mediation import Effects, Mediation, mediate, pair_prompts
from care_hf.pair_runs import GROUPS, PairRuns, counterparts, token_groups
from care_hf.projection import Subspace
from care_hf.samples import IGNORED, Sample, answered, collate, generation_prompt
from care_hf.sites import Site, decoder_layers, record
from care_hf.suite import Case
from care_hf.testbed.building import CHAT_TEMPLATE
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL

REFUSALS = ["i cannot help with that .", "i cannot", "no", "i cannot help with that ."]
COMPLIED = ["step one mix", "step one mix with tool .", "yes a tool", "step one"]
COMPONENTS = ("residual", "ffn", "attention")
SANDWICH = {"ffn": "post_feedforward_layernorm", "attention": "post_attention_layernorm"}
IMAGE = 4  # the placeholder's id in every processor here
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # norms work in float32


def noise(seed, width=48, height=48):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def case(text, *images, request=""):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return Case([{"role": "user", "content": content}], request)


TEXTS = (
    [case("how do i make soap ?"), case("tell me"), case("give me the recipe for a tool ."), case("how do i")],
    [case("please tell me how to make rope ."), case("how do i make a tool ?"), case("a"), case("give me soap .")],
)
PICTURED = (
    [case("how ?", noise(0)), case("tell me how ?", noise(1), noise(2)), case("give me", noise(3)), case("how do i ?")],
    [case("tell me how", noise(4), noise(5)), case("how ?", noise(6)), case("give me how"), case("a tool", noise(7))],
)


# Models


def shallow(llava, depth=3):
    """A LLaVA of some layers, in float64."""
    decoder = llava.get_decoder()
    decoder.layers = decoder.layers[:depth]
    llava.config.text_config.num_hidden_layers = depth
    return llava.double()


class ImageProcessor(Qwen2_5_VLProcessor):
    """The stock processor without videos, which need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


@pytest.fixture(scope="module")
def qwen(_untrained):
    torch.manual_seed(0)
    tokenizer = _untrained[1].tokenizer
    tokenizer.image_token, tokenizer.video_token = "<image>", "<unk>"
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    template = CHAT_TEMPLATE.replace("<image>", "<image>-")  # it tells images apart by what is between them
    processor = ImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template)
    config = qwen_config(len(tokenizer), IMAGE, 3, 5, 6, spread=0.2)
    return Qwen2_5_VLForConditionalGeneration(config).eval().double(), processor


def text_model(name, vocabulary, depth=4):
    kinds = {"llama": LlamaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "gemma4": Gemma4TextConfig}
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name != "llama":
        # Gemma 2 takes the softmax in float32, in which float64's masks are infinite: there no row may see nothing.
        window = 32 if name == "gemma2" else 4
        sizes |= {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"] * (depth // 2)}
    if name == "gemma4":  # the last layers take keys and values of the first
        sizes |= {"num_kv_shared_layers": depth // 2, "vocab_size_per_layer_input": vocabulary}
        sizes |= {"hidden_size_per_layer_input": 8, "global_head_dim": 16}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kinds[name](**sizes)).eval().double()


@pytest.fixture
def build(llava, qwen, processor):
    """Gives a small model, its processor, and pairs of prompts."""

    def make(name):
        if name == "llava":
            return shallow(llava), processor, PICTURED
        if name == "qwen":
            sizes = [(16, 16), (24, 16), (16, 40), (32, 24)]
            pairs = [[case(c.messages[0]["content"][-1]["text"]) for c in side] for side in TEXTS]
            for side, which in ((0, (0, 1, 2)), (1, (0, 1, 3))):
                for i in which:
                    images = [noise(9 * side + i, *sizes[(i + side) % 4])] * (1 + (i == side))
                    pairs[side][i] = case(TEXTS[side][i].messages[0]["content"][0]["text"], *images)
            return *qwen, pairs
        return text_model(name, len(processor.tokenizer)), processor, TEXTS

    return make


def untouched(model):
    """Whether no hook of the package and no other forward is left; transformers leaves hooks of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    left = [hook for hook in hooks if hook.__module__.startswith("care_hf")]
    return not left and not any("forward" in vars(module) for module in model.modules())


def close(values, abs=2e-5):
    """Values or None, in the same places."""
    return [None if value is None else pytest.approx(value, rel=1e-4, abs=abs) for value in values]


# By hand: one run at a time, without padding


def module_of(model, site, names):
    layer = model.get_decoder().layers[site.layer]
    return layer if site.component == "residual" else getattr(layer, names[site.component])


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run_alone(model, processor, prompt, text, modules=(), patch=None):
    """log p(text), what the modules put out, and the groups' positions; `patch` is a module and vectors by position."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = dict(processor.apply_chat_template([prompt.messages], **options))
    ids, answer = inputs["input_ids"][0].tolist(), processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = len(ids)
    inputs["input_ids"] = torch.tensor([ids + answer])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, len(answer)))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    seen = {}

    def note(module, args, output):
        seen[module] = first_of(output)[0].clone()

    def change(module, args, output):
        new = first_of(output).clone()
        for position, vector in patch[1].items():
            new[0, position] = vector
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [module.register_forward_hook(note) for module in modules]
    handles += [patch[0].register_forward_hook(change)] if patch else []
    log_p = model(**inputs).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    image = [i for i in range(end - 1) if ids[i] == IMAGE]
    rest = [i for i in range(end - 1) if ids[i] != IMAGE]
    groups = dict(zip(GROUPS, (image, rest, [end - 1], list(range(end, end + len(answer)))), strict=True))
    return sum(log_p[end + i - 1, token].item() for i, token in enumerate(answer)), seen, groups


def by_hand(model, processor, refused, jailbroken, refusals, complied, sites, names):
    """Y of both runs, and (site, group) -> [(indirect, direct) or None]."""
    modules = {site: module_of(model, site, names) for site in sites}
    outcomes, effects = [], {(site, group): [] for site in sites for group in GROUPS}
    for one, other, *texts in zip(refused, jailbroken, refusals, complied, strict=True):
        runs = [[run_alone(model, processor, p, t, modules.values()) for t in texts] for p in (one, other)]
        y = [row[0][0] - row[1][0] for row in runs]
        outcomes.append(y)
        for (site, group), found in effects.items():
            if not runs[0][0][2][group] or not runs[1][0][2][group]:
                found.append(None)
                continue
            patched = []
            for to, prompt in ((0, one), (1, other)):
                log_p = []
                for text, (_, _, mine), (_, seen, theirs) in zip(texts, runs[to], runs[1 - to], strict=True):
                    source = [seen[modules[site]][i] for i in theirs[group]]
                    lacking = max(0, len(mine[group]) - len(source))
                    vectors = [torch.stack(source).mean(0)] * lacking + source
                    patch = dict(zip(mine[group], vectors[len(vectors) - len(mine[group]) :], strict=True))
                    log_p.append(run_alone(model, processor, prompt, text, (), (modules[site], patch))[0])
                patched.append(log_p[0] - log_p[1])
            found.append((patched[1] - y[1], patched[0] - y[1]))
    return outcomes, effects


def assert_as_by_hand(model, processor, pairs, sites, names=None, order=None):
    """Patch `sites` in `order`; returns whether forwards began at each, and the effects by hand."""
    names = names or {"ffn": "mlp", "attention": "self_attn"}
    given = (*pairs, REFUSALS[: len(pairs[0])], COMPLIED[: len(pairs[0])])
    outcomes, effects = by_hand(model, processor, *given, sites, names)
    runs, skips = PairRuns(model, processor, *given, sites), {}
    base = runs.patched(None)[""]
    torch.testing.assert_close(list(zip(base["refused"], base["jailbroken"], strict=True)), list(map(tuple, outcomes)))
    for site in order or sites:
        found = runs.patched(site)
        skips[site] = runs._skips
        for group in GROUPS:
            for i, name in enumerate(("indirect", "direct")):
                expected = close([values and values[i] for values in effects[site, group]])
                assert found[group][name] == expected, (site, group, name)
    return skips, effects


@pytest.mark.parametrize("name", ["llava", "qwen", "llama", "gemma2", "gemma3"])
def test_effects_are_those_of_runs_one_by_one(build, name):
    model, processor, pairs = build(name)
    last = len(decoder_layers(model)) - 1
    sites = [Site(0, "residual"), Site(1, "ffn"), Site(1, "residual"), Site(last, "attention")]
    sites += [Site(0, "attention"), Site(last, "ffn")] if name == "llama" else []
    names = SANDWICH if name.startswith("gemma") else None
    skips, effects = assert_as_by_hand(model, processor, pairs, sites, names)
    assert skips == {site: site.layer > 0 for site in sites} and untouched(model)
    sizes = {group: max(abs(v[0]) for v in effects[sites[0], group] if v) for group in GROUPS if group != "image"}
    assert min(sizes.values()) > 1e-3  # far above the tolerance
    images = [v is not None for v in effects[sites[0], "image"]]
    assert images == ([True, True, False, False] if name in ("llava", "qwen") else [False] * 4)


def test_pairs_do_not_disturb_one_another(build):
    model, processor, pairs = build("llava")
    sites = [Site(1, "residual")]
    together = PairRuns(model, processor, *pairs, REFUSALS, COMPLIED, sites)
    for i in range(4):
        alone = PairRuns(model, processor, *[[side[i]] for side in (*pairs, REFUSALS, COMPLIED)], sites)
        for site in (None, *sites):
            whole, one = together.patched(site), alone.patched(site)
            for group, by in one.items():
                for name, values in by.items():
                    assert whole[group][name][i : i + 1] == close(values)


# Tokens


ROWS = st.lists(
    st.tuples(st.lists(st.integers(4, 8), min_size=1, max_size=9), st.lists(st.integers(4, 8), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@given(ROWS, st.booleans(), st.sampled_from([(), (4,), (4, 5)]))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_one_group_and_padding_in_none(rows, left, images):
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 1
    ids, mask, labels, expected = ([] for _ in range(4))
    for prompt, answer in rows:
        free = [0] * (width - len(prompt) - len(answer))

        def padded(values, free=free, by=0):
            free = [by] * len(free)
            return [*free, *values] if left else [*values, *free]

        ids.append(padded([*prompt, *answer]))
        mask.append(padded([1] * (len(prompt) + len(answer))))
        labels.append(padded([IGNORED] * len(prompt) + answer, by=IGNORED))
        kinds = ["image" if token in images else "prompt" for token in prompt[:-1]]
        expected.append(padded([*kinds, "last", *["generated"] * len(answer)], by=None))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    found = token_groups(inputs, torch.tensor(labels), images)
    assert tuple(found) == GROUPS
    for group, where in found.items():
        assert where.tolist() == [[kind == group for kind in row] for row in expected]


def test_counterparts_by_hand():
    group = torch.tensor(
        [
            [0, 1, 1, 0, 1, 0],  # three, beside two
            [1, 1, 1, 0, 0, 0],  # three, beside three
            [0, 0, 1, 1, 0, 0],  # two, beside none
            [0, 0, 0, 1, 0, 1],
            [0, 0, 1, 1, 0, 1],
            [0, 0, 0, 0, 0, 0],
        ]
    ).bool()
    expected = [
        [-1, 6, 3, -1, 5, -1],
        [2, 3, 5, -1, -1, -1],
        [-1] * 6,
        [-1, -1, -1, 2, -1, 4],
        [-1, -1, 0, 1, -1, 2],
        [-1] * 6,
    ]
    assert counterparts(group).tolist() == expected


@given(st.integers(1, 3), st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_counterparts_are_mutual_in_order_and_matched_from_the_end(pairs, width, data):
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    group = torch.tensor(data.draw(st.lists(row, min_size=2 * pairs, max_size=2 * pairs)))
    index = counterparts(group)
    assert torch.equal(counterparts(group.roll(pairs, 0)), index.roll(pairs, 0))
    for i, (mine, got) in enumerate(zip(group.tolist(), index.tolist(), strict=True)):
        partner = (i + pairs) % (2 * pairs)
        here, there = [c for c in range(width) if mine[c]], group[partner].nonzero()[:, 0].tolist()
        if not here or not there:
            assert got == [-1] * width
            continue
        assert [c for c in range(width) if got[c] != -1] == here
        taken = [got[c] for c in here]
        lacking = max(0, len(here) - len(there))
        assert taken[:lacking] == [width] * lacking and taken[lacking:] == there[-(len(here) - lacking) :]
        assert all(index[partner, got[c]] == c for c in here[lacking:])


# Identities


def test_at_the_last_layer_the_last_token_and_the_answer_carry_everything(build):
    model, processor, pairs = build("llava")
    site = Site(2, "residual")
    runs = PairRuns(model, processor, *pairs, REFUSALS, COMPLIED, [site])
    base, found = runs.patched(None)[""], runs.patched(site)
    total = np.subtract(base["refused"], base["jailbroken"])
    assert np.abs(total).min() > 1e-2
    for group in ("image", "prompt"):
        for indirect, direct, whole in zip(*found[group].values(), total, strict=True):
            assert indirect is None or (indirect == 0 and direct == pytest.approx(whole, abs=1e-9))
    indirect = {group: np.array(found[group]["indirect"]) for group in ("last", "generated")}
    assert min(np.abs(values[:2]).min() for values in indirect.values()) > 1e-3
    np.testing.assert_allclose(indirect["last"] + indirect["generated"], total, rtol=1e-6)
    for group, values in indirect.items():  # each token's own log-probabilities add up
        np.testing.assert_allclose(values + found[group]["direct"], total, rtol=1e-6)


def test_a_prompt_beside_itself_changes_nothing(build):
    model, processor, pairs = build("llava")
    sites = [Site(0, "residual"), Site(1, "ffn"), Site(1, "attention")]
    runs = PairRuns(model, processor, pairs[0], pairs[0], REFUSALS, COMPLIED, sites)
    base = runs.patched(None)[""]
    assert base["refused"] == pytest.approx(base["jailbroken"], abs=1e-9)
    for site in sites:
        for group, by in runs.patched(site).items():
            values = [v for items in by.values() for v in items if v is not None]
            assert values == pytest.approx([0] * len(values), abs=1e-6) and (values or group == "image")


def test_between_linear_parts_direct_and_indirect_effects_add_up(build):
    """The last FFN's output goes linearly into logits without a norm, and so into the odds of two single tokens."""
    model, processor, pairs = build("llama")
    model.model.norm = nn.Identity()
    last = len(model.model.layers) - 1
    sites = [Site(last, "ffn"), Site(last, "attention"), Site(0, "residual")]
    runs = PairRuns(model, processor, *pairs, ["cannot"] * 4, ["step"] * 4, sites)
    base = runs.patched(None)[""]
    total = np.subtract(base["refused"], base["jailbroken"])
    found = {site: runs.patched(site) for site in sites}

    def summed(site):
        return np.add(*found[site]["last"].values())

    np.testing.assert_allclose(summed(sites[0]), total, rtol=1e-5)
    assert np.abs(found[sites[0]]["last"]["indirect"]).min() > 1e-3
    # Through what is not linear they do not.
    assert np.abs(summed(sites[1]) - total).max() > 1e-2 and np.abs(summed(sites[2]) - total).max() > 1e-2
    for site in sites:  # a forced text of one token predicts nothing
        assert found[site]["generated"] == {"indirect": [0] * 4, "direct": pytest.approx(total.tolist())}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_only_the_forced_tokens_count(build, length):
    """No end of sequence is scored, since answers are cut off."""
    model, processor, pairs = build("llama")
    words = ["step one mix with tool".split()[:length], "i cannot help with that".split()[:length]]
    texts = [" ".join(w) for w in words]
    runs = PairRuns(model, processor, *[side[:1] for side in pairs], texts[1:], texts[:1], [Site(0, "ffn")])
    assert (runs.labels != IGNORED).sum(1).tolist() == [length] * 4
    assert not (runs.inputs["input_ids"] == processor.tokenizer.eos_token_id).any()


def test_a_mean_over_many_image_tokens_is_within_half_precision(llava, processor):
    shallow(llava, 2)
    with torch.no_grad():
        llava.model.multi_modal_projector.linear_2.bias[0] = 2000  # 36 of them are beyond float16
    pairs = [case("how ?", noise(0), noise(1))], [case("tell me", noise(2))]
    site, found = Site(0, "residual"), []
    for dtype in (torch.float64, torch.float16):
        runs = PairRuns(llava.to(dtype), processor, *pairs, ["i cannot"], ["step one"], [site])
        found.append([*runs.patched(None)[""].values(), *runs.patched(site)["image"].values()])
    assert np.abs(found[0][2:]).max() > 1e-3
    np.testing.assert_allclose(found[1], found[0], atol=0.05)


# Forwards that begin at a layer


def forced(model, processor, prompts):
    inputs, _ = answered(processor, prompts, REFUSALS[: len(prompts)])
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@contextmanager
def counting(modules):
    """How often each module runs."""
    counts = Counter()
    handles = [
        module.register_forward_hook(lambda *_, index=index: counts.update([index]))
        for index, module in enumerate(modules)
    ]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["testbed", "llava", "qwen", "llama", "gemma2", "gemma3"])
@torch.no_grad()
def test_a_forward_may_begin_at_any_layer(testbed, build, name):
    model, processor, pairs = (*testbed, PICTURED) if name == "testbed" else build(name)
    inputs = forced(model, processor, pairs[0])
    with layer_calls(model) as calls:
        expected = model(**inputs, use_cache=False).logits
    layers = decoder_layers(model)
    assert len(calls) == len(layers) and untouched(model)
    for layer in range(len(layers)):
        with counting([one.mlp for one in layers]) as counts, entered_at(model, layer, calls):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)
        assert counts == dict.fromkeys(range(layer, len(layers)), 1)
        # And so where something changes from there on.
        sites = [Site(layer, component) for component in COMPONENTS]
        for site in sites:
            with rewritten(model, site, lambda output, stream: output.flip(-1)):
                changed = model(**inputs, use_cache=False).logits
                with entered_at(model, layer, calls):
                    torch.testing.assert_close(model(**inputs, use_cache=False).logits, changed)
            assert not torch.allclose(changed, expected, atol=1e-2)
    assert untouched(model)


@torch.no_grad()
def test_what_enters_is_what_the_calls_say(build):
    model, processor, pairs = build("llama")
    inputs, other = (forced(model, processor, [prompt]) for prompt in (pairs[0][0], pairs[1][1]))
    with layer_calls(model) as calls:
        model(**inputs)
        first = [(entered.clone(), output.clone()) for entered, output in calls]
        model(**other)
        assert len(calls) == 4 and calls[0][0].shape != first[0][0].shape  # those of the last forward alone
        model(**inputs)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(calls, first, strict=True))
    mine = [(torch.randn_like(entered), output) for entered, output in calls]
    seen = []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(args), with_kwargs=True
    )
    with entered_at(model, 2, mine):
        model(**inputs)
    handle.remove()
    kwargs = {"position_embeddings": model.model.rotary_emb(mine[2][0], torch.arange(mine[2][0].shape[1])[None])}
    expected = first_of(model.model.layers[2](mine[2][0], **kwargs))
    torch.testing.assert_close(seen[0], expected, **CLOSE)


@torch.no_grad()
def test_hooks_and_forwards_are_gone_after_errors(build):
    model, processor, pairs = build("llama")
    inputs = forced(model, processor, pairs[0])
    with layer_calls(model) as calls:
        model(**inputs)
    with pytest.raises(KeyboardInterrupt), layer_calls(model):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), entered_at(model, 2, calls):
        assert "forward" in vars(model.model.layers[0])
        raise KeyboardInterrupt
    assert untouched(model)
    with pytest.raises(ValueError, match=r"layer=4: the model has 4 decoder layers \(0 to 3\)"):
        entered_at(model, 4, calls).__enter__()
    with pytest.raises(ValueError, match="`calls` holds 0 of 4 layers; do a forward in `layer_calls` first"):
        entered_at(model, 1, []).__enter__()
    assert untouched(model)


@torch.no_grad()
def test_a_forward_that_accelerate_has_replaced_is_there_again(build):
    model, processor, pairs = build("llama")
    inputs = forced(model, processor, pairs[0])
    runs = []

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            runs.append(module)
            return args, kwargs

    layers = model.model.layers
    for layer in layers:
        add_hook_to_module(layer, Noting())
    theirs = [vars(layer)["forward"] for layer in layers]
    with layer_calls(model) as calls:
        expected = model(**inputs).logits
    runs.clear()
    with entered_at(model, 2, calls):
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert runs == list(layers[2:])
    assert [vars(layer)["forward"] for layer in layers] == theirs
    assert torch.equal(model(**inputs).logits, expected) and runs == [*layers[2:], *layers]


def test_replaced_forwards_may_be_nested():
    module, x = nn.Linear(2, 2), torch.ones(2)
    with forward_replaced(module, lambda x: x + 1):
        with forward_replaced(module, lambda x: x + 2):
            assert torch.equal(module(x), x + 2)
        assert torch.equal(module(x), x + 1)
    assert "forward" not in vars(module) and torch.equal(module(x), x @ module.weight.T + module.bias)


# Models whose layers share more than the stream


def every(model, components=("residual", "attention")):
    return [Site(layer, component) for layer in range(len(decoder_layers(model))) for component in components]


def fewer(pairs, n=2):
    return [side[:n] for side in pairs]


def test_keys_that_later_layers_share_are_not_missed(build):
    model, processor, pairs = build("gemma4")
    skips, _ = assert_as_by_hand(model, processor, fewer(pairs), every(model), SANDWICH)
    assert not any(skips.values()) and untouched(model)


def test_a_gates_decision_is_not_missed(build):
    model, processor, pairs = build("llava")
    gate_site, repaired_site = Site(0, "residual"), Site(1, "residual")
    readers = torch.randn(128, 1, generator=torch.Generator().manual_seed(1))
    prompts = [Sample(c.messages) for c in (*pairs[0], *pairs[1])]
    inputs = collate(processor, prompts, ()).inputs
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with record(model, [gate_site]) as activations, torch.no_grad():
        model(**inputs)
    threshold = (activations[gate_site][:, -1].float() @ readers).median(dim=0).values + 1e-3
    gate = Gate(generation_prompt(processor), readers, threshold)
    last = Subspace(random_subspace(0, rank=64).basis, 40 * random_subspace(1).mean)
    subspaces = SafetySubspaces({repaired_site: {"last": last}}, gate=gate, gate_site=gate_site)
    repaired = CareForConditionalGeneration.from_base(model, subspaces).eval()
    sites = every(repaired, ("residual",))
    skips, effects = assert_as_by_hand(repaired, processor, pairs, sites)
    # From layer 2 on nothing reads the gate any more.
    assert skips == {site: site.layer == 2 for site in sites}
    # What is patched at the gate decides, so what is repaired differs.
    with repaired.disable():
        _, plain = by_hand(repaired, processor, *pairs, REFUSALS, COMPLIED, sites[:1], {})
    changes = np.abs(np.subtract(effects[gate_site, "last"], plain[gate_site, "last"]))
    assert changes.max() > 0.05


@pytest.mark.parametrize("stale", [True, False])
def test_what_a_hook_carries_is_not_missed(build, stale):
    """`stale`: taken inside of layer 0, so that it stays where that layer is passed over; else at its output."""
    model, processor, pairs = build("llama")
    layers, carried = model.model.layers, []
    taken = layers[0].post_attention_layernorm if stale else layers[0]

    def take(module, args, output):
        carried[:] = [args[0] if stale else first_of(output)]

    taken.register_forward_hook(take)
    layers[2].mlp.register_forward_hook(lambda module, args, output: output + carried[0])
    sites = every(model)
    order = [Site(3, "residual"), *sites, Site(1, "residual"), Site(0, "attention"), Site(1, "attention")]
    skips, effects = assert_as_by_hand(model, processor, fewer(pairs), sites, order=order)
    # After layers above have been patched, layer 0 has left what it leaves undisturbed.
    assert not skips[Site(1, "attention")] and skips[Site(1, "residual")] is stale
    assert skips[Site(3, "residual")]  # nothing reads it any more
    assert abs(effects[Site(0, "attention"), "last"][0][0]) > 1e-2


# A planted cause


def planted(processor, mover, writer=None):
    """Attention of layer `mover` takes the word "hazard" to later tokens; there it refuses, or FFN `writer` makes it.

    Four dimensions: constant, hazard, heard of it, refuse. Heads look at all tokens alike.
    """
    tokenizer = processor.tokenizer

    def one(word):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        return token

    sizes = {"hidden_size": 4, "intermediate_size": 1, "num_hidden_layers": 4, "num_attention_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "norm" in name else 0)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[one("hazard"), 1] = 1
        attention = model.model.layers[mover].self_attn
        attention.v_proj.weight[0, 1] = attention.o_proj.weight[2, 0] = 1
        if writer is not None:
            ffn = model.model.layers[writer].mlp
            ffn.gate_proj.weight[0, 0] = ffn.up_proj.weight[0, 2] = ffn.down_proj.weight[3, 0] = 1
        model.lm_head.weight[one("step"), 0] = 1
        model.lm_head.weight[one("cannot"), 2 if writer is None else 3] = 50
    model.model.norm = nn.Identity()
    return model


@pytest.mark.parametrize("mover, writer", [(0, None), (2, None), (1, 2), (1, 1), (0, 3)])
def test_a_planted_cause_is_found_where_it_is(processor, mover, writer):
    model = planted(processor, mover, writer)
    refused = [case(f"how do i make {words} ?") for words in ("hazard", "a hazard tool", "tool with hazard")]
    jailbroken = [case(f"how do i make {words} ?") for words in ("tool", "a a tool", "tool with a")]
    assert generate_answers(model, processor, [*refused, *jailbroken], 1) == ["cannot"] * 3 + ["step"] * 3
    found = mediate(model, processor, refused, jailbroken, max_new_tokens=1)
    total = np.subtract(found.refused, found.jailbroken)
    assert total.min() > 1 and len(found.effects) == 12
    for site, by_group in found.effects.items():
        carries = {
            "residual": "prompt" if site.layer < mover else "last",
            "attention": "last" if site.layer == mover else None,
            "ffn": "last" if site.layer == writer else None,
        }[site.component]
        assert set(by_group) == set(GROUPS)
        assert by_group["image"] == Effects([None] * 3, [None] * 3)
        for group in ("prompt", "last", "generated"):
            here = group == carries
            np.testing.assert_allclose(by_group[group].indirect, total * here, atol=1e-5, err_msg=f"{site} {group}")
            np.testing.assert_allclose(by_group[group].direct, total * (not here), atol=1e-5, err_msg=f"{site} {group}")
            assert found.share(site, group) == pytest.approx(float(here), abs=1e-5)
            assert found.indirect(site, group).value == pytest.approx(total.mean() * here, abs=1e-5)


# `mediate` on the bundled model


@pytest.fixture(scope="module")
def pairs(testbed):
    """Three pairs that the bundled model refuses and complies with, with and without images."""
    suite = load_suite("test", n=16)

    def answered_so(cases, refusing):
        answers = generate_answers(*testbed, cases, 8)
        return [c for c, answer in zip(cases, answers, strict=True) if answer and (answer == REFUSAL) == refusing]

    refused = answered_so(list(suite.harmful), True)
    jailbroken = [c for cases in suite.attacks.values() for c in answered_so(list(cases), False)[:1]]
    assert len(refused) >= 3 and len(jailbroken) >= 3
    return refused[:3], jailbroken[:3]


OPTIONS = {"components": ("layer", "ffn"), "layers": [1, 4], "max_new_tokens": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def whole(testbed, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with working(testbed[0]) as count:
        found = mediate(*testbed, *pairs, **OPTIONS, out=folder)
    return found, count.total(), folder


@contextmanager
def working(model, stop_at=None):
    """Counts the model's forwards; Ctrl-C at one of them."""
    count = Counter()

    def note(module, args, kwargs):
        if count.total() + 1 == stop_at:
            raise KeyboardInterrupt
        count.update([""])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def test_refusal_of_the_bundled_model_goes_through_its_last_layer(testbed, pairs):
    found = mediate(*testbed, *pairs, components=("layer",), layers=[0, 5], max_new_tokens=8)
    assert found.total.value > 3 and found.settings == {"max_new_tokens": 8, "pairs": 3}
    answers = [generate_answers(*testbed, side, 8) for side in pairs]
    assert set(answers[0]) == {REFUSAL} and found.refused == [
        pytest.approx(run_alone(*testbed, c, REFUSAL)[0] - run_alone(*testbed, c, other)[0], abs=1e-3)
        for c, other in zip(pairs[0], answers[1], strict=True)
    ]
    last = Site(5, "residual")
    assert found.share(last, "last") + found.share(last, "generated") == pytest.approx(1, abs=1e-4)
    assert found.share(last, "prompt") == 0


def test_batches_change_nothing(testbed, pairs, whole):
    found = mediate(*testbed, *pairs, **{**OPTIONS, "batch_size": 3})
    assert found.refused == pytest.approx(whole[0].refused, abs=1e-3)
    for site, by_group in whole[0].effects.items():
        for group, effects in by_group.items():
            for name in ("indirect", "direct"):
                assert getattr(found.effects[site][group], name) == close(getattr(effects, name), abs=1e-3)


def test_what_is_finished_is_not_done_again(testbed, pairs, whole):
    found, work, folder = whole
    assert work > 40
    with working(testbed[0]) as count:
        again = mediate(*testbed, *pairs, **OPTIONS, out=folder)
    assert not count and again.to_dict() == found.to_dict()


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_an_interrupted_run_goes_on(testbed, pairs, whole, tmp_path, at):
    found, work, _ = whole
    model = testbed[0]
    with working(model, int(work * at)) as before, pytest.raises(KeyboardInterrupt):
        mediate(*testbed, *pairs, **OPTIONS, out=tmp_path)
    assert untouched(model) and not model.training
    with working(model) as after:
        resumed = mediate(*testbed, *pairs, **OPTIONS, out=tmp_path)
    assert resumed.to_dict() == found.to_dict()
    # What is done twice: the answers or the place that were going on, and a record and a check to begin from.
    assert work - before.total() <= after.total() <= work - before.total() + 10
    with working(model) as more:
        mediate(*testbed, *pairs, **{**OPTIONS, "layers": [1, 3, 4]}, out=tmp_path)
    assert 0 < more.total() < work / 2  # places of another layer are added


@pytest.mark.parametrize("other", ["prompts", "order", "model", "tokens", "template"])
def test_cells_of_another_work_are_not_taken(testbed, pairs, whole, llava, processor, monkeypatch, other):
    model, work, folder = testbed[0], whole[1], whole[2]
    of, options = pairs, OPTIONS
    if other == "prompts":
        of = pairs[0], [*pairs[1][:2], pairs[0][0]]
        with pytest.raises(ValueError, match=r"Pair 2: the model answers 'i cannot help with that \.' to the refused"):
            mediate(*testbed, *of, **options, out=folder)
        of = pairs[0][:2], pairs[1][:2]
    if other == "order":
        of = [side[::-1] for side in pairs]
    if other == "model":
        llava.load_state_dict(model.state_dict())
        with torch.no_grad():
            llava.lm_head.weight.mul_(1.5)
        model = llava
    if other == "tokens":
        options = {**OPTIONS, "max_new_tokens": 7}
    if other == "template":
        monkeypatch.setattr(testbed[1], "chat_template", testbed[1].chat_template + "{# otherwise #}")
    with working(model) as count:
        found = mediate(model, testbed[1], *of, **options, out=folder)
    assert count.total() > work / 3
    if other == "order":
        assert found.refused == pytest.approx(whole[0].refused[::-1], abs=1e-3)
    if other == "model":
        assert found.total.value != pytest.approx(whole[0].total.value, rel=0.05)


BAD = [
    ({"jailbroken": 1}, "There are 3 refused and 1 jailbroken prompts; give pairs"),
    ({"refused": 0}, "`refused` is empty"),
    ({"components": ("neurons",)}, r"components=\('neurons',\) must be some of \('layer', 'ffn', 'attention'\)"),
    ({"components": ()}, r"components=\(\) must be some of"),
    ({"layers": [6]}, r"Site 6\.residual: the model has 6 decoder layers \(0 to 5\)"),
    ({"layers": [-1]}, "layer=-1 must be a decoder layer counted from 0"),
    ({"layers": []}, r"layers=\[\] names no layer; give numbers from 0, or None for all"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"batch_size": -2}, "batch_size=-2 must be at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_input_is_refused_before_any_forward(testbed, pairs, tmp_path, bad, message):
    given = [side[: bad.get(name)] for name, side in zip(("refused", "jailbroken"), pairs, strict=True)]
    options = {**OPTIONS, **{k: v for k, v in bad.items() if k not in ("refused", "jailbroken")}}
    with working(testbed[0]) as count, pytest.raises(ValueError, match=message):
        mediate(*testbed, *given, **options, out=tmp_path)
    assert not count and not list(tmp_path.iterdir())


def test_a_prompt_of_no_known_form_is_named(testbed, pairs):
    with pytest.raises(ValueError, match=r"`jailbroken`\[1\]"):
        mediate(*testbed, pairs[0][:2], [{"text": "how ?"}, {"question mark": "how ?"}])


def test_pairs_that_are_answered_alike_are_named(testbed, pairs):
    message = re.escape(
        f"Pair 1: the model answers {REFUSAL!r} to the refused prompt and {REFUSAL!r} to the jailbroken"
    )
    model = testbed[0]
    with pytest.raises(ValueError, match=message):
        mediate(*testbed, pairs[0][:2], [pairs[1][0], pairs[0][1]], **OPTIONS)
    assert untouched(model) and not model.training


def test_an_empty_answer_is_named(processor):
    model = planted(processor, 1)
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id, 0] = 2
    message = "Pair 0: the model answers 'cannot' to the refused prompt and '' to the jailbroken one; give a prompt"
    with pytest.raises(ValueError, match=message):
        mediate(model, processor, [case("how hazard ?")], [case("how tool ?")], max_new_tokens=1)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_before(processor, training):
    model = planted(processor, 1).train(training)
    model.config.attention_dropout = 0.5  # of which nothing may be seen
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    given = [case("how hazard ?")], [case("how tool ?")]
    found = mediate(model, processor, *given, max_new_tokens=1)
    assert found.share(Site(1, "attention"), "last") == pytest.approx(1, abs=1e-5)
    assert model.training is training and all(module.training is training for module in model.model.layers.modules())
    with working(model, 3), pytest.raises(KeyboardInterrupt):
        mediate(model, processor, *given, max_new_tokens=1)
    assert model.training is training


def test_prompts_of_any_form_and_a_place_named_twice(processor):
    model = planted(processor, 1)
    words = "how hazard ?", "how tool ?"
    forms = [[{"text": word}] for word in words], [[case(word)] for word in words]
    forms += ([[case(word).messages] for word in words],)
    found = [mediate(model, processor, *form, ("ffn", "ffn"), layers=[2, 2], max_new_tokens=1) for form in forms]
    assert found[0].to_dict() == found[1].to_dict() == found[2].to_dict()
    assert list(found[0].effects) == [Site(2, "ffn")]
    assert len(found[0].effects[Site(2, "ffn")]["last"].indirect) == 1


# Results


def mediation(seed=0, n=40):
    rng = np.random.default_rng(seed)
    refused, jailbroken = rng.normal(4, 1, n).tolist(), rng.normal(-2, 1, n).tolist()
    effects = {
        site: {
            group: Effects(*(rng.normal(1, 2, n).tolist() for _ in range(2)))
            for group in ("prompt", "last", "generated")
        }
        for site in (Site(0, "residual"), Site(1, "ffn"))
    }
    pictured = [value if i % 4 == 0 else None for i, value in enumerate(rng.normal(0, 3, n).tolist())]
    for by in effects.values():
        by["image"] = Effects(pictured, [None if value is None else 2 * value for value in pictured])
    effects = {site: {group: by[group] for group in GROUPS} for site, by in effects.items()}
    return Mediation(refused, jailbroken, effects, {"pairs": n})


def test_means_and_intervals_are_those_of_numpy():
    found, rng = mediation(), np.random.default_rng(7)
    site = Site(1, "ffn")
    image = [v for v in found.effects[site]["image"].indirect if v is not None]
    assert len(image) == 10
    cases = {
        found.total: np.subtract(found.refused, found.jailbroken),
        found.indirect(site, "last"): np.array(found.effects[site]["last"].indirect),
        found.direct(site, "last"): np.array(found.effects[site]["last"].direct),
        found.indirect(site, "image"): np.array(image),
        found.direct(site, "image"): 2 * np.array(image),
    }
    assert len(cases) == 5
    for mean, values in cases.items():
        assert mean.value == pytest.approx(values.mean()) and mean.n == len(values)
        drawn = rng.choice(values, (20_000, len(values))).mean(1)
        scale = values.std() / len(values) ** 0.5
        assert (mean.low, mean.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.2 * scale)


def test_a_share_is_a_ratio_of_sums_over_the_pairs_that_have_the_place():
    site = Site(0, "ffn")
    effects = {"image": Effects([1.0, None, 5.0], [0.0, None, 1.0]), "last": Effects([1.0, 2.0, 3.0], [0.0] * 3)}
    found = Mediation([3.0, 100.0, 8.0], [1.0, 0.0, -2.0], {site: effects}, {})
    assert found.share(site, "image") == pytest.approx(6 / 12) and found.share(site, "last") == pytest.approx(6 / 112)
    assert np.isnan(replace(found, jailbroken=found.refused).share(site, "last"))
    nowhere = replace(found, effects={site: {"image": Effects([None] * 3, [None] * 3)}})
    assert np.isnan(nowhere.share(site, "image")) and nowhere.indirect(site, "image").n == 0


def test_results_survive_json(whole):
    for found in (mediation(), whole[0]):
        again = Mediation.from_dict(json.loads(json.dumps(found.to_dict())))
        assert again.to_dict() == found.to_dict() and again.table() == found.table()
        assert list(again.effects) == list(found.effects) and again.effects == found.effects


def test_the_table_has_a_row_per_place_and_an_empty_cell_where_nothing_is_known():
    found = mediation()
    found.effects[Site(1, "ffn")]["image"] = Effects([None] * 40, [None] * 40)
    intro, _, head, line, *rows = found.table().split("\n")
    assert intro.startswith(f"Total effect {found.total} nats, n = 40 pairs.")
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["place", *GROUPS]
    assert set(line) == set("| -") and {text.count("|") for text in (head, line, *rows)} == {6}
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["0.layer", "1.ffn"] and cells[1][1] == ""
    site = Site(0, "residual")
    mean, share, direct = found.indirect(site, "last"), found.share(site, "last"), found.direct(site, "last")
    assert cells[0][3] == f"{mean}, {100 * share:.0f} % ({direct.value:.2f})"


# Pairs


def test_pairs_are_about_the_same_request():
    refused = [case("a", request="tool"), case("b", request="rope"), case("c", request="tool"), case("d", request="x")]
    jailbroken = [case("e", request="tool"), case("f", request="tool"), case("g", request="rope"), case("h")]
    first, second = pair_prompts(refused, jailbroken)
    assert first == refused[:3] and second == [jailbroken[0], jailbroken[2], jailbroken[1]]
    assert pair_prompts([], jailbroken) == pair_prompts(refused, []) == ([], [])


@given(st.lists(st.sampled_from(["", "a", "b"]), max_size=6), st.lists(st.sampled_from(["", "a", "b"]), max_size=6))
@settings(deadline=None)
def test_as_many_pairs_as_there_can_be_each_prompt_once(one, other):
    refused, jailbroken = ([case(str(i), request=r) for i, r in enumerate(side)] for side in (one, other))
    first, second = pair_prompts(refused, jailbroken)
    assert [c.request for c in first] == [c.request for c in second]
    assert Counter(c.request for c in first) == Counter(one) & Counter(other)
    assert len({id(c) for c in first}) == len({id(c) for c in second}) == len(first)
    for request in ("", "a", "b"):  # in order
        for mine, all_of in ((first, refused), (second, jailbroken))[: 1 if request else 2]:
            having = [c for c in mine if c.request == request]
            assert having == [c for c in all_of if c.request == request][: len(having)]


def test_partners_have_as_many_images_and_are_not_all_of_the_first_attack():
    refused = [case("how ?", request="a"), case("how ?", noise(0), request="a"), case("how ?", request="b")]
    attacks = [[case(name, *images, request=r) for r in "ab"] for name, images in (("x", ()), ("y", ()))]
    pictured = case("z", noise(1), request="a")
    second = pair_prompts(refused, [*attacks[0], *attacks[1], pictured])[1]
    assert second == [attacks[0][0], pictured, attacks[0][1]]
    second = pair_prompts([refused[0], refused[2]], [*attacks[0], *attacks[1], pictured])[1]
    assert second == [attacks[0][0], attacks[1][1]]
