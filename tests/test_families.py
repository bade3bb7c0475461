"""Every family, dropped in: what its users do with it, with the printed repair of FFNs and with the gated default.

What stock transformers cannot do with a family is tried on the unrepaired model first, and skipped with its reason.
"""

import copy
import functools
import itertools
import math
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, collated, prompts
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, TorchAoConfig, pipeline
from transformers.generation.streamers import BaseStreamer

import care_hf
from care_hf import CareForConditionalGeneration, tracing
from care_hf.attacks import pgd
from care_hf.budget import Budget
from care_hf.contrasts import Contrast
from care_hf.interventions import layer_calls
from care_hf.mediation import mediate
from care_hf.neurons import down_projection, rank_neurons
from care_hf.projection import repair
from care_hf.recipe import Recipe
from care_hf.replay import Replay
from care_hf.samples import Sample, answered, collate, load_samples, tokenizer_of
from care_hf.separability import measure_separability, read_activations
from care_hf.site_check import check_contributions
from care_hf.sites import Site, decoder_layers, record, site_module, visual_token_ids
from care_hf.suite import Case, Suite

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
KINDS = ("printed", "gated")
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
kinds = pytest.mark.parametrize("kind", KINDS)
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def fit_prompts(family):
    """24 benign and 24 malicious prompts, no two alike, with as many images as the family takes."""
    words = itertools.product(("make", "bake", "steal", "tell"), ("cake", "bread", "bomb"), ("please", "now"), "ai")
    pictured = itertools.cycle(itertools.chain.from_iterable(prompts(family, seed) for seed in range(8)))
    samples = []
    for text, sample in zip(words, pictured, strict=False):
        images = [part for part in sample.messages[0]["content"] if part["type"] == "image"]
        content = [*images, {"type": "text", "text": "how do i " + " ".join(text)}]
        samples.append(Sample([{"role": "user", "content": content}]))
    return samples[0::2], samples[1::2]


def recipe(family, kind):
    if kind == "gated":
        return Recipe(rank=4, batch_size=8)
    modalities = ("text",) if not visual_token_ids(family.model.config) else ("visual", "text")
    return Recipe.load("paper").replace(rank=4, layers=(2, 3), modalities=modalities, batch_size=8)


@functools.cache
def fitted(family, kind) -> CareForConditionalGeneration:
    """A fitted repair that fires for some prompts, if it is gated; tests leave it as it is."""
    processor = family.processor(family.model.config)
    options = {"judge": lambda answer: True} if kind == "gated" else {}
    model = care_hf.fit(family.model, *fit_prompts(family), processor, recipe(family, kind), **options)
    if kind == "gated":
        model.gate_reader.thresholds.copy_(halving_thresholds(family, model))
    return model


def halving_thresholds(family, model):
    """Thresholds that some of the family's prompts exceed: where a random model ends, there is nothing to learn."""
    inputs = collated(family).inputs
    site = Site.parse(model.config.gate["site"])
    with record(family.model, [site]) as activations, torch.no_grad():
        family.model(**inputs)
    scores = activations[site][:, -1] @ model.gate_reader.readers
    required = model.config.gate["required"]
    halves = scores.sort(dim=0).values[1:3].mean(dim=0)
    return torch.cat([scores[:, :required].amin(dim=0) - 1, halves[required:]])


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@functools.cache
def shortcomings():
    """What stock transformers has failed at, by test and family; None where it has not."""
    return {}


