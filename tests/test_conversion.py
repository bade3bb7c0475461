"""The converters: round trips, inputs that must be refused, and their help."""

import json
import pickle
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
)

import care_hf
from care_hf import SafetySubspaces
from care_hf.gating import Gate
from care_hf.projection import Subspace, repair
from care_hf.sites import Site
from care_hf.steering_vectors import SteeringVectors

FOLDER = Path(__file__).parents[1] / "conversion"
sys.path.insert(0, str(FOLDER))

import astra_vectors  # noqa: E402
import bases  # noqa: E402
import control_vectors  # noqa: E402
import full_and_adapter  # noqa: E402
import original_llava  # noqa: E402
import safe_files  # noqa: E402

SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.stem != "safe_files")
D = 32  # hidden size of the tiny families


class Ran:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def hostile(tmp_path):
    """Makes pickles with code, and asserts afterwards that none of it ran and that nothing was left half written."""
    mark = tmp_path / "ran"

    def make(path, **good):
        torch.save({**good, "bad": Ran(mark)}, path)
        torch.load(path, weights_only=False)
        assert mark.exists()  # read carelessly, it runs
        mark.unlink()
        return path

    yield make
    assert not mark.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_help_explains_in_sentences():
    """As `python conversion/x.py --help` of each, in one process: most of the time is that of importing torch."""
    loop = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(FOLDER)!r}\n"
        f"for script in {SCRIPTS}:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(sys.path[0] + '/' + script, run_name='__main__')\n"
        "    except SystemExit as end: print('STATUS', end.code)\n"
    )
    run = subprocess.run([sys.executable, "-c", loop], capture_output=True, text=True, check=True)
    pages = run.stdout.split("STATUS 0")
    assert len(pages) == len(SCRIPTS) + 1 and len(SCRIPTS) == 5
    for script, page in zip(SCRIPTS, pages, strict=False):
        assert f"usage: {script}" in page and page.count(".") > 5


def test_a_script_reports_errors_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bases.py", "in", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^error: .* save the arrays as one of them\.$"):
        runpy.run_path(str(FOLDER / "bases.py"), run_name="__main__")


# Files


def test_output_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), safe_files.whole(tmp_path / "file") as target:
        target.write_text("half")
        raise RuntimeError
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="name another"), safe_files.whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="make it first"), safe_files.whole(tmp_path / "none" / "file"):
        pass


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_shards_hold_every_tensor_once(tmp_path, size):
    tensors = {f"t{i}": torch.randn(5, i + 1) for i in range(6)}
    shards = safe_files.Shards(tmp_path, size)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = safe_files.weight_files(tmp_path)
    assert len(files) == {1: 6, 100: 4, 10**6: 1}[size] or size == 100
    found = dict(pair for file in files for pair in safe_files.stream_tensors(file))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(index["weight_map"][name] in {f.name for f in files} for name in tensors)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="its own folder"):
        safe_files.weight_files(tmp_path)


# ASTRA


