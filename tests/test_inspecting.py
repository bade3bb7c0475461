import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_subspace
from families import FAMILIES
from hub import serving
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_hostile_files import BASIS, D, edit, rewritten, tiny_base, tiny_subspaces
from test_hub import HERE, run
from transformers import AutoModel

from care_hf import CareForConditionalGeneration, SafetySubspaces, load_adapter, merge, save_adapter, tensor_files
from care_hf.checkpoint import ADAPTER_FILE
from care_hf.gating import Gate
from care_hf.inspecting import inspect
from care_hf.loading import of_the_repair
from care_hf.recipe import Recipe
from care_hf.sites import Site, hidden_size, site_module
from care_hf.tensor_files import HubFiles, LocalFiles, stored

RAISED = (ValueError, OSError, RuntimeError, TypeError, ImportError)


@pytest.fixture(scope="module")
def repaired():
    told = {
        "recipe": json.dumps(Recipe().replace(rank=2).to_dict()),
        "reports": json.dumps({"0.ffn.last": {"eigenvalues": [4.5, 2.25], "shrinkage": 0.125, "benign": 8}}),
        "calibration": json.dumps({"target": 0.01, "kinds": {"benign/a/text": {"n": 9, "fires": 1}}}),
        "base": json.dumps({"name": "org/base", "revision": "abc", "class": "X", "fingerprint": "f"}),
        "prompts": json.dumps({"benign": 9}),
        "data": "not JSON",
        "judge": "somebody",
    }
    subspaces = tiny_subspaces(strength=0.75)
    object.__setattr__(subspaces, "metadata", told)
    return CareForConditionalGeneration.from_base(tiny_base(), subspaces)


