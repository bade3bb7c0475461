"""What test_distributed.py runs in every process: ``distributed_worker.py JOBS FOLDER``.

JOBS is a file of dicts; each one's "kind" names a function here, whose result goes to FOLDER, one file for each rank.
"""

import sys
import traceback
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModel
from transformers.distributed import DistributedConfig

import care_hf  # noqa: F401  the Auto classes then know it


def answers(model, job):
    """Logits of one forward, and what every way of decoding generates."""
    with torch.no_grad():
        result = {"logits": model(**job["inputs"]).logits}
    result["tokens"] = [model.generate(**job["inputs"], **job["options"], **more) for more in job["decoding"]]
    return result


def whole(tensor):
    """The tensor of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def described(model):
    """Names and local shapes of what is sharded, and the repair's buffers."""
    local = {n: p.to_local().shape for n, p in model.named_parameters() if isinstance(p, DTensor)}
    full = {n: p.shape for n, p in model.named_parameters()}
    buffers = {n: b for n, b in model.named_buffers() if ".care." in n or ".care_gate." in n}
    return {"local": local, "full": full, "buffers": {n: b.detach().clone() for n, b in buffers.items()}}


def tensor_parallel(job, folder):
    """Loaded by transformers with the plan of the job."""
    model = AutoModel.from_pretrained(job["checkpoint"], distributed_config=DistributedConfig(**job["config"]))
    result = {**described(model), **answers(model, job)}
    if job.get("save"):
        model.save_pretrained(folder / job["save"])
    return result


def main(jobs, folder):
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    folder, results = Path(folder), {}
    for name, job in torch.load(jobs, weights_only=False).items():
        try:
            results[name] = globals()[job["kind"]](job, folder)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