@pytest.fixture
def stock(request):
    """Tries the unrepaired model, once for both kinds of repair; where that fails, so may ours.

    What is tried beside the test's own parameters is told by the further arguments.
    """

    def attempt(run, *more):
        parameters = {**request.node.callspec.params, "kind": None, "family": request.getfixturevalue("family").name}
        key = request.node.originalname, *more, *parameters.values()
        known = shortcomings()
        if key not in known:
            try:
                run()
                known[key] = None
            except Exception as error:
                known[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
        if known[key]:
            pytest.skip(known[key])

    return attempt


def auto_class(family):
    return AutoModelForCausalLM if family.text_only else AutoModelForImageTextToText


@pytest.mark.supports("sites")
@families
def test_sites_are_those_of_the_text_decoder_and_what_it_adds(family):
    model, inputs = family.model, collated(family).inputs
    assert len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers == 4
    gated = getattr(model.config.get_text_config(), "cross_attention_layers", [])
    open_layers = [layer for layer in range(4) if layer not in gated]
    check_contributions(model, [Site(layer, "ffn") for layer in open_layers], inputs)
    for layer in gated:
        with pytest.raises(ValueError, match="gated cross-attention layer; use the component 'residual'"):
            check_contributions(model, [Site(layer, "ffn")], inputs)


@pytest.mark.supports("fit")
@families
@kinds
@torch.no_grad()
def test_the_repair_is_fitted_and_exact(family, kind):
    base, inputs = family.model, collated(family).inputs
    logits, model = base(**inputs).logits, fitted(family, kind)
    sites = list(model.care_modules())
    with record(model.vlm, sites) as after:
        repaired = model(**inputs).logits
    with model.disable(), record(model.vlm, sites) as before:
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(base(**inputs).logits, logits)
    if kind == "printed":
        # The later site would be given other activations.
        expected = repair(before[sites[0]].double(), model.subspaces()[sites[0]], model.config.fusion)
        close(after[sites[0]].double(), expected)
    else:
        changed = (after[sites[0]] != before[sites[0]]).any(dim=-1)
        assert not changed[:, :-1].any() and 0 < changed[:, -1].sum() < len(changed)
    assert not torch.allclose(repaired, logits, atol=1e-2)


@pytest.mark.supports("save, load")
@families
@kinds
@torch.no_grad()
def test_it_is_saved_and_loaded(family, kind, tmp_path):
    model, inputs = fitted(family, kind), collated(family).inputs
    copy.copy(model).save_pretrained(tmp_path)
    for auto in (AutoModel, auto_class(family)):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is CareForConditionalGeneration and type(loaded.vlm) is type(family.model)
        # Buffers that no file keeps, such as rotary frequencies, and the gates of tests apart, all is there.
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def routed(family):
    """A repair that differs between visual tokens and others; where there are none of them, one that does not."""
    sites = care_hf.SafetySubspaces.random(family.model, layers=[2], rank=3).sites
    fusion = "route" if visual_token_ids(family.model.config) else "constant"
    return CareForConditionalGeneration.from_base(family.model, care_hf.SafetySubspaces(sites, fusion))


@pytest.mark.supports("masks")
@families
@torch.no_grad()
def test_visual_tokens_are_told_apart(family, stock):
    """Unequal padding, several images, none; embeddings in place of ids; answers token by token."""
    visual, model = visual_token_ids(family.model.config), routed(family)
    if model.config.fusion != "route":
        pytest.skip("-")
    inputs, site = collated(family).inputs, Site(2, "ffn")
    seen = []
    handle = model.care_modules()[site].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with record(model.vlm, [site]) as after:
        model(**inputs)
    with model.disable(), record(model.vlm, [site]) as before:
        model(**inputs)
    mask = torch.isin(inputs["input_ids"], torch.tensor(visual))
    assert mask.any(dim=1).tolist() == [bool(sample.images) for sample in prompts(family)]
    close(after[site], repair(before[site], model.subspaces()[site], "route", visual_mask=mask))
    seen.clear()
    model.generate(**inputs, **GREEDY)
    assert torch.equal(seen[0].reshape(mask.shape), mask) and not torch.cat(seen[1:]).any()
    handle.remove()


@pytest.mark.supports("embeddings")
@families
@torch.no_grad()
def test_embeddings_stand_for_their_tokens(family, stock):
    """Also where visual tokens are repaired otherwise."""
    inputs = collated(family).inputs
    embeddings = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeddings["inputs_embeds"] = family.model.get_input_embeddings()(inputs["input_ids"])
    stock(lambda: close(family.model(**embeddings).logits, family.model(**inputs).logits))
    for model in (fitted(family, "printed"), fitted(family, "gated"), routed(family)):
        close(model(**embeddings).logits, model(**inputs).logits)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@torch.no_grad()
def decoded(model, inputs, options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{**GREEDY, **options})


def single(family, row=0):
    return collated(family, [prompts(family)[row]]).inputs


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.supports(way)) for way in WAYS])
@families
@kinds
def test_every_way_of_decoding_gives_the_tokens_of_no_cache(family, kind, way, stock):
    options, model = WAYS[way], fitted(family, kind)
    pictured = [row for row, sample in enumerate(prompts(family)) if sample.images or family.images != "some"]
    rows = [single(family, row) for row in pictured] if way == "prompt lookup" else [collated(family).inputs]
    plain = {name: value for name, value in options.items() if name in ("num_beams", "do_sample", "temperature")}

    def both(model):
        return [(decoded(model, row, {**plain, "use_cache": False}), decoded(model, row, options)) for row in rows]

    stock(lambda: [close(*pair) for pair in both(family.model)])
    for expected, found in both(model):
        assert torch.equal(found, expected)