@pytest.fixture(scope="module")
def checkpoint(repaired, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    repaired.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(repaired, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    repaired.save_pretrained(folder, max_shard_size="10kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def adapter(repaired, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(repaired, folder)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


# What it says, against the loaded model


@pytest.mark.parametrize("kind", ["checkpoint", "sharded", "adapter", "file", "subspaces"])
def test_it_says_what_the_loaded_model_holds(kind, checkpoint, sharded, adapter, repaired, tmp_path):
    sources = {"checkpoint": checkpoint, "sharded": sharded, "adapter": adapter, "file": adapter / ADAPTER_FILE}
    if kind == "subspaces":
        SafetySubspaces.from_model(repaired).save(tmp_path / "s.safetensors")
    source = sources.get(kind, tmp_path / "s.safetensors")
    whole = kind in ("checkpoint", "sharded")
    model = AutoModel.from_pretrained(source) if whole else load_adapter(tiny_base(), source, other_base=True)
    found = inspect(source)
    assert found.kind == {"file": "adapter", "subspaces": kind}.get(kind, "repaired checkpoint" if whole else "adapter")
    assert found.format == (2 if whole else "care_hf.subspaces.v2") and found.verified is True
    assert found.digest == SafetySubspaces.from_model(model).digest and found.strength == model.strength == 0.75
    assert [site["site"] for site in found.sites] == [str(site) for site in sorted(model.care_modules())]
    for site, (place, subspaces) in zip(found.sites, sorted(model.subspaces().items()), strict=True):
        assert set(site["subspaces"]) == set(subspaces)
        for name, one in site["subspaces"].items():
            subspace = subspaces[name]
            assert one["rank"] == subspace.basis.shape[1] and one["beta"] == subspace.beta == 0.75
            assert one["oblique"] == (subspace.reader is not None) and one["anchors"] == (subspace.steps or 1)
            reported = (str(place), name) == ("0.ffn", "last")
            assert one["eigenvalues"] == ([4.5, 2.25] if reported else None)
            assert one["shrinkage"] == (0.125 if reported else None)
    calibration = {"target": 0.01, "kinds": {"benign/a/text": {"n": 9, "fires": 1}}}
    counts = {"required": 1, "alarms": 1, "pictured": 1}
    assert found.gate == {"site": "0.attention", **counts, "prompt_end": [3, 4], "calibration": calibration}
    assert found.scope == "the last token of the prompt and the first 3 tokens of the answer" and found.fusion is None
    assert found.recipe["rank"] == 2 and found.prompts == {"benign": 9} and found.data is None
    assert found.origin == {"judge": "somebody"} and found.base["revision"] == "abc"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == json.loads(json.dumps(found.to_dict()))


def test_sizes_are_those_of_the_model_and_of_the_files(checkpoint, sharded, adapter, repaired):
    base = {id(p): p for p in repaired.vlm.parameters()}.values()
    persistent = [b for name, b in repaired.named_buffers() if ".care" in name or name == "layers"]
    for source in (checkpoint, sharded, adapter):
        sizes = inspect(source).sizes
        assert sizes["base"]["parameters"] == sum(p.numel() for p in base)
        assert sizes["base"]["bytes"] == sum(p.numel() * p.element_size() for p in base)
        assert sizes["share"] == sizes["repair"]["parameters"] / sizes["base"]["parameters"]
        if source is not adapter:
            assert sizes["repair"]["parameters"] == sum(b.numel() for b in persistent)
            assert sizes["repair"]["bytes"] == sum(b.numel() * b.element_size() for b in persistent)


def test_of_an_adapter_it_says_which_base(adapter, checkpoint):
    for source in (adapter, checkpoint):
        base = inspect(source).base
        assert (base["model_type"], base["layers"], base["hidden_size"], base["vocabulary"]) == ("llava", 2, D, 20)
    assert (
        inspect(checkpoint).base["class"] == "LlavaForConditionalGeneration" and inspect(adapter).base["class"] == "X"
    )
    assert inspect(checkpoint).base["dtype"] == "float32" and inspect(checkpoint).base["name"] == "org/base"


def test_a_repair_by_modality_has_a_fusion_and_no_gate(tmp_path):
    groups = {name: random_subspace(seed, D, 2) for seed, name in enumerate(("visual", "text"))}
    subspaces = SafetySubspaces({Site(1, "ffn"): groups}, "constant", 0.25)
    CareForConditionalGeneration.from_base(tiny_base(), subspaces).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert (found.fusion, found.fusion_weight, found.gate, found.scope) == ("constant", 0.25, None, "every token")
    assert found.recipe is None and found.origin == {}
    told = dict(found.sections())
    assert told["Gate"] == [("gate", "none: every prompt is repaired")] and "Recipe" not in told


def test_sites_may_differ_in_strength(repaired, tmp_path):
    other = CareForConditionalGeneration.from_base(tiny_base(), tiny_subspaces())
    other.care_modules()[Site(0, "ffn")].strength.fill_(0.5)
    other.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.strength is None and [site["strength"] for site in found.sites] == [0.5, 1.0]
    told = dict(found.sections())
    assert dict(told["Site 0.ffn"])["strength"] == "0.5" and dict(told["Repair"])["strength"].startswith("differs")


def test_sections_are_text_and_say_it_all(checkpoint):
    told = inspect(checkpoint).sections()
    assert all(isinstance(text, str) for heading, rows in told for row in (*rows, (heading,)) for text in row)
    flat = {(heading, label.strip()): value for heading, rows in told for label, value in rows}
    assert flat["Site 0.ffn", "eigenvalues"] == "4.5, 2.25" and flat["Site 0.ffn", "shrinkage"] == "0.125"
    assert flat["Site 0.ffn", "last token of the prompt"] == "rank 2, oblique, beta 0.75"
    assert flat["Gate", "fired, benign"] == "1 of 9 held-out prompts"
    assert flat["Recipe", "recipe"] == "gated, but for" and flat["Recipe", "rank"] == "2"
    assert (
        flat["Base", "name"] == "org/base at abc" and flat["Base", "decoder"] == "2 layers, hidden size 16, 20 tokens"
    )
    assert flat["Size", "share"].endswith("% of the base's parameters")
    assert flat["Checkpoint", "checked"] == "bit for bit what was saved"


@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_told_by_the_names_in_the_files_of_every_family(name, tmp_path):
    """The digest goes by place: it would be another if two were taken for one another."""
    model = FAMILIES[name].model
    d, sites = hidden_size(model), {}
    for site in (Site(2, "attention"), Site(2, "ffn"), Site(2, "residual"), Site(3, "attention")):
        try:
            site_module(model, site)
        except ValueError:
            continue
        sites[site] = {"last": random_subspace(len(sites), d, 2)}
    gate = Gate((3,), torch.randn(d, 2), torch.randn(2), 1)
    repaired = CareForConditionalGeneration.from_base(
        model, SafetySubspaces(sites, gate=gate, gate_site=Site(1, "residual"))
    )
    repaired.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.verified and found.digest == SafetySubspaces.from_model(repaired).digest
    assert found.sizes["base"]["parameters"] == sum(p.numel() for p in model.parameters())


# What it reads


def test_weights_of_the_base_are_never_read(checkpoint, sharded, monkeypatch, tmp_path):
    read = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(tensor_files, "safe_open", Watched)
    for folder in (checkpoint, sharded):
        inspect(folder)
    assert read and all(map(of_the_repair, read))


def test_types_of_stored_tensors():
    assert [stored(t, (3, 4)).bytes for t in ("F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4")] == [
        *(48, 24, 96, 12, 12, 12, 6)
    ]
    assert stored("bfloat16", ()).bytes == 2 and stored("float32", (0, 4)).numbers == 0
    with pytest.raises(ValueError, match="'string' is no type of numbers"):
        stored("string", (1,))


class Ranges(HubFiles):
    """Reads as from the Hub, of a folder."""

    def __init__(self, folder):
        super().__init__("org/none")
        self.folder, self.asked = folder, []

    def _read(self, name, start, end):
        content = (self.folder / name).read_bytes()
        self.asked.append((start, end))
        return content[start:end], len(content)


def test_ranges_give_what_the_files_hold(sharded, checkpoint, monkeypatch):
    monkeypatch.setattr(tensor_files, "FIRST", 100)
    for near in (0, 100, 10**6):
        monkeypatch.setattr(tensor_files, "NEAR", near)
        for path in (*sharded.glob("*.safetensors"), checkpoint / "model.safetensors"):
            ranges, local = Ranges(path.parent), LocalFiles(path.parent)
            header = ranges.header(path.name)
            assert header == local.header(path.name)
            keys = list(header)[::2]
            found, expected = (files.tensors(path.name, keys) for files in (ranges, local))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in keys)
            assert ranges.asked[:2] == [(0, 100), (100, 8 + int.from_bytes(path.read_bytes()[:8], "little"))]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: b"",
        lambda c: c[:7],
        lambda c: c[:200],
        lambda c: c[:-1],
        lambda c: c + b"0",
        lambda c: (2**63).to_bytes(8, "little") + c[8:],
        lambda c: c.replace(b'"F32"', b'"F16"', 1),
        lambda c: c.replace(b'"F32"', b'"XYZ"', 1),
        lambda c: c.replace(b'"shape"', b'"shapf"', 1),
        lambda c: c.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        lambda c: c.replace(b'"data_offsets":[', b'"data_offsets":{', 1),
        lambda c: (5).to_bytes(8, "little") + b"[1,2]" + c[8:],
    ],
)
def test_broken_files_are_refused_by_their_headers_as_safetensors_does(checkpoint, tmp_path, spoil):
    (tmp_path / "a.safetensors").write_bytes(spoil((checkpoint / "model.safetensors").read_bytes()))
    with pytest.raises(SafetensorError):
        LocalFiles(tmp_path).header("a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file"):
        Ranges(tmp_path).header("a.safetensors")


