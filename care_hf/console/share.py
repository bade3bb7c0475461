"""`care merge`, `care push` and `care convert`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Checkpoint, Json, Quiet
from .voice import Voice


def merge(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    base: Annotated[str | None, typer.Option(help="The base's own checkpoint, if it is not where it was.")] = None,
    compare: Annotated[str, typer.Option(help="logits, or tensors alone, which runs no model.")] = "logits",
    only_transformers: Annotated[
        bool, typer.Option("--only-transformers", help="Also where other engines would drop what is added, unseen.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold an ungated repair into the weights: an ordinary checkpoint that any engine loads."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import merge as fold
        from care_hf.inspection_text import told_bytes
        from care_hf.opening import check_source

        check_source(checkpoint)
        voice.say(f"Merges {checkpoint}.")
        merged = fold(checkpoint, out, base=base, compare=compare, only_transformers=only_transformers)
        voice.say(f"Merged in {voice.elapsed}: {out} is a checkpoint of the base's class.")
        difference = None if merged.difference is None else f"{merged.difference:.2g} of the logits' spread"
        changed = f"{len(merged.changed)} tensors changed, {len(merged.added)} added"
        voice.facts({"weights": changed, "difference": difference, "size": told_bytes(_bytes(out))})
        voice.result(
            {"out": str(out), "changed": merged.changed, "added": merged.added, "difference": merged.difference}
        )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def push(
    checkpoint: Checkpoint,
    repo: Annotated[str, typer.Argument(help="On the Hub: owner/name. Log in with `hf auth login`.")],
    report: Annotated[Path | None, typer.Option(help="For the card: what `care evaluate` wrote.")] = None,
    diagnosis: Annotated[Path | None, typer.Option(help="For the card: what `care diagnose` wrote.")] = None,
    base_model: Annotated[str, typer.Option(help="For the card: the base's Hub id, if it was a folder.")] = "",
    license_id: Annotated[str, typer.Option("--license", help="For the card, if it is not the base's.")] = "",
    private: Annotated[bool, typer.Option("--private", help="A repo that is made is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a repaired model",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Share a repaired model with its card, or an adapter, on the Hub."""
    voice = Voice(as_json, quiet)
    with voice.command():
        from care_hf import Card
        from care_hf.push_job import push as upload

        card = Card(report=report, diagnosis=diagnosis, base_model=base_model, license=license_id)
        voice.say(f"Pushes {checkpoint} to {repo}.")
        pushed = upload(checkpoint, repo, card, private=private or None, revision=revision, commit_message=message)
        voice.say(f"Pushed in {voice.elapsed}: {pushed.url}")
        load = "AutoModelForImageTextToText.from_pretrained" if pushed.whole else "care_hf.load_adapter"
        before = "" if pushed.whole else "BASE, "
        voice.next_steps({f'{load}({before}"{repo}")': "load it, after `import care_hf`"})
        voice.result({"repo": repo, "url": pushed.url, "whole": pushed.whole})


FORMATS = "original-llava, astra-vectors, control-vectors, bases, full-and-adapter"


def convert(
    context: typer.Context,
    form: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{FORMATS}.")],
) -> None:
    """Read and write foreign formats; `care convert FORMAT --help` explains each."""
    voice = Voice()
    with voice.command():
        from care_hf.convert_job import convert as job

        voice.say(job(form, context.args))


# What follows the format is for the converter, `--help` too.
convert.settings = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "options_metavar": "",
}
