import copy
import inspect
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import random_subspace
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    pipeline,
)

from care_hf import CareConfig, CareForConditionalGeneration, SafetySubspaces
from care_hf.gating import GateReader, TurnProjection
from care_hf.projection import FUSIONS, SafetyProjection, repair
from care_hf.samples import Sample, collate
from care_hf.sites import Site, record

FFN = Site(2, "ffn")


def subspaces(fusion="adaptive", **more):
    sites = {
        FFN: {"visual": random_subspace(1), "text": random_subspace(2, oblique=True)},
        Site(4, "residual"): {"visual": random_subspace(3), "text": random_subspace(4)},
    }
    return SafetySubspaces(sites, fusion, **more)


@pytest.fixture
def repaired(llava):
    return CareForConditionalGeneration.from_base(llava, subspaces())


@pytest.fixture(scope="module")
def inputs(world, processor):
    """Unequal prompts, left-padded, one without an image."""
    samples = [
        *world.attack("typographic", "fit", 1),
        *world.attack("wrapper", "fit", 1),
        *world.benign("icon", "fit", 1),
    ]
    return collate(processor, [Sample(s.messages) for s in samples], [4]).inputs


@pytest.fixture
def checkpoint(repaired, processor, tmp_path):
    repaired.processor = processor
    repaired.save_pretrained(tmp_path / "care")
    return tmp_path / "care"


def run(code, cwd):
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=cwd)


# The repair itself


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_wrapper_adds_exactly_the_repair(llava, inputs, fusion):
    base = CareForConditionalGeneration.from_base(llava, subspaces(fusion))
    with record(base.vlm, [FFN]) as after:
        base(**inputs)
    with base.disable(), record(base.vlm, [FFN]) as before:
        base(**inputs)
    mask = inputs["input_ids"] == llava.config.image_token_id
    expected = repair(before[FFN], subspaces().sites[FFN], fusion, visual_mask=mask)
    torch.testing.assert_close(after[FFN], expected)
    assert not torch.allclose(after[FFN], before[FFN], atol=1e-2)


def test_the_base_is_untouched_and_its_weights_are_shared(llava, inputs):
    before = llava(**inputs).logits
    names = list(llava.state_dict())
    repaired = CareForConditionalGeneration.from_base(llava, subspaces())
    assert torch.equal(llava(**inputs).logits, before) and list(llava.state_dict()) == names
    assert not torch.equal(repaired(**inputs).logits, before)
    ours = dict(repaired.vlm.named_parameters())
    assert all(ours[name].data_ptr() == value.data_ptr() for name, value in llava.named_parameters())
    assert {n for n in repaired.vlm.state_dict() if ".care." not in n} == set(names)


def test_switched_off_or_at_strength_zero_it_is_the_base_bit_for_bit(llava, repaired, inputs):
    base, full = llava(**inputs).logits, repaired(**inputs).logits
    with repaired.disable():
        assert torch.equal(repaired(**inputs).logits, base)
        with repaired.enable():
            assert torch.equal(repaired(**inputs).logits, full)
        assert torch.equal(repaired(**inputs).logits, base)
    assert torch.equal(repaired(**inputs).logits, full)
    repaired.disable()
    assert torch.equal(repaired(**inputs).logits, base)
    repaired.enable()
    repaired.strength = 0
    assert repaired.strength == 0 and torch.equal(repaired(**inputs).logits, base)
    tokens = llava.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(repaired.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)


def test_an_error_inside_a_disabled_block_switches_it_on_again(repaired):
    with pytest.raises(RuntimeError), repaired.disable():
        raise RuntimeError
    assert repaired.care_state.enabled