# What it refuses, and how


def tensor(change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = change(load_file(path))
        save_file({name: t.clone() for name, t in tensors.items()}, path, metadata={"format": "pt"})

    return apply


def named(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def without(end):
    return tensor(lambda t: {name: v for name, v in t.items() if name != named(t, end)})


def changed(end, how):
    return tensor(lambda t: {**t, named(t, end): how(t[named(t, end)])})


def configured(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


SITES = [
    {"site": "0.ffn", "ranks": {"last": 2, "response": 2}, "oblique": ["last"], "steps": 3},
    {"site": "1.residual", "ranks": {"last": 2}, "oblique": [], "steps": 0},
]
GATED = {"site": "0.attention", "required": 1, "alarms": 1, "pictured": 1, "prompt_end": [3, 4]}
BREAKS = {
    "a later format": configured(care_format=3),
    "no digest": configured(repair_digest=KeyError),
    "another digest": configured(repair_digest="0" * 64),
    "another setting": configured(scope="prompt"),
    "an unknown fusion": configured(fusion="mean"),
    "a site twice": configured(sites=[SITES[0], SITES[0]]),
    "no such layer": configured(sites=[SITES[0], {**SITES[1], "site": "9.ffn"}]),
    "a rank above d": configured(sites=[{**SITES[0], "ranks": {"last": 17, "response": 2}}, SITES[1]]),
    "ids that no token has": configured(gate={**GATED, "prompt_end": [3, 99]}),
    "a gate of another threshold": changed("care_gate.thresholds", lambda t: t + 1),
    "a gate that is not finite": changed("care_gate.readers", lambda t: t * torch.nan),
    "a broken base": configured(vlm_config={"model_type": "llava", "text_config": 3}),
    "an unknown base": configured(vlm_config={"model_type": "nothing"}),
    "an origin that is none": configured(origin=[1]),
    "a changed bit": changed("last.mean", lambda t: t.nextafter(t + 1)),
    "a mean that is not finite": changed("response.mean", lambda t: t * torch.nan),
    "a basis that is not orthonormal": changed("1.care.last.basis", lambda t: t * 1.1),
    "no strength": changed("care.strength", lambda t: t * torch.nan),
    "other layers": changed("layers", lambda t: t + 1),
    "a truncated file": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
    "no safetensors file": lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"),
    "an empty file": lambda f: (f / "model.safetensors").write_bytes(b""),
    "pickles alone": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "a config that is no JSON": lambda f: (f / "config.json").write_text("{"),
}
LACKING = {  # here loading names modules, and this the tensors in the files
    "a missing basis": (without("0.mlp.care.last.basis"), "lacks 1 tensors: .*care.last.basis"),
    "a missing gate": (without("care_gate.readers"), "lacks 1 tensors: .*care_gate.readers"),
    "no layers": (without("layers"), "lacks 1 tensors: layers"),
    "a site that is not configured": (configured(sites=SITES[:1]), "unknown to its config.json, 4 tensors"),
    "a site that is not stored": (
        configured(sites=[*SITES, {**SITES[1], "site": "1.ffn"}]),
        "lacks 4 tensors: sites.1.ffn.last.basis",
    ),
    "another shape": (changed("last.basis", lambda t: t[:, :1]), "in another shape 1 tensors"),
    "a tensor too many": (
        tensor(lambda t: {**t, "vlm.x.1.care.last.reader": torch.zeros(2)}),
        "unknown to its config.json, 1 tensors",
    ),
    "no sites": (configured(sites=[], gate=None), "unknown to its config.json"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_does_not_load_is_refused_with_the_same_words(what, broken):
    BREAKS[what](broken)
    with pytest.raises(RAISED) as by_loading:
        AutoModel.from_pretrained(broken)
    with pytest.raises(RAISED) as by_inspecting:
        inspect(broken)
    assert str(by_inspecting.value) == str(by_loading.value)


@pytest.mark.parametrize("what", LACKING)
def test_what_lacks_tensors_does_not_load_and_is_refused_too(what, broken):
    apply, message = LACKING[what]
    apply(broken)
    with pytest.raises(RAISED):
        AutoModel.from_pretrained(broken)
    with pytest.raises(ValueError, match=message):
        inspect(broken)


def test_a_size_that_no_memory_holds_takes_none(broken):
    config = json.loads((broken / "config.json").read_text())
    config["vlm_config"]["text_config"]["hidden_size"] = 2**30
    config["sites"][1]["ranks"]["last"] = 2**29
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in another shape"):
        inspect(broken)


def test_before_there_was_a_digest_there_is_nothing_to_check(broken):
    edit(broken / "config.json", care_format=KeyError, repair_digest=KeyError)
    changed("last.mean", lambda t: t + 1)(broken)
    found = inspect(broken)
    assert found.verified is None and found.format == 1
    assert dict(dict(found.sections())["Checkpoint"])["checked"] == "this format has no hash to tell by"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file, to: rewritten(file, to, format="care_hf.subspaces.v3"),
        lambda file, to: rewritten(file, to, digest="0"),
        lambda file, to: rewritten(file, to, settings="{"),
        lambda file, to: rewritten(file, to, lambda t: {**t, BASIS: t[BASIS] * 1.1}),
        lambda file, to: rewritten(file, to, lambda t: {k: v for k, v in t.items() if k != BASIS}),
        lambda file, to: to.write_bytes(file.read_bytes()[:-3]),
    ],
)
def test_a_broken_adapter_is_refused_with_the_same_words(adapter, break_it, tmp_path):
    path = tmp_path / ADAPTER_FILE
    break_it(adapter / ADAPTER_FILE, path)
    with pytest.raises(ValueError) as by_loading:
        load_adapter(tiny_base(), path)
    for source in (path, tmp_path):
        with pytest.raises(ValueError) as by_inspecting:
            inspect(source)
        assert str(by_inspecting.value) == str(by_loading.value)


@pytest.mark.parametrize(
    "told",
    [
        {"reports": "[1]"},
        {"reports": json.dumps({"0.ffn.last": [1]})},
        {"reports": json.dumps({"0.ffn.last": {"eigenvalues": [[1]], "shrinkage": {}, "total": "x", "tokens": None}})},
        {"reports": '{"0.ffn.last": {"eigenvalues": [NaN], "total": 0}}'},
        {"recipe": json.dumps({"rank": {"a": 1}, "new field": [1]})},
        {"calibration": json.dumps({"target": "x", "kinds": [1], "curve": 3})},
        {"calibration": json.dumps({"kinds": {"a/b": 3, "c": {"n": "x"}}})},
        {"base": "[]", "data": '{"benign": 3}', "prompts": "3", "environment": "null"},
        {"data": "[" * 100_000, "other": "[" * 100},
    ],
)
def test_an_origin_that_says_nonsense_does_no_harm(told, tmp_path):
    subspaces = tiny_subspaces()
    object.__setattr__(subspaces, "metadata", told)
    repaired = CareForConditionalGeneration.from_base(tiny_base(), subspaces)
    repaired.save_pretrained(tmp_path / "whole")
    save_adapter(repaired, tmp_path / "adapter")
    for source in (tmp_path / "whole", tmp_path / "adapter"):
        found = inspect(source)
        assert found.verified and json.dumps(found.to_dict(), allow_nan=False)
        assert dict(found.sections())["Repair"]


def test_what_is_something_else_is_told_what_it_is(tmp_path, checkpoint, adapter, monkeypatch):
    base = tiny_base()
    base.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"plain is an ordinary checkpoint of a 'llava', .* merged .*`care info` reads"
    ):
        inspect(tmp_path / "plain")
    constant = SafetySubspaces({Site(1, "ffn"): {"text": random_subspace(0, D, 2)}})
    merge(CareForConditionalGeneration.from_base(base, constant), tmp_path / "merged")
    with pytest.raises(ValueError, match="or its repair was merged into the weights"):
        inspect(tmp_path / "merged")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="lora is an adapter of PEFT, without a repair"):
        inspect(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither a config.json nor a care_adapter.safetensors"):
        inspect(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"model.safetensors is not loaded: it has the format 'pt'"):
        inspect(tmp_path / "plain" / "model.safetensors")
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"neither a file nor a folder, and no repo on the Hub"):
            inspect(name)
    shutil.copy(adapter / ADAPTER_FILE, tmp_path / "plain")  # the adapter beside the base that it is for
    assert inspect(tmp_path / "plain").kind == "adapter"
    shutil.copytree(checkpoint, tmp_path / "both")
    shutil.copy(adapter / ADAPTER_FILE, tmp_path / "both")
    assert inspect(tmp_path / "both").kind == "repaired checkpoint"


def test_a_quantised_base_is_named(broken):
    edit(broken / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert inspect(broken).base["quantised"] == "bitsandbytes"


def test_adapters_of_peft_are_named(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_base()
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    repaired = CareForConditionalGeneration.from_base(tuned, tiny_subspaces())
    repaired.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.adapters == {"default": {"kind": "LORA", "rank": 3, "active": True}}
    assert dict(dict(found.sections())["Base"])["adapter default"] == "LORA, rank 3, active"
    assert found.sizes["base"]["parameters"] == sum(p.numel() for p in repaired.vlm.parameters())


# The Hub

PUSH = """
import care_hf
from test_hostile_files import tiny_base, tiny_subspaces
base = tiny_base()
base.resize_token_embeddings(20_000)
repaired = care_hf.CareForConditionalGeneration.from_base(base, tiny_subspaces(0.5))
repaired.push_to_hub("org/one")
repaired.push_to_hub("org/shards", max_shard_size="300kB")
repaired.push_to_hub("org/secret", private=True)
base.push_to_hub("org/plain")
care_hf.save_adapter(repaired, "org/adapter", push_to_hub=True)
repaired.strength = 0.25
repaired.push_to_hub("org/one", revision="weaker")
"""
LOOK = """
import json
from care_hf.inspecting import inspect
told = {}
for name in ("org/one", "org/shards", "org/secret", "org/adapter", "org/plain", "org/none"):
    try:
        told[name] = inspect(name).to_dict()
    except (ValueError, OSError) as error:
        told[name] = [type(error).__name__, str(error)]
told["weaker"] = inspect("org/one", revision="weaker").to_dict()
open(sys.argv[1], "w").write(json.dumps(told))
"""


@pytest.fixture(scope="module")
def hub():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def looked(hub, tmp_path_factory):
    """What was told of every repo, and how many bytes of every file were sent."""
    folder = tmp_path_factory.mktemp("hub")
    run(HERE + PUSH, hub, folder)
    hub.sent.clear()
    return look(hub, folder), dict(hub.sent)


def look(hub, folder, **more):
    run(HERE + LOOK, hub, folder, **more)
    return json.loads((folder / "saved.pt").read_text())


def test_on_the_hub_no_more_is_read_than_headers_and_the_repair(hub, looked):
    told, sent = looked
    for name in ("org/one", "org/shards", "org/secret", "org/adapter"):
        assert told[name]["strength"] == 0.5 and told[name]["verified"], told[name]
        assert [site["site"] for site in told[name]["sites"]] == ["0.ffn", "1.residual"]
        assert told[name]["digest"] == told["org/one"]["digest"]
    assert told["weaker"]["strength"] == 0.25 and told["weaker"]["verified"]
    assert told["org/one"]["sizes"] == told["org/shards"]["sizes"]
    assert told["org/plain"][0] == "ValueError" and "ordinary checkpoint of a 'llava'" in told["org/plain"][1]
    assert told["org/none"][0] == "RepositoryNotFoundError"
    # Of three repos with such a file, less than half of one was sent.
    assert 0 < sent["model.safetensors"] < len(hub.files["org/one"]["model.safetensors"]) / 2


def test_it_reads_the_same_where_parts_are_not_to_be_had_and_nothing_that_is_private(hub, looked, tmp_path):
    hub.ranged = False
    try:
        told = look(hub, tmp_path, HF_TOKEN="", HF_HOME=str(tmp_path / "home"))
    finally:
        hub.ranged = True
    refused = told.pop("org/secret")
    assert refused[0] == "RepositoryNotFoundError"
    assert told == {name: one for name, one in looked[0].items() if name != "org/secret"} | {
        "org/none": told["org/none"]
    }
