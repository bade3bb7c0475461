"""Broken, hostile and half-written files: they load as what was saved, bit for bit, or not at all.

With the environment variable FUZZ=N the fuzzing tests try N inputs each.
"""

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import random_subspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    modeling_utils,
)

from care_hf import CareConfig, CareForConditionalGeneration, SafetySubspaces, atomic, load_adapter, save_adapter
from care_hf.checkpoint import ADAPTER_FILE
from care_hf.gating import Gate
from care_hf.loading import repair_digest
from care_hf.sites import Site

D = 16
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", 60)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ" not in os.environ,
)
RAISED = (ValueError, OSError, RuntimeError, TypeError, ImportError)  # what `from_pretrained` says it raises


def tiny_base():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(vocab_size=20, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=9)).eval()


def tiny_subspaces(strength=1.0):
    def at(seed, steps=0, oblique=False):
        subspace = random_subspace(seed, D, 2, oblique)
        if steps:
            object.__setattr__(subspace, "mean", torch.stack([subspace.mean] * steps))
        return subspace

    generator = torch.Generator().manual_seed(1)
    gate = Gate((3, 4), torch.randn(D, 3, generator=generator), torch.randn(3, generator=generator), 1, 1)
    sites = {
        Site(0, "ffn"): {"last": at(1, oblique=True), "response": at(2, steps=3)},
        Site(1, "residual"): {"last": at(3)},
    }
    return SafetySubspaces(sites, strength=strength, gate=gate, gate_site=Site(0, "attention"))


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def repaired(base):
    return CareForConditionalGeneration.from_base(base, tiny_subspaces())