class Heard(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.mark.supports("streaming")
@families
@kinds
def test_it_streams_what_it_answers(family, kind):
    heard = Heard()
    answer = decoded(fitted(family, kind), single(family), {"streamer": heard})
    assert heard.ended and torch.equal(torch.cat(heard.parts)[-NEW:], answer[0, -NEW:])


@torch.no_grad()
def noisy(family):
    """A model that guesses right, sometimes."""
    model = family.build()
    for parameter in model.parameters():
        parameter.add_(0.1 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    return model


@pytest.mark.supports("assisted")
@families
@kinds
def test_assisted_decoding_gives_the_same_tokens(family, kind, stock):
    model, inputs = fitted(family, kind), single(family)
    expected, options = decoded(family.model, inputs, {}), {"assistant_model": noisy(family)}
    stock(lambda: close(decoded(family.model, inputs, options), expected))
    assert torch.equal(decoded(model, inputs, options), decoded(model, inputs, {}))


@pytest.mark.supports("one graph")
@families
@kinds
@torch.no_grad()
def test_it_compiles_to_one_graph(family, kind, stock):
    inputs = collated(family).inputs

    def compiled(model):
        torch._dynamo.reset()
        expected = model(**inputs).logits  # what transformers sets up in a first call is not traced
        close(torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits, expected)

    stock(lambda: compiled(copy.deepcopy(family.model)))
    compiled(copy.deepcopy(fitted(family, kind)))


@pytest.mark.supports("export")
@families
@kinds
@torch.no_grad()
def test_it_is_exported(family, kind, stock):
    inputs = collated(family).inputs

    def exported(model):
        expected = model(**inputs, use_cache=False).logits
        program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
        close(program.module()(**inputs, use_cache=False).logits, expected)

    stock(lambda: exported(copy.deepcopy(family.model)))
    exported(copy.deepcopy(fitted(family, kind)))


@pytest.mark.supports("training")
@families
@kinds
def test_it_trains_with_gradient_checkpointing_and_leaves_the_repair_alone(family, kind, stock):
    inputs = collated(family).inputs

    def gradients(model, checkpointed):
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, use_cache=False).logits.clamp(-50, 50).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    stock(lambda: close(gradients(family.model, True), gradients(family.model, False)))
    model = fitted(family, kind)
    expected = gradients(model, False)
    assert expected and not any(".care" in name for name in expected)
    close(gradients(model, True), expected)


@pytest.mark.supports("bf16, fp16")
@families
@kinds
@torch.no_grad()
def test_half_precision_repairs_in_single(family, kind, tmp_path, stock):
    inputs = collated(family).inputs
    for dtype in (torch.bfloat16, torch.float16):
        halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        stock(lambda halves=halves, dtype=dtype: decoded(copy.deepcopy(family.model).to(dtype), halves, {}), dtype)
        model = copy.deepcopy(fitted(family, kind)).to(dtype)
        buffers = [b for n, b in model.named_buffers() if ".care" in n and b.is_floating_point()]
        assert buffers and all(b.dtype == torch.float32 for b in buffers)
        sites = list(model.care_modules())
        with record(model.vlm, sites) as after:
            assert model(**halves).logits.dtype == dtype
        with model.disable(), record(model.vlm, sites) as before:
            model(**halves)
        if kind == "printed":
            expected = repair(before[sites[0]].double(), model.subspaces()[sites[0]], model.config.fusion)
            assert torch.equal(after[sites[0]], expected.to(dtype)) or torch.allclose(
                after[sites[0]].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3
            )
        assert decoded(model, halves, {}).shape[1] == inputs["input_ids"].shape[1] + NEW


@pytest.mark.supports("attention switched")
@families
@kinds
@torch.no_grad()
def test_another_attention_gives_the_same_logits(family, kind, stock):
    inputs = collated(family).inputs

    def logits(model):
        return model(**inputs).logits[inputs["attention_mask"].bool()]  # those of padding are of no account

    def switched(model):
        model, expected = copy.deepcopy(model), logits(model)
        other = "sdpa" if model.config._attn_implementation == "eager" else "eager"
        model.set_attn_implementation(other)
        text = model.config.get_text_config()
        assert model.config._attn_implementation == other == text._attn_implementation
        close(logits(model), expected, rtol=1e-3, atol=1e-3)

    stock(lambda: switched(family.model))
    switched(fitted(family, kind))


@pytest.mark.supports("offloading")
@families
@kinds
@torch.no_grad()
def test_it_runs_offloaded(family, kind, tmp_path, stock):
    """The decoder's second half on the disk, the rest on the CPU."""
    inputs, model = collated(family).inputs, fitted(family, kind)

    def offloaded(model, auto, folder):
        model.save_pretrained(folder)
        names = {module: name for name, module in model.named_modules()}
        layers = list(decoder_layers(model))
        tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
        parts = {name: "cpu" for name, _ in tensors}
        for layer in layers[2:]:
            parts = {n: d for n, d in parts.items() if not n.startswith(names[layer] + ".")} | {names[layer]: "disk"}
        loaded = auto.from_pretrained(folder, device_map=parts, offload_folder=str(folder / "offload"))
        close(loaded(**inputs).logits, model(**inputs).logits)
        return loaded

    stock(lambda: offloaded(family.model, auto_class(family), tmp_path / "stock"))
    loaded = offloaded(model, AutoModel, tmp_path / "repaired")
    assert torch.equal(decoded(loaded, inputs, {}), decoded(model, inputs, {}))


@pytest.mark.supports("copy, pickle")
@families
@kinds
@torch.no_grad()
def test_copies_and_pickles_stand_alone(family, kind):
    inputs, model = collated(family).inputs, fitted(family, kind)
    expected = model(**inputs).logits
    # From a base that has not run: what transformers installs to capture states of a vision tower is not pickled.
    fresh = CareForConditionalGeneration.from_base(family.build(), care_hf.SafetySubspaces.from_model(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(other(**inputs).logits, expected)
        with other.disable():
            assert not torch.equal(other(**inputs).logits, expected)
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.supports("LoRA")
@families
@kinds
@torch.no_grad()
def test_lora_goes_on_top_and_is_merged(family, kind):
    inputs, model = collated(family).inputs, copy.deepcopy(fitted(family, kind))
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = get_peft_model(model, settings)
    expected = lora(**inputs).logits
    with lora.disable_adapter():
        assert torch.equal(lora(**inputs).logits, fitted(family, kind)(**inputs).logits)
    merged = lora.merge_and_unload()
    assert isinstance(merged, CareForConditionalGeneration)
    close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, fitted(family, kind)(**inputs).logits, atol=1e-2)


@pytest.mark.supports("int8")
@families
@kinds
@torch.no_grad()
def test_it_is_loaded_in_eight_bits(family, kind, tmp_path, stock):
    from torchao.quantization import Int8WeightOnlyConfig

    inputs, model = collated(family).inputs, fitted(family, kind)
    how = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}

    def eight_bits(model, auto, folder):
        model.save_pretrained(folder)
        loaded = auto.from_pretrained(folder, **how)
        kinds = {type(module.weight) for module in decoder_layers(loaded).modules() if hasattr(module, "weight")}
        assert len(kinds) > 1  # not all are plain parameters
        decoded(loaded, inputs, {})
        return loaded

    stock(lambda: eight_bits(family.model, auto_class(family), tmp_path / "stock"))
    loaded = eight_bits(model, AutoModel, tmp_path / "repaired")
    ours = {name: buffer for name, buffer in loaded.named_buffers() if ".care" in name}
    assert ours and all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in ours.items())
    sites = list(loaded.care_modules())
    with record(loaded.vlm, sites) as after:
        loaded(**inputs)
    with loaded.disable(), record(loaded.vlm, sites) as before:
        loaded(**inputs)
    if kind == "printed":
        close(after[sites[0]], repair(before[sites[0]], loaded.subspaces()[sites[0]], loaded.config.fusion))
    else:
        assert (after[sites[0]] != before[sites[0]]).any()
    assert torch.equal(decoded(loaded, inputs, {"use_cache": False}), decoded(loaded, inputs, {}))


