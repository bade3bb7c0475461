"""`care chat`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .options import Checkpoint, Device, Dtype, Json, Quiet, Seed
from .voice import Voice

HELP = "/image FILE puts an image beside the next prompt, /new begins a new conversation, /quit ends."


def chat(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Ask this, and end; without, a conversation.")] = None,
    image: Annotated[Path | None, typer.Option(help="Beside the prompt, or the first one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of every answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask base and repaired model side by side; how much the repair changed is told for every token.

    Without a terminal, prompts are the lines of the standard input. A strength is how far the repair moved an
    activation, relative to its length; the first is that of the prompt's last token, from which the answer begins.
    """
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf.chatting import converse
        from care_hf.opening import open_model

        opened = open_model(checkpoint, device, dtype, repaired=True)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        voice.facts({**opened.facts, "": HELP if prompt is None and sys.stdin.isatty() else None})
        history: list = []
        for text, picture in _asked(voice, prompt, image, history):
            exchange = converse(opened.model, opened.processor, text, picture, history, **options)
            history.append(exchange)
            _show(voice, exchange)
        voice.result({"exchanges": [exchange.to_dict() for exchange in history]})


def _asked(voice: Voice, prompt: str | None, image: Path | None, history: list):
    """Every prompt with the image beside it, until there are no more."""
    if prompt is not None:
        yield prompt, image
        return
    picture = image
    while (line := _line(voice)) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            history.clear()
        elif command == "/image":
            picture = Path(rest.strip())
            if not picture.is_file():
                voice.say(f"There is no image {picture}.")
                picture = None
        elif line.strip():
            yield line, picture
            picture = None


def _line(voice: Voice) -> str | None:
    if sys.stdin.isatty():
        try:
            return voice.console.input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _show(voice: Voice, exchange) -> None:
    """Both answers in columns, and below them the strength of every token."""
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    for name in ("base", "repaired"):
        table.add_column(name, ratio=1)
    table.add_row(Text(exchange.base.text.strip()), _coloured(exchange.repaired))
    voice.show(table)
    known = [
        (t, s) for t, s in zip(exchange.repaired.tokens, exchange.repaired.strengths, strict=True) if s is not None
    ]
    shown = " ".join(f"{token.strip() or '·'} {strength:.2f}" for token, strength in known if strength > 0)
    beyond = max(exchange.prompt_strengths[:-1], default=0.0)
    voice.facts(
        {
            "  gate": _decision(exchange.decision),
            "  strength": f"prompt's end {exchange.prompt_strength:.2f}; " + (shown or "nothing in the answer"),
            "  earlier": f"at most {beyond:.2f} at the {len(exchange.prompt_strengths) - 1} tokens before"
            if beyond
            else None,
        }
    )


def _decision(decision) -> str | None:
    if decision is None:
        return None
    margins = ", ".join(f"{margin:+.2f}" for margin in (*decision.required, *decision.alarms))
    return f"{'fires' if decision.fires else 'does not fire'}; above their thresholds its detectors are by {margins}"


def _coloured(answer) -> Text:
    """The answer, its tokens the redder the more the repair moved them."""
    text = Text()
    for token, strength in zip(answer.tokens, answer.strengths, strict=True):
        red = round(255 * min(strength or 0.0, 1.0))
        text.append(token, style=f"on rgb({red},0,0)" if red > 12 else "")
    text.rstrip()
    return text