@pytest.fixture(scope="module")
def checkpoint(repaired, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    repaired.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(repaired, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(repaired, folder)
    return folder / ADAPTER_FILE


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def of_the_repair(model):
    """All that the repair is, without the package's own digest."""
    described = [(name, getattr(model.config, name)) for name in ("sites", "fusion", "scope", "gate")]
    buffers = [(n, str(b.dtype), b.tolist()) for n, b in sorted(model.named_buffers()) if ".care" in n or n == "layers"]
    return json.dumps([described, buffers], sort_keys=True)


# One break at a time: what it is refused with


def edit(path, **changes):
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config.pop(name) if value is KeyError else config.update({name: value})
    path.write_text(json.dumps(config))


SITE = {"site": "0.ffn", "ranks": {"last": 2, "response": 2}, "oblique": ["last"], "steps": 3}
GATE = {"site": "0.attention", "required": 1, "alarms": 1, "pictured": 1, "prompt_end": [3, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"care_format": 3}, r"format 3.*reads up to 2; install a newer"),
        ({"care_format": "2"}, "must be a whole number"),
        ({"care_format": True}, "must be a whole number"),
        ({"care_format": 0}, "must be a whole number"),
        ({"repair_digest": KeyError}, "repair_digest=None must be the hash"),
        ({"repair_digest": "0" * 64}, "has the digest .* but config.json says 000000000000"),
        ({"care_format": KeyError}, None),  # the digest is still there, and right
        ({"fusion": "mean"}, "fusion='mean' is not known"),
        ({"fusion": ["adaptive"]}, "is not known"),
        ({"fusion": "union"}, "digest"),
        ({"scope": "prompt"}, "digest"),
        ({"sites": [SITE]}, "unknown to its config.json|`layers`|mismatched"),
        ({"sites": [SITE, SITE]}, "name a place twice"),
        ({"sites": [SITE, {**SITE, "site": "00.ffn"}]}, "not a site as it is written"),
        ({"sites": [{**SITE, "site": "²3.ffn"}]}, "is not a site"),
        ({"sites": [{**SITE, "site": "9.ffn"}]}, "2 decoder layers"),
        ({"sites": [{**SITE, "site": 3}]}, "not a site"),
        ({"sites": {"site": 1}}, "must be a list of dicts"),
        ({"sites": [{**SITE, "ranks": [2]}]}, "ranks="),
        ({"sites": [{**SITE, "ranks": {"last": True, "response": 2}}]}, "ranks="),
        ({"sites": [{**SITE, "ranks": {"last": 17, "response": 2}}]}, "rank=17 must lie between 1 and"),
        ({"sites": [{**SITE, "oblique": 7}]}, "oblique=7"),
        ({"sites": [{**SITE, "steps": 3.0}]}, "steps=3.0"),
        ({"gate": None}, "ask a gate"),
        ({"gate": {**GATE, "required": -1}}, "counts of detectors"),
        ({"gate": {**GATE, "required": 0, "alarms": 2}}, "digest"),
        ({"gate": {**GATE, "prompt_end": [3, 5]}}, "digest"),
        ({"gate": {**GATE, "prompt_end": [3, 99]}}, "has 20 tokens"),
        ({"gate": {**GATE, "prompt_end": []}}, "token ids"),
        ({"gate": {**GATE, "site": "1.residual"}}, "after sites"),
        ({"gate": {**GATE, "more": 1}}, "must be a dict of"),
        ({"vlm_config": 3}, "must be a configuration"),
        ({"vlm_config": {"model_type": "llava", "text_config": 3}}, "no configuration of a 'llava'"),
        ({"vlm_config": {"model_type": "nothing"}}, "no configuration of a 'nothing'"),
        ({"origin": [1]}, "origin="),
        ({"adapters": [1]}, "adapters="),
        ({"active_adapters": [["a"]]}, "active_adapters="),
        ({"transformers_weights": "../other.safetensors"}, "names other weights"),
    ],
)
def test_settings_that_cannot_be(broken, repaired, changes, message):
    edit(broken / "config.json", **changes)
    for auto in (AutoModel, AutoModelForImageTextToText, CareForConditionalGeneration):
        if message is None:
            assert of_the_repair(auto.from_pretrained(broken)) == of_the_repair(repaired)
            continue
        with pytest.raises(RAISED, match=message):
            auto.from_pretrained(broken)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("text_config",), "mismatched"),
        (("text_config", "hidden_size"), "mismatched"),
        (("vision_config", "num_hidden_layers"), r"a model of 26,128 parameters, of which its files lack 16,960"),
    ],
)
def test_what_a_lost_size_makes_of_the_model_is_never_initialised(broken, monkeypatch, lost, message):
    """It would be a model of 7 billion parameters, in the first."""
    config = json.loads((broken / "config.json").read_text())
    holder = config["vlm_config"]
    for name in lost[:-1]:
        holder = holder[name]
    del holder[lost[-1]]
    (broken / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(CareForConditionalGeneration, "_initialize_missing_keys", lambda *_: pytest.fail("initialised"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModel.from_pretrained(broken)


def test_any_change_of_a_tensor_of_the_repair(checkpoint, broken):
    """Values that a repair may well have, so that nothing but the digest can tell."""
    tensors = load_file(checkpoint / "model.safetensors")
    names = [name for name in tensors if ".care" in name]
    assert len(names) == 3 * 3 + 1 + 2 + 2  # basis, mean, beta; a reader; strengths; the gate
    for name in names:
        changed = tensors[name].clone()
        changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(9.0))
        save_file({**tensors, name: changed}, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="has the digest"):
            AutoModel.from_pretrained(broken)
        save_file({**tensors, name: tensors[name].half()}, broken / "model.safetensors", metadata={"format": "pt"})
        if not torch.equal(tensors[name].half().float(), tensors[name]):
            with pytest.raises(ValueError, match=r"has the digest|identity"):
                AutoModel.from_pretrained(broken)
    off = {name: value * 0 if name.endswith("strength") else value for name, value in tensors.items()}
    save_file(off, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has the digest"):
        AutoModel.from_pretrained(broken)


def test_checkpoints_from_before_there_was_a_digest_load(broken, repaired):
    edit(broken / "config.json", care_format=KeyError, repair_digest=KeyError)
    model = AutoModel.from_pretrained(broken)
    assert of_the_repair(model) == of_the_repair(repaired) and model.config.care_format == 1
    model.save_pretrained(broken)
    assert AutoModel.from_pretrained(broken).config.care_format == 2


def test_the_digest_goes_by_place_and_not_by_dtype(repaired, base, checkpoint):
    loaded = AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert repair_digest(loaded) == repair_digest(repaired) == loaded.config.repair_digest
    other = CareForConditionalGeneration.from_base(base, tiny_subspaces(0.5))
    assert repair_digest(other) != repair_digest(repaired)
    state = {name: torch.zeros_like(value) for name, value in repaired.state_dict().items()}
    assert repair_digest(repaired, state) != repair_digest(repaired, {}) == repair_digest(repaired)


@pytest.fixture
def sharded(repaired, tmp_path):
    repaired.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def test_names_that_lead_elsewhere(sharded, checkpoint, tmp_path):
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    elsewhere = [
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "a/b.safetensors",
        "..\\o.safetensors",
    ]
    for name in [*elsewhere, "pytorch_model.bin", "", None, 3, ["x.safetensors"], "x\0.safetensors"]:
        index.write_text(json.dumps({**whole, "weight_map": dict.fromkeys(whole["weight_map"], name)}))
        with pytest.raises(ValueError, match=r"may only name safetensors files|is no index"):
            AutoModel.from_pretrained(sharded)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}, "metadata": 1}', "\udcff", "[" * 100_000):
        index.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="index"):
            AutoModel.from_pretrained(sharded)
    index.write_text(json.dumps(whole))
    AutoModel.from_pretrained(sharded)
    (sharded / sorted(set(whole["weight_map"].values()))[0]).unlink()
    with pytest.raises(OSError, match="No such file"):
        AutoModel.from_pretrained(sharded)