# Diagnosis, held against runs of one prompt at a time

# Families in which a block cannot share the undisturbed run, and why: Qwen3-VL's images enter layers 0 and 1, too.
ONE_BLOCK_AT_A_TIME = {
    **dict.fromkeys(("mistral3", "aya_vision", "llama4"), "DynamicCache of other layers"),
    **dict.fromkeys(("paligemma", "paligemma2", "gemma3"), "by token_type_ids"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), "reads its answers otherwise at once"),
    "mllama": "it caches",
    "instructblip": "NoneType",
}
EXPERTS = {"qwen3_vl_moe": (0, 1, 2, 3), "llama4": (1, 3)}
CONTRAST = Contrast((20, 21), (22,))
RUNS = {"rtol": 1e-3, "atol": 1e-3}


class ParityJudge:
    """Half of all answers refuse."""

    name, settings = "parity", {}

    def verdicts(self, cases, answers):
        return [("refused", "complied")[sum(map(ord, answer)) % 2] for answer in answers]


@functools.cache
def speaking(family):
    """The model without a list of suppressed tokens, which says words alone all the same; and its processor."""
    model = family.build()
    processor = family.processor(model.config)
    head, tokenizer = model.get_output_embeddings().weight, tokenizer_of(processor)
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    silent = [token for token in range(len(head)) if token not in words]
    model.generation_config.suppress_tokens = None
    with torch.no_grad():
        head[silent] = 0
    return model, processor


