"""`care fit`."""

from pathlib import Path
from typing import Annotated

import typer

from .inform import SUMMARY, show_sections
from .options import BatchSize, Device, Dtype, Json, Model, Out, Quiet, Recipe, batch_size
from .voice import Voice

DATA = "Prompts: files, folders, Hub ids, benchmark sets"


def fit(
    model: Model,
    out: Out,
    benign: Annotated[str | None, typer.Option(metavar="DATA", help="To grant.", rich_help_panel=DATA)] = None,
    malicious: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="To refuse; some must be plain requests.", rich_help_panel=DATA),
    ] = None,
    exposed: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Harmless questions about harmful things.", rich_help_panel=DATA),
    ] = None,
    neutral: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="The same about harmless things; both or neither.", rich_help_panel=DATA),
    ] = None,
    refused: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Malicious ones that the model refuses for sure.", rich_help_panel=DATA),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts of each kind.", rich_help_panel=DATA)
    ] = None,
    recipe: Recipe = None,
    diagnosis: Annotated[Path | None, typer.Option(help="Folder of one, for recipes with sites: auto.")] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Add prompts to the fit in --out, as if it had had them from the beginning."),
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the repair alone, a file of some MB.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    batch: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Repair a model so that it refuses in every modality what it refuses in plain text."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import fit_job as job
        from care_hf.inspecting import inspect
        from care_hf.processes import launched

        changes = {"seed": seed, "batch_size": batch_size(batch) if batch else None}
        prompts = {
            "benign": benign, "malicious": malicious, "exposed": exposed, "neutral": neutral, "refused": refused,
        }  # fmt: skip
        voice.say(f"{'Updates' if update else 'Fits'} a repair of {model}.")
        with launched(cpu=device == "cpu"):
            plan = job.prepare(
                model,
                prompts,
                recipe,
                out,
                limit=limit,
                diagnosis=diagnosis,
                changes={name: value for name, value in changes.items() if value is not None},
                update=update,
                adapter=adapter,
                device=device,
                dtype=dtype,
            )
            voice.facts(plan.facts)
            repaired = plan.fit()
        if not voice.speaks:
            return
        plan.save(repaired)
        found = inspect(out)
        voice.say(f"Fitted in {voice.elapsed}, saved in {out}.")
        show_sections(voice, found.sections(), SUMMARY)
        voice.next_steps(_next(str(out), adapter))
        voice.result({"out": str(out), "seconds": round(voice.seconds), **found.to_dict()})


def _next(out: str, adapter: bool) -> dict[str, str]:
    if adapter:
        return {f"care info {out}": "see what the repair is", f"care push {out} org/name": "share it"}
    return {
        f"care chat {out}": "talk to both models, side by side",
        f"care evaluate {out} --suite xstest --suite figstep --out results": "measure it, before you believe it",
        f"care push {out} org/name": "share it",
    }