@pytest.mark.parametrize("fusion", ["adaptive", "route"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_every_way_of_decoding_gives_the_tokens_of_no_cache(llava, inputs, fusion, options):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces(fusion))
    common = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    rows = {name: value[:1] for name, value in inputs.items()} if "prompt_lookup_num_tokens" in options else inputs
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = repaired.generate(**rows, **common, **beams, use_cache=False)
    assert torch.equal(repaired.generate(**rows, **common, **beams), expected)
    assert torch.equal(repaired.generate(**rows, **common, **options), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_is_its_rows(llava, world, processor, fusion):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces(fusion))
    samples = [Sample(s.messages) for s in (*world.attack("icon", "fit", 2), *world.plain("fit", 3))]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = collate(processor, samples, [4]).inputs
    together = repaired.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, sample in zip(together, samples, strict=True):
        single = collate(processor, [sample], [4]).inputs
        assert torch.equal(repaired.generate(**single, **options)[0, single["input_ids"].shape[1] :], row)


def test_assisted_decoding_gives_the_same_tokens(llava, repaired, inputs):
    row = {name: value[:1] for name, value in inputs.items()}
    assistant = CareForConditionalGeneration.from_base(llava, SafetySubspaces.random(llava, layers=[1], rank=2))
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = repaired.generate(**row, **options)
    assert torch.equal(repaired.generate(**row, **options, assistant_model=assistant), expected)


def test_route_finds_image_tokens_among_embeddings_too(llava, inputs):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces("route"))
    expected = repaired(**inputs).logits
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeddings = repaired.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(repaired(inputs_embeds=embeddings, **rest).logits, expected)
    assert repaired.care_state.now.visual_mask is None


def test_route_refuses_to_guess(llava, inputs):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces("route"))
    with pytest.raises(ValueError, match="which are which"):
        repaired.vlm.model(**inputs)
    llava.config.image_token_id = None
    with pytest.raises(ValueError, match="names none"):
        CareForConditionalGeneration.from_base(llava, subspaces("route"))


def test_gradients_reach_the_pixels_and_the_weights(repaired, inputs):
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    repaired(**{**inputs, "pixel_values": pixels}).logits.square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    assert repaired.vlm.model.language_model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fusion", ["adaptive", "union", "route"])
def test_it_compiles_to_one_graph(llava, inputs, fusion):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces(fusion))
    expected = repaired(**inputs).logits
    compiled = torch.compile(
        repaired.vlm if fusion != "route" else repaired, fullgraph=fusion != "route", backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_stand_alone(repaired, inputs):
    pickled, copied = pickle.dumps(repaired), copy.deepcopy(repaired)
    expected = repaired(**inputs).logits
    repaired.strength = 0
    for other in (pickle.loads(pickled), copied):
        assert torch.equal(other(**inputs).logits, expected)
        with other.disable():
            assert not torch.equal(other(**inputs).logits, expected)
        assert repaired.care_state.enabled


@pytest.mark.parametrize("fusion", ["adaptive", "constant", "route"])
def test_a_repair_is_trained_only_where_asked(llava, inputs, fusion, tmp_path):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces(fusion))
    repaired(**inputs).logits.square().mean().backward()
    assert not any(buffer.requires_grad for buffer in repaired.buffers())
    tensors = repaired.unfreeze_repair()
    assert len(tensors) == 2 * 2 * 2 + 1  # a basis and a mean for each, and one reader
    before, losses = copy.deepcopy(repaired), []
    optimiser = torch.optim.SGD(tensors, lr=0.05)
    for _ in range(4):
        optimiser.zero_grad()
        loss = repaired(**inputs).logits.square().mean()
        loss.backward()
        losses.append(float(loss))
        assert all(tensor.grad.abs().sum() > 0 for tensor in tensors)
        optimiser.step()
        repaired.retract_repair()
        repaired.check()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(torch.equal(*pair) for pair in zip(repaired.parameters(), before.parameters(), strict=True))
    repaired.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, repaired(**inputs).logits)
    optimiser.step()
    with pytest.raises(ValueError, match="identity"):
        repaired.save_pretrained(tmp_path)


def test_gradients_of_a_basis_are_those_of_finite_differences(llava, inputs):
    repaired = CareForConditionalGeneration.from_base(llava.double(), subspaces("constant"))
    basis = repaired.unfreeze_repair()[0]
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    repaired(**inputs).logits.square().mean().backward()
    with torch.no_grad():
        direction, ends = torch.randn_like(basis), []
        for sign in (1, -1):
            basis.add_(sign * 1e-3 * direction)
            ends.append(repaired(**inputs).logits.square().mean())
            basis.sub_(sign * 1e-3 * direction)
    expected = (ends[0] - ends[1]) / 2e-3
    torch.testing.assert_close((basis.grad.double() * direction).sum(), expected, rtol=1e-2, atol=1e-6)