def test_pickles_are_not_opened(checkpoint, broken, tmp_path):
    class Run:
        def __reduce__(self):
            return Path(tmp_path / "ran").touch, ()

    (broken / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        torch.save({"layers": Run()}, broken / name)
        with pytest.raises(OSError, match="holds no safetensors file"):
            AutoModel.from_pretrained(broken)
    for options in (
        {"use_safetensors": False},
        {"gguf_file": "model.gguf"},
        {"use_safetensors": False, "variant": "x"},
    ):
        with pytest.raises(ValueError, match="safetensors alone"):
            CareForConditionalGeneration.from_pretrained(broken, **options)
    shutil.copy(checkpoint / "model.safetensors", broken / "other.safetensors")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModel.from_pretrained(broken)
    file = tmp_path / "adapter.pt"
    torch.save({"sites": Run()}, file)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SafetySubspaces.load(file)
    assert not (tmp_path / "ran").exists()


def test_links_are_read_and_never_written_through(checkpoint, repaired, tmp_path):
    """The Hub's cache consists of them."""
    linked, precious = tmp_path / "linked", tmp_path / "precious"
    linked.mkdir()
    precious.write_text("precious")
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    before = (checkpoint / "config.json").read_bytes()
    assert of_the_repair(AutoModel.from_pretrained(linked)) == of_the_repair(repaired)
    other = CareForConditionalGeneration.from_base(tiny_base(), tiny_subspaces(0.5))
    (linked / "notes").symlink_to(precious)
    other.save_pretrained(linked)
    assert not (linked / "config.json").is_symlink() and (linked / "notes").is_symlink()
    assert (checkpoint / "config.json").read_bytes() == before
    (tmp_path / ADAPTER_FILE).symlink_to(precious)
    save_adapter(other, tmp_path)
    assert precious.read_text() == "precious" and not (tmp_path / ADAPTER_FILE).is_symlink()


def rewritten(adapter, path, tensors=lambda t: t, **header):
    """The adapter with other content, and its old digest unless another is given."""
    with safe_open(adapter, "pt") as file:
        old = file.metadata()
    new = {**old, **{name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}}
    save_file(tensors(load_file(adapter)), path, metadata={k: v for k, v in new.items() if v != "null"})
    return path


BASIS = "sites.0.ffn.last.basis"
SET = {"fusion": "adaptive", "fusion_weight": 0.5, "strength": 1.0}
DESCRIBED = {"site": "0.attention", "required": 1, "pictured": 1, "prompt_end": [3, 4]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "care_hf.subspaces.v3"}, "format 'care_hf.subspaces.v3'.*install a newer"),
        ({"format": "care_hf.steering.v1"}, "this version reads"),
        ({"digest": "0"}, "does not have the digest '0'"),
        ({"digest": None}, "does not have the digest None"),
        ({"metadata": {"origin": "elsewhere"}}, "does not have the digest"),
        ({"settings": "{"}, "no 'settings' that is JSON"),
        ({"settings": [1]}, "not a JSON object"),
        ({"settings": SET}, r"belong to no subspace: \['gate.readers'"),
        ({"settings": {**SET, "gate": {**DESCRIBED, "required": 1.0}}}, "two counts and token ids"),
        ({"settings": {**SET, "gate": {**DESCRIBED, "required": 9}}}, "do not fit"),
        ({"settings": {**SET, "gate": {**DESCRIBED, "site": "../x"}}}, "is not a site"),
        ({"settings": {**SET, "gate": {**DESCRIBED, "required": 0}}}, "does not have the digest"),
        ({"settings": {**SET, "strength": float("nan"), "gate": DESCRIBED}}, "strength=nan must be a float, finite"),
        ({"settings": {**SET, "strength": "1", "gate": DESCRIBED}}, "strength='1'"),
        ({"settings": {**SET, "strength": 0.0, "gate": DESCRIBED}}, "does not have the digest"),
        ({"settings": {"fusion": "adaptive"}}, r"lack \['fusion_weight', 'strength'\]"),
        ({"settings": {**SET, "hook": "x"}}, r"unknown here, \['hook'\]"),
        ({"base": None}, "belong to no subspace: \\['base.values'\\]"),
        ({"base": {"model_type": "llava"}}, "does not have the digest"),
    ],
)
def test_headers_that_cannot_be(adapter, base, header, message, tmp_path):
    path = rewritten(adapter, tmp_path / "a.safetensors", **header)
    for load in (SafetySubspaces.load, lambda file: load_adapter(base, file)):
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != BASIS}, "belong to no subspace"),
        (
            lambda t: {k: v for k, v in t.items() if k != "sites.0.ffn.last.mean"},
            "lacks the tensor 'sites.0.ffn.last.m",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "base.values"}, "lacks the tensor 'base.values'"),
        (lambda t: {**t, "sites.0.ffn.extra": torch.zeros(3)}, "belong to no subspace"),
        (lambda t: {**t, BASIS: t[BASIS] * torch.nan}, "sites.0.ffn.last: .*not finite"),
        (lambda t: {**t, BASIS: t[BASIS] * 1.1}, "identity"),
        (lambda t: {**t, BASIS: t[BASIS][:, :1].contiguous()}, "do not fit"),
        (lambda t: {**t, BASIS: t[BASIS].double()}, "is of torch.float64; expected torch.float32"),
        (lambda t: {**t, BASIS: t[BASIS].half()}, "is of torch.float16"),
        (lambda t: {**t, BASIS: t[BASIS].int()}, "is of torch.int32"),
        (lambda t: {**t, "sites.0.ffn.last.beta": torch.ones(2, dtype=torch.float64)}, "expected a single number"),
        (lambda t: {**t, "sites.0.ffn.last.beta": torch.tensor(0.5, dtype=torch.float64)}, "does not have the digest"),
        (lambda t: {k.replace("0.ffn", "00.ffn"): v for k, v in t.items()}, "not a site as it is written"),
        (lambda t: {k.replace("0.ffn", "../../ffn"): v for k, v in t.items()}, "is not a site"),
        (lambda t: {k.replace("0.ffn", "1.ffn"): v for k, v in t.items()}, "does not have the digest"),
        (lambda t: {k.replace("0.ffn.last", "0.ffn.first"): v for k, v in t.items()}, "does not have the digest"),
    ],
)
def test_tensors_that_cannot_be(adapter, base, change, message, tmp_path):
    path = rewritten(adapter, tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, path)


