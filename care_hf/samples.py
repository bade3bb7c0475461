"""Prompts and images in, padded batches and modality masks out."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .processor_quirks import IGNORED, apply_evenly, check_images, mark_answers, prompt_with_what_is_needed

TEXT_COLUMNS = ("text", "prompt", "question", "query")
ACCEPTED = (
    "a datasets.Dataset, a list of chat conversations in transformers' multimodal format, or a list of dicts with "
    "'text' and perhaps 'image' (PIL image, path or array)"
)


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt as a chat conversation in transformers' multimodal format, images as PIL images inside it.

    Attributes:
        messages: the conversation.
        kind: what kind of prompt it is, for example "captioning"; prompts of one kind are compared with one another.
        groups: what it shares with others, for example its topic and its template; prompts that share a group are held
            out together.
    """

    messages: list[dict[str, Any]]
    kind: str = ""
    groups: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The images of the prompt, in order."""
        return [part["image"] for message in self.messages for part in message["content"] if part["type"] == "image"]

    @property
    def digest(self) -> str:
        """A hash of the roles, texts and pixels: equal prompts have equal digests."""
        texts = [[m["role"], *(p["text"] for p in m["content"] if p["type"] == "text")] for m in self.messages]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for image in self.images:
            digest.update(repr(image.size).encode() + image.tobytes())
        return digest.hexdigest()


class Samples(Sequence[Sample]):
    """Prompts that are read whenever they are asked for, so that the images of a data set are never all in memory.

    Attributes:
        digests: the `Sample.digest` of every prompt.
        pictured: the indices of the prompts that have an image.
        kinds, groups: of every prompt, see `Sample`.
    """

    def __init__(self, data: Iterable[Any], name: str):
        indexable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        self._data, self._name = data if indexable else list(data), name
        self.digests: list[str] = []
        self.pictured: list[int] = []
        self.kinds: list[str] = []
        self.groups: list[tuple[str, ...]] = []
        for index, sample in enumerate(logging.tqdm(self, desc=f"Reading {name}", unit="prompt", leave=False)):
            self.digests.append(sample.digest)
            self.pictured += [index] if sample.images else []
            self.kinds.append(sample.kind)
            self.groups.append(sample.groups)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self._data[index]
        try:
            return load_sample(item)
        except (TypeError, ValueError, OSError) as error:
            raise type(error)(f"`{self._name}`[{index}]: {error}") from error


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded model inputs, and which tokens are which.

    Attributes:
        inputs: what the model takes: `input_ids` (B, S), `attention_mask` (B, S), pixel values and whatever else.
        visual: bool (B, S), True at image and video tokens.
        text: bool (B, S), True at the other tokens of the prompt; never at padding, nor at control tokens.
    """

    inputs: dict[str, torch.Tensor]
    visual: torch.Tensor
    text: torch.Tensor


def load_image(image: Any) -> Image.Image:
    """Return an RGB PIL image from a PIL image, a path, or an array (H, W), (H, W, 3) of uint8 or of floats in [0, 1].

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: an array of another shape or range.
        TypeError: anything else.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise FileNotFoundError(
                f"Image {str(image)!r} does not exist; give a path relative to the working folder or absolute."
            )
        with Image.open(image) as opened:
            return opened.convert("RGB")
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):  # datasets.Image(decode=False)
        from io import BytesIO

        return Image.open(BytesIO(image["bytes"])).convert("RGB") if image.get("bytes") else load_image(image["path"])
    if isinstance(image, (np.ndarray, torch.Tensor, list)):
        return _image_from_array(np.asarray(image))
    raise TypeError(f"An image of type {type(image).__name__} cannot be read; give a PIL image, a path or an array.")


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"An image array of shape {array.shape} cannot be read; give (H, W) or (H, W, 3).")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > (1 if array.dtype.kind == "f" else 255):
            raise ValueError(
                f"A {array.dtype} image array must lie in [0, 1] if it is of floats, in [0, 255] if of integers."
            )
        array = (array * 255).round() if array.dtype.kind == "f" else array
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def load_samples(data: Iterable[Any], name: str = "samples") -> Samples:
    """Turn every accepted form of prompts into `Sample`s; a bad one is named now, before any work.

    Args:
        data: a `datasets.Dataset` with a column "messages", or with a column of text ("text", "prompt", "question" or
            "query") and perhaps "image" or "images"; a list of conversations (lists of messages); a list of dicts with
            the same keys. Columns or keys "kind" and "groups" label prompts, see `Sample`.
        name: what errors call this set.

    Raises:
        TypeError: `data` or one of its items is of another form.
        ValueError: the set is empty, or an item lacks its text.
        OSError: an image file cannot be read.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"`{name}` is a {type(data).__name__}; expected {ACCEPTED}.")
    samples = Samples(data, name)
    if not samples:
        raise ValueError(f"`{name}` is empty; it needs at least a few dozen prompts.")
    return samples