def astra_files(folder, layers=(2, 4), size=D, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    for name in ("vectors.pt", "reference.pt"):
        rows = {i: {layer: [torch.randn(size, generator=generator).to(dtype)] for layer in layers} for i in range(3)}
        torch.save(rows, folder / name)
    return folder / "vectors.pt", folder / "reference.pt"


def published_mean(path, layer):
    """As the published scripts take it."""
    rows = [a for by_layer in torch.load(path, weights_only=True).values() for a in by_layer[layer]]
    return torch.from_numpy(np.mean(np.array([row.numpy() for row in rows]), axis=0))


def test_astra_in_steers_as_the_published_hook(tmp_path):
    vectors, reference = astra_files(tmp_path)
    out = tmp_path / "astra.safetensors"
    command = ["in", "--vectors", vectors, "--reference", reference, "--layer", "2", "--out", out]
    assert "1.residual" in astra_vectors.main([*map(str, command)])
    model = FAMILIES["llava"].model
    ids = {"input_ids": torch.tensor([[1, 4, 9, 12, 20]])}
    layers = model.get_decoder().layers
    v, h0 = (published_mean(path, 2).float() for path in (vectors, reference))

    def published(module, args, output):
        h = output[:, -1]
        share = ((h - h0) @ v / torch.norm(h - h0) / torch.norm(v)).clamp(0, 1)
        output[:, -1] = h - share * torch.norm(h) * 7 * v / torch.norm(v)

    with torch.no_grad(), astra_vectors.load(model, out, alpha=7.0):
        ours = model(**ids).logits
    handle = layers[2 - 1].register_forward_hook(published)
    with torch.no_grad():
        theirs = model(**ids).logits
        handle.remove()
        assert not torch.allclose(theirs, model(**ids).logits, atol=1e-3)
    # Means of half precision are rounded to it there.
    assert torch.allclose(ours, theirs, atol=2e-2)


def test_astra_round_trip_is_exact(tmp_path):
    vectors, reference = astra_files(tmp_path, dtype=torch.float32)
    astra_vectors.from_astra(vectors, reference, 4, tmp_path / "a.safetensors")
    site, v, h0 = astra_vectors.read(tmp_path / "a.safetensors")
    back = [str(tmp_path / name) for name in ("v.pt", "r.pt")]
    done = astra_vectors.main(["out", str(tmp_path / "a.safetensors"), "--vectors", back[0], "--reference", back[1]])
    assert site == Site(3, "residual") and "--steer_layer 4" in done
    assert torch.equal(published_mean(back[0], 4), v) and torch.equal(published_mean(back[1], 4), h0)
    astra_vectors.from_astra(*back, 4, tmp_path / "b.safetensors")
    assert all(
        torch.equal(x, y) for x, y in zip(astra_vectors.read(tmp_path / "b.safetensors")[1:], (v, h0), strict=True)
    )


def test_astra_refuses(tmp_path, hostile):
    vectors, reference = astra_files(tmp_path)
    out = tmp_path / "out"
    for layer, match in ((0, "from 1"), (3, r"choose --layer from \[2, 4\]")):
        with pytest.raises(ValueError, match=match):
            astra_vectors.from_astra(vectors, reference, layer, out)
    bad = tmp_path / "bad.pt"
    for content, match in (
        ([1], "expected ASTRA's"),
        ({0: {2: torch.ones(D)}}, "not a list of tensors"),
        ({0: {2: [torch.ones(D)]}, 1: {2: [torch.ones(D + 1)]}}, "the same for all"),
        ({0: {2: [torch.full((D,), torch.nan)]}}, "not finite"),
        ({0: {2: [torch.zeros(D)]}}, "no direction"),
        ({0: {2: [torch.ones(D + 1)]}}, "one model"),
        ({}, "nothing of layer 2"),
    ):
        torch.save(content, bad)
        with pytest.raises(ValueError, match=match):
            astra_vectors.from_astra(bad, reference, 2, out)
    with pytest.raises(ValueError, match="could be code and is not run"):
        astra_vectors.from_astra(hostile(bad), reference, 2, out)
    bad.write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"could be code|not a whole file"):
        astra_vectors.from_astra(bad, reference, 2, out)
    bad.write_bytes(vectors.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole file"):
        astra_vectors.from_astra(bad, reference, 2, out)
    save_file({"x": torch.ones(2)}, bad)
    with pytest.raises(ValueError, match="merely added"):
        astra_vectors.read(bad)
    assert not out.exists()


# Control vectors


def gguf_bytes(tensors, metadata, count_type=5):
    """A GGUF file of version 3, by the specification; tensors are float32."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, packed = (8, text(value)) if isinstance(value, str) else (count_type, struct.pack("<I", value))
        out += text(key) + struct.pack("<I", kind) + packed
    data = b""
    for name, array in tensors.items():
        out += text(name) + struct.pack("<I", array.ndim)
        out += b"".join(struct.pack("<Q", side) for side in reversed(array.shape))
        out += struct.pack("<IQ", {"float32": 0, "float16": 1}[str(array.dtype)], len(data))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return out + bytes(-len(out) % 32) + data


def control_vector(path, layers=(1, 3), kind="int32", **metadata):
    draw = np.random.default_rng(0)
    tensors = {f"direction.{layer}": draw.standard_normal(D).astype("float32") for layer in layers}
    known = {"controlvector.model_hint": "llama", "controlvector.layer_count": len(layers)}
    count_type = {"uint32": 4, "int32": 5}[kind]
    path.write_bytes(gguf_bytes(tensors, {"general.architecture": "controlvector", **known, **metadata}, count_type))
    return tensors


@pytest.mark.parametrize("kind", ["int32", "uint32"])  # llama.cpp writes the one, repeng the other
def test_control_vectors_steer_as_llama_cpp_does(tmp_path, kind):
    pytest.importorskip("gguf")
    tensors = control_vector(tmp_path / "v.gguf", kind=kind)
    out = tmp_path / "steering.safetensors"
    done = control_vectors.main(["in", str(tmp_path / "v.gguf"), "--out", str(out), "--strength", "-0.5"])
    assert "1.residual, 3.residual" in done
    model = FAMILIES["llava"].model
    ids = {"input_ids": torch.tensor([[1, 4, 9, 12, 20]])}
    with torch.no_grad(), SteeringVectors.load(model, out):
        ours = model(**ids).logits

    def adding(vector):
        return lambda module, args, output: output - 0.5 * torch.from_numpy(vector)

    layers = model.get_decoder().layers
    handles = [layers[n].register_forward_hook(adding(tensors[f"direction.{n}"])) for n in (1, 3)]
    with torch.no_grad():
        theirs = model(**ids).logits
    [handle.remove() for handle in handles]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_control_vectors_round_trip_is_exact(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = FAMILIES["llava"].model
    vectors = {Site(layer, "residual"): torch.randn(D) for layer in (2, 1)}
    SteeringVectors(model, vectors).save(tmp_path / "a")
    done = control_vectors.main(
        ["out", str(tmp_path / "a"), "--out", str(tmp_path / "v.gguf"), "--model-hint", "llama"]
    )
    assert done.endswith("layers 1, 2")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    assert found.keys() == {"direction.1", "direction.2"}
    assert all(torch.equal(found[f"direction.{site.layer}"], vector) for site, vector in vectors.items())
    control_vectors.from_gguf(tmp_path / "v.gguf", tmp_path / "b")
    loaded = SteeringVectors.load(model, tmp_path / "b")
    assert all(torch.equal(loaded.vectors[site], vector) for site, vector in vectors.items())
    control_vectors.to_gguf(tmp_path / "b", tmp_path / "w.gguf")  # remembers the hint
    assert (tmp_path / "w.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


def test_control_vectors_refuse_what_is_not_exact(tmp_path):
    pytest.importorskip("gguf")
    model, path, out = FAMILIES["llava"].model, tmp_path / "v.gguf", tmp_path / "out"
    one = np.ones(D, "float32")
    head = {"general.architecture": "controlvector"}
    for content, match in (
        (gguf_bytes({"direction.1": one}, {"general.architecture": "llama"}), "no control vector"),
        (gguf_bytes({"direction.0": one}, head), "N from 1"),
        (gguf_bytes({"direction.1x": one}, head), "N from 1"),
        (gguf_bytes({"other": one}, head), "N from 1"),
        (gguf_bytes({"direction.1": one.astype("float16")}, head), "F16"),
        (gguf_bytes({"direction.1": np.ones((2, D), "float32")}, head), "F32 of shape"),
        (gguf_bytes({"direction.1": one, "direction.2": one[:-1]}, head), "the same for all"),
        (gguf_bytes({"direction.1": one * np.nan}, head), "not finite"),
        (gguf_bytes({}, head), "no direction"),
        (gguf_bytes({"direction.1": one}, head)[:-40], "not a whole GGUF"),
        (b"GGUF", "not a whole GGUF"),
        (b"", "not a whole GGUF"),
        (b"other" * 100, "not a whole GGUF"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            control_vectors.from_gguf(path, out)
    control_vector(path, **{"glp.mode": "project"})
    with pytest.raises(ValueError, match=r"--ignore glp\.mode"):
        control_vectors.from_gguf(path, out)
    assert not out.exists()
    control_vectors.from_gguf(path, out, ignore=["glp.mode"])

    for name, subject in (
        ("zero", SteeringVectors(model, {Site(0, "residual"): torch.ones(D)})),
        ("repair", SafetySubspaces.random(model, [1], 1)),
    ):
        subject.save(tmp_path / name)
        with pytest.raises(
            ValueError, match={"zero": "never steers layer 0", "repair": "depends on the activation"}[name]
        ):
            control_vectors.to_gguf(tmp_path / name, tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()


def test_control_vectors_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        control_vectors.read_gguf(tmp_path / "v.gguf")


# Bases


def orthonormal(seed=0, rank=3):
    return torch.linalg.qr(torch.randn(D, rank, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_bases_round_trip_is_exact(tmp_path, suffix):
    basis = orthonormal(1)
    other = torch.randn(D, 3) / 8
    pair = Subspace(basis, torch.randn(D), 0.3, basis + other - basis @ (basis.T @ other))
    sites = {
        Site(2, "ffn"): {"visual": Subspace(orthonormal(), torch.randn(D), 0.75), "text": pair},
        Site(1, "attention"): {"text": Subspace(orthonormal(2, 1), torch.zeros(D), 0.0)},
    }
    subspaces = SafetySubspaces(sites, "constant", 0.25, 1.5)
    subspaces.save(tmp_path / "a")
    done = bases.main(["out", str(tmp_path / "a"), "--out", str(tmp_path / f"arrays{suffix}")])
    flags = done.partition("way back: ")[2].split()
    bases.main(["in", str(tmp_path / f"arrays{suffix}"), "--out", str(tmp_path / "b"), *flags])
    assert SafetySubspaces.load(tmp_path / "b").digest == subspaces.digest


def test_bases_of_other_code(tmp_path):
    u, mean = orthonormal(rank=2).numpy(), np.random.default_rng(0).standard_normal(D)
    np.savez(tmp_path / "a.npz", **{"layer2.visual": u, "layer2.visual.mean": mean, "layer0.residual.text": u[:, 0]})
    sites = bases.to_subspaces(bases.read_arrays(tmp_path / "a.npz")).sites
    assert set(sites) == {Site(2, "ffn"), Site(0, "residual")}
    h = torch.randn(5, D)
    projected = h - (h - torch.tensor(mean).float()) @ torch.tensor(u @ u.T)
    assert torch.allclose(repair(h, sites[Site(2, "ffn")]), projected, atol=1e-5)
    linear = h - h @ torch.tensor(u[:, :1] @ u[:, :1].T)
    assert torch.allclose(repair(h, sites[Site(0, "residual")]), linear, atol=1e-5)


def test_bases_must_be_orthonormal_or_are_made_so():
    u = orthonormal()
    skewed = u @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 3]])
    with pytest.raises(ValueError, match=r"layer2.ffn.visual: .*--orthonormalise"):
        bases.to_subspaces({"layer2.visual": skewed})
    made = bases.to_subspaces({"layer2.visual": skewed}, orthonormalise=True).sites[Site(2, "ffn")]["visual"].basis
    assert torch.allclose(made @ made.T, u @ u.T, atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"layer2.audio": (D, 2)}, "not known"),
        ({"layer2.visual.mean": (D,)}, "no directions"),
        ({"layer2.visual": (2, D)}, "in columns"),
        ({"layer2.visual": (D, 2), "layer2.ffn.visual": (D, 2)}, "two names"),
        ({"layer2.visual": (D, 2), "layer2.visual.beta": (1,)}, "needs a mean"),
        ({"layer2.visual": (D, 2), "layer2.visual.mean": (D + 1,)}, "do not fit"),
        ({"layer2.visual": (D, 2), "layer2.visual.reader": (D, 2)}, "leave one out"),
        ({"layer2.visual": (D, 2), "layer3.visual": (D + 1, 2)}, "share its hidden size"),
        ({}, "at least one site"),
    ],
)
def test_bases_refuse(arrays, match):
    with pytest.raises(ValueError, match=match):
        bases.to_subspaces({name: torch.randn(shape) for name, shape in arrays.items()}, orthonormalise=True)


def test_bases_refuse_objects_integers_and_gates(tmp_path):
    np.savez(
        tmp_path / "a.npz", **{"layer2.visual": np.array([Ran(tmp_path / "ran")], dtype=object)}, allow_pickle=True
    )
    with pytest.raises(ValueError, match="could be code"):
        bases.read_arrays(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "a.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        bases.read_arrays(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="floating point"):
        bases.to_subspaces({"layer2.visual": torch.eye(D, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"\.npz nor"):
        bases.read_arrays(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="has a gate"):
        bases.to_arrays(gated())


# A repaired checkpoint and its repair


def gated():
    gate = Gate((5,), torch.randn(D, 3), torch.randn(3), required=1, pictured=1)
    steps = Subspace(orthonormal(3), torch.randn(4, D))
    return SafetySubspaces(
        {Site(2, "residual"): {"last": Subspace(orthonormal(4), torch.randn(D)), "response": steps}},
        strength=1.25,
        metadata={"origin": "test"},
        gate=gate,
        gate_site=Site(1, "residual"),
    )


def by_modality():
    both = SafetySubspaces.random(FAMILIES["llava"].model, [1, 3], 2, component="ffn")
    pair = Subspace(orthonormal(5), torch.randn(D), 1.0, orthonormal(5))
    return SafetySubspaces(
        {**both.sites, Site(2, "attention"): {"text": pair}}, "constant", 0.25, 0.5, metadata={"origin": "test"}
    )


def repaired_from_files(folder, family, subspaces, dtype="auto", name="", before=torch.float32):
    """A base in `folder` / base, and in `folder` / full its repair as it was loaded from there."""
    family = FAMILIES[family]
    family.build().to(before).save_pretrained(folder / "base")
    auto = AutoModelForCausalLM if family.text_only else AutoModelForImageTextToText
    base = auto.from_pretrained(folder / "base", dtype=dtype)
    base.config._name_or_path = name or base.config._name_or_path
    repaired = care_hf.CareForConditionalGeneration.from_base(base, subspaces)
    if not family.lacks:
        family.processor(base.config).save_pretrained(folder / "base")
        repaired.processor = AutoProcessor.from_pretrained(folder / "base")
    repaired.save_pretrained(folder / "full")
    return repaired


def there_and_back(folder):
    """As on the command line: `full` to `adapter` to `back`; returns what the last said."""
    full_and_adapter.main(["adapter", str(folder / "full"), "--out", str(folder / "adapter")])
    command = [folder / "base", folder / "adapter", "--out", folder / "back"]
    return full_and_adapter.main(["full", *map(str, command)])


def raw_tensors(folder):
    """Bytes, shapes and dtypes of a checkpoint's weights, by the safetensors specification."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], content[start:end])
    return found


def adapter_file(folder):
    with safe_open(folder / "care_adapter.safetensors", "pt") as file:
        return raw_tensors(folder), file.metadata()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma2", "qwen3_vl_moe", "llama"])
@pytest.mark.parametrize("subspaces", [gated, by_modality])
def test_full_and_adapter_round_trip_is_exact(tmp_path, family, subspaces):
    repaired = repaired_from_files(tmp_path, family, subspaces(), name="org/base")
    assert "(base compared: exact)" in there_and_back(tmp_path)
    care_hf.save_adapter(repaired, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["care_adapter.safetensors"]
    assert adapter_file(tmp_path / "adapter") == adapter_file(tmp_path / "saved")
    full, back = tmp_path / "full", tmp_path / "back"
    assert raw_tensors(full) == raw_tensors(back) and raw_tensors(full)
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (full, back))
    # Where a base comes from is not part of it, and how it was recognised is part of the origin.
    assert config["vlm_config"].pop("_name_or_path") == "org/base" and "_name_or_path" not in again["vlm_config"]
    assert again["origin"].pop("base_match") == "exact"
    assert again == config
    cards = {"README.md", "reproduce.json", "config.json"}
    others = [{p.name: p.read_bytes() for p in folder.iterdir() if p.name not in cards} for folder in (full, back)]
    assert others[0] == others[1] and ("tokenizer_config.json" in others[0]) == (not FAMILIES[family].lacks)


def test_the_adapter_of_a_checkpoint_names_no_folder(tmp_path):
    """Which is all that it says less than one that is saved from memory, where the folder's last part is known."""
    repaired = repaired_from_files(tmp_path, "llava", gated())
    full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")
    care_hf.save_adapter(repaired, tmp_path / "saved")
    (tensors, found), (expected, saved) = (adapter_file(tmp_path / name) for name in ("adapter", "saved"))
    assert json.loads(saved["base"]) == {**json.loads(found["base"]), "name": "base"}
    assert json.loads(found["base"])["name"] == ""
    assert {name for name in saved if saved[name] != found[name]} == {"base", "digest"}
    assert tensors == expected and tensors


@pytest.mark.parametrize("fitted", [torch.bfloat16, torch.float32])
def test_the_full_checkpoint_has_the_precision_that_it_was_fitted_in(tmp_path, fitted):
    repaired_from_files(tmp_path, "llava", gated(), dtype=fitted, before=torch.float16)
    assert "(base compared: exact)" in there_and_back(tmp_path)
    assert raw_tensors(tmp_path / "back") == raw_tensors(tmp_path / "full")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells which memory is a file's")
def test_the_base_of_a_checkpoint_stays_in_its_files(tmp_path, monkeypatch):
    seen = []
    repaired_from_files(tmp_path, "llava", gated())
    monkeypatch.setattr(full_and_adapter, "save_adapter", lambda repaired, _: seen.append(repaired))
    full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "full" / "model.safetensors")]
    parameters = dict(seen[0].vlm.named_parameters())
    for name, parameter in parameters.items():
        assert any(int(a, 16) <= parameter.data_ptr() < int(b, 16) for a, b in spans), name