def test_a_fusion_that_needs_both_bases_is_not_trained(llava):
    with pytest.raises(ValueError, match="Fusion 'union' cannot be trained"):
        CareForConditionalGeneration.from_base(llava, subspaces("union")).unfreeze_repair()


# Bases that are elsewhere


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_base_is_repaired(llava, inputs, offload, tmp_path):
    expected = CareForConditionalGeneration.from_base(copy.deepcopy(llava), subspaces())(**inputs).logits
    base = llava(**inputs).logits
    if offload == "cpu":
        cpu_offload(llava, torch.device("cpu"))
    else:
        disk_offload(llava, str(tmp_path / "offload"), torch.device("cpu"))
    repaired = CareForConditionalGeneration.from_base(llava, subspaces())
    torch.testing.assert_close(repaired(**inputs).logits, expected)
    assert torch.equal(llava(**inputs).logits, base)


def test_device_maps(checkpoint, repaired, inputs, tmp_path):
    expected = repaired(**inputs).logits
    for device_map in ("cpu", {"": "cpu"}, {"": "disk"}):
        loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map, offload_folder=str(tmp_path / "offload"))
        torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_half_precision_keeps_the_bases_single(checkpoint, inputs):
    loaded = AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    cast = AutoModel.from_pretrained(checkpoint).to(torch.bfloat16)
    for model in (loaded, cast):
        buffers = {n: b for n, b in model.named_buffers() if ".care." in n}
        assert {b.dtype for b in buffers.values() if b.is_floating_point()} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits.dtype == torch.bfloat16


def test_lora_trains_saves_reloads_and_merges_on_top(repaired, checkpoint, inputs, tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(repaired, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = lora(**inputs).logits
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        n for n, _ in lora.named_parameters() if "lora_" in n
    }
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(checkpoint), tmp_path / "lora")
    assert torch.equal(again(**inputs).logits, expected)
    merged = again.merge_and_unload()
    assert isinstance(merged, CareForConditionalGeneration)
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


# Checkpoints


def test_every_auto_class_gives_the_repaired_model_back(checkpoint, repaired, inputs):
    expected = repaired(**inputs).logits
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, CareForConditionalGeneration):
        loaded = auto.from_pretrained(checkpoint)
        assert type(loaded) is CareForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, expected)
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is CareConfig and config.image_token_id == 4 and config.text_config.hidden_size == 128
    assert type(AutoProcessor.from_pretrained(checkpoint)).__name__ == "LlavaProcessor"
    assert loaded.layers.tolist() == [2, 4]


def test_shards_and_a_second_round_trip(repaired, inputs, tmp_path):
    repaired.save_pretrained(tmp_path / "a", max_shard_size="1MB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    once = AutoModel.from_pretrained(tmp_path / "a")
    once.save_pretrained(tmp_path / "b")
    twice = AutoModel.from_pretrained(tmp_path / "b")
    assert torch.equal(twice(**inputs).logits, repaired(**inputs).logits)
    assert json.loads(once.config.to_json_string()) == json.loads(twice.config.to_json_string())


def test_the_pipeline_answers_as_generate_does(checkpoint, world):
    sample = world.attack("icon", "fit", 1)[0]
    pipe = pipeline("image-text-to-text", str(checkpoint))
    options = {"max_new_tokens": 6, "do_sample": False}
    answer = pipe(text=sample.messages, generate_kwargs=options, return_full_text=False)[0]["generated_text"]
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    single = collate(processor, [Sample(sample.messages)], [4]).inputs
    output = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
    assert answer.strip() == processor.decode(output, skip_special_tokens=True)


def test_a_reloaded_model_is_switched_on(repaired, tmp_path, inputs):
    expected = repaired(**inputs).logits
    with repaired.disable():
        repaired.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, expected)