def load_sample(item: Any) -> Sample:
    """One prompt of any form that `load_samples` takes.

    Raises:
        TypeError: it is of another form.
        ValueError: it lacks its text, or an image.
        OSError: an image file cannot be read.
    """
    if isinstance(item, Sample):
        return item
    if not isinstance(item, Mapping) and hasattr(item, "messages"):  # a case of an evaluation, say
        return Sample([_load_message(message) for message in item.messages])
    if isinstance(item, Mapping):
        groups = item.get("groups") or ()
        groups = [groups] if isinstance(groups, str) else groups
        labels = {"kind": str(item.get("kind") or ""), "groups": tuple(map(str, groups))}
        if item.get("messages") is not None:
            return Sample([_load_message(message) for message in item["messages"]], **labels)
        if "role" in item:
            return Sample([_load_message(item)])
        column = next((column for column in TEXT_COLUMNS if isinstance(item.get(column), str)), None)
        if column is None:
            raise ValueError(
                f"has the keys {sorted(item)}; expected 'messages', or a text under one of {TEXT_COLUMNS}."
            )
        images = item.get("images") or ([] if item.get("image") is None else [item["image"]])
        content = [{"type": "image", "image": load_image(image)} for image in images]
        return Sample([{"role": "user", "content": [*content, {"type": "text", "text": item[column]}]}], **labels)
    if isinstance(item, Sequence) and not isinstance(item, str):
        return Sample([_load_message(message) for message in item])
    raise TypeError(f"is a {type(item).__name__}; expected {ACCEPTED}.")


def _load_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f"a chat message needs 'role' and 'content'; got {message!r:.80}.")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": message["role"], "content": [_load_part(part) for part in content]}


def _load_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "image":
        image = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        if image is None:
            raise ValueError("an image part needs its image under 'image' (PIL image, path or array), 'path' or 'url'.")
        if isinstance(image, str) and "://" in image:
            raise ValueError(
                f"the image {image!r} is an address; download it first, so that a rerun sees the same pixels."
            )
        return {"type": "image", "image": load_image(image)}
    raise ValueError(f"a content part of type {part.get('type')!r} is not supported; use 'text' and 'image'.")


def collate(processor, samples: Sequence[Sample], image_tokens: Sequence[int], padding_side: str = "left") -> Batch:
    """Tokenise and pad `samples` into one `Batch`, each row ending where the answer would begin.

    Args:
        processor: a transformers processor or, for a model of text alone, tokenizer, with a chat template.
        samples: the prompts; with and without images may be mixed.
        image_tokens: the ids of image and video placeholders (`sites.image_token_ids`).
        padding_side: "left" to generate (the last prompt token of every row is the last column), "right" to read
            activations.

    Raises:
        ValueError: the processor has no chat template.
    """
    inputs = chat(processor, [sample.messages for sample in samples], padding_side, add_generation_prompt=True)
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(list(image_tokens), dtype=ids.dtype))
    control = torch.tensor(sorted(_control_tokens(tokenizer_of(processor))), dtype=ids.dtype)
    text = inputs["attention_mask"].bool() & ~visual & ~torch.isin(ids, control)
    return Batch(inputs, visual, text)


