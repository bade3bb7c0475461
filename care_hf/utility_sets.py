"""Rows of sets that measure what a model can do: which columns they have, and which case a row is."""

import ast
import re
from typing import Any

from .rows import OpenImage, Options, Reader, Row, blank, chat, label, one_image
from .suite import Case

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_PLEASE = "Answer with the option's letter from the given choices directly."
PHRASE_PLEASE = "Answer the question using a single word or phrase."
IMAGES = tuple(f"image_{number}" for number in range(1, 8))  # of MMMU


def accepted_answers(reference: str) -> list[tuple[str, ...]]:
    """What MM-Vet accepts: any one of the list ("<OR>"), of which all parts ("<AND>") must be in the answer."""
    return [tuple(part.strip() for part in answer.split("<AND>")) for answer in reference.split("<OR>")]


def _choices_text(question: str, choices: tuple[str, ...], please: str) -> str:
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *options, please])


def _letter(answer: Any, choices: tuple[str, ...]) -> str:
    """The letter of the right choice, from itself or from its place counted from 0."""
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise ValueError(
        f"answer={answer!r} is none of the {len(choices)} choices; splits for leaderboards hide their answers, use one "
        "that has them."
    )


def _mmbench(row: Row, image: OpenImage, options: Options) -> Case:
    choices = tuple(str(row[letter]) for letter in "ABCDE" if not blank(row.get(letter)))
    question = row["question"] if blank(row["hint"]) else f"{row['hint']}\n{row['question']}"
    text = _choices_text(question, choices, options["please"])
    labels = {"reference": _letter(row["answer"], choices), "category": label(row, "category"), "choices": choices}
    return Case(chat([one_image(row, "image", image)], text), request=row["question"], **labels)


def _mmvet(row: Row, image: OpenImage, options: Options) -> Case:
    messages = chat([one_image(row, "image", image)], row["question"])
    category = label(row, "capability")
    return Case(messages, request=row["question"], reference=str(row["answer"]), category=category)


def _scienceqa(row: Row, image: OpenImage, options: Options) -> Case:
    choices = tuple(map(str, row["choices"]))
    question = row["question"] if blank(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    images = [] if blank(row["image"]) else [image(row["image"])]
    labels = {"reference": _letter(row["answer"], choices), "category": label(row, "subject"), "choices": choices}
    return Case(chat(images, _choices_text(question, choices, options["please"])), request=row["question"], **labels)


def _mmmu(row: Row, image: OpenImage, options: Options) -> Case:
    try:
        choices = tuple(map(str, ast.literal_eval(row["options"])))
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"options={row['options']!r:.80} is no list in Python's notation.") from error
    if choices:
        text, reference = _choices_text(row["question"], choices, options["please"]), _letter(row["answer"], choices)
    else:  # an open question
        text, reference = f"{row['question']}\n{options['please_open']}", str(row["answer"])
    named = re.fullmatch(r"[a-z]+_(.+)_\d+", str(row.get("id")))  # validation_Art_Theory_3
    category = named[1] if named else label(row, "subfield")
    messages = [{"role": "user", "content": _with_images(text, row, image)}]
    return Case(messages, request=row["question"], reference=reference, category=category, choices=choices)


def _with_images(text: str, row: Row, image: OpenImage) -> list[dict[str, Any]]:
    """Content parts with each image where it is first named; images that are never named come first."""
    given = {number: row[f"image_{number}"] for number in range(1, 8) if not blank(row.get(f"image_{number}"))}
    parts = re.split(r"<image (\d)>", text)
    unnamed = set(given) - {int(number) for number in parts[1::2]}
    content = [{"type": "image", "image": image(given[number])} for number in sorted(unnamed)]
    seen: set[int] = set()
    for place, part in enumerate(parts):
        if place % 2 == 0:
            content += [{"type": "text", "text": part}] if part.strip() else []
        elif int(part) in seen:
            content.append({"type": "text", "text": f"image {part}"})
        elif int(part) in given:
            content.append({"type": "image", "image": image(given[int(part)])})
            seen.add(int(part))
        else:
            raise ValueError(f"names <image {part}>, but image_{part} is empty; it has {sorted(given)}.")
    return content


UTILITY_READERS: dict[str, Reader] = {
    "mmbench": Reader(
        _mmbench,
        columns=("question", "hint", "A", "B", "C", "D", "answer", "image"),
        optional=("E", "category"),
        images=("image",),
        options={"please": LETTER_PLEASE},
    ),
    "mm-vet": Reader(
        _mmvet,
        columns=("question", "answer", "image"),
        optional=("capability",),
        images=("image",),
    ),
    "scienceqa": Reader(
        _scienceqa,
        columns=("image", "question", "choices", "answer"),
        optional=("hint", "subject"),
        images=("image",),
        options={"please": LETTER_PLEASE},
    ),
    "mmmu": Reader(
        _mmmu,
        columns=("question", "options", "answer", "image_1"),
        optional=("id", "subfield", *IMAGES[1:]),
        images=IMAGES,
        options={"please": LETTER_PLEASE, "please_open": PHRASE_PLEASE},
    ),
}
