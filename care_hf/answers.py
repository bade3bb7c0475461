"""What a model answers, and where its gate fires."""

from collections.abc import Sequence

import torch

from .devices import input_device
from .samples import Sample, batches, collate
from .sites import image_token_ids


@torch.no_grad()
def generate_answers(model, processor, samples: Sequence, max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """Greedy answers to `samples` (anything with chat `messages`), in order, without special tokens."""
    answers = []
    for part in batches(samples, batch_size):
        batch = collate(processor, [Sample(s.messages) for s in part], image_token_ids(model.config))
        inputs = {name: value.to(input_device(model)) for name, value in batch.inputs.items()}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


@torch.no_grad()
def gate_fires(model, processor, samples: Sequence, batch_size: int = 64) -> torch.Tensor:
    """Whether the gate of `model` fires at the end of each of `samples` (anything with chat `messages`), bool (n,).

    Raises:
        ValueError: the model has no gate.
    """
    if model.gate is None:
        raise ValueError("The model has no gate; fit one with the recipe 'gated'.")
    found: list[torch.Tensor] = []
    handle = model.gate_reader.register_forward_hook(lambda module, args, fires: found.append(fires[:, -1].cpu()))
    try:
        for part in batches(samples, batch_size):
            batch = collate(processor, [Sample(s.messages) for s in part], image_token_ids(model.config))
            model(**{name: value.to(input_device(model)) for name, value in batch.inputs.items()}, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(found)


@torch.no_grad()
def next_token_log_probabilities(model, processor, samples: Sequence, batch_size: int = 64) -> torch.Tensor:
    """Of the first token of the answers to `samples` (anything with chat `messages`), float32 (n, vocabulary), CPU."""
    found = []
    for part in batches(samples, batch_size):
        batch = collate(processor, [Sample(s.messages) for s in part], image_token_ids(model.config))
        inputs = {name: value.to(input_device(model)) for name, value in batch.inputs.items()}
        found.append(model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(dim=-1).cpu())
    return torch.cat(found)


def relative_entropy(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``KL(base || other)`` in nats, float64 (n,), of log-probabilities (n, vocabulary)."""
    terms = base.double().exp() * (base.double() - other.double())
    # A token that is impossible under both adds nothing.
    return terms.nan_to_num(nan=0.0, posinf=torch.inf).sum(dim=-1)
