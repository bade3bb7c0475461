import functools
from contextlib import contextmanager

import pytest
import torch
from conftest import random_subspace
from tiny import qwen_config
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from care_hf import replay as replay_module
from care_hf.blocking import MODES, Blocker, Contributions, collect_contributions, generate_blocked
from care_hf.gating import Gate
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.replay import NotReplayable, Replay
from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import COMPONENTS, Site, decoder_layers, hidden_size, site_module
from care_hf.subspace import SafetySubspaces

# The end of an answer is likely in some of these vocabularies: several ids end it.
ENDS = {"eos_token_id": [2, 11, 23, 31, 47, 59, 71, 83], "pad_token_id": 0, "bos_token_id": 1}
GROUPED = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **ENDS,
}
PLAIN = {name: value for name, value in GROUPED.items() if name not in ("num_key_value_heads", "intermediate_size")}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def randomised(model, scale=0.25, seed=3):
    """With weights large enough for answers to vary."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def text_inputs(rows=6, length=7):
    """Left-padded by different amounts."""
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= torch.arange(rows)[:, None] % 4).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def qwen_inputs():
    first = [5, 91, *[90] * 4, 92, 6, 7, 8]
    ids = torch.tensor([first, [0] * 6 + [9, 10, 12, 13], [0] * 3 + [91, *[90] * 4, 92, 14], [15] * 9 + [16]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == 90).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def qwen():
    return Qwen2_5_VLForConditionalGeneration(qwen_config(99, 90, 93, 91, 92, **ENDS))


FAMILIES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), text_inputs),
    "glm4, with norms after the blocks": (lambda: Glm4ForCausalLM(Glm4Config(**GROUPED, head_dim=8)), text_inputs),
    "opt, with a flattened FFN": (
        lambda: OPTForCausalLM(OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32)),
        text_inputs,
    ),
    "neox, with parallel blocks": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN, intermediate_size=48)),
        text_inputs,
    ),
    "gpt2, without an attention of a known name": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, **ENDS)),
        text_inputs,
    ),
    "qwen3-moe, a mixture of experts": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        ),
        text_inputs,
    ),
    "qwen2.5-vl, with images in some rows": (qwen, qwen_inputs),
    "qwen2.5-vl, without images": (qwen, text_inputs),
}


def blockers_of(model, modes=MODES, seed=0):
    """Every block of a model, with contributions drawn at random."""
    sites = []
    for layer in range(len(decoder_layers(model))):
        for component in COMPONENTS:
            try:
                site_module(model, Site(layer, component))
            except ValueError:
                continue
            sites.append(Site(layer, component))
    generator, d = torch.Generator().manual_seed(4), hidden_size(model)
    of = Contributions(
        {site: torch.randn(d, generator=generator) for site in sites},
        {site: torch.randn(40, d, generator=generator) for site in sites},
    )
    return [Blocker(site, mode, of, seed) for mode in modes for site in sites]


def until_the_end(tokens, ends):
    """Answers as lists, cut after their end."""
    cut = []
    for row in tokens.tolist():
        at = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        cut.append(row[: at + 1])
    return cut


def ends_of(model):
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def check(model, inputs, blockers, tokens, numbers=None, replay=None):
    """Compare with stock `generate`; gives answers by mode and site."""
    numbers = torch.arange(len(inputs["input_ids"])) if numbers is None else numbers
    replay = replay or Replay(model, inputs, numbers, tokens)
    assert replay.agrees()
    ends, found = ends_of(model), {}
    base, first = generate_blocked(model, inputs, None, numbers, tokens)
    assert until_the_end(replay.answers, ends) == until_the_end(base, ends)
    torch.testing.assert_close(replay.first, first, rtol=1e-4, atol=1e-4)
    results = list(replay.blocked(blockers))
    assert [blocker for blocker, _, _ in results] == list(blockers)
    for blocker, answers, first in results:
        expected, expected_first = generate_blocked(model, inputs, blocker, numbers, tokens)
        name = blocker.mode, blocker.site
        assert until_the_end(answers, ends) == until_the_end(expected, ends), name
        width = min(answers.shape[1], expected.shape[1])
        assert torch.equal(answers[:, :width], expected[:, :width]), name  # padding, too
        assert (answers[:, width:] == model.generation_config.pad_token_id).all()
        torch.testing.assert_close(first, expected_first, rtol=1e-4, atol=1e-4)
        found[name] = until_the_end(answers, ends)
    return until_the_end(base, ends), found


def differences(base, found):
    """Where answers under blocks leave the undisturbed ones: None or the place, of all."""
    places = set()
    for answers in found.values():
        for a, b in zip(base, answers, strict=True):
            same = [x == y for x, y in zip(a, b, strict=False)]
            places.add(None if a == b else same.index(False) if False in same else min(len(a), len(b)))
    return places


def state(model):
    """Every hook and stand-in of the model."""
    return [
        (name, list(m._forward_hooks), list(m._forward_pre_hooks), m.__dict__.get("forward"))
        for name, m in model.named_modules()
    ]


# It is what `generate` gives


@pytest.fixture(scope="module")
def prompts(world):
    """Of unequal lengths, with and without images, refused and answered."""
    some = [*world.attack("typographic", "validation", 2), *world.plain("validation", 2)]
    return [*some, *world.benign("recipe", "validation", 2), *world.benign("typographic", "validation", 2)]


@pytest.fixture(scope="module")
def batch(testbed, prompts):
    return collate(testbed[1], [Sample(p.messages) for p in prompts], ()).inputs


@pytest.fixture(scope="module")
def measured(testbed, prompts):
    """Every block of the testbed, with its own contributions."""
    sites = [Site(layer, component) for layer in range(6) for component in COMPONENTS]
    of = collect_contributions(*testbed, prompts[4:], sites)
    return [Blocker(site, mode, of, 3) for mode in MODES for site in sites]


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_answers_of_the_testbed_are_those_of_generate(testbed, batch, measured, tokens):
    model, _ = testbed
    before = state(model)
    base, found = check(model, batch, measured if tokens == 12 else measured[::7], tokens)
    assert state(model) == before
    padding = (batch["attention_mask"] == 0).sum(dim=1)
    assert padding.min() == 0 and len(set(padding.tolist())) > 2
    # The case is not trivial: answers end at different places or are cut, blocks change some of them somewhere.
    if tokens == 7:
        assert {row[-1] == 2 for row in base} == {True, False}
    if tokens == 12:
        assert len({len(row) for row in base}) > 1
        assert {None, 0} < differences(base, found) and len(differences(base, found)) > 4


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family_are_those_of_generate(name):
    make, inputs = FAMILIES[name]
    model = randomised(make())
    model.generation_config.eos_token_id = ENDS["eos_token_id"]
    before = state(model)
    base, found = check(model, inputs(), blockers_of(model), 8)
    assert state(model) == before
    assert {0, 1} < differences(base, found)
    lengths = {len(row) for rows in (base, *found.values()) for row in rows}
    assert 8 in lengths and len(lengths) > 2


def test_positions_of_images_are_the_models_own():
    """With positions counted along the text, answers of Qwen2.5-VL would be others."""
    model, inputs = randomised(qwen()), qwen_inputs()
    base = Replay(model, inputs, torch.arange(4), 4).base
    assert base.positions.ndim == 3
    with_image = base.positions[-3:, 0]
    assert not torch.equal(with_image[0], with_image[1]) and with_image.max() < 9


@pytest.mark.parametrize("fusion", ["adaptive", "route"])
def test_answers_of_a_repaired_model_are_those_of_generate(testbed, batch, fusion):
    random = SafetySubspaces.random(testbed[0], layers=[2, 4], rank=8)
    model = CareForConditionalGeneration.from_base(testbed[0], SafetySubspaces(random.sites, fusion))
    check(model, batch, blockers_of(model, ("zero", "resample"))[::3], 6)
    with model.disable():
        check(model, batch, blockers_of(model, ("zero",))[::4], 6)


def test_hooks_that_users_have_set_run_once(testbed, batch):
    model, _ = testbed
    handles = []
    for layer, component in ((1, "attention"), (3, "ffn"), (2, "residual"), (5, "ffn"), (4, "attention")):
        vector = torch.randn(128, generator=torch.Generator().manual_seed(layer)) / 2

        def add(module, args, output, vector=vector):
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        handles.append(site_module(model, Site(layer, component)).register_forward_hook(add))
    try:
        check(model, batch, blockers_of(model, ("zero",)), 6)
    finally:
        for handle in handles:
            handle.remove()


# Blocks at once, batches


def test_blocks_at_once_give_what_each_gives_alone(monkeypatch):
    model, inputs = randomised(FAMILIES["llama"][0]()), text_inputs()
    blockers, numbers = blockers_of(model), torch.arange(6)
    replay = Replay(model, inputs, numbers, 8)
    alone = {b: (tokens, first) for one in blockers for b, tokens, first in replay.blocked([one])}
    for waiting, order in ((0, blockers), (1, blockers[::-1]), (3, blockers), (1000, blockers)):
        monkeypatch.setattr(replay_module, "WAITING", waiting)
        for blocker, tokens, first in replay.blocked(order):
            width = min(tokens.shape[1], alone[blocker][0].shape[1])
            assert torch.equal(tokens[:, :width], alone[blocker][0][:, :width])
            torch.testing.assert_close(first, alone[blocker][1])


@pytest.mark.parametrize("mode", MODES)
def test_batches_and_padding_do_not_matter(mode):
    model, inputs = randomised(FAMILIES["llama"][0]()), text_inputs()
    blockers, ends = blockers_of(model, (mode,)), {*ENDS["eos_token_id"]}
    model.generation_config.eos_token_id = ENDS["eos_token_id"]
    numbers = torch.arange(10, 16)
    whole = {b: tokens for b, tokens, _ in Replay(model, inputs, numbers, 6).blocked(blockers)}
    for row in range(6):
        length = int(inputs["attention_mask"][row].sum())
        alone = {name: value[row : row + 1, -length:] for name, value in inputs.items()}
        for blocker, tokens, _ in Replay(model, alone, numbers[row : row + 1], 6).blocked(blockers):
            assert until_the_end(tokens, ends) == until_the_end(whole[blocker][row : row + 1], ends)


def test_no_blocks_give_nothing():
    model = randomised(FAMILIES["llama"][0]())
    assert list(Replay(model, text_inputs(), torch.arange(6), 3).blocked([])) == []


# The model stays as it was


@contextmanager
def failing_at(module, call):
    """Raise at the n-th call of a module."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_model_whose_run_is_interrupted_is_as_it_was(component):
    model, inputs = randomised(FAMILIES["llama"][0]()), text_inputs()
    before, weights = state(model), {name: p.clone() for name, p in model.named_parameters()}
    last, numbers = decoder_layers(model)[2], torch.arange(6)
    for call in (1, 3):
        with pytest.raises(KeyboardInterrupt), failing_at(last.self_attn, call):
            Replay(model, inputs, numbers, 8)
        assert state(model) == before
    replay = Replay(model, inputs, numbers, 8)
    blockers = [b for b in blockers_of(model) if b.site == Site(1, component)]
    for call in (1, 2, 4, 6):  # while a draft is judged, and while answers are finished
        with pytest.raises(KeyboardInterrupt), failing_at(last.self_attn, call):
            list(replay.blocked(blockers))
        assert state(model) == before
    for _ in replay.blocked(blockers):  # an answer taken, the others not
        break
    assert state(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    check(model, inputs, blockers, 8, replay=replay)


def test_forwards_that_others_have_set_on_modules_survive():
    """As accelerate does, to move weights to a device and back."""
    model, inputs = randomised(FAMILIES["llama"][0]()), text_inputs()
    expected = {b.site: t for b, t, _ in Replay(model, inputs, torch.arange(6), 6).blocked(blockers_of(model)[:9])}
    calls = []

    def counted(run, name, *args, **kwargs):
        calls.append(name)
        return run(*args, **kwargs)

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "mlp")) or (name.startswith("model.layers.") and name.count(".") == 2):
            module.forward = functools.partial(counted, module.forward, name)
    before = state(model)
    found = {b.site: t for b, t, _ in Replay(model, inputs, torch.arange(6), 6).blocked(blockers_of(model)[:9])}
    assert state(model) == before and {*calls} == {name for name, *_, own in before if own}
    for site, tokens in expected.items():
        assert torch.equal(tokens, found[site])
    check(model, inputs, blockers_of(model)[:9], 6)