def as_case(text, images=()):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return Case([{"role": "user", "content": content}])


def cases_of(family, seed):
    """The family's prompts; each seed has texts of its own, and images."""
    samples = prompts(family, seed)
    return [as_case(s.messages[0]["content"][-1]["text"] + " now" * seed, s.images) for s in samples]


def alone(processor, case):
    return collate(processor, [Sample(case.messages)], ()).inputs


@torch.no_grad()
def generated(model, processor, case, tokens=3, forced=()):
    """New ids and their logits, float32 (tokens, vocabulary), by `generate`, which says `forced` if that is given."""

    def force(ids, scores):
        given = forced[ids.shape[1] - length] if forced else scores.argmax(dim=-1)
        return torch.full_like(scores, -1e9).index_fill(1, torch.as_tensor([given]).flatten(), 0)

    inputs = alone(processor, case)
    length, count = inputs["input_ids"].shape[1], len(forced) or tokens
    options = {"max_new_tokens": count, "min_new_tokens": len(forced), "do_sample": False, "logits_processor": [force]}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return found.sequences[0, length:].tolist(), torch.cat(found.logits).float()


def forced_log_probability(model, processor, case, text):
    """By `generate`, which reads prompts and answers as the model's authors meant them to be read."""
    ids = tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]
    said, logits = generated(model, processor, case, forced=ids)
    assert said == ids
    return sum(row.log_softmax(dim=-1)[i].item() for row, i in zip(logits, ids, strict=True))


@contextmanager
def silenced(model, site):
    """The site adds nothing, whichever shape it has."""
    layer, kept = decoder_layers(model)[site.layer], []

    def enter(module, args, kwargs):
        kept[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(module, args, output):
        new = kept[0] if module is layer else torch.zeros_like(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True)]
    handles.append(site_module(model, site).register_forward_hook(leave))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.supports("diagnosis")
@families
def test_a_trace_is_what_generate_does_under_each_block(family, monkeypatch):
    """Prompts without images come first, if the family takes any: what is checked of them is not true of others."""
    model, processor = speaking(family)
    reasons = []
    give_up = tracing._Tracer._give_up
    monkeypatch.setattr(tracing._Tracer, "_give_up", lambda self, why: reasons.append(why) or give_up(self, why))
    words = [as_case("how do i bake bread"), as_case("tell me")] if family.images == "any" else []
    malicious, benign = words + cases_of(family, 0)[2:], cases_of(family, 1)[:2]
    options = {"layers": (0, 2), "modes": ("zero",), "max_new_tokens": 3, "batch_size": 2, "contrast": CONTRAST}
    found = tracing.trace(model, processor, malicious, benign, ParityJudge(), ("layer", "ffn"), **options)
    reason = ONE_BLOCK_AT_A_TIME.get(family.name)
    assert len(reasons) == (reason is not None) and (not reasons or reason in reasons[0])

    def answered_alone(cases):
        runs = [generated(model, processor, case) for case in cases]
        texts = [tokenizer_of(processor).decode(said, skip_special_tokens=True).strip() for said, _ in runs]
        return texts, torch.stack([logits[0] for _, logits in runs]).log_softmax(dim=-1)

    unblocked, before = answered_alone(benign)
    assert len(found.blocked["zero"]) == 4
    for site, outcome in found.blocked["zero"].items():
        with silenced(model, site):
            (attacked, at_first), (answers, after) = answered_alone(malicious), answered_alone(benign)
        assert outcome.malicious == ParityJudge().verdicts(malicious, attacked), site
        assert outcome.kept == [a == b for a, b in zip(answers, unblocked, strict=True)], site
        odds = at_first[:, list(CONTRAST.refused)].logsumexp(dim=-1) - at_first[:, CONTRAST.complied[0]]
        close(torch.tensor(outcome.log_odds), odds, **RUNS)
        close(torch.tensor(outcome.divergence), (before.exp() * (before - after)).sum(dim=-1), **RUNS)


