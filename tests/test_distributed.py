"""Repaired models shared out to processes or spread over devices: they answer what one process with all of it does."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import random_subspace
from test_decoding import FULL, GREEDY, anchored, assert_answers, case, of_each_kind, padded, samples  # noqa: F401
from tiny import qwen_config
from transformers import AutoModel, Qwen2_5_VLForConditionalGeneration, Qwen3MoeConfig

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.gating import Gate
from care_hf.projection import repair
from care_hf.sites import Site, record, site_module

IMAGE, VIDEO, START, END = 90, 93, 91, 92
TWO = {"tp_size": 2}
WAYS = ({}, {"use_cache": False}, {"cache_implementation": "static"})
EXPERTS = {**TWO, "ep_size": 2}
LAYERS = "vlm.model.language_model.layers"
# A plan in which an FFN's outputs are parts of a sum until all of it has run, as those of shared experts are.
SUMMED_LATE = {
    **TWO,
    "tp_plan": {
        f"{LAYERS}.*.mlp.down_proj.weight": "rowwise",
        f"{LAYERS}.*.mlp.down_proj": "local_params",
        f"{LAYERS}.*.mlp": "all_reduce",
    },
}


# What is run


def components(make, layers=(2, 3, 4)):
    """One site of each component."""
    places = zip(layers, ("ffn", "attention", "residual"), strict=True)
    return {Site(layer, part): make(i) for i, (layer, part) in enumerate(places)}


def by_modality(fusion="adaptive", size=128, **layers):
    def make(i):
        visual, text = (random_subspace(2 * i + j, size, 8, oblique=i == 1, beta=3) for j in (0, 1))
        return {"visual": visual, "text": text}

    return SafetySubspaces(components(make, **layers), fusion)


def gated(prompt_end, size=128, **layers):
    """With a gate that fires in prompts without an image."""

    def make(i):
        return {"last": anchored(2 * i, i == 1, 0, size), "response": anchored(2 * i + 1, i == 1, 4, size)}

    gate = Gate(prompt_end, torch.zeros(size, 2), torch.tensor([-1.0, 1.0]), pictured=1)
    return SafetySubspaces(components(make, **layers), gate=gate, gate_site=Site(0, "residual"))


def dense_qwen():
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(qwen_config(99, IMAGE, VIDEO, START, END, spread=0.1)).eval()


def qwen_inputs():
    """One image of 4 x 4 patches, merged to 4 tokens, between text; the second row left-padded and without an image."""
    rows = [[5, START, *[IMAGE] * 4, END, 6, 7, 8], [0] * 5 + [9, 10, 11, 7, 8]]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor([[1] * 10, [0] * 5 + [1] * 5]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 10]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def of_experts(llava):
    """The same LLaVA with a text model whose FFNs, but for the first, are mixtures of four experts."""
    config = copy.deepcopy(llava.config)
    sizes = {name: getattr(config.text_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    more = {"num_hidden_layers": 3, "initializer_range": 0.06, "pad_token_id": 0}
    config.text_config = Qwen3MoeConfig(**sizes, **experts, **heads, **more)
    torch.manual_seed(0)
    return type(llava)(config).eval()


@pytest.fixture(scope="module")
def base(_untrained):
    return _untrained[0]


class Jobs(dict):
    """What the processes are to do, and what one alone makes of it."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.alone, self._made = folder, {}, {}

    def add(self, name, kind, model, inputs, decoding=({},), dtype=torch.float32, **more):
        checkpoint = self.folder / str(id(model))
        if (model, dtype) not in self._made:
            model.save_pretrained(checkpoint)
            self._made[model, dtype] = run_alone(checkpoint, inputs, dtype)
        made = self._made[model, dtype]
        self.alone[name] = {**made, "tokens": [made["tokens"]] * len(decoding)}
        job = {"checkpoint": str(checkpoint), "inputs": inputs, "options": GREEDY, "decoding": list(decoding)}
        self[name] = {"kind": kind, "save": f"{name}-again", **job, **more}

    def run(self, processes=2, timeout=200):
        """What every process makes of the jobs, and what one alone does."""
        here, folder = Path(__file__).parent, self.folder / "out"
        folder.mkdir()
        torch.save(dict(self), folder / "jobs.pt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        paths = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [*command, here / "distributed_worker.py", folder / "jobs.pt", folder],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its workers
            output, _ = process.communicate()
            pytest.fail(f"Still running after {timeout} s:\n{output}")
        assert process.returncode == 0, output
        results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
        return {
            name: ([result[name] for result in results], self.alone[name], folder / self[name]["save"]) for name in self
        }


def run_alone(checkpoint, inputs, dtype):
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    with torch.no_grad():
        logits = model(**given).logits
        with model.disable():
            assert (model(**given).logits - logits).abs().max() > 0.1  # the repair is not lost unnoticed
    tokens = model.generate(**given, **GREEDY)
    loss = model(**given, labels=inputs["input_ids"]).loss
    loss.backward()
    return {
        "logits": logits,
        "tokens": tokens,
        "loss": loss.detach(),
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "buffers": {n: b for n, b in model.named_buffers() if ".care." in n or ".care_gate." in n},
        "shapes": {n: p.shape for n, p in model.named_parameters()},
        "sites": list(map(str, model.care_modules())),
    }


def assert_same(results, alone):
    """All processes made the same as one alone, and hold the whole repair as it was saved."""
    for result in results:
        assert "error" not in result, result["error"]
        torch.testing.assert_close(result["logits"], alone["logits"], rtol=1e-5, atol=1e-5)
        assert len(result["tokens"]) == len(alone["tokens"])
        for ours, expected in zip(result["tokens"], alone["tokens"], strict=True):
            assert torch.equal(ours, expected)
        torch.testing.assert_close(result["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
        # Some fill in zeros for weights that have no part in it.
        gradients = {n: g for n, g in result["gradients"].items() if n in alone["gradients"] or g.any()}
        torch.testing.assert_close(gradients, alone["gradients"], rtol=1e-4, atol=1e-5)
        assert result["buffers"].keys() == alone["buffers"].keys()
        for name, buffer in result["buffers"].items():
            assert buffer.dtype == alone["buffers"][name].dtype and torch.equal(buffer, alone["buffers"][name])


def assert_saved(folder, inputs, alone):
    """What the processes saved is a whole repaired checkpoint."""
    again = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, alone["logits"], rtol=1e-5, atol=1e-5)


# Tensor and expert parallel


@pytest.fixture(scope="module")
def parallel(case, base, tmp_path_factory):  # noqa: F811
    jobs = Jobs(tmp_path_factory.mktemp("parallel"))
    repaired = CareForConditionalGeneration.from_base
    of_llava, of_qwen = padded(case, of_each_kind(case)), qwen_inputs()
    add = functools.partial(jobs.add, kind="tensor_parallel", inputs=of_llava, config=TWO)
    add("adaptive", model=repaired(base, by_modality()))
    route = repaired(base, by_modality("route"))
    add("route", model=route)
    add("summed late", model=route, config=SUMMED_LATE)
    add("gated", model=case.model, decoding=WAYS)
    add("gated, summed late", model=case.model, config=SUMMED_LATE)
    of_three = {"layers": (1, 2, 2)}
    qwen, end = dense_qwen(), case.subspaces.gate.prompt_end
    add("qwen", model=repaired(qwen, by_modality(size=64, **of_three)), inputs=of_qwen)
    add("qwen, gated", model=repaired(qwen, gated((7, 8), size=64, **of_three)), inputs=of_qwen, decoding=WAYS)
    mixture = of_experts(base)
    add("mixture", model=repaired(mixture, by_modality(**of_three)))
    add("experts, gated", model=repaired(mixture, gated(end, **of_three)), config=EXPERTS)
    return jobs, jobs.run()


PARALLEL = [
    "adaptive",
    "route",
    "summed late",
    "gated",
    "gated, summed late",
    "qwen",
    "qwen, gated",
    "mixture",
    "experts, gated",
]


@pytest.mark.parametrize("name", PARALLEL)
def test_every_plan_answers_and_trains_as_one_process(parallel, name):
    jobs, outcomes = parallel
    results, alone, saved = outcomes[name]
    assert_same(results, alone)
    for result in results:
        held, shapes = result["held"], alone["shapes"]
        rows, columns = shapes[f"{LAYERS}.1.self_attn.q_proj.weight"]
        assert held[f"{LAYERS}.1.self_attn.q_proj.weight"] == (rows // 2, columns)
        rows, columns = shapes[f"{LAYERS}.0.mlp.down_proj.weight"]
        assert held[f"{LAYERS}.0.mlp.down_proj.weight"] == (rows, columns // 2)
        of_experts = [n for n in held if ".1.mlp.experts." in n]
        assert bool(of_experts) == name.startswith(("mixture", "experts"))
        for n in of_experts:
            first = name.startswith("experts")
            assert 2 * held[n].numel() == shapes[n].numel() and (held[n][0] == shapes[n][0] // 2) == first
    assert_saved(saved, jobs[name]["inputs"], alone)


# Fully sharded


@pytest.fixture(scope="module")
def sharded(case, base, tmp_path_factory):  # noqa: F811
    jobs = Jobs(tmp_path_factory.mktemp("sharded"))
    inputs, half = padded(case, of_each_kind(case)), torch.bfloat16
    route = CareForConditionalGeneration.from_base(base, by_modality("route"))
    for name, model in (("route", route), ("gated", case.model)):
        jobs.add(f"torch, {name}", "fully_sharded", model, inputs)
        jobs.add(f"transformers, {name}", "sharded_by_transformers", model, inputs)
        jobs.add(f"wrapped, {name}", "wrapped", model, inputs, mixed={})
        jobs.add(f"wrapped, {name}, half", "wrapped", model, inputs, mixed={"param_dtype": half, "buffer_dtype": half})
    kept = {"param_dtype": half, "buffer_dtype": torch.float32}
    jobs.add("wrapped, kept", "wrapped", case.model, inputs, dtype=half, mixed=kept)
    jobs.add("torch, half", "fully_sharded", case.model, inputs, dtype=half, half=half)
    return jobs, jobs.run()


@pytest.mark.parametrize("name", ["route", "gated"])
@pytest.mark.parametrize("by", ["torch", "transformers", "wrapped"])
def test_sharded_it_answers_and_trains_as_one_process(sharded, by, name):
    jobs, outcomes = sharded
    results, alone, saved = outcomes[f"{by}, {name}"]
    if by == "wrapped":  # torch gathers its weights in its own forward only, so it does not generate
        alone = {**alone, "tokens": []}
    assert_same(results, alone)
    for rank, result in enumerate(results):
        assert list(result["sites"]) == alone["sites"]
        assert all("Care" in of_site or of_site == "FullyShardedDataParallel" for of_site in result["sites"].values())
        if by != "wrapped":
            assert result["uneven"] == 2 + 3 * rank
            assert result["held"].keys() >= {f"{LAYERS}.1.mlp.down_proj.weight", "vlm.lm_head.weight"}
            for n, shape in alone["shapes"].items():
                assert sum(other["held"][n].numel() for other in results) == shape.numel()
    assert_saved(saved, jobs[f"{by}, {name}"]["inputs"], alone)


def test_mixed_precision_leaves_the_bases_single(sharded):
    for name in ("torch, half", "wrapped, kept"):
        results, alone, _ = sharded[1][name]
        for result in results:
            assert "error" not in result, result["error"]
            floating = {n: b for n, b in result["buffers"].items() if b.is_floating_point()}
            assert floating and {b.dtype for b in floating.values()} == {torch.float32}
            assert all(torch.equal(b, alone["buffers"][n]) for n, b in floating.items())
            assert result["logits"].dtype == torch.bfloat16
            torch.testing.assert_close(result["logits"], alone["logits"], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["route", "gated"])
def test_half_precision_bases_are_refused(sharded, name):
    for result in sharded[1][f"wrapped, {name}, half"][0]:
        assert "were cast to torch.bfloat16" in result["error"] and "buffer_dtype=torch.float32" in result["error"]


# Spread over devices


MIXED = {
    "vlm.model.vision_tower": "disk",
    "vlm.model.multi_modal_projector": "cpu",
    "vlm.model.language_model.embed_tokens": "cpu",
    **{f"{LAYERS}.{i}": "disk" if i in (1, 2, 4) else "cpu" for i in range(6)},
    "vlm.model.language_model.norm": "cpu",
    "vlm.model.language_model.rotary_emb": "cpu",
    "vlm.lm_head": "disk",
    "layers": "cpu",  # the model's own buffer; accelerate wants it named
}


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("saved")
    case.model.save_pretrained(folder)
    return folder


def on_disk(model):
    return {name for name, weight in model.named_parameters() if weight.is_meta}


def assert_repair_is_here(model):
    buffers = {n: b for n, b in model.named_buffers() if ".care." in n or ".care_gate." in n}
    assert buffers and not any(b.is_meta for b in buffers.values())


def test_layers_on_a_processor_and_on_a_disk(case, saved, tmp_path):  # noqa: F811
    model = AutoModel.from_pretrained(saved, device_map=MIXED, offload_folder=str(tmp_path))
    assert {name.split(".")[4] for name in on_disk(model) if name.startswith(LAYERS)} == {"1", "2", "4"}
    assert_repair_is_here(model)
    for options in ({}, {"cache_implementation": "static"}):
        assert_answers(model.generate(**padded(case), **FULL, **options), case.answers)
    again = copy.deepcopy(model)
    assert_answers(again.generate(**padded(case), **FULL), case.answers)


def test_what_does_not_fit_goes_to_the_disk(case, saved, tmp_path):  # noqa: F811
    model = AutoModel.from_pretrained(
        saved, device_map="auto", max_memory={"cpu": 4 * 2**20}, offload_folder=str(tmp_path)
    )
    assert {"cpu", "disk"} <= set(map(str, model.hf_device_map.values()))
    # No repaired layer is split, whatever is in it.
    assert not any(name.startswith(f"{LAYERS}.") and name.count(".") > 4 for name in model.hf_device_map)
    assert_repair_is_here(model)
    assert_answers(model.generate(**padded(case), **FULL), case.answers)


def test_an_offloaded_repair_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="is offloaded; load with offload_buffers=False"):
        AutoModel.from_pretrained(saved, device_map=MIXED, offload_folder=str(tmp_path), offload_buffers=True)


@pytest.mark.parametrize("spread", ["cpu", "disk", "both"])
@pytest.mark.parametrize("first", ["spread", "repaired"])
def test_a_gated_repair_of_a_spread_model(case, spread, first, tmp_path):  # noqa: F811
    def spread_out(model):
        if spread == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif spread == "disk":
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        else:
            device_map = {n.removeprefix(prefix): device for n, device in MIXED.items() if n.startswith(prefix)}
            dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    base, prefix = copy.deepcopy(case.base), "vlm." if first == "spread" else ""
    if first == "spread":
        spread_out(base)
    model = CareForConditionalGeneration.from_base(base, case.subspaces)
    if first == "repaired":
        spread_out(model)
    assert len(on_disk(model)) > 20
    assert_repair_is_here(model)
    rows = of_each_kind(case)
    output = model.generate(**padded(case, rows), **FULL)
    assert_answers(output, [case.answers[i] for i in rows])


# A forward that something else puts on a repaired module


FFN = Site(2, "ffn")


def assert_repaired_after(model, inputs, factor=1):
    """The FFN puts out `factor` times its own, repaired once."""
    with record(model.vlm, [FFN]) as ours, torch.no_grad():
        model(**inputs)
    own = {}
    handle = site_module(model.vlm, FFN).down_proj.register_forward_hook(lambda m, a, out: own.update(h=out))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    torch.testing.assert_close(ours[FFN], repair(factor * own["h"], by_modality().sites[FFN]))


@pytest.mark.parametrize("put", ["around", "instead"])
def test_it_is_repaired_afterwards(case, llava, put):  # noqa: F811
    model, inputs = CareForConditionalGeneration.from_base(llava, by_modality()), padded(case, of_each_kind(case))
    assert_repaired_after(model, inputs)
    module = site_module(model.vlm, FFN)
    assert "forward" not in module.__dict__
    of_class = module.forward if put == "around" else functools.partial(type(module).__mro__[2].forward, module)
    module.forward = lambda *args, **kwargs: 2 * of_class(*args, **kwargs)
    assert_repaired_after(model, inputs, 2)
    with model.disable(), record(model.vlm, [FFN]) as off, torch.no_grad():
        model(**inputs)
    with record(llava, [FFN]) as plain, torch.no_grad():
        llava(**inputs)
    assert torch.equal(off[FFN], 2 * plain[FFN])
    del module.forward
    assert_repaired_after(model, inputs)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("first", ["hook", "repair"])
def test_accelerates_hooks_come_and_go(case, llava, first):  # noqa: F811
    inputs = padded(case, of_each_kind(case))
    if first == "hook":
        add_hook_to_module(site_module(llava, FFN), Doubling())
    model = CareForConditionalGeneration.from_base(llava, by_modality())
    if first == "repair":
        add_hook_to_module(site_module(model.vlm, FFN), Doubling())
    assert_repaired_after(model, inputs, 2)
    assert_repaired_after(copy.deepcopy(model), inputs, 2)
    remove_hook_from_module(site_module(model.vlm, FFN))
    assert_repaired_after(model, inputs)