def _control_tokens(tokenizer) -> set[int]:
    """Those that have a name or a list that says so, and those that were added as such: Llama 3's headers, say."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def tokenizer_of(processor):
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def chat(processor, conversations: Sequence[Sequence[dict]], padding_side: str, **options) -> dict[str, torch.Tensor]:
    """Conversations in transformers' multimodal format as padded model inputs; `options` go to the chat template.

    Raises:
        ValueError: the processor has no chat template, a prompt has an image and the processor is a tokenizer, or the
            family does not take so many images as the prompts have.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so prompts cannot be written as this model expects "
            "them; set `processor.chat_template`."
        )
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if isinstance(processor, PreTrainedTokenizerBase):
        options |= {"padding": True, "tokenizer_kwargs": {"padding_side": padding_side}}
        conversations = [[_as_plain_text(message) for message in messages] for messages in conversations]
    else:
        options["processor_kwargs"] = {"padding": True, "padding_side": padding_side}
        check_images(processor, conversations)
    inputs = apply_evenly(processor, conversations, lambda those: processor.apply_chat_template(list(those), **options))
    # PaliGemma's processor gives some whether asked or not.
    return {name: value for name, value in inputs.items() if name != "labels"}


def _as_plain_text(message: dict[str, Any]) -> dict[str, Any]:
    if any(part["type"] != "text" for part in message["content"]):
        raise ValueError(
            "A prompt has an image, and the processor is a tokenizer; give the processor of the vision-language model."
        )
    return {**message, "content": "".join(part["text"] for part in message["content"])}


def generation_prompt(processor) -> tuple[int, ...]:
    """The token ids with which the chat template ends a prompt, so that the answer begins.

    Raises:
        ValueError: there is no chat template, or it adds nothing to a prompt.
    """
    messages = [prompt_with_what_is_needed(processor)]
    without, whole = (
        chat(processor, messages, "left", add_generation_prompt=add)["input_ids"][0].tolist() for add in (False, True)
    )
    if whole[: len(without)] != without or len(whole) == len(without):
        raise ValueError(
            f"The chat template of {type(processor).__name__} does not end a prompt by a generation prompt of its own, "
            "so the gate could not tell where prompts end; give it a template with `add_generation_prompt`."
        )
    return tuple(whole[len(without) :])


def answered(
    processor, samples: Sequence, answers: Sequence[str], end: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts with their answers, right-padded, and labels (B, S) that are `IGNORED` outside the answers.

    Args:
        processor: a transformers processor with a chat template.
        samples: anything with chat `messages`.
        answers: one per sample; tokenised apart from the prompt, so that both are what `generate` sees and gives.
        end: whether the end-of-sequence token follows each answer and is labelled, too.
    """
    tokenizer = tokenizer_of(processor)
    prompts = collate(processor, [Sample(s.messages) for s in samples], (), padding_side="right").inputs
    begins = prompts["attention_mask"].sum(dim=1).tolist()
    ends = [tokenizer.eos_token_id] if end else []
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] + ends for answer in answers]
    missing = max(b + len(t) for b, t in zip(begins, tokens, strict=True)) - prompts["input_ids"].shape[1]
    inputs = _longer(prompts, missing)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, (begin, answer) in enumerate(zip(begins, tokens, strict=True)):
        labels[row, begin : begin + len(answer)] = torch.tensor(answer, dtype=labels.dtype)
    # In `collate`'s padding lie pad tokens, in this function's zeros: both are masked.
    inputs["input_ids"] = torch.where(labels != IGNORED, labels, inputs["input_ids"])
    inputs["attention_mask"] = inputs["attention_mask"] | (labels != IGNORED)
    if (seen := inputs.get("cross_attention_mask")) is not None:
        # Answers see the images that the prompt's last token sees.
        lasts = seen[torch.arange(len(seen)), torch.tensor(begins) - 1]
        inputs["cross_attention_mask"] = torch.where((labels != IGNORED)[..., None, None], lasts[:, None], seen)
    mark_answers(processor, inputs, labels)
    return inputs, labels


def _longer(inputs: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The inputs with `count` further tokens, of which all that counts tokens, such as their types, says 0."""
    shape = inputs["input_ids"].shape
    none = (0, 0)
    return {
        name: F.pad(value, (*none * (value.dim() - 2), 0, count)) if value.shape[:2] == shape else value
        for name, value in inputs.items()
    }


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[Sequence[Sample]]:
    """Cut `samples` into runs of at most `batch_size`, order kept."""
    for start in range(0, len(samples), batch_size):
        yield samples[start : start + batch_size]