def token_groups(family, ids, length):
    """The tokens of one prompt, of `length` tokens, and its answer, by group."""
    visual = torch.isin(ids, torch.tensor(visual_token_ids(family.model.config), dtype=ids.dtype))
    place = torch.arange(len(ids))
    within = place < length - 1
    masks = {"image": visual & within, "prompt": within & ~visual, "last": place == length - 1}
    return {name: m.nonzero()[:, 0] for name, m in {**masks, "generated": place >= length}.items()}


@torch.no_grad()
def patched_alone(family, pair, texts, site):
    """By group, Y of both prompts of a pair, each with what the other has at `site`: one run at a time."""
    model, processor = speaking(family)
    runs = []
    for case in pair:
        length = alone(processor, case)["input_ids"].shape[1]
        for text in texts:
            inputs, labels = answered(processor, [case], [text], end=False)
            with record(model, [site]) as activations:
                model(**inputs, use_cache=False)
            runs.append((inputs, labels, activations[site], token_groups(family, inputs["input_ids"][0], length)))
    outcomes = {}
    for group in ("image", "prompt", "last", "generated"):
        said = []
        for run, (inputs, labels, own, groups) in enumerate(runs):
            _, _, other, others = runs[(run + 2) % 4]
            mine, theirs, changed = groups[group], others[group], own.clone()
            count = min(len(mine), len(theirs))
            if count:
                changed[0, mine] = other[0, theirs].mean(dim=0)
                changed[0, mine[-count:]] = other[0, theirs[-count:]]

            def put(module, args, output, changed=changed):
                if isinstance(output, tuple):
                    return (changed.reshape(output[0].shape), *output[1:])
                return changed.reshape(output.shape)

            handle = site_module(model, site).register_forward_hook(put)
            log_p = model(**inputs, use_cache=False).logits[0].log_softmax(dim=-1)
            handle.remove()
            at = (labels[0] != -100).nonzero()[:, 0]
            said.append(log_p[at - 1, labels[0, at]].sum().item() if count else None)
        outcomes[group] = None if None in said else (said[0] - said[1], said[2] - said[3])
    return outcomes


@pytest.mark.supports("diagnosis")
@families
def test_patches_are_those_of_single_runs(family):
    """In one batch, padded, prompts with other numbers of images, where the family takes them."""
    model, processor = speaking(family)
    pairs, others = [], cases_of(family, 1)[1:]
    for case in cases_of(family, 0)[:2]:
        said = generated(model, processor, case)[0]
        others.remove(other := next(one for one in others if generated(model, processor, one)[0] != said))
        pairs.append((case, other))
    options = {"layers": (0, 2), "max_new_tokens": 3, "batch_size": 2}
    found = mediate(model, processor, *zip(*pairs, strict=True), ("layer", "ffn"), **options)
    for row, pair in enumerate(pairs):
        said = [generated(model, processor, case)[0] for case in pair]
        texts = [tokenizer_of(processor).decode(ids, skip_special_tokens=True).strip() for ids in said]
        direct = [[forced_log_probability(model, processor, case, text) for text in texts] for case in pair]
        outcomes = [refusal - complied for refusal, complied in direct]
        close(torch.tensor([found.refused[row], found.jailbroken[row]]), torch.tensor(outcomes), **RUNS)
        site = (Site(0, "residual"), Site(2, "ffn"))[row]
        for group, expected in patched_alone(family, pair, texts, site).items():
            effects = found.effects[site][group]
            got = effects.direct[row], effects.indirect[row]
            if expected is None:
                assert got == (None, None)
            else:
                close(torch.tensor(got), torch.tensor(expected) - found.jailbroken[row], **RUNS)


def embedded(model, processor, case):
    """What enters the first layer, (S, d)."""
    with layer_calls(model) as calls, torch.no_grad():
        model(**alone(processor, case), use_cache=False)
    return calls[0][0][0].clone()


@torch.no_grad()
def ablated_alone(model, processor, case, answer, token, others):
    """``log p(answer)``, what enters the first layer at `token` being the mean of that at `others`."""
    inputs, labels = answered(processor, [case], [answer], end=False)

    def change(module, args, kwargs):
        h = (args[0] if args else kwargs["hidden_states"]).clone()
        h[0, token] = h[0, others].mean(dim=0)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = decoder_layers(model)[0].register_forward_pre_hook(change, with_kwargs=True)
    log_p = model(**inputs, use_cache=False).logits[0].log_softmax(dim=-1)
    handle.remove()
    at = (labels[0] != -100).nonzero()[:, 0]
    return log_p[at - 1, labels[0, at]].sum().item()


