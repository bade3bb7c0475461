"""Adapters of a repair: saved, put on their base again in every form that a base has, and refused on any other."""

import copy
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from hub import Hub
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_decoding import GREEDY, case, samples  # noqa: F401  fixtures
from test_hub import run as run_online
from test_modeling import subspaces
from test_quantised import build, quantisation
from transformers import AutoModelForImageTextToText, LlamaConfig

from care_hf import CareForConditionalGeneration, SafetySubspaces, load_adapter, load_testbed, save_adapter
from care_hf.checkpoint import ADAPTER_FILE
from care_hf.sites import Site, decoder_layers

GOLDEN = Path(__file__).parent / "data"


def repair_tensors(model):
    return {name: value.clone() for name, value in model.named_buffers() if ".care" in name}


def assert_same_repair(a, b):
    one, other = repair_tensors(a), repair_tensors(b)
    assert one.keys() == other.keys() and one
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
    for name in ("sites", "fusion", "scope", "gate"):
        assert getattr(a.config, name) == getattr(b.config, name)


@pytest.fixture(scope="module")
def small():
    """A LLaVA that bitsandbytes can quantise."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return build(LlamaConfig(vocab_size=99, **text, tie_word_embeddings=False, initializer_range=0.2))


@pytest.fixture
def small_adapter(small, tmp_path):
    repaired = CareForConditionalGeneration.from_base(small, SafetySubspaces.random(small, [1], 4))
    save_adapter(repaired, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def adapter(llava, tmp_path):
    save_adapter(CareForConditionalGeneration.from_base(llava, subspaces()), tmp_path / "adapter")
    return tmp_path / "adapter"


# What is saved comes back


def test_a_gated_repair_comes_back_and_answers_alike(case, tmp_path):  # noqa: F811
    save_adapter(case.model, tmp_path)
    again = load_adapter(case.base, tmp_path)
    assert_same_repair(again, case.model)
    assert again.config.origin == {**case.model.config.origin, "base_match": "exact"}
    for inputs in case.singles[:4]:
        assert torch.equal(again.generate(**inputs, **GREEDY), case.model.generate(**inputs, **GREEDY))
    save_adapter(again, tmp_path / "again")
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as one, safe_open(tmp_path / "again" / ADAPTER_FILE, "pt") as other:
        assert one.metadata() == other.metadata()


@pytest.mark.parametrize("fusion", ["adaptive", "printed", "union", "route", "constant"])
def test_a_repair_by_modality_comes_back(llava, fusion, tmp_path):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces(fusion, fusion_weight=0.25))
    repaired.strength = 0.5
    save_adapter(repaired, tmp_path / "named.safetensors")
    again = load_adapter(llava, tmp_path / "named.safetensors")
    assert_same_repair(again, repaired)
    assert all(p is q for p, q in zip(again.parameters(), llava.parameters(), strict=True))


def test_the_file_is_small_keyed_by_site_and_tells_no_folder(llava, tmp_path):
    llava.config._name_or_path = str(tmp_path / "secret" / "model")
    save_adapter(CareForConditionalGeneration.from_base(llava, subspaces()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]
    content = (tmp_path / ADAPTER_FILE).read_bytes()
    assert len(content) < 200_000 and b"secret" not in content
    names = set(load_file(tmp_path / ADAPTER_FILE))
    assert "sites.2.ffn.visual.basis" in names and all(n.startswith(("sites.", "base.values")) for n in names)


def test_tensors_that_share_memory_are_saved(tmp_path):
    one = subspaces().sites[Site(4, "residual")]
    shared = SafetySubspaces({Site(1, "ffn"): one, Site(3, "ffn"): one})
    shared.save(tmp_path / "s.safetensors")
    assert SafetySubspaces.load(tmp_path / "s.safetensors").digest == shared.digest


# Every form of a base


def test_the_base_may_be_cast(llava, adapter):
    for dtype, said in ((torch.bfloat16, "in bfloat16"), (torch.float16, "in float16"), (torch.float64, "in float64")):
        loaded = load_adapter(copy.deepcopy(llava).to(dtype), adapter)
        expected = "in float32" if dtype == torch.float64 else said
        assert loaded.config.origin["base_match"] == expected
        assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("fitted", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.bfloat16, torch.float16, torch.float32])
def test_a_repair_of_a_cast_base_fits_the_base_in_any_other_dtype(llava, fitted, used, tmp_path):
    half = CareForConditionalGeneration.from_base(copy.deepcopy(llava).to(fitted), subspaces())
    save_adapter(half, tmp_path)
    loaded = load_adapter(llava.to(used), tmp_path)
    assert_same_repair(loaded, half)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes 8", "bitsandbytes 4"])
def test_the_base_may_be_quantised_and_it_is_said_what_was_compared(small, small_adapter, method, tmp_path):
    small.save_pretrained(tmp_path / "base")
    loaded = load_adapter(tmp_path / "base", small_adapter, quantization_config=quantisation(method))
    match = loaded.config.origin["base_match"]
    assert "quantised" in match and len(list(loaded.care_modules())) == 1
    # Norms were trained too: that is seen through any quantisation.
    tuned = copy.deepcopy(small)
    with torch.no_grad():
        tuned.model.language_model.norm.weight.add_(0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="weights of this one differ"):
        load_adapter(tmp_path / "tuned", small_adapter, quantization_config=quantisation(method))


def test_a_repair_of_a_quantised_base_fits_the_whole_one(small, tmp_path):
    small.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", quantization_config=quantisation("bitsandbytes 8")
    )
    save_adapter(CareForConditionalGeneration.from_base(base, SafetySubspaces.random(base, [1], 4)), tmp_path)
    for other in (small, base):
        assert "quantised" in load_adapter(other, tmp_path).config.origin["base_match"]


def test_the_base_may_be_offloaded(llava, adapter):
    cpu_offload(llava, torch.device("cpu"))
    assert load_adapter(llava, adapter).config.origin["base_match"] == "exact"


def test_the_base_may_be_named_and_is_loaded_as_asked(llava, adapter, tmp_path):
    llava.save_pretrained(tmp_path / "base")
    loaded = load_adapter(str(tmp_path / "base"), str(adapter), dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert type(loaded.vlm).__name__ == "LlavaForConditionalGeneration"


def test_adapters_of_peft_belong_to_the_base(llava, adapter, tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(copy.deepcopy(llava), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    repaired = CareForConditionalGeneration.from_base(lora, subspaces())
    save_adapter(repaired, tmp_path / "on_lora")
    assert_same_repair(load_adapter(lora, tmp_path / "on_lora"), repaired)
    assert not any("lora" in name for name in load_file(tmp_path / "on_lora" / ADAPTER_FILE))
    for base, file in ((llava, tmp_path / "on_lora"), (lora, adapter)):
        with pytest.raises(ValueError, match="other adapters"):
            load_adapter(base, file)
    merged = lora.merge_and_unload()
    with pytest.raises(ValueError, match="9 of them"):
        load_adapter(merged, adapter)


def test_renamed_modules_orphan_nothing(llava, adapter):
    """As if another version of transformers had renamed the FFN, and what holds the decoder's layers."""
    expected = repair_tensors(load_adapter(llava, adapter))
    for layer in decoder_layers(llava):
        cls = type(layer)
        layer.feed_forward = layer._modules.pop("mlp")
        layer.__class__ = type("Renamed", (cls,), {"mlp": property(lambda self: self.feed_forward)})
    loaded = load_adapter(llava, adapter)
    renamed = repair_tensors(loaded)
    assert loaded.config.origin["base_match"] == "exact" and set(renamed) != set(expected)
    assert all(torch.equal(renamed[name.replace(".mlp.", ".feed_forward.")], expected[name]) for name in expected)


