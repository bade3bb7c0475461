"""`care demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .options import Json, Quiet
from .voice import Voice

NARROW = str.maketrans("", "", "()")  # leaves an interval without its brackets


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the repaired checkpoints and the table.")] = Path("care-demo"),
    seed: Annotated[int, typer.Option(min=0, max=1, help="Which bundled testbed checkpoint.")] = 0,
    files: Annotated[
        Path | None,
        typer.Option(help="Do nothing else than write the testbed's model and prompts here, to try commands on."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit, save, reload and measure a repair on the bundled testbed, beside its controls."""
    voice = Voice(as_json, quiet)
    with voice.command():
        if files is not None:
            return _write(voice, files, seed)
        from care_hf import demo as job

        counts = job.run(out, seed, voice.say)
        voice.show(_table({name: job.measurements(c) for name, c in counts.items()}))
        voice.say(f"Written to {out} in {voice.elapsed}: the four checkpoints, table.md, counts.json")
        voice.next_steps({f"care chat {out}/gated": "talk to it", f"care info {out}/gated": "see what the repair is"})
        voice.result({"out": str(out), "counts": counts})


def _write(voice: Voice, files: Path, seed: int) -> None:
    from care_hf.testbed.files import write_files

    counts = write_files(files, seed)
    voice.say(f"The testbed's model and prompts to fit on are in {files}.")
    voice.facts({f"{name}.jsonl": f"{n} prompts" for name, n in counts.items()})
    given = " ".join(f"--{name} {files}/{name}.jsonl" for name in counts)
    voice.next_steps({f"care fit {files}/model {given} --out repaired": "fit a repair"})
    voice.result({"files": str(files), "prompts": counts})


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