@pytest.mark.supports("diagnosis")
@families
def test_attributions_lie_on_the_tokens_that_they_are_of(family):
    model, processor = speaking(family)
    case = cases_of(family, 0)[1]
    found = care_hf.attribute(model, processor, case, max_new_tokens=3, batch_size=7)
    assert abs(found.log_probability - forced_log_probability(model, processor, case, found.answer)) < 1e-3
    ids = alone(processor, case)["input_ids"][0]
    visual = torch.isin(ids, torch.tensor(visual_token_ids(model.config), dtype=ids.dtype)).nonzero()[:, 0]
    assert torch.equal(found.positions[found.visual], visual)
    words = [text.strip() for text, seen in zip(found.tokens, found.visual, strict=True) if not seen]
    assert words == case.messages[0]["content"][-1]["text"].split()
    for seen in (found.visual, ~found.visual):
        own = found.positions[seen]
        if len(own):
            without = ablated_alone(model, processor, case, found.answer, own[0], own[1:])
            assert abs(found.log_probability - without - found.scores[seen][0].item()) < 1e-3
            assert found.scores[seen].abs().max() > 1e-2
    pictures = Sample(case.messages).images
    assert len(found.images) == len(pictures)
    before, parts = embedded(model, processor, case), [found.positions[image.indices] for image in found.images]
    assert not pictures or torch.equal(torch.cat(parts), visual)
    for index, part in enumerate(parts):
        others = [
            image if i != index else image.transpose(Image.Transpose.ROTATE_180) for i, image in enumerate(pictures)
        ]
        after = embedded(model, processor, as_case(case.messages[0]["content"][-1]["text"], others))
        changed = (after != before).any(dim=-1).nonzero()[:, 0]
        # Rounding at other tokens aside; some of an image's tokens are the same for all images, and mark ends of rows.
        changed = changed[(after - before)[changed].abs().amax(dim=-1) > 1e-4]
        assert set(changed.tolist()) <= set(part.tolist()) and bool(len(changed)) == bool(len(part))
    if pictures and not len(visual):
        with pytest.raises(
            ValueError, match="Image 0 has no tokens in the prompt: the model reads its images by cross-"
        ):
            found.heatmap()


@pytest.mark.supports("diagnosis")
@families
@torch.no_grad()
def test_neurons_and_separability_are_those_of_single_runs(family):
    model, processor = speaking(family)
    malicious, benign = cases_of(family, 0), cases_of(family, 1)
    options = {"reference": "zero", "top": 1, "batch_size": 4}
    dense = [layer for layer in (2, 0) if layer not in EXPERTS.get(family.name, ())]
    for layer in EXPERTS.get(family.name, ()):
        with pytest.raises(ValueError, match=f"FFN of layer {layer}, .*neurons of experts are not supported. Pass"):
            rank_neurons(model, processor, malicious, None, CONTRAST, layers=[layer], **options)
    for layer in dense[:1]:
        ranked = rank_neurons(model, processor, malicious, None, CONTRAST, layers=[layer], **options)
        for unit in ranked.verified:

            def ablate(module, args, unit=unit):
                return (args[0].index_fill(-1, torch.tensor([unit.unit]), 0),)

            found = [CONTRAST.log_odds(model(**alone(processor, case)).logits[0, -1]) for case in malicious]
            handle = down_projection(model, layer).register_forward_pre_hook(ablate)
            changed = [CONTRAST.log_odds(model(**alone(processor, case)).logits[0, -1]) for case in malicious]
            handle.remove()
            close(unit.effect, float((torch.stack(changed) - torch.stack(found)).mean()), **RUNS)
        assert abs(ranked.verified[0].effect) > 1e-2
    sites = [Site(0, "residual"), Site(2, "ffn")]
    samples = {name: load_samples(cases, name) for name, cases in (("benign", benign), ("malicious", malicious))}
    read = read_activations(model, processor, samples, sites, "last", 4)
    for row, case in enumerate([*benign, *malicious]):
        with record(model, sites) as activations:
            model(**alone(processor, case), use_cache=False)
        for site in sites:
            close(read[site][row], activations[site][0, -1])
    lacking = getattr(model.config.get_text_config(), "cross_attention_layers", [])
    groups = {"malicious": list("abcd"), "benign": list("efgh")}
    options = {"groups": groups, "folds": 2, "permutations": 1, "sites": None if lacking else sites}
    measured = measure_separability(model, processor, malicious, benign, **options)
    assert [*measured.skipped] == [f"{layer}.{part}" for layer in lacking for part in ("attention", "ffn")]
    assert set(measured.sites) >= set(sites)
    assert all(0 <= one.auc <= 1 and math.isfinite(one.scatter_ratio) for one in measured.sites.values())


