"""The console; the only module that prints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Diagnose and repair unsafe channels in vision-language models.", no_args_is_help=True)
console = Console()


@app.callback()
def care() -> None:
    """Diagnose and repair unsafe channels in vision-language models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the repaired checkpoints and the table.")] = Path("care-demo"),
    seed: Annotated[int, typer.Option(help="Which bundled testbed checkpoint, 0 or 1.")] = 0,
) -> None:
    """Fit, save, reload and measure a repair on the bundled testbed, beside its controls."""
    # Imported here so that --help answers before torch is loaded.
    from transformers.utils import logging

    from . import demo as job

    logging.set_verbosity_error()
    counts = job.run(out, seed, lambda line: console.print(line, highlight=False))
    tables = {name: job.measurements(c) for name, c in counts.items()}
    table = Table(
        title="Share [95 % Wilson interval], greedy decoding, strict judging, test split", title_justify="left"
    )
    table.add_column("measured")
    table.add_column("n", justify="right")
    for name in tables:
        table.add_column(name, justify="right")
    for row, rate in tables["undefended"].items():
        table.add_row(row, str(rate.n), *(str(t[row]) for t in tables.values()))
    console.print(table)
    console.print(f"Written to {out}: the checkpoints paper and best, table.md, counts.json", highlight=False)
