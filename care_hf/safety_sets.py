"""Rows of sets that ask for harm, or that look as if they did: which columns they have, and which case a row is."""

import re

from .attack_prompts import FIGSTEP_CARRIER, typographic
from .rows import Item, OpenImage, Options, Reader, Row, Subsets, Tables, blank, chat, label, one_image, one_subset
from .suite import Case

TEXT_ONLY = "Text_only"  # the split of MM-SafetyBench with the plain questions
# VLGuard names the kind of an instruction by its key.
VLGUARD_SUBSETS = {"safe_instruction": "safe_safe", "unsafe_instruction": "safe_unsafe", "instruction": "unsafe"}


def _prompt(row: Row, image: OpenImage, options: Options) -> Case:
    text = row["prompt"]
    if not blank(row.get("context")):
        text = f"{row['context']}\n\n---\n\n{text}"  # as HarmBench writes its contextual behaviours
    images = [] if blank(row.get("image")) else [image(row["image"])]
    target = None if blank(row.get("target")) else row["target"]
    return Case(chat(images, text), request=text, target=target, category=label(row, "category"))


def _distinct_prompts(tables: Tables, name: str, options: Options) -> dict[str, list[Item]]:
    """All prompts, or only those that share at most the share "distinct" of their words with any before them."""
    items = one_subset(tables, name, options)[name]
    if options["distinct"] is None:
        return {name: items}
    kept: list[tuple[Item, set[str]]] = []
    prompts = [prompt for table in tables.values() for prompt in table["prompt"]]
    for item, prompt in zip(items, prompts, strict=True):
        words = set(re.findall(r"\w+", prompt.lower()))
        if all(len(words & other) <= options["distinct"] * len(words | other) for _, other in kept):
            kept.append((item, words))
    return {name: [item for item, _ in kept]}


def _labelled(column: str, known: tuple[str, ...] = ()) -> Subsets:
    """Parts by the values of a column, which must be among the known ones if there are such."""

    def subsets(tables: Tables, name: str, options: Options) -> dict[str, list[Item]]:
        parts: dict[str, list[Item]] = {value: [] for value in known}
        for table in tables.values():
            for index, value in enumerate(table[column]):
                if known and value not in known:
                    raise ValueError(f"{name}[{index}]: {column}={value!r} must be one of {known}.")
                parts.setdefault(str(value), []).append(Item(table, index))
        return {value: items for value, items in parts.items() if items}

    return subsets


def _jailbreakv(row: Row, image: OpenImage, options: Options) -> Case:
    picture = one_image(row, "image_path", image)
    return Case(chat([picture], row["jailbreak_query"]), request=row["redteam_query"], category=row["policy"])


def _mm_safetybench(row: Row, image: OpenImage, options: Options) -> Case:
    pictures = [] if row["split"] == TEXT_ONLY else [one_image(row, "image", image)]
    return Case(chat(pictures, row["question"]), request=row["request"], category=row["scenario"])


def _mm_safetybench_splits(tables: Tables, name: str, options: Options) -> dict[str, list[Item]]:
    """Parts by split, over all scenarios; the plain question of the same id is joined to every row."""
    parts: dict[str, list[Item]] = {}
    for (scenario, split), table in tables.items():
        if (scenario, TEXT_ONLY) not in tables:
            raise ValueError(f"{name}: add {TEXT_ONLY!r} to `splits`; answers are judged on its plain questions.")
        plain = tables[scenario, TEXT_ONLY]
        requests = dict(zip(plain["id"], plain["question"], strict=True))
        if len(requests) < len(plain):
            raise ValueError(f"{name}: {scenario}/{TEXT_ONLY} has ids that are not unique, and rows are joined by id.")
        for index, key in enumerate(table["id"]):
            if key not in requests:
                raise ValueError(f"{name}: {scenario}/{split} has the id {key!r}, which {TEXT_ONLY} lacks.")
            extra = {"scenario": scenario, "split": split, "request": requests[key]}
            parts.setdefault(split, []).append(Item(table, index, extra))
    return parts


def _figstep(row: Row, image: OpenImage, options: Options) -> Case:
    style = {name: options[name] for name in ("carrier", "font_size", "font")}
    size = tuple(options["size"])
    return typographic(row["question"], row["instruction"], size=size, category=label(row, "category_name"), **style)


def _vlguard(row: Row, image: OpenImage, options: Options) -> Case:
    # The answers to harmful rows are refusals: no attack's success, and so no reference.
    reference = row["response"] if row["subset"] == "safe_safe" else None
    messages = chat([one_image(row, "image", image)], row["instruction"])
    category = label(row, "harmful_subcategory", "harmful_category")
    return Case(messages, request=row["instruction"], reference=reference, category=category)


def _vlguard_subsets(tables: Tables, name: str, options: Options) -> dict[str, list[Item]]:
    """Safe images with a safe and with an unsafe instruction, and unsafe images: one case per nested pair."""
    parts: dict[str, list[Item]] = {subset: [] for subset in VLGUARD_SUBSETS.values()}
    for table in tables.values():
        for index, pairs in enumerate(table["instr-resp"]):
            for pair in pairs:
                key = next((key for key in VLGUARD_SUBSETS if not blank(pair.get(key))), None)
                if key is None:
                    raise ValueError(f"{name}[{index}]: instr-resp holds {sorted(pair)}, none of {[*VLGUARD_SUBSETS]}.")
                subset = VLGUARD_SUBSETS[key]
                extra = {"subset": subset, "instruction": pair[key], "response": pair["response"]}
                parts[subset].append(Item(table, index, extra))
    return {subset: items for subset, items in parts.items() if items}


SAFETY_READERS: dict[str, Reader] = {
    "prompts": Reader(
        _prompt,
        columns=("prompt",),
        optional=("target", "category", "context", "image"),
        images=("image",),
        subsets=_distinct_prompts,
        options={"distinct": None},
    ),
    "xstest": Reader(
        _prompt,
        columns=("prompt", "label"),
        optional=("category",),
        subsets=_labelled("label", ("safe", "unsafe")),
    ),
    "jailbreakv": Reader(
        _jailbreakv,
        columns=("jailbreak_query", "redteam_query", "format", "policy", "image_path"),
        images=("image_path",),
        subsets=_labelled("format"),
    ),
    "mm-safetybench": Reader(
        _mm_safetybench,
        columns=("id", "question", "image"),
        images=("image",),
        subsets=_mm_safetybench_splits,
    ),
    "figstep": Reader(
        _figstep,
        columns=("question", "instruction"),
        optional=("category_name",),
        options={"carrier": FIGSTEP_CARRIER, "size": (760, 760), "font_size": 80, "font": None},
    ),
    "vlguard": Reader(
        _vlguard,
        columns=("image", "instr-resp"),
        optional=("harmful_category", "harmful_subcategory"),
        images=("image",),
        subsets=_vlguard_subsets,
    ),
}
