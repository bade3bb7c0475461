"""Repaired models in several processes, and spread over devices: what they answer is what one process answers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_subspace
from test_decoding import FULL, GREEDY, anchored, case, of_each_kind, padded, samples  # noqa: F401  fixtures
from tiny import qwen_config
from transformers import (
    AutoModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
)

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.gating import Gate
from care_hf.sites import Site

IMAGE, VIDEO, START, END = 90, 93, 91, 92
TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def launch(jobs, folder, processes=2, timeout=300):
    """What every process makes of the jobs, by rank."""
    folder.mkdir(exist_ok=True)
    torch.save(dict(jobs), folder / "jobs.pt")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = [str(here.parent), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [*command, str(here / "distributed_worker.py"), str(folder / "jobs.pt"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def by_modality(size=128, layers=(2, 3, 4)):
    """A repair of every component."""
    places = [Site(layer, part) for layer, part in zip(layers, ("ffn", "attention", "residual"), strict=True)]
    return {
        site: {
            "visual": random_subspace(2 * i, size, 8, oblique=i == 1, beta=3),
            "text": random_subspace(2 * i + 1, size, 8, beta=3),
        }
        for i, site in enumerate(places)
    }


def gated(size, layers, prompt_end):
    """The gate fires at once."""
    sites = {
        Site(layer, part): {"last": anchored(2 * i, False, 0, size), "response": anchored(2 * i + 1, False, 4, size)}
        for i, (layer, part) in enumerate(zip(layers, ("ffn", "attention", "residual"), strict=True))
    }
    gate = Gate(prompt_end, torch.zeros(size, 1), torch.tensor([-1.0]))
    return SafetySubspaces(sites, gate=gate, gate_site=Site(0, "residual"))


def grid_inputs():
    """One image of 4 x 4 patches, merged to 4 tokens, between text; the second row left-padded and without an image."""
    first = [5, START, *[IMAGE] * 4, END, 6, 7, 8]
    return {
        "input_ids": torch.tensor([first, [0] * 5 + [9, 10, 11, 7, 8]]),
        "attention_mask": torch.tensor([[1] * 10, [0] * 5 + [1] * 5]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 10]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def dense_qwen():
    torch.manual_seed(0)
    config = qwen_config(99, IMAGE, VIDEO, START, END, spread=0.1)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def experts(llava):
    """The same LLaVA, its text model a mixture of four experts from the second layer on."""
    config = copy.deepcopy(llava.config)
    sizes = {name: getattr(config.text_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config.text_config = Qwen3MoeConfig(
        **sizes,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mlp_only_layers=[0],
        initializer_range=0.06,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return type(llava)(config).eval()


class Jobs(dict):
    """Jobs, with what one process answers to each."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.expected = folder, {}

    def add(self, name, kind, model, inputs, options=TOKENS, decoding=({},), **more):
        checkpoint = self.folder / name
        model.save_pretrained(checkpoint)
        self[name] = {
            "kind": kind,
            "checkpoint": str(checkpoint),
            "inputs": inputs,
            "options": options,
            "decoding": list(decoding),
            **more,
        }
        single = AutoModel.from_pretrained(checkpoint)
        with torch.no_grad(), single.disable():
            base = single(**inputs).logits
        with torch.no_grad():
            logits = single(**inputs).logits
        tokens = [single.generate(**inputs, **options, **ways) for ways in decoding]
        assert (logits - base).abs().max() > 0.1
        self.expected[name] = {"logits": logits, "tokens": tokens, "model": single}


# An MLP whose sum over the processes is the MLP's own, not that of its last projection.
LATE = {f"vlm.model.language_model.layers.*.{key}": style for key, style in {
    "mlp.down_proj.weight": "rowwise",
    "mlp.down_proj": "local_params",
    "mlp": "all_reduce",
}.items()}


@pytest.fixture(scope="module")
def parallel(case, llava_base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("parallel")
    jobs, tp = Jobs(folder), {"tp_size": 2}
    inputs = padded(case, of_each_kind(case))
    ways = ({}, {"use_cache": False}, {"cache_implementation": "static"})
    for fusion in ("adaptive", "route"):
        model = CareForConditionalGeneration.from_base(llava_base, SafetySubspaces(by_modality(), fusion))
        jobs.add(fusion, "tensor_parallel", model, inputs, decoding=ways, config=tp, save=f"{fusion}-again")
    jobs.add("late", "tensor_parallel", model, inputs, config={**tp, "tp_plan": LATE})
    jobs.add("gated", "tensor_parallel", case.model, inputs, GREEDY, ways, config=tp)
    both = {"tp": tp, "ep": {"tp_size": 2, "ep_size": 2}}
    for name, base, size, configs in (("dense", dense_qwen(), 64, {"tp": tp}), ("expert", experts(llava_base), 128, both)):
        end = (7, 8) if size == 64 else case.subspaces.gate.prompt_end
        for kind, subspaces in {
            "adaptive": SafetySubspaces(by_modality(size, (1, 2, 2))),
            "gated": gated(size, (1, 2, 2), end),
        }.items():
            for of, config in configs.items():
                model = CareForConditionalGeneration.from_base(base, subspaces)
                jobs.add(f"{name}-{kind}-{of}", "tensor_parallel", model, grid_inputs() if size == 64 else inputs, config=config)
    return jobs, launch(jobs, folder / "out")


@pytest.fixture(scope="module")
def llava_base(_untrained):
    return _untrained[0]


def test_parallel(parallel):
    jobs, results = parallel
    bad = 0
    for name in jobs:
        for rank, result in enumerate(results[:1]):
            got, want = result[name], jobs.expected[name]
            if "error" in got:
                print(name, rank, got["error"][-700:]); bad += 1
                continue
            print(name, rank, (got["logits"] - want["logits"]).abs().max().item(), want["logits"].abs().max().item(), [torch.equal(a, b) for a, b in zip(got["tokens"], want["tokens"])], len(got["local"]))
    assert not bad


@pytest.fixture(scope="module")
def sharded(case, llava_base, tmp_path_factory):  # noqa: F811
    jobs = Jobs(tmp_path_factory.mktemp("sharded"))
    inputs = padded(case, of_each_kind(case))
    route = CareForConditionalGeneration.from_base(llava_base, SafetySubspaces(by_modality(), "route"))
    jobs.add("route", "fully_sharded", route, inputs, save="route")
    jobs.add("gated", "fully_sharded", case.model, inputs, GREEDY, save="gated")
    jobs.add("half", "fully_sharded", case.model, inputs, GREEDY, save="half", half=True)
    jobs.add("loaded", "by_transformers", case.model, inputs, GREEDY, save="loaded", config={"fsdp_size": 2})
    jobs.add("first", "first_generation", case.model, inputs, GREEDY, mixed={})
    jobs.add("first-half", "first_generation", case.model, inputs, GREEDY, mixed={"param_dtype": torch.bfloat16, "buffer_dtype": torch.bfloat16})
    return jobs, launch(jobs, jobs.folder / "out")


def test_sharded(sharded):
    jobs, results = sharded
    for name in jobs:
        got, want = results[0][name], jobs.expected[name]
        if "error" in got:
            print(name, got["error"][-1500:])
            continue
        print(name, (got["logits"] - want["logits"]).abs().max().item(), want["logits"].abs().max().item(), [torch.equal(a, b) for a, b in zip(got["tokens"], want["tokens"])], len(got["local"]), {b.dtype for b in got["buffers"].values()}, got.get("sites"), got.get("loss"))