def test_the_undisturbed_run_is_shared(testbed, batch):
    """Layers below a block are not run, and answers that stay as they were cost one forward."""
    model, _ = testbed
    calls = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        replay = Replay(model, batch, torch.arange(8), 12)
        for layer in range(6):
            calls.clear()
            changed = replay._judge_draft(Blocker(Site(layer, "ffn"), "zero"))
            assert calls == list(range(layer, 6))
            if not len(changed.rows):
                list(replay._finish([changed]))
                assert calls == list(range(layer, 6))
    finally:
        for handle in handles:
            handle.remove()


# What cannot be replayed


def not_replayable(message, model, inputs):
    before = state(model)
    with pytest.raises(NotReplayable, match=message):
        Replay(model, inputs, torch.arange(len(inputs["input_ids"])), 4)
    assert state(model) == before


def test_models_with_sliding_windows_are_refused():
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=4)),
        Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4)),
    ):
        not_replayable("keeps its state in a DynamicCache of other layers", randomised(model), text_inputs())


def test_blocks_in_models_with_norms_after_the_blocks_and_sliding_windows_work_the_plain_way():
    """Against a loop without a cache, one prompt at a time."""
    model = randomised(Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4)))
    inputs, vector = text_inputs(), torch.randn(32, generator=torch.Generator().manual_seed(0))
    for component in COMPONENTS:
        site = Site(1, component)
        of = Contributions({site: vector}, {})
        found, _ = generate_blocked(model, inputs, Blocker(site, "mean", of), torch.arange(6), 5)
        layer = decoder_layers(model)[1]
        named = {"ffn": "post_feedforward_layernorm", "attention": "post_attention_layernorm"}
        module = getattr(layer, named[component]) if component in named else layer

        def instead(module, args, kwargs, output, component=component):
            stream = args[0] if args else kwargs["hidden_states"]
            new = stream + vector if component == "residual" else vector.expand_as(stream)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = module.register_forward_hook(instead, with_kwargs=True)
        for row in range(6):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
            for token in until_the_end(found[row : row + 1], ends_of(model))[0]:
                assert model(ids, use_cache=False).logits[0, -1].argmax() == token
                ids = F.pad(ids, (0, 1), value=token)
        handle.remove()


