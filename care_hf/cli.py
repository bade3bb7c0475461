"""The console; the only module that prints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Diagnose and repair unsafe channels in vision-language models.", no_args_is_help=True)
console = Console()
NARROW = str.maketrans("", "", "()")  # leaves an interval without its brackets


@app.callback()
def care() -> None:
    """Diagnose and repair unsafe channels in vision-language models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the repaired checkpoints and the table.")] = Path("care-demo"),
    seed: Annotated[int, typer.Option(min=0, max=1, help="Which bundled testbed checkpoint.")] = 0,
) -> None:
    """Fit, save, reload and measure a repair on the bundled testbed, beside its controls."""
    # Imported here: --help needs none of it.
    from transformers.utils import logging

    from . import demo as job

    logging.set_verbosity_error()
    counts = job.run(out, seed, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(_table({name: job.measurements(c) for name, c in counts.items()}))
    console.print(f"Written to {out}: the four checkpoints, table.md, counts.json", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    comparison: Annotated[Path, typer.Option(help="Which defences, and how much is measured (YAML).")],
    out: Annotated[Path, typer.Option(help="Folder for the report; a run that finds it unfinished goes on.")],
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model; without, the bundled testbed.")] = "",
    suite: Annotated[
        list[str], typer.Option(help="Data sets that are asked: names of configs/datasets, or files.")
    ] = (),
    prompts: Annotated[Path | None, typer.Option(help="What defences are trained on (YAML).")] = None,
    judge: Annotated[list[Path], typer.Option(help="Further judges: files of configs/judges.")] = (),
    seed: Annotated[int, typer.Option(min=0, help="Of attacks and training; of the testbed, which checkpoint.")] = 0,
    split: Annotated[str, typer.Option(help="The testbed's validation, to choose by, or test, to report.")] = "test",
    quick: Annotated[bool, typer.Option(help="A small share of the budget, to see that everything runs.")] = False,
) -> None:
    """Train the defences of a comparison, and measure them side by side."""
    from transformers.utils import logging

    from . import evaluate_job as job

    logging.set_verbosity_error()
    try:
        plan = job.prepare(comparison, model, list(suite), prompts, list(judge), seed, split, quick)
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    console.print(plan.summary, highlight=False, soft_wrap=True)
    plan.run(out)
    console.print(f"Written to {out}: report.md, report.json, answers.json", highlight=False, soft_wrap=True)


@app.command()
def diagnose(
    out: Annotated[Path, typer.Option(help="Folder for the diagnosis; a run that finds it unfinished goes on.")],
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model; without, the bundled testbed.")] = "",
    suite: Annotated[
        list[str], typer.Option(help="Harmful and benign data sets: names of configs/datasets, or files.")
    ] = (),
    split: Annotated[str, typer.Option(help="Of the testbed: validation, or test.")] = "validation",
    n: Annotated[int, typer.Option(min=1, help="At most so many prompts of every set.")] = 16,
    layer: Annotated[list[int], typer.Option(help="Decoder layers to look at, from 0; all unless named.")] = (),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn; of the testbed, which checkpoint.")] = 0,
) -> None:
    """Find which layers, components, neurons and tokens carry what a model does with harmful requests."""
    from transformers.utils import logging

    from . import diagnose_job as job

    logging.set_verbosity_error()
    try:
        plan = job.prepare(model, list(suite), split, n, list(layer), max_new_tokens, batch_size, seed)
        console.print(plan.summary, highlight=False, soft_wrap=True)
        # A model that refuses all or nothing is found out when it has answered.
        found = plan.run(out)
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    for name, reason in found.left_out.items():
        console.print(f"No {name}: {reason}", highlight=False, soft_wrap=True)
    written = "diagnosis.md, diagnosis.json, diagnosis.safetensors, figures"
    console.print(f"Written to {out}: {written}", highlight=False, soft_wrap=True)


def _table(columns: dict) -> Table:
    """One line per measurement and one column per defence, within 80 characters."""
    title = "Percent and 95 % Wilson interval (rounded outwards); greedy decoding, strict judging, test split"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("measured", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", max_width=10)
    for row, rate in next(iter(columns.values())).items():
        table.add_row(row, str(rate.n), *(column[row].percent.translate(NARROW) for column in columns.values()))
    return table
