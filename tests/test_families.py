"""Every family, dropped in: what its users do with it, with the printed repair of FFNs and with the gated default.

What stock transformers cannot do with a family is tried on the unrepaired model first, and skipped with its reason.
"""

import copy
import functools
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from families import FAMILIES, collated, prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, TorchAoConfig, pipeline
from transformers.generation.streamers import BaseStreamer

import care_hf
from care_hf import CareForConditionalGeneration
from care_hf.projection import repair
from care_hf.recipe import Recipe
from care_hf.samples import Sample
from care_hf.site_check import check_contributions
from care_hf.sites import Site, decoder_layers, record, visual_token_ids

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