def test_repairs_that_keep_decisions_in_the_cache_are_refused(testbed, batch):
    model, processor = testbed
    generator = torch.Generator().manual_seed(1)
    gate = Gate(generation_prompt(processor), torch.randn(128, 1, generator=generator), torch.tensor([0.0]))
    sites = {Site(4, "residual"): {"last": random_subspace(0)}}
    gated = CareForConditionalGeneration.from_base(
        model, SafetySubspaces(sites, gate=gate, gate_site=Site(2, "residual"))
    )
    not_replayable("keeps its state in a DynamicCache of other layers", gated, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.3),
        ("no_repeat_ngram_size", 2),
        ("num_beams", 2),
        ("min_new_tokens", 3),
        ("suppress_tokens", [5]),
        ("sequence_bias", [[[5], -1.0]]),
        ("forced_eos_token_id", 2),
    ],
)
def test_decoding_that_is_not_plainly_greedy_is_refused(name, value):
    model = randomised(FAMILIES["llama"][0]())
    setattr(model.generation_config, name, value)
    not_replayable(name, model, text_inputs())
    generate_blocked(model, text_inputs(), blockers_of(model)[0], torch.arange(6), 4)  # the plain way goes


def test_models_that_read_prompts_otherwise_than_answers_are_refused():
    """PaliGemma's prompts see themselves as a whole."""
    sizes = {**GROUPED, "eos_token_id": 2, "model_type": "gemma", "head_dim": 8}
    vision = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
    config = PaliGemmaConfig(vision_config=vision, text_config=sizes, image_token_index=98, projection_dim=32)
    model = randomised(PaliGemmaForConditionalGeneration(config))
    ids = torch.cat([torch.full((3, 4), 98), text_inputs(3)["input_ids"].clamp_min(5)], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    }
    not_replayable("token_type_ids", model, {**inputs, "token_type_ids": torch.zeros_like(ids)})
    # Where nothing in the inputs tells of it, it is seen in what comes out.
    assert not Replay(model, inputs, torch.arange(3), 4).agrees()