# Any break: fuzzing

operations = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "cut", "zero", "swap", "header"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
    st.integers(1, 64),
)


def mutate(content: bytes, changes, regions) -> bytes:
    data = bytearray(content)
    for what, where, value, length in changes:
        start, end = regions[value % len(regions)]
        at = min(start + int(where * max(1, end - start)), len(data) - 1)
        if what == "flip":
            data[at] ^= 1 << value % 8
        elif what == "set":
            data[at] = value
        elif what == "insert":
            data[at:at] = bytes([value]) * length
        elif what == "delete":
            del data[at : at + length]
        elif what == "cut":
            del data[at:]
        elif what == "zero":
            data[at : at + length] = bytes(min(length, len(data) - at))
        elif what == "swap":
            data[at : at + length], data[:length] = data[:length], data[at : at + length]
        else:  # a header of another length
            data[:8] = ((int.from_bytes(data[:8], "little") + length - 32) % 2**64).to_bytes(8, "little")
        if not data:
            return b""
    return bytes(data)


def regions_of(path):
    """The header, and where the tensors of the repair lie."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = {k: v for k, v in json.loads(content[8 : 8 + size]).items() if k != "__metadata__"}
    inside = [v["data_offsets"] for k, v in entries.items() if ".care" in k or k.startswith(("sites.", "gate."))]
    return [(0, 8 + size), *[(8 + size + a, 8 + size + b) for a, b in inside], (0, len(content))]


STRANGE = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 7, 0.5, float("nan"), float("inf"), "", "x", "../x", "²", [], {}, [[]], {"a": 1}]
)
edits = st.tuples(st.integers(0, 10**6), st.sampled_from(["put", "drop", "twice", "rename", "nest"]), STRANGE)


def places(value, path=()):
    """Every place in plain values."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def edited(value, changes):
    value = json.loads(json.dumps(value))
    for index, what, strange in changes:
        found = list(places(value))
        if not found:
            break
        *path, key = found[index % len(found)]
        holder = value
        for part in path:
            holder = holder[part]
        if what == "put":
            holder[key] = copy.deepcopy(strange)  # else a list might come to hold itself
        elif what == "drop":
            del holder[key]
        elif what == "nest":
            holder[key] = [holder[key]]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            name = f"{key}_" if what == "rename" else key
            holder[name] = holder.pop(key)
    return value


