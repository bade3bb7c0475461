"""Fit, diagnose and evaluate on models that are offloaded or shared out by tensors, against the model in one piece."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.linalg
import torch
from accelerate import dispatch_model
from all_measures import all_of
from transformers import AutoModelForImageTextToText

from care_hf.testbed import load_testbed

LAYERS = "model.language_model.layers"
SPREAD = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "disk",
    **{f"{LAYERS}.{i}": "cpu" if i in (1, 4) else "disk" for i in range(6)},
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The testbed in double precision, in which parts summed in another order make no difference that would be seen."""
    model, processor = load_testbed()
    folder = tmp_path_factory.mktemp("model")
    model.double().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    return all_of(model, load_testbed()[1])


def close(found, expected, tolerance=1e-6):
    """Numbers are equal up to rounding, all else is equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close(found[name], value, tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert found == expected


def assert_same(found, plain):
    for name, expected in plain["fits"].items():
        tensors, others = found["fits"][name]["tensors"], expected["tensors"]
        assert tensors.keys() == others.keys() and found["fits"][name]["told"] == expected["told"]
        for key, tensor in others.items():
            if key.endswith("basis"):
                bases = (one.double().numpy() for one in (tensors[key], tensor))
                assert scipy.linalg.subspace_angles(*bases).max() < 1e-6, (name, key)
            else:
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-5, atol=1e-5)
    assert not found["diagnosis"]["left out"] and not plain["diagnosis"]["left out"]
    for part in ("trace", "mediation", "neurons"):
        close(found["diagnosis"][part].to_dict(), plain["diagnosis"][part].to_dict(), 1e-4)
    estimates = (diagnosis["neurons"].estimates for diagnosis in (found["diagnosis"], plain["diagnosis"]))
    torch.testing.assert_close(*estimates, rtol=1e-4, atol=1e-6)
    close(found["evaluation"], plain["evaluation"])


@pytest.mark.parametrize("by", ["accelerate", "transformers"])
def test_an_offloaded_model_is_fitted_diagnosed_and_evaluated_like_a_whole_one(folder, plain, tmp_path, by):
    load = AutoModelForImageTextToText.from_pretrained
    if by == "accelerate":
        model = load(folder, dtype=torch.float64).eval()
        model = dispatch_model(copy.deepcopy(model), SPREAD, main_device="cpu", offload_dir=str(tmp_path))
    else:
        model = load(folder, dtype=torch.float64, device_map=SPREAD, offload_folder=str(tmp_path)).eval()
    away = {name for name, weight in model.named_parameters() if weight.is_meta}
    assert model.device.type == "meta" and len(away) > 40
    assert_same(all_of(model, load_testbed()[1]), plain)
    assert {name for name, weight in model.named_parameters() if weight.is_meta} == away


def test_a_model_shared_out_by_tensors_is_fitted_diagnosed_and_evaluated_like_a_whole_one(folder, plain, tmp_path):
    here = Path(__file__).parent
    paths = os.pathsep.join(filter(None, [str(here.parent), str(here), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [here / "all_measures.py", folder, tmp_path]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for found in results:
        assert found["held"][f"{LAYERS}.1.mlp.down_proj.weight"] == 0.5
        assert_same(found, plain)
    # All ran all prompts, and one kept what all had.
    assert sorted(path.name for path in tmp_path.glob("*.kept")) == ["gated.kept", "paper.kept"]
    for name in ("gated", "paper"):
        first, second = (found["fits"][name]["tensors"] for found in results)
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        told = json.loads(plain["fits"][name]["told"]["prompts"])
        assert told["benign"] > 0