def test_another_base_is_refused(tmp_path):
    repaired_from_files(tmp_path, "llava", gated())
    full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")
    other = FAMILIES["llava"].build()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)  # as after a fine-tuning
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"weights of this one differ \(1 of them"):
        full_and_adapter.to_full(tmp_path / "other", tmp_path / "adapter", tmp_path / "back")
    gated().save(tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match="does not name its base"):
        full_and_adapter.to_full(tmp_path / "base", tmp_path / "nameless.safetensors", tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        full_and_adapter.to_full(tmp_path / "base", tmp_path / "nowhere", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "full", "adapter", "other", "nameless.safetensors"}


def test_adapter_refuses_what_is_not_whole(tmp_path):
    repaired_from_files(tmp_path, "llava", gated())
    with pytest.raises(ValueError, match="expected a repaired one"):
        full_and_adapter.to_adapter(tmp_path / "base", tmp_path / "adapter")
    weights = tmp_path / "full" / "model.safetensors"
    tensors = load_file(weights)
    gate = next(name for name in tensors if name.endswith("care_gate.readers"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gate}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors: .*care_gate.readers"):
        full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")
    save_file({**tensors, gate: tensors[gate] * 2}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="was changed or damaged"):
        full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "full"}


def test_adapter_refuses_a_base_that_loading_would_cast(tmp_path):
    base = FAMILIES["llava"].build().to(torch.bfloat16)
    base.model.vision_tower.float()
    care_hf.CareForConditionalGeneration.from_base(base, gated()).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"in torch.bfloat16, torch.float32, of which loading makes torch\.\w+; save"):
        full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")