def test_models_that_return_no_cache_are_refused():
    text = {"model_type": "opt", **PLAIN, "eos_token_id": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
    reader = {"vocab_size": 99, "encoder_hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**reader, "hidden_size": 32, "intermediate_size": 48},
        text_config=text,
        num_query_tokens=4,
        image_token_index=98,
    )
    model = randomised(InstructBlipForConditionalGeneration(config))
    ids = torch.cat([torch.full((3, 4), 98), text_inputs(3)["input_ids"].clamp_min(5)], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "qformer_input_ids": ids[:, 4:],
        "qformer_attention_mask": torch.ones_like(ids[:, 4:]),
    }
    not_replayable("keeps its state in a NoneType", model, inputs)
    site = Site(1, "ffn")
    found, first = generate_blocked(model, inputs, Blocker(site, "zero"), torch.arange(3), 4)
    handle = site_module(model, site).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected = model(**inputs).logits[:, -1]
    handle.remove()
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, 0], expected.argmax(dim=-1)) and found.shape == (3, 4)


# The check of itself


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_depends_on_how_tokens_are_read_is_noticed(layer):
    model, inputs = randomised(FAMILIES["llama"][0]()), text_inputs()
    model.generation_config.eos_token_id = 2
    vector = 5 * torch.randn(32, generator=torch.Generator().manual_seed(layer))
    assert Replay(model, inputs, torch.arange(6), 6).agrees()

    def later_tokens(module, args, output):  # those that are read one at a time
        return output + vector if output.shape[1] == 1 else output

    handle = decoder_layers(model)[layer].mlp.register_forward_hook(later_tokens)
    assert not Replay(model, inputs, torch.arange(6), 6).agrees()
    handle.remove()


def test_rounding_of_half_precision_is_let_pass():
    model = randomised(FAMILIES["llama"][0]()).bfloat16()
    assert Replay(model, text_inputs(), torch.arange(6), 8).agrees()