def assert_adapter_whole_or_refused(path, base, expected, seen):
    try:
        loaded = load_adapter(base, path)
    except (ValueError, OSError) as error:
        assert str(error)
        seen["refused"] += 1
        return
    assert of_the_repair(loaded) == of_the_repair(expected) and loaded.config.origin["base_match"] == "exact"
    seen["whole"] += 1


def assert_checkpoint_whole_or_refused(folder, expected, seen):
    try:
        loaded = CareForConditionalGeneration.from_pretrained(folder)
    except RAISED as error:
        assert str(error)
        seen["refused"] += 1
        return
    assert type(loaded) is CareForConditionalGeneration and loaded.care_state.enabled
    assert of_the_repair(loaded) == of_the_repair(expected)
    seen["whole"] += 1


@pytest.fixture(scope="module")
def seen():
    """How many inputs were refused, and how many loaded as what was saved."""
    counts: dict[str, int] = {"refused": 0, "whole": 0}
    yield counts
    warnings.warn(f"fuzzed: {counts}", stacklevel=1)
    assert counts["refused"] > 10


@FUZZ
@given(changes=st.lists(operations, min_size=1, max_size=3))
def test_fuzz_the_bytes_of_an_adapter(adapter, base, repaired, seen, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(mutate(adapter.read_bytes(), changes, regions_of(adapter)))
    assert_adapter_whole_or_refused(path, base, repaired, seen)


@FUZZ
@given(name=st.sampled_from(["settings", "metadata", "base"]), changes=st.lists(edits, min_size=1, max_size=3))
def test_fuzz_the_header_of_an_adapter(adapter, base, repaired, seen, tmp_path_factory, name, changes):
    with safe_open(adapter, "pt") as file:
        value = json.loads(file.metadata()[name])
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    rewritten(adapter, path, **{name: edited(value, changes)})
    assert_adapter_whole_or_refused(path, base, repaired, seen)


@pytest.fixture(scope="module")
def scratch(checkpoint, tmp_path_factory):
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("scratch") / "fuzzed"))


