"""Who writes a checkpoint, and its way to the Hub after it was written."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

TAKEN = ("repo_id", "commit_message", "create_pr")  # by transformers from what it passes on to create the repo


def writes_alone(given: dict[str, Any]) -> bool:
    """Whether this process writes the whole checkpoint, given the arguments of `save_pretrained`."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    return first and given.get("is_main_process", True) and not given.get("distributed_checkpoint", False)


def taken_for_hub(given: dict[str, Any]) -> dict[str, Any] | None:
    """Take out of the arguments of `save_pretrained` those that tell how to push; None if nothing is to be pushed."""
    if not given.pop("push_to_hub", False):
        return None
    known = ("save_directory", "is_main_process", "state_dict", "max_shard_size", "variant")
    known += ("save_peft_format", "save_original_format", "distributed_checkpoint")
    return {name: given.pop(name) for name in [*given] if name not in known}


def push(model: PreTrainedModel, folder: str | os.PathLike, written: Sequence[str], **options: Any) -> None:
    """Upload the files `written` in `folder`, with a model card if it has none, as `save_pretrained` of transformers.

    Args:
        model: whose tags the card has.
        folder: where it was saved.
        written: names in it; others are not uploaded.
        options: "repo_id", by default the name of the folder, "token", "commit_message", "create_pr", and others that
            `huggingface_hub.create_repo` takes.
    """
    folder, token = Path(folder), options.get("token")
    taken = {name: options.pop(name, None) for name in TAKEN}
    create = importlib.import_module("huggingface_hub").create_repo
    repo = create(taken["repo_id"] or folder.resolve().name, exist_ok=True, **options).repo_id
    if not (folder / "README.md").exists():
        create_and_tag_model_card(repo, model.model_tags, token=token).save(folder / "README.md")
    others = {name: float("inf") for name in os.listdir(folder) if name not in {*written, "README.md"}}
    model._upload_modified_files(
        folder,
        repo,
        others,
        commit_message=taken["commit_message"],
        token=token,
        create_pr=bool(taken["create_pr"]),
    )
