"""`care evaluate` and `care diagnose`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, OptionalModel, Out, Quiet
from .voice import Voice


def evaluate(
    out: Out,
    model: OptionalModel = "",
    comparison: Annotated[
        Path | None,
        typer.Option(help="Which defences, and how much is measured (YAML); without, a repaired MODEL as it is."),
    ] = None,
    suite: Annotated[
        list[str],
        typer.Option(help="Data sets that are asked: names of configs/datasets, or files; testbed for copies of that."),
    ] = (),
    prompts: Annotated[Path | None, typer.Option(help="What defences are trained on (YAML).")] = None,
    judge: Annotated[list[Path], typer.Option(help="Further judges: files of configs/judges.")] = (),
    seed: Annotated[int, typer.Option(min=0, help="Of attacks and training; of the testbed, which checkpoint.")] = 0,
    split: Annotated[str, typer.Option(help="The testbed's validation, to choose by, or test, to report.")] = "test",
    quick: Annotated[bool, typer.Option(help="A small share of the budget, to see that everything runs.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a repaired model, or train the defences of a comparison and measure them side by side."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import evaluate_job as job

        where = {"device": device, "dtype": dtype}
        plan = job.prepare(model, list(suite), comparison, prompts, list(judge), seed, split, quick, **where)
        voice.say(f"Measures {plan.summary}.")
        report = plan.run(out)
        voice.facts(job.summary(report))
        voice.say(f"Written to {out} in {voice.elapsed}: report.md, report.json, answers.json")
        voice.result({"out": str(out), "report": str(out / "report.json")})


def diagnose(
    out: Out,
    model: OptionalModel = "",
    suite: Annotated[
        list[str], typer.Option(help="Harmful and benign data sets: names of configs/datasets, or files.")
    ] = (),
    split: Annotated[str, typer.Option(help="Of the testbed: validation, or test.")] = "validation",
    n: Annotated[int, typer.Option(min=1, help="At most so many prompts of every set.")] = 16,
    layer: Annotated[list[int], typer.Option(help="Decoder layers to look at, from 0; all unless named.")] = (),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn; of the testbed, which checkpoint.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find which layers, components, neurons and tokens carry what a model does with harmful requests."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import diagnose_job as job

        where = {"device": device, "dtype": dtype}
        plan = job.prepare(model, list(suite), split, n, list(layer), max_new_tokens, batch_size, seed, **where)
        voice.say(f"Diagnoses on {plan.summary}.")
        found = plan.run(out)
        for name, reason in found.left_out.items():
            voice.say(f"No {name}: {reason}")
        voice.say(f"Written to {out} in {voice.elapsed}: diagnosis.md, diagnosis.json, diagnosis.safetensors, figures")
        voice.next_steps({f"care fit ... --recipe RECIPE.yaml --diagnosis {out}": "fit where it says (sites: auto)"})
        voice.result({"out": str(out), "left_out": dict(found.left_out)})
