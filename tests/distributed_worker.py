"""What test_distributed.py runs in every process: ``distributed_worker.py JOBS FOLDER``.

JOBS is a file of dicts; each one's "kind" names a function here, whose result goes to FOLDER, one file for each rank.
"""

import functools
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import AutoModel
from transformers.distributed import DistributedConfig

from care_hf.sites import decoder_layers, site_module


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


def fully_sharded(job, folder):
    """Sharded by torch: every decoder layer, then the model."""
    model = AutoModel.from_pretrained(job["checkpoint"])
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if job.get("half") else {}
    for layer in decoder_layers(model.vlm):
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    result = {"sites": {str(site): type(site_module(model.vlm, site)).__name__ for site in model.care_modules()}}
    result.update(described(model), **answers(model, job))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder / job["save"], state_dict=state)
    return {**result, **step(model, job)}


def by_transformers(job, folder):
    """Sharded by transformers as it loads."""
    model = AutoModel.from_pretrained(job["checkpoint"], distributed_config=DistributedConfig(**job["config"]))
    result = {**described(model), **answers(model, job)}
    model.save_pretrained(folder / job["save"])
    return {**result, **step(model, job)}


def first_generation(job, folder):
    """Wrapped by FullyShardedDataParallel."""
    model = AutoModel.from_pretrained(job["checkpoint"])
    mixed = MixedPrecision(**job["mixed"])
    classes = {type(layer) for layer in decoder_layers(model.vlm)}
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        mixed_precision=mixed,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    with torch.no_grad():
        logits = wrapped(**job["inputs"]).logits
    return {**described(wrapped), "logits": logits, "tokens": []}


def step(model, job):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**job["inputs"], labels=job["inputs"]["input_ids"]).loss
    loss.backward()
    gradients = {n: whole(p.grad).float().norm() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


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
