"""A repaired model on its way to the Hub: nobody's README is lost, and no weights of an earlier push stay behind."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from .model_card import README, add_card, written_here

__all__ = ["add_card", "push", "push_saved"]
logger = logging.get_logger(__name__)

# A model that is saved in one file is loaded from there even if shards, pushed later, lie beside it.
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
OF_A_PUSH = ("token", "private", "revision", "create_pr", "commit_message", "commit_description")


def push(
    model,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
):
    """Save `model` for a moment and upload all of it in one commit; arguments as transformers' `push_to_hub` takes.

    Returns:
        The commit's `huggingface_hub.CommitInfo`.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision and not revision.startswith("refs/pr"):
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as around:
        folder = Path(around) / "model"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        add_card(model, folder, [tags] if isinstance(tags, str) else tags or (), repo_id, hub)
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[README] if _is_kept(hub, repo_id, revision) or _is_refused(folder / README) else None,
            delete_patterns=WEIGHTS,
        )


def push_saved(model, folder: str | Path, repo_id: str | None = None, **options):
    """What `save_pretrained(folder, push_to_hub=True)` adds to saving; the model goes up, not all of the folder."""
    known = {name: options[name] for name in (*OF_A_PUSH, "max_shard_size") if name in options}
    return push(model, repo_id or Path(folder).resolve().name, **known)


def _is_refused(readme: Path) -> bool:
    """Whether the Hub does not take a card, with which it would refuse the whole commit."""
    try:
        ModelCard.load(readme).validate()
        return False
    except Exception as error:
        logger.warning(f"The model is pushed, but without a new model card: {type(error).__name__}: {error}")
        return True


def _is_kept(hub: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repo has a README.md that is not a card of ours."""
    with TemporaryDirectory() as folder:
        try:
            path = hub.hf_hub_download(repo_id, README, revision=revision, local_dir=folder)
        except LocalEntryNotFoundError:  # an EntryNotFoundError by its class, a failed connection by its cause
            raise
        except EntryNotFoundError:
            return False
        if written_here(Path(path).read_bytes()):
            return False
    logger.info(f"{README} of {repo_id} is not a card of care_hf, or was edited; it is kept.")
    return True
