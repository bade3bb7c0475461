"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

HELP = "How it speaks"
WHERE = "Where it runs"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for scripts.", rich_help_panel=HELP)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.", rich_help_panel=HELP)]
Seed = Annotated[int, typer.Option(min=0, help="Of whatever is drawn at random.")]
Device = Annotated[
    str, typer.Option(help="auto (accelerators as far as they go), cpu, cuda, cuda:1 ...", rich_help_panel=WHERE)
]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.", rich_help_panel=WHERE)
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        help="Prompts per forward, or auto: large, and halved where memory does not suffice.",
        rich_help_panel=WHERE,
    ),
]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
OptionalModel = Annotated[str, typer.Argument(help="Folder or Hub id of a model; without, the bundled testbed.")]
Checkpoint = Annotated[str, typer.Argument(help="Folder or Hub id of a repaired model.")]
Recipe = Annotated[
    str | None, typer.Option(help="Name or YAML file: gated unless given, paper, llava-1.5-7b ...; see configs/.")
]
Out = Annotated[Path, typer.Option(help="Folder to write to; an earlier, unfinished run there is taken up.")]


def batch_size(given: str) -> int | str:
    """A number, or "auto".

    Raises:
        ValueError: neither.
    """
    if given == "auto":
        return given
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--batch-size {given} must be 'auto' or a whole number of at least 1.")
    return int(given)
