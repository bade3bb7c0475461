"""What test_distributed.py runs in every process: ``distributed_worker.py JOBS FOLDER``.

JOBS is a file of dicts; each one's "kind" names a function here, whose result, or traceback, goes to FOLDER, in one
file for each process. What a job asks to "save" goes there, too.
"""

import datetime
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


def tensor_parallel(job, folder):
    """Every layer shared out by transformers as it loads."""
    model = AutoModel.from_pretrained(job["checkpoint"], distributed_config=DistributedConfig(**job["config"]))
    result = {**described(model), **answers(model, job), **trained(model, job)}
    model.save_pretrained(folder / job["save"])
    return result


def fully_sharded(job, folder):
    """Every layer and the whole shared out by torch; answers before the model's own forward has run."""
    model = AutoModel.from_pretrained(job["checkpoint"])
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=job["half"])} if "half" in job else {}
    for layer in decoder_layers(model.vlm):
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    result = {**described(model), **unevenly_long(model, job), **answers(model, job), **trained(model, job)}
    save_whole(model, model, folder / job["save"])
    return result


def sharded_by_transformers(job, folder):
    """The same by transformers as it loads."""
    model = AutoModel.from_pretrained(job["checkpoint"], distributed_config=DistributedConfig(fsdp_size=2))
    result = {**described(model), **unevenly_long(model, job), **answers(model, job), **trained(model, job)}
    model.save_pretrained(folder / job["save"])
    return result


def wrapped(job, folder):
    """Every layer and the whole put into FullyShardedDataParallel."""
    model = AutoModel.from_pretrained(job["checkpoint"])
    classes = {type(layer) for layer in decoder_layers(model.vlm)}
    outer = FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        mixed_precision=MixedPrecision(**job["mixed"]),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    with torch.no_grad():
        result = {**described(model), "logits": outer(**job["inputs"]).logits, "tokens": []}
    loss = outer(**job["inputs"], labels=job["inputs"]["input_ids"]).loss
    loss.backward()
    result["loss"] = loss.detach()
    with FullyShardedDataParallel.summon_full_params(outer, with_grads=True):
        named = ((name.replace("_fsdp_wrapped_module.", ""), p.grad) for name, p in outer.named_parameters())
        result["gradients"] = {name: grad.clone() for name, grad in named if grad is not None}
    # On a processor torch offloads what it then frees.
    save_whole(outer, model, folder / job["save"], cpu_offload=False)
    return result


def answers(model, job):
    """Logits of one forward, and what every way of decoding generates."""
    tokens = [model.generate(**job["inputs"], **job["options"], **way) for way in job["decoding"]]
    with torch.no_grad():
        return {"logits": model(**job["inputs"]).logits, "tokens": tokens}


def unevenly_long(model, job):
    """How many tokens are generated where one process wants fewer than the other."""
    wanted = 2 + 3 * distributed.get_rank()
    ids = model.generate(**job["inputs"], max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False)
    return {"uneven": ids.shape[1] - job["inputs"]["input_ids"].shape[1]}


def trained(model, job):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**job["inputs"], labels=job["inputs"]["input_ids"]).loss
    loss.backward()
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), "gradients": gradients}


def described(model):
    """What this process holds of every weight, the repair's buffers, and the classes of repaired modules."""
    return {
        "held": {n: p.to_local().shape for n, p in model.named_parameters() if isinstance(p, DTensor)},
        "buffers": {
            n.replace("_fsdp_wrapped_module.", ""): b.clone()
            for n, b in model.named_buffers()
            if ".care." in n or ".care_gate." in n
        },
        "sites": {str(site): type(site_module(model.vlm, site)).__name__ for site in model.care_modules()},
    }


def whole(tensor):
    """The tensor of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_whole(outer, model, folder, cpu_offload=True):
    """As accelerate saves: the weights of all processes, by one of them."""
    state = get_model_state_dict(outer, options=StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload))
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)


def main(jobs, folder):
    """Run the jobs one after the other."""
    torch.set_num_threads(1)
    # A process that waits for the other in vain says so.
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    folder, results = Path(folder), {}
    for name, job in torch.load(jobs, weights_only=False).items():
        try:
            results[name] = globals()[job["kind"]](job, folder)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        distributed.barrier()
    torch.save(results, folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
