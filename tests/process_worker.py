"""What test_processes.py runs in every process: ``process_worker.py JOBS FOLDER``.

JOBS is a JSON file of a list of fits; what became of each goes to FOLDER, in one file for each process.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed

import care_hf
from care_hf import processes, resume
from care_hf.fitting import collect, collect_turns
from care_hf.recipe import Recipe
from care_hf.turn_repair import solve_turns

KEEP = {"paper": {"rank": 4, "batch_size": 4}, "gated": {"steps": 4, "batch_size": 4}}


def prompts(name, first=None):
    """Prompts to fit the recipe of this name on; of every class only the first."""
    from care_hf.testbed import World
    from care_hf.testbed.prompts import fit_prompts

    world = World()
    if name == "paper":
        many = {name: items[:37] for name, items in fit_prompts(world, 8, ["typographic"], exposure=False).items()}
    else:
        many = fit_prompts(world, 20)
        many = {name: items if name == "malicious" else items[:: len(items) // 24] for name, items in many.items()}
    return {name: items[:first] for name, items in many.items()}


def solve(model, processor, job, rank=0):
    """The subspaces of a job, as `care_hf.fit` solves them."""
    name = job["recipe"]
    recipe = Recipe.load(name).replace(**KEEP[name])
    given = prompts(name, job.get("first"))
    if job.get("others") == rank:
        given = {**given, "benign": given["benign"][:-1]}
    files = {of: job.get(of) for of in ("resume", "update")}
    if job.get("update"):
        old = prompts(name, job["after"])
        given = {name: items[len(old[name]) :] for name, items in given.items()}
    if name == "paper":
        return collect(model, processor=processor, recipe=recipe, **files, **given).solve(recipe)
    return solve_turns(collect_turns(model, processor=processor, recipe=recipe, **files, **given), recipe)


def rows_of(given):
    """How many prompts a forward is of, by its arguments."""
    ids = given.get("input_ids")
    return len(given["inputs_embeds"] if ids is None else ids)


def load(job):
    """A model on which batches of other sizes make no difference that would be seen."""
    model, processor = care_hf.load_testbed()
    return (model.double() if job.get("double") else model), processor


def run(job, rank, folder):
    """Solve, while at some forward of some process happens what the job says; what became of it."""
    model, processor = load(job)
    forwards = []

    def forward(module, args, given):
        forwards.append(rows_of(given))
        time.sleep(job.get("delays", [0, 0, 0])[rank])
        if job.get("at") == [rank, len(forwards)]:
            if job["then"] == "raise":
                raise ValueError("this prompt is broken")
            (folder / "here.partial").write_text(str(os.getpid()))
            os.replace(folder / "here.partial", folder / "here")
            time.sleep(300)

    handle = model.model.register_forward_pre_hook(forward, with_kwargs=True)
    began = time.monotonic()
    try:
        subspaces = solve(model, processor, job, rank)
        if rank == 0:
            subspaces.save(folder / f"{job['name']}.safetensors")
        return {"digest": subspaces.digest, "rows": sum(forwards)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    finally:
        handle.remove()


def main(jobs, folder):
    """Run the jobs one after the other, or, if it is to be so, one as the console does."""
    torch.set_num_threads(1)
    folder, jobs, results = Path(folder), json.loads(Path(jobs).read_text()), {}
    resume.SAVE_SECONDS = 0
    processes.SILENT = jobs[0].get("silent", processes.SILENT)
    rank = int(os.environ["RANK"])
    if jobs[0].get("as_console"):
        with processes.launched(cpu=True):
            results = {job["name"]: run(job, rank, folder) for job in jobs}
    else:
        distributed.init_process_group("gloo")
        for job in jobs:
            results[job["name"]] = run(job, rank, folder)
            (folder / f"{rank}.json").write_text(json.dumps(results))
        if not any("error" in result for result in results.values()):
            distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