@FUZZ
@given(name=st.sampled_from(["model.safetensors", "config.json"]), changes=st.lists(operations, min_size=1, max_size=3))
def test_fuzz_the_bytes_of_a_checkpoint(checkpoint, scratch, repaired, seen, name, changes):
    whole = checkpoint / name
    regions = regions_of(whole) if name.endswith(".safetensors") else [(0, whole.stat().st_size)]
    (scratch / name).write_bytes(mutate(whole.read_bytes(), changes, regions))
    try:
        assert_checkpoint_whole_or_refused(scratch, repaired, seen)
    finally:
        shutil.copy(whole, scratch / name)


@FUZZ
@given(changes=st.lists(edits, min_size=1, max_size=3))
def test_fuzz_the_settings_of_a_checkpoint(checkpoint, scratch, repaired, seen, changes):
    config = json.loads((checkpoint / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(edited(config, changes)))
    try:
        assert_checkpoint_whole_or_refused(scratch, repaired, seen)
    finally:
        shutil.copy(checkpoint / "config.json", scratch / "config.json")


# Saving, interrupted


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(model, tensors):
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in tensors)


def build_versions():
    """Two checkpoints that differ in everything: base, repair, number of files."""
    models = []
    for number in range(2):
        base = tiny_base()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(number)
        models.append(CareForConditionalGeneration.from_base(base, tiny_subspaces(1 - number / 2)))
    return models


@pytest.fixture(scope="module")
def versions():
    return build_versions()


SIZES = ({}, {"max_shard_size": "10KB"})


class Killed(BaseException):
    """As `SIGKILL`: nothing is tidied up after it."""


def interrupted_at(monkeypatch, step, error):
    """Have the step-th call that changes the disk raise, and count the calls."""
    calls = {"made": 0}

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if name == "mkdir" and os.path.isdir(args[0]):
                return original(*args, **kwargs)
            calls["made"] += 1
            if calls["made"] == step:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("link", "replace", "rename", "fsync", "mkdir"):
        counted(os, name)
    counted(Path, "unlink")
    counted(modeling_utils, "safe_save_file")
    counted(CareConfig, "save_pretrained")
    if isinstance(error, Killed):
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    return calls


@pytest.fixture(scope="module")
def saved(versions, tmp_path_factory):
    """The folders of both, with another file."""
    folders = [tmp_path_factory.mktemp("saved") / str(number) for number in range(2)]
    for model, folder, sizes in zip(versions, folders, SIZES, strict=True):
        model.save_pretrained(folder, **sizes)
        (folder / "README.md").write_text("mine")
    return folders


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("error", "subfolder"), [(FULL, False), (Killed(), False), (Killed(), True)])
def test_an_interrupted_save_leaves_the_old_or_the_new(versions, saved, first, error, subfolder, tmp_path):
    old, new = weights(versions[first]), weights(versions[1 - first])
    found, step, steps = [], 0, random.Random(first)
    while True:
        step += 1 if "FUZZ" in os.environ else steps.choice((1, 2, 3, 4))
        folder = Path(shutil.copytree(saved[first], tmp_path / str(step)))
        if subfolder:
            (folder / "notes").mkdir()
        with pytest.MonkeyPatch.context() as patched:
            calls = interrupted_at(patched, step, error)
            try:
                versions[1 - first].save_pretrained(folder, **SIZES[1 - first])
            except (Killed, OSError) as raised:
                assert raised is error
        assert (folder / "README.md").read_text() == "mine"
        staged = list(tmp_path.glob(f".{folder.name}.*"))
        if not (folder / "config.json").exists():
            with pytest.raises((OSError, ValueError)):
                AutoModel.from_pretrained(folder)
            assert subfolder and is_same(AutoModel.from_pretrained(staged[0]), new)
            found.append("away")
        else:
            loaded = AutoModel.from_pretrained(folder)
            assert is_same(loaded, old) != is_same(loaded, new)
            found.append("old" if is_same(loaded, old) else "new")
        assert error is not FULL or not staged
        if calls["made"] < step:
            break
    assert found == sorted(found, key=["old", "away", "new"].index) and (found[0], found[-1]) == ("old", "new")
    assert ("away" in found) == subfolder