# Any other base


def altered(model, name, change):
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.language_model.norm.weight",
        "model.language_model.layers.5.self_attn.v_proj.weight",
        "model.multi_modal_projector.linear_2.bias",
    ],
)
def test_a_fine_tuned_base_is_told_and_refused_unless_asked(llava, adapter, name):
    tuned = altered(llava, name, lambda weight: weight.add_(0.01))
    for base in (tuned, copy.deepcopy(tuned).bfloat16()):
        with pytest.raises(ValueError, match=rf"1 of them, {name} first.*other_base=True"):
            load_adapter(base, adapter)
    loaded = load_adapter(tuned, adapter, other_base=True)
    assert loaded.config.origin["base_match"].startswith("another base")
    assert_same_repair(loaded, load_adapter(llava, adapter))


def test_bases_of_another_shape_are_refused(llava, qwen, small, adapter):
    with pytest.raises(
        ValueError, match=r"family 'qwen2_5_vl', not 'llava', hidden size 64, not 128, decoder layers 3"
    ):
        load_adapter(qwen, adapter)
    with pytest.raises(ValueError, match="tokens 99, not"):
        load_adapter(small, adapter)
    with pytest.raises(ValueError, match="d=128"):
        load_adapter(qwen, adapter, other_base=True)
    deeper = copy.deepcopy(llava)
    decoder_layers(deeper).append(copy.deepcopy(decoder_layers(deeper)[0]))
    with pytest.raises(ValueError, match=r"cannot be told|decoder layers 7, not 6"):
        load_adapter(deeper, adapter)


# Older formats


def cosines(first, rank):
    rows, columns = torch.arange(128, dtype=torch.float64)[:, None], torch.arange(first, first + rank)
    return math.sqrt(2 / 128) * torch.cos(math.pi * (rows + 0.5) * columns / 128)


