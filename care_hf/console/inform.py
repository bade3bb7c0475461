"""`care info`."""

from typing import Annotated

import typer

from .options import Json, Quiet
from .voice import Voice

SUMMARY = ("Repair", "Gate", "Fitted on", "Size")  # what of it a fit ends with


def info(
    checkpoint: Annotated[str, typer.Argument(help="Folder, file or Hub id of a repaired model or of an adapter.")],
    revision: Annotated[str | None, typer.Option(help="On the Hub.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what a repair is: sites, ranks, eigenvalues, recipe, base, sizes; the base's weights are not read."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf.inspecting import inspect

        found = inspect(checkpoint, revision=revision)
        show_sections(voice, found.sections())
        voice.result(found.to_dict())


def show_sections(voice: Voice, sections: list, only: tuple[str, ...] = ()) -> None:
    """Headings, and labelled lines under them; `only` some of them, if named."""
    for heading, rows in sections:
        if not only or heading in only:
            voice.say(heading)
            voice.facts(dict(rows))