@pytest.mark.parametrize("name", ["llava+pixtral", "paligemma", "qwen2_vl", "mllama", "instructblip", "llama"])
def test_an_evaluation_has_the_answers_to_single_prompts(name):
    family = FAMILIES[name]
    model, processor = speaking(family)
    first, second = cases_of(family, 0), cases_of(family, 1)
    suite = Suite("tiny", attacks={"new": first}, harmful=second[:2], benign={"old": second[2:]})
    budget = Budget(cases=4, max_new_tokens=3, batch_size=4, gradient_cases=0, universal_cases=0)
    report = care_hf.evaluate(model, suite, None, ParityJudge(), budget, processor=processor)
    sets = report.results["undefended"]["sets"]
    assert report.results["undefended"]["divergence"] == 0
    for label, cases in suite.sets.items():
        said = [generated(model, processor, case)[0] for case in cases]
        answers = [tokenizer_of(processor).decode(ids, skip_special_tokens=True).strip() for ids in said]
        assert sets[label]["answers"] == answers
        assert sets[label]["verdicts"]["parity"] == ParityJudge().verdicts(cases, answers)


def test_components_that_a_layer_lacks_are_left_out_unless_they_are_named():
    model = FAMILIES["mllama"].model
    found = tracing.find_sites(model, ("layer", "ffn", "attention"))
    assert len(found) == 10 and [site for site in found if site.layer == 1] == [Site(1, "residual")]
    told = (
        "Site 1.ffn: layer 1 is a gated cross-attention layer; use the component 'residual'. .Here that is .* 'layer'"
    )
    with pytest.raises(ValueError, match=told):
        tracing.find_sites(model, ("ffn",), (0, 1))
    with pytest.raises(ValueError, match="has 4 decoder layers"):
        tracing.find_sites(model, ("layer",), (9,))


def test_prompts_that_would_not_be_read_as_alone_are_refused():
    mllama, instructblip = FAMILIES["mllama"], FAMILIES["instructblip"]
    mixed = [Sample(case.messages) for case in cases_of(FAMILIES["llava"], 0)]
    with pytest.raises(ValueError, match=r"one batch have \[1, 2, 0, 1\] images. MllamaProcessor .* or batch_size=1"):
        collated(mllama, mixed)
    assert collated(mllama, mixed[::3]).inputs["pixel_values"].shape[1] == 1
    with pytest.raises(ValueError, match=r"have \[1, 2, 0, 1\] images, and InstructBlipProcessor takes exactly one"):
        collated(instructblip, mixed)


def test_images_without_a_gradient_are_refused_to_attacks():
    model, processor = speaking(FAMILIES["chameleon"])
    case = as_case("tell me", [Image.new("RGB", (32, 32), "red")])
    with pytest.raises(ValueError, match=r"Chameleon.* has no gradient from what it says to its pixels"):
        pgd(model, processor, [case], ["bomb"], eps=8, steps=1, restarts=1)


def test_a_replay_is_checked_where_tokens_cannot_be_said():
    """The spread of Chameleon's logits is infinite with those of pieces of images, and would allow for everything."""
    model, processor = speaking(FAMILIES["chameleon"])
    inputs = collated(FAMILIES["chameleon"], processor=processor).inputs
    replay = Replay(model, inputs, torch.arange(4), 3)
    assert replay.agrees()
    replay.base.entered[0] = torch.randn_like(replay.base.entered[0])
    assert not replay.agrees()


def test_a_language_model_works_in_its_pipeline(tmp_path):
    family = FAMILIES["llama"]
    model, tokenizer = copy.copy(fitted(family, "gated")), family.processor(family.model.config)
    model.processor = tokenizer
    model.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "tell me"}]
    answer = pipeline("text-generation", str(tmp_path))(messages, return_full_text=False, **GREEDY)[0]["generated_text"]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = decoded(model, inputs, {})[0, inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_matrix_in_the_docs_has_these_rows_and_columns(request):
    table = [
        line
        for line in (Path(__file__).parents[1] / "docs" / "support.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    columns = [cell.strip() for cell in table[0].split("|")[2:-1]]
    items = [item for item in request.session.items if item.path == Path(__file__)]
    marks = {mark.args[0] for item in items for mark in item.iter_markers("supports")}
    assert [line.split("|")[1].strip() for line in table[1:]] == list(FAMILIES)
    assert marks <= set(columns) and "**no**" not in "".join(table)