def test_adapter_refuses_what_it_would_leave_out(tmp_path):
    base = get_peft_model(FAMILIES["llava"].build(), LoraConfig(target_modules=["q_proj"], r=2))
    care_hf.CareForConditionalGeneration.from_base(base, gated()).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"the adapters \['default'\] of PEFT"):
        full_and_adapter.to_adapter(tmp_path / "full", tmp_path / "adapter")


# Original LLaVA

WORDS = 90  # of the original's vocabulary; its tokenizer has fewer


@pytest.fixture
def original(tmp_path):
    """A tiny checkpoint in the original format, and the stock model it was taken from."""
    from families.text import build_tokenizer

    config = FAMILIES["llava"].config()
    config.text_config.rope_parameters["rope_theta"] = 500.0  # not the default
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    checkpoint, tower = tmp_path / "original", tmp_path / "clip"
    checkpoint.mkdir()
    build_tokenizer().save_pretrained(checkpoint)
    state, vision = {}, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor[:WORDS] if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else tensor
        if "vision_tower" in name:
            vision[name.replace("model.vision_tower.", "vision_model.")] = tensor.clone()
        elif "multi_modal_projector" in name:
            _, _, which, leaf = name.split(".")
            state[f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[which] }.{leaf}"] = tensor.clone()
        else:
            state[name.replace("model.language_model.", "model.")] = tensor.clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(state)
    torch.save({name: state[name] for name in names[::2]}, checkpoint / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[1::2]}, checkpoint / "pytorch_model-00002-of-00002.bin")
    text = model.config.text_config.to_dict()
    text = {key: value for key, value in text.items() if key not in ("rope_parameters", "dtype", "architectures")}
    config = {
        **text,
        "vocab_size": WORDS,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": model.config.text_config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "mm_vision_tower": "openai/clip",
        "mm_hidden_size": D,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    CLIPVisionModel(model.config.vision_config).config.save_pretrained(tower)
    vision |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    vision["vision_model.embeddings.position_ids"] = torch.arange(5)
    save_file(vision, tower / "model.safetensors", {"format": "pt"})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images.save_pretrained(tower)
    return checkpoint, tower, model


def spliced_logits(model, before, pixels, after):
    """As the original code runs: features of the penultimate layer, without the class token, between embeddings."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = model.model.multi_modal_projector(hidden)
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([before])), features, embed(torch.tensor([after]))], dim=1)
    return model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)


@torch.no_grad()
def test_original_llava_runs_as_before(tmp_path, original):
    checkpoint, tower, model = original
    command = [checkpoint, "--vision-tower", tower, "--out", tmp_path / "out"]
    assert "AutoProcessor" in original_llava.main([*map(str, command)])
    converted, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = converted.config.image_token_id
    assert image == processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert converted.config.image_seq_length == 4 and processor.image_processor.do_pad
    pixels = torch.randn(1, 3, 16, 16)
    expected = spliced_logits(model, [1, 4, 9], pixels, [12, 20])
    ids = torch.tensor([[1, 4, 9, *[image] * 4, 12, 20]])
    found = converted(input_ids=ids, pixel_values=pixels).logits
    assert torch.allclose(found[..., :WORDS], expected[..., :WORDS], atol=1e-5)


def test_original_llava_speaks_and_can_be_repaired(tmp_path, original):
    from PIL import Image

    checkpoint, tower, _ = original
    original_llava.convert(checkpoint, tower, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = {"type": "image", "image": Image.new("RGB", (24, 16))}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "hi"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("questions. USER: <image>\nhi ASSISTANT:")
    told = [*messages, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(told).endswith(" ASSISTANT: yes</s>")
    inputs = processor(text=text, images=picture["image"], return_tensors="pt")
    square = Image.new("RGB", (24, 24), (122, 116, 104))  # CLIP's mean
    square.paste(picture["image"], (0, 4))
    stock = CLIPImageProcessorPil.from_pretrained(tower)(square, return_tensors="pt")["pixel_values"]
    assert torch.allclose(inputs["pixel_values"], stock, atol=1e-5)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    repaired = care_hf.CareForConditionalGeneration.from_base(model, SafetySubspaces.random(model, [1], 2))
    assert repaired.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_original_llava_grows_embeddings_only_where_it_must(tmp_path, original):
    checkpoint, tower, model = original
    config = json.loads((checkpoint / "config.json").read_text())
    original_llava.convert(checkpoint, tower, tmp_path / "enough")
    words = AutoProcessor.from_pretrained(tmp_path / "enough").tokenizer
    assert len(words) <= WORDS
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "enough").lm_head.weight.shape[0] == WORDS
    few = len(words) - 1  # one row less than there are tokens now
    for path in checkpoint.glob("*.bin"):
        state = torch.load(path, weights_only=True)
        small = {
            k: v[:few].clone() if k in ("lm_head.weight", "model.embed_tokens.weight") else v for k, v in state.items()
        }
        torch.save(small, path)
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": few}))
    original_llava.convert(checkpoint, tower, tmp_path / "grown")
    grown = AutoModelForImageTextToText.from_pretrained(tmp_path / "grown").get_input_embeddings().weight
    old = model.get_input_embeddings().weight[:few]
    assert len(grown) == 64 * -(-len(words) // 64) and torch.equal(grown[:few], old)
    assert torch.allclose(grown[few:], old.mean(dim=0).expand(len(grown) - few, -1), atol=1e-6)


def test_original_llava_takes_a_tower_that_was_trained_further(tmp_path, original):
    checkpoint, tower, model = original
    vision = load_file(tower / "model.safetensors")
    ours = {
        f"model.vision_tower.vision_tower.{k}": v.half() for k, v in vision.items() if k.startswith("vision_model.")
    }
    torch.save(ours, checkpoint / "pytorch_model-00003-of-00003.bin")
    (tower / "model.safetensors").unlink()
    original_llava.convert(checkpoint, tower, tmp_path / "out")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").model.vision_tower.state_dict()
    expected = {name: t.half().float() for name, t in model.model.vision_tower.state_dict().items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_original_llava_keeps_half_precision(tmp_path, original):
    checkpoint, tower, model = original
    for path in checkpoint.glob("*.bin"):
        torch.save({name: t.bfloat16() for name, t in torch.load(path, weights_only=True).items()}, path)
    original_llava.convert(checkpoint, tower, tmp_path / "out")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert all(torch.equal(t[:WORDS], model.state_dict()[name][:WORDS].bfloat16()) for name, t in found.items())


def test_original_llava_loses_no_image_to_a_template(tmp_path, original):
    checkpoint, tower, _ = original
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    text_only = {**settings, "chat_template": "{{ messages[0].content }}"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(text_only))
    with pytest.raises(ValueError, match="images would be lost"):
        original_llava.convert(checkpoint, tower, tmp_path / "out")
    (tmp_path / "own.jinja").write_text("<image>{{ messages[0].content }}")
    command = [
        checkpoint,
        "--vision-tower",
        tower,
        "--out",
        tmp_path / "out",
        "--chat-template",
        tmp_path / "own.jinja",
    ]
    original_llava.main([*map(str, command)])
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template.startswith("<image>{{")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "needs no conversion"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"mm_projector_type": None}, "mlp2x_gelu"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "differently"),
        ({"mm_use_im_start_end": True}, "differently"),
        ({"image_aspect_ratio": "anyres"}, "differently"),
        ({"mm_hidden_size": D + 1}, "that model's folder"),
        ({"num_hidden_layers": 3}, "no such tensor"),
        ({"num_hidden_layers": 5}, "merged first"),
        ({"vocab_size": WORDS + 1}, "does not fit its config.json"),
    ],
)
def test_original_llava_refuses_other_configurations(tmp_path, original, change, match):
    checkpoint, tower, _ = original
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=match):
        original_llava.convert(checkpoint, tower, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"original", "clip"}


def test_original_llava_accounts_for_every_tensor(tmp_path, original, hostile):
    checkpoint, tower, _ = original
    extra = checkpoint / "pytorch_model-extra.bin"
    for state, match in (
        ({"model.image_newline": torch.ones(D)}, "has no place"),
        ({"model.mm_projector.4.weight": torch.ones(D, D)}, "no such tensor"),
        ({"model.norm.weight": torch.ones(D)}, "both hold"),
        ({"model.norm.weight": [1.0]}, "no plain dict of tensors"),
    ):
        torch.save(state, extra)
        with pytest.raises(ValueError, match=match):
            original_llava.convert(checkpoint, tower, tmp_path / "out")
    with pytest.raises(ValueError, match="could be code and is not run"):
        original_llava.convert(hostile(extra).parent, tower, tmp_path / "out")
    extra.unlink()
    (checkpoint / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="tensors are in neither"):
        original_llava.convert(checkpoint, tower, tmp_path / "out")
    (tmp_path / "away").rename(checkpoint / "pytorch_model-00002-of-00002.bin")
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        original_llava.convert(checkpoint, tower, tmp_path / "out")
    assert not (tmp_path / "out").exists()
