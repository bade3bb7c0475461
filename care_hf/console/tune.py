"""`care tune`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Dtype, Json, OptionalModel, Out, Quiet, batch_size
from .voice import Voice


def tune(
    out: Out,
    model: OptionalModel = "",
    suite: Annotated[list[str], typer.Option(help="Data sets to choose by; never those that are reported.")] = (),
    prompts: Annotated[Path | None, typer.Option(help="What repairs are fitted on (YAML).")] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many recipes are tried.")] = 40,
    n: Annotated[int, typer.Option(min=1, help="Validation prompts of every set, at most.")] = 24,
    layer: Annotated[list[int], typer.Option(help="Decoder layers that may be repaired, from 0.")] = (),
    family: Annotated[list[str], typer.Option(help="turn (with a gate), modality (the printed method), or both.")] = (
        "turn",
        "modality",
    ),
    sampler: Annotated[str, typer.Option(help="tpe, or random.")] = "tpe",
    max_divergence: Annotated[
        float | None, typer.Option(help="Nats per token from the base on benign prompts that are allowed.")
    ] = None,
    max_over_refusal: Annotated[float | None, typer.Option(help="Share of benign prompts that may be refused.")] = None,
    min_refusal: Annotated[float | None, typer.Option(help="Share of attacks that must be refused.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer.")] = 32,
    batch: BatchSize = "16",
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler; of the testbed, which checkpoint.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search recipes for a model: few attacks that succeed, little change on benign prompts."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import tune_job as job

        limits = {"max_divergence": max_divergence, "max_over_refusal": max_over_refusal, "min_refusal": min_refusal}
        plan = job.prepare(
            model,
            list(suite),
            prompts,
            seed,
            n,
            trials,
            sampler,
            families=tuple(family),
            layers=list(layer),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size(batch),
            device=device,
            dtype=dtype,
            **{name: value for name, value in limits.items() if value is not None},
        )
        voice.say(f"Tries {plan.summary}.")
        found = plan.run(out)
        voice.say(f"Tried in {voice.elapsed}. {found.rule}")
        voice.facts(job.facts(found))
        voice.say(f"Written to {out}: recipe.yaml, repair.safetensors, tuning.md, tuning.json, pareto.png")
        voice.next_steps({f"care fit MODEL ... --recipe {out}/recipe.yaml --out repaired": "fit what was chosen"})
        voice.result({"out": str(out), **found.to_dict()})