def test_without_the_package_it_does_not_load_unless_its_code_is_trusted(checkpoint, repaired, inputs, tmp_path):
    torch.save({"inputs": inputs, "logits": repaired(**inputs).logits}, tmp_path / "expected.pt")
    load = "import sys, torch; from transformers import {0} as A; m = A.from_pretrained('care'{1})"
    for auto in ("AutoModel", "AutoModelForImageTextToText"):
        refused = run(
            "import sys; sys.modules['care_hf'] = None;" + load.format(auto, ", trust_remote_code=False"), tmp_path
        )
        assert refused.returncode != 0 and "trust_remote_code" in refused.stderr
    check = "; e = torch.load('expected.pt'); assert torch.equal(m(**e['inputs']).logits, e['logits'])"
    check += "; print(type(m).__name__)"
    for auto in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        code = "import sys; sys.modules['care_hf'] = None;" + load.format(auto, ", trust_remote_code=True") + check
        trusted = run(code, tmp_path)
        assert trusted.stdout.split()[-1:] == ["CareForConditionalGeneration"], trusted.stderr


def test_the_bases_own_class_finds_none_of_its_weights(checkpoint):
    # It ignores the model type and warns; what comes out is random, never the unrepaired base.
    stock, info = LlavaForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == set(stock.state_dict())


def test_checkpoints_whose_repair_is_not_whole_do_not_load(checkpoint, tmp_path):
    weights, config = load_file(checkpoint / "model.safetensors"), json.loads((checkpoint / "config.json").read_text())
    # The base's modules have the names of its own checkpoints, which transformers maps to those in memory.
    (basis,) = (name for name in weights if name.endswith("layers.2.mlp.care.visual.basis"))
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))

    def refused(message, new_weights=None, new_config=None, **options):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(checkpoint, broken)
        save_file(new_weights or weights, broken / "model.safetensors", metadata={"format": "pt"})
        (broken / "config.json").write_text(json.dumps(new_config or config))
        for auto in (AutoModel, AutoModelForImageTextToText):
            with pytest.raises((ValueError, RuntimeError), match=message):
                auto.from_pretrained(broken, **options)

    repair_tensors = [name for name in weights if ".care." in name or name == "layers"]
    assert len(repair_tensors) == 2 * (3 * 2 + 3) + 1 + 1
    for name in repair_tensors:
        refused("lacks", {k: v for k, v in weights.items() if k != name})
    refused("lacks", {k: v for k, v in weights.items() if k != head})
    refused("unknown to its config.json", {**weights, basis.replace("layers.2", "layers.3"): weights[basis].clone()})
    narrow = {**weights, basis: weights[basis][:, :2].contiguous()}
    refused("mismatch|shape", narrow)
    refused("another shape", narrow, ignore_mismatched_sizes=True)
    refused("not finite", {**weights, basis: weights[basis] * torch.nan})
    refused("identity", {**weights, basis: weights[basis] * 1.01})
    refused("`layers`", {**weights, "layers": weights["layers"] + 1})
    refused("fusion", new_config={**config, "fusion": "constant"})
    refused("lacks", new_config={**config, "fusion": "union"})
    extra = {"site": "2.residual", "ranks": {"text": 4}, "oblique": []}
    refused("lacks", new_config={**config, "sites": [*config["sites"], extra]})
    moved = {**config["sites"][1], "site": "4.ffn"}
    refused("lacks", new_config={**config, "sites": [config["sites"][0], moved]})
    refused("mismatched", new_config={**config, "sites": config["sites"][:1]})
    refused("mismatched", new_config={**config, "sites": []})
    refused("no 'model_type'", new_config={**config, "vlm_config": {}})


