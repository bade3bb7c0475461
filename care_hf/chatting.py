"""Base and repaired model side by side on one prompt: both answers, and how far the repair moved every token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .correction import Correction, Decision, recorded
from .modeling_care import CareForConditionalGeneration
from .samples import collate, load_sample, tokenizer_of
from .sites import image_token_ids

SIDES = ("base", "repaired")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what part of a character reads as


@dataclass(frozen=True)
class Answer:
    """An answer, token by token.

    Attributes:
        ids: of the tokens, with that which ends the answer.
        tokens: what each adds to the text; empty for special ones, and for the first parts of a character.
        strengths: how far the repair moved each, see `correction.recorded`; None of the base's answer, and for the last
            token, which `generate` does not read any more.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    strengths: tuple[float | None, ...]

    @property
    def text(self) -> str:
        """The whole answer, without special tokens."""
        return "".join(self.tokens)


@dataclass(frozen=True, eq=False)
class Exchange:
    """One prompt and both answers.

    Attributes:
        message: the prompt as a chat message, images in it.
        base, repaired: the answers.
        prompt_strengths: how far the repair moved every token of the prompt, of the repaired conversation; the last is
            that of the token after which the answer begins.
        visual: which of them are tokens of images.
        decision: the gate's; None if there is none or it was not asked.
    """

    message: dict[str, Any]
    base: Answer
    repaired: Answer
    prompt_strengths: tuple[float, ...]
    visual: tuple[bool, ...]
    decision: Decision | None

    @property
    def prompt_strength(self) -> float:
        """How far the last token of the prompt was moved, from which the first of the answer comes."""
        return self.prompt_strengths[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; of the prompt its text alone, and how many images it has."""
        parts = self.message["content"]
        told = {"text": "".join(p["text"] for p in parts if p["type"] == "text")}
        told["images"] = sum(p["type"] == "image" for p in parts)
        answers = {side: {"text": getattr(self, side).text, **asdict(getattr(self, side))} for side in SIDES}
        decision = None if self.decision is None else asdict(self.decision)
        strengths = {"prompt_strengths": list(self.prompt_strengths), "visual": list(self.visual)}
        return {"prompt": told, **answers, **strengths, "decision": decision}


def converse(
    repaired: CareForConditionalGeneration,
    processor: Any,
    text: str,
    image: Any = None,
    history: Sequence["Exchange | Mapping[str, Any]"] = (),
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str, str], None] | None = None,
) -> Exchange:
    """Ask both what they answer, each in its own conversation.

    Args:
        repaired: the repaired model; the base is itself with the repair off.
        processor: of the base, or its tokenizer if it sees no images.
        text: what is asked.
        image: a PIL image, a path, an array, or a list of them.
        history: earlier exchanges, of which each side remembers its own answer; chat messages among them, such as one
            of the role "system", are said to both.
        max_new_tokens: at most so many in each answer.
        temperature: 0 is greedy; above, both answers are drawn with the same seed.
        seed: of what is drawn; the global state of the generator stays as it is.
        on_text: told ``(side, text)`` of every piece of an answer as it comes, first of the "base", then "repaired".

    Raises:
        TypeError: the model is not repaired.
        ValueError: the prompt is empty, the processor cannot write it, or a number does not fit.
        OSError: there is no such image.
    """
    if not isinstance(repaired, CareForConditionalGeneration):
        raise TypeError(f"A {type(repaired).__name__} is not repaired; load a repaired checkpoint or an adapter.")
    if not text.strip() and image is None:
        raise ValueError("The prompt is empty; ask something.")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} not below 0.")
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    content = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": text}]
    (message,) = load_sample([{"role": "user", "content": content}]).messages
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "num_beams": 1,
        "num_return_sequences": 1,
    }
    options |= {"temperature": temperature} if temperature > 0 else {}

    def ask(side: str) -> tuple[Answer, Correction | None, list[bool]]:
        sample = load_sample([*_said(history, side), message])
        batch = collate(processor, [sample], image_token_ids(repaired.config))
        inputs = {name: value.to(repaired.device) for name, value in batch.inputs.items()}
        tokenizer = tokenizer_of(processor)
        streamer = None if on_text is None else _Pieces(tokenizer, partial(on_text, side))
        with _seeded(seed, repaired.device), _as(side, repaired) as correction:
            output = repaired.generate(**inputs, **options, streamer=streamer)
        length = inputs["input_ids"].shape[1]
        ids = output[0, length:].tolist()
        read = [] if correction is None else correction.strengths(length + len(ids) - 1)[length:]
        strengths = (*read, *[None] * (len(ids) - len(read)))
        return Answer(tuple(ids), pieces(tokenizer, ids), strengths), correction, batch.visual[0].tolist()

    base, _, _ = ask("base")
    answer, correction, visual = ask("repaired")
    strengths = correction.strengths(len(visual) + len(answer.ids) - 1)[: len(visual)]
    return Exchange(message, base, answer, tuple(strengths), tuple(visual), correction.decision)


@contextmanager
def _as(side: str, repaired: CareForConditionalGeneration) -> Iterator[Correction | None]:
    """While entered the model is the base, or repaired and recorded."""
    if side == "base":
        with repaired.disable():
            yield None
    else:
        with repaired.enable(), recorded(repaired) as correction:
            yield correction


def _said(history: Sequence["Exchange | Mapping[str, Any]"], side: str) -> list[Mapping[str, Any]]:
    """The conversation so far, as one side remembers it."""
    messages: list[Mapping[str, Any]] = []
    for entry in history:
        if isinstance(entry, Exchange):
            answer = {"type": "text", "text": getattr(entry, side).text.strip()}
            messages += [entry.message, {"role": "assistant", "content": [answer]}]
        else:
            messages.append(entry)
    return messages


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def pieces(tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """What every token adds to the text: together the text without special tokens."""
    whole, told, found = tokenizer.decode(list(ids), skip_special_tokens=True), 0, []
    for count in range(1, len(ids) + 1):
        so_far = whole if count == len(ids) else tokenizer.decode(list(ids[:count]), skip_special_tokens=True)
        # Further tokens may change the end: part of a character, or a space that a tokenizer takes back.
        end = max(told, _common(so_far, whole))
        found.append(whole[told:end])
        told = end
    return tuple(found)


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Pieces(BaseStreamer):
    """Tells the text as it comes."""

    def __init__(self, tokenizer, tell: Callable[[str], None]):
        self.tokenizer, self.tell = tokenizer, tell
        self.ids: list[int] | None = None
        self.told = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            self._tell(text)

    def end(self) -> None:
        self._tell(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if text.startswith(self.told) and len(text) > len(self.told):
            self.tell(text[len(self.told) :])
            self.told = text