@pytest.mark.parametrize("error", [FULL, Killed()])
def test_an_interrupted_adapter_leaves_the_old_or_the_new(versions, error, tmp_path):
    expected = [SafetySubspaces.from_model(model).digest for model in versions]
    found, step = [], 0
    while True:
        step += 1
        save_adapter(versions[0], tmp_path)
        with pytest.MonkeyPatch.context() as patched:
            calls = interrupted_at(patched, step, error)
            try:
                save_adapter(versions[1], tmp_path)
            except (Killed, OSError) as raised:
                assert raised is error
        found.append(expected.index(SafetySubspaces.load(tmp_path / ADAPTER_FILE).digest))
        if calls["made"] < step:
            break
    assert found == sorted(found) and set(found) == {0, 1}


def test_a_new_folder_is_there_whole_or_not_at_all(versions, tmp_path):
    folder = tmp_path / "a" / "new [1]*"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            modeling_utils, "safe_save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            versions[0].save_pretrained(folder)
    assert list((tmp_path / "a").iterdir()) == []
    versions[0].save_pretrained(folder)
    assert is_same(AutoModel.from_pretrained(folder), weights(versions[0]))
    with pytest.raises(NotADirectoryError, match="is a file"):
        versions[0].save_pretrained(folder / "config.json")


def test_what_replaced_weights_left_behind_is_gone(versions, tmp_path):
    """transformers reads `model.safetensors` before shards, and so would read an older one."""
    for number in (0, 1, 0):
        versions[number].save_pretrained(tmp_path / "c", **SIZES[number])
        assert is_same(AutoModel.from_pretrained(tmp_path / "c"), weights(versions[number]))
        assert (tmp_path / "c" / "model.safetensors").exists() == (number == 0)
        assert len(list((tmp_path / "c").glob("*.safetensors"))) == 1 or number == 1


def test_it_saves_where_it_stands(versions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        versions[number].save_pretrained(".", **SIZES[number])
        assert Path.cwd() == tmp_path and is_same(AutoModel.from_pretrained("."), weights(versions[number]))


def test_what_a_killed_save_left_is_cleared_a_day_later(versions, tmp_path):
    fresh, old = (tmp_path / f".c{atomic.STAGING}{name}" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.mkdir()
    os.utime(old, (time.time() - 2 * atomic.ABANDONED,) * 2)
    versions[0].save_pretrained(tmp_path / "c")
    assert fresh.exists() and not old.exists()


KEEP_SAVING = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_hostile_files import SIZES, build_versions, torch
torch.set_num_threads(1)
models = build_versions()
models[0].save_pretrained(sys.argv[1])
for _ in sys.stdin:
    process = os.fork()
    while not process:
        for number in (1, 0):
            models[number].save_pretrained(sys.argv[1], **SIZES[number])
    print(process, flush=True)
    os.waitpid(process, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_processes_leave_a_whole_checkpoint(versions, tmp_path):
    expected, waits = [weights(model) for model in versions], random.Random(0)
    package = Path(atomic.__file__).parents[1]
    command = [sys.executable, "-c", KEEP_SAVING, str(tmp_path / "c"), str(package), str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as parent:
        for _ in range(int(os.environ.get("FUZZ", 15)) // 5 + 5):
            parent.stdin.write("go\n")
            parent.stdin.flush()
            process = int(parent.stdout.readline())
            time.sleep(waits.uniform(0.05, 0.6))
            os.kill(process, signal.SIGKILL)
            loaded = AutoModel.from_pretrained(tmp_path / "c")
            assert sum(is_same(loaded, tensors) for tensors in expected) == 1
        parent.stdin.close()
