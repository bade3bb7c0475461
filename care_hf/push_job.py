"""What `care push` does: a repaired checkpoint, or an adapter, from a folder to the Hub."""

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import ADAPTER_FILE, push_adapter
from .model_card import Card
from .opening import open_model


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: the address of the commit, and whether it is a whole checkpoint or an adapter."""

    url: str
    whole: bool


def push(source: str, repo: str, card: Card, **options) -> Pushed:
    """Upload what `care fit` wrote; it is loaded before, so that nothing broken goes out.

    Args:
        source: folder of a repaired checkpoint or of an adapter.
        repo: on the Hub.
        card: what the model card should tell; of an adapter there is none.
        options: private, revision, commit_message, as `push_to_hub` takes them.

    Raises:
        ValueError, OSError: the checkpoint is not whole, there is none, or the Hub does not take it.
    """
    if (Path(source) / ADAPTER_FILE).is_file() and not (Path(source) / "config.json").is_file():
        return Pushed(str(push_adapter(Path(source) / ADAPTER_FILE, repo, **options)), False)
    opened = open_model(source, "cpu", "auto", repaired=True)
    opened.model.processor, opened.model.card = opened.processor, card
    return Pushed(opened.model.push_to_hub(repo, **options).commit_url, True)