def assert_golden(found: SafetySubspaces):
    ramp = torch.linspace(-1, 1, 128)
    assert list(found.sites) == [Site(2, "ffn"), Site(4, "residual")] and found.strength == 0.75
    assert found.gate_site == Site(1, "residual") and found.gate.prompt_end == (5,)
    assert (found.gate.required, found.gate.alarms, found.gate.pictured) == (1, 1, 1)
    torch.testing.assert_close(found.gate.readers, torch.stack([ramp, -ramp, ramp**2], 1))
    for by_place in found.sites.values():
        torch.testing.assert_close(by_place["last"].basis, cosines(1, 2).float())
        torch.testing.assert_close(by_place["last"].reader, (cosines(1, 2) + 0.25 * cosines(9, 2)).float())
        torch.testing.assert_close(by_place["last"].mean, ramp)
        assert by_place["last"].beta == 0.5
    response = found.sites[Site(4, "residual")]["response"]
    torch.testing.assert_close(response.mean, torch.stack([ramp, 2 * ramp, 3 * ramp]))
    assert found.metadata["origin"] == "a golden file"


def test_files_of_the_first_format_load(llava):
    old = GOLDEN / "adapter_v1.safetensors"
    assert_golden(SafetySubspaces.load(old))
    with pytest.raises(ValueError, match=r"does not name its base, as no file .* of the first format.*other_base=True"):
        load_adapter(llava, old)
    assert_golden(SafetySubspaces.from_model(load_adapter(llava, old, other_base=True)))


def test_files_of_this_format_will_load(llava):
    file, (base, _) = GOLDEN / "adapter_v2.safetensors", load_testbed()
    assert_golden(SafetySubspaces.load(file))
    loaded = load_adapter(base, file)
    assert_golden(SafetySubspaces.from_model(loaded))
    assert loaded.config.origin["base_match"] == "exact"
    with pytest.raises(ValueError, match="weights of this one differ"):
        load_adapter(llava, file)  # of the same shape, not trained


# What is not there, or not meant


def test_errors_say_what_to_do(llava, adapter, tmp_path):
    repaired = CareForConditionalGeneration.from_base(llava, subspaces())
    repaired.save_pretrained(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    expected = [
        (FileNotFoundError, "neither a file nor a folder", lambda: load_adapter(llava, tmp_path / "nowhere")),
        (FileNotFoundError, "neither a file nor a folder", lambda: load_adapter(llava, "../../elsewhere")),
        (FileNotFoundError, "holds no care_adapter.safetensors", lambda: load_adapter(llava, tmp_path / "empty")),
        (FileNotFoundError, "load it with AutoModel", lambda: load_adapter(llava, tmp_path / "whole")),
        (IsADirectoryError, "is a folder", lambda: SafetySubspaces.load(tmp_path)),
        (FileNotFoundError, "no file", lambda: SafetySubspaces.load(tmp_path / "nowhere")),
        (TypeError, "repaired already", lambda: load_adapter(repaired, adapter)),
        (TypeError, "repaired already", lambda: load_adapter(tmp_path / "whole", adapter)),
        (TypeError, r"\['dtype'\] is for loading a base", lambda: load_adapter(llava, adapter, dtype="auto")),
        (TypeError, "has no repair to save", lambda: save_adapter(llava, tmp_path)),
    ]
    for error, message, do in expected:
        with pytest.raises(error, match=message):
            do()
    next(iter(repaired.care_modules().values())).strength.fill_(0.5)
    with pytest.raises(ValueError, match=r"Sites differ in strength, \[0.5, 1.0\]"):
        save_adapter(repaired, tmp_path)


# The Hub

PUSH = """
import sys, torch, care_hf
model, processor = care_hf.load_testbed()
subspaces = care_hf.SafetySubspaces.random(model, layers=[2], rank=4)
repaired = care_hf.CareForConditionalGeneration.from_base(model, subspaces)
care_hf.save_adapter(repaired, "org/adapter", push_to_hub=True)
model.push_to_hub("org/base")
repaired.save_pretrained("whole", push_to_hub=True, repo_id="org/whole", max_shard_size="2MB")
"""

LOAD = """
import torch, care_hf
from transformers import AutoModel
model, _ = care_hf.load_testbed()
one = care_hf.load_adapter(model, "org/adapter", revision="main")
other = care_hf.load_adapter("org/base", "org/adapter")
whole, local = AutoModel.from_pretrained("org/whole"), AutoModel.from_pretrained("whole")
expected = care_hf.SafetySubspaces.from_model(local).digest
for repaired in (one, other, whole):
    assert care_hf.SafetySubspaces.from_model(repaired).digest == expected
assert other.config.origin["base_match"] == "exact"
assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
"""


def test_adapters_and_checkpoints_go_through_the_hub(tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        run_online(PUSH, server, tmp_path)
        assert set(server.files["org/adapter"]) == {ADAPTER_FILE}
        assert "model.safetensors.index.json" in server.files["org/whole"] and "README.md" in server.files["org/whole"]
        assert server.files["org/whole"]["config.json"] == (tmp_path / "whole" / "config.json").read_bytes()
        run_online(LOAD, server, tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    shutil.rmtree(tmp_path / "whole")