def test_a_truncated_file_does_not_load(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|buffer"):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: CareForConditionalGeneration.from_base(
                m, SafetySubspaces({Site(6, "ffn"): {"text": random_subspace(0)}})
            ),
            "6 decoder layers",
        ),
        (
            lambda m: CareForConditionalGeneration.from_base(
                m, SafetySubspaces({FFN: {"text": random_subspace(0, 64)}})
            ),
            "d=64",
        ),
        (
            lambda m: CareForConditionalGeneration.from_base(
                CareForConditionalGeneration.from_base(m, subspaces()), subspaces()
            ),
            "repaired already",
        ),
        (lambda m: CareConfig(m.config, [{"site": "2.mlp", "ranks": {"text": 1}}]), "component='mlp'"),
        (lambda m: CareConfig(m.config, [{"site": "2.ffn", "ranks": {"text": 0}}]), "ranks="),
        (lambda m: CareConfig(m.config, [{"site": "2.ffn", "ranks": {"text": 1}}] * 2), "twice"),
        (lambda m: CareConfig(m.config, [{"site": "2.ffn", "ranks": {"text": 1}, "oblique": ["visual"]}]), "oblique="),
        (lambda m: CareConfig(m.config, fusion="mean"), "fusion='mean'"),
        (lambda m: CareConfig(), "no vlm_config"),
    ],
)
def test_what_cannot_be_repaired_is_named(llava, build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(llava)


# What transformers' common model tests ask for


def test_forward_takes_what_the_base_takes(repaired, llava):
    assert inspect.signature(repaired.forward) == inspect.signature(llava.forward)
    assert list(inspect.signature(type(repaired).forward).parameters) == ["self", "input_ids", "labels", "kwargs"]


def test_a_copy_of_a_hooked_model_runs_itself(repaired, inputs):
    add_hook_to_module(repaired, ModelHook())
    twin = copy.deepcopy(repaired)
    twin.strength = 0.0
    with torch.no_grad(), repaired.disable():
        base = repaired(**inputs).logits
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, base) and not torch.equal(repaired(**inputs).logits, base)


def test_the_embeddings_are_tied_as_the_configuration_says(repaired):
    config = copy.deepcopy(repaired.config)
    assert not config.tie_word_embeddings
    config.tie_word_embeddings = True
    assert config.vlm_config.tie_word_embeddings and CareConfig.from_dict(config.to_dict()).tie_word_embeddings
    tied = CareForConditionalGeneration(config)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_repair_that_nothing_filled_is_nan_whatever_memory_held(repaired):
    with torch.device("meta"):
        model = CareForConditionalGeneration(repaired.config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1)
    model.init_weights()
    assert model.layers.tolist() == repaired.layers.tolist()
    for part in model.care_modules().values():
        assert all(buffer.isnan().all() for buffer in part.buffers() if buffer.is_floating_point())
    with pytest.raises(ValueError, match="not finite"):
        model.check()
    repaired.init_weights()  # fills nothing that is filled already
    repaired.check()


def test_the_base_is_initialised_as_alone(repaired):
    """On the meta device too, where transformers passes over modules of models that it does not know."""
    with torch.device("meta"):
        model = CareForConditionalGeneration(repaired.config)
    model.to_empty(device="cpu").init_weights()
    for (name, one), other in zip(model.vlm.named_parameters(), repaired.vlm.parameters(), strict=True):
        if "vision_tower" in name and name.endswith("proj.weight"):
            torch.testing.assert_close(one.std(), other.std(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        (SafetyProjection, (8, {"visual": 2, "text": 2}, "union", ["text"])),
        (TurnProjection, (8, {"last": 2, "response": 2}, 3, ["last"])),
        (GateReader, (8, 0, 1, 1)),
    ],
)
def test_buffers_of_a_repair_are_single_precision_whatever_the_default(part, arguments):
    torch.set_default_dtype(torch.float16)
    try:
        buffers = list(part(*arguments).buffers())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in buffers if buffer.is_floating_point()} == {torch.float32}


def test_tokens_of_a_video_are_visual_ones(qwen):
    sites = SafetySubspaces.random(qwen, layers=[1], rank=4).sites
    repaired = CareForConditionalGeneration.from_base(qwen, SafetySubspaces(sites, "route"))
    ids = torch.tensor([[5, 91, *[93] * 4, 92, 6, 7]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.tensor([[0, 0, 2, 2, 2, 2, 0, 0, 0]]),
        "pixel_values_videos": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    site = Site(1, "ffn")
    with record(repaired.vlm, [site]) as after, torch.no_grad():
        repaired(**inputs)
    with repaired.disable(), record(repaired.vlm, [site]) as before, torch.no_grad():
        repaired(**inputs)
    torch.testing.assert_close(after[site], repair(before[site], sites[site], "route", visual_mask=ids == 93))
    assert not torch.allclose(after[site], repair(before[site], sites[site], "route", visual_mask=ids == 90))
