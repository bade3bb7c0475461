"""How probable it is that a causal language model goes on with given words."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from .devices import input_device

Ids: TypeAlias = tuple[int, ...]


@torch.no_grad()
def log_probabilities(
    model,
    tokenizer,
    prompts: Sequence[str],
    groups: Sequence[Sequence[str]],
    add_special_tokens: bool = True,
    batch_size: int = 8,
) -> torch.Tensor:
    """Log-probability that what follows a prompt begins with any word of a group.

    Args:
        model: a causal language model of transformers in evaluation mode.
        tokenizer: its tokenizer; prompt and word are tokenised as one text.
        prompts: texts.
        groups: words by group, white space included.
        add_special_tokens: whether the tokenizer adds its own to a prompt.
        batch_size: prompts per forward; one forward is enough for words that differ in their last tokens alone.

    Returns:
        float32 (len(prompts), len(groups)), on the CPU.

    Raises:
        ValueError: a prompt is too long for the model, or a word begins within a prompt's last token.
    """
    table = torch.empty(len(prompts), len(groups))
    split = [[_words_after(tokenizer, p, words, add_special_tokens) for words in groups] for p in prompts]
    starts = [tuple(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]) for prompt in prompts]
    rows = [
        (row, ids) for row, start in enumerate(starts) for ids in _inputs(start, [w for g in split[row] for w in g])
    ]
    _check_length(model, max((len(ids) for _, ids in rows), default=0))
    rows.sort(key=lambda pair: len(pair[1]), reverse=True)  # little padding, and the largest batch fails first
    known: list[dict[Ids, torch.Tensor]] = [{} for _ in prompts]
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        ends = _ends(model, [ids for _, ids in part], 1 + max(len(ids) - len(starts[row]) for row, ids in part))
        for (row, ids), logs in zip(part, ends, strict=True):
            after = logs[len(logs) - 1 - len(ids) + len(starts[row]) :]
            for word in {word for group in split[row] for word in group}:
                if ids[len(starts[row]) :][: len(word) - 1] == word[:-1]:
                    known[row][word] = after[torch.arange(len(word)), list(word)].sum()
    for row, of_prompt in enumerate(split):
        for column, words in enumerate(of_prompt):
            table[row, column] = torch.stack([known[row][word] for word in words]).logsumexp(0)
    return table


def _words_after(tokenizer, prompt: str, words: Sequence[str], special: bool) -> list[Ids]:
    """Token ids of every word after the prompt; of one that begins with another only the other is kept."""
    before = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    found: list[Ids] = []
    for word in words:
        whole = tokenizer(prompt + word, add_special_tokens=special)["input_ids"]
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ValueError(
                f"After a prompt that ends in {prompt[-20:]!r}, {word!r} is no token of its own, so that its "
                "probability is unknown; move white space from the one to the other, and use a tokenizer that adds no "
                "token at the end."
            )
        found.append(tuple(whole[len(before) :]))
    found.sort(key=len)
    return [ids for i, ids in enumerate(found) if not any(ids[: len(other)] == other for other in found[:i])]


def _inputs(start: Ids, words: Sequence[Ids]) -> list[Ids]:
    """The fewest inputs whose logits tell every word: the prompt and all of a word but its last token."""
    kept: list[Ids] = []
    for ids in sorted({start + word[:-1] for word in words}, key=len, reverse=True):
        if not any(other[: len(ids)] == ids for other in kept):
            kept.append(ids)
    return kept


def _check_length(model, longest: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"A prompt has {longest} tokens and the model takes {limit}; shorten its texts.")


def _ends(model, rows: Sequence[Ids], keep: int) -> torch.Tensor:
    """Log-probabilities of the next token at the last `keep` places of every row, float32 (B, keep, V) on the CPU.

    Rows are padded on the left, so that these places are the last columns of all rows.
    """
    width = max(len(ids) for ids in rows)
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in rows])
    mask = (torch.arange(width) >= torch.tensor([[width - len(ids)] for ids in rows])).long()
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),  # a plain forward counts padding otherwise
    }
    inputs = {name: value.to(input_device(model)) for name, value in inputs.items()}
    # The vocabulary times a long prompt would be the largest tensor of all.
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return logits[:, -keep:].float().log_softmax(-1).cpu()
