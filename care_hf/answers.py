"""What a model answers, and where its gate fires."""

from collections.abc import Sequence

import torch

from .devices import input_device
from .memory import in_batches
from .samples import Sample, collate
from .sites import image_token_ids


@torch.no_grad()
def generate_answers(model, processor, samples: Sequence, max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """Greedy answers to `samples` (anything with chat `messages`), in order, without special tokens.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for one prompt; batches that do not fit are halved.
    """
    runs = in_batches(samples, batch_size, lambda part: answer_batch(model, processor, part, max_new_tokens))
    return [text for texts in runs for text in texts]


@torch.no_grad()
def answer_batch(model, processor, samples: Sequence, max_new_tokens: int) -> list[str]:
    """The same of one batch, whether it fits into memory or not."""
    inputs = _inputs(model, processor, samples)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _inputs(model, processor, samples: Sequence) -> dict[str, torch.Tensor]:
    batch = collate(processor, [Sample(s.messages) for s in samples], image_token_ids(model.config))
    return {name: value.to(input_device(model)) for name, value in batch.inputs.items()}


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

    def ask(part: Sequence) -> torch.Tensor:
        found.clear()
        model(**_inputs(model, processor, part), use_cache=False)
        return found[-1]

    try:
        return torch.cat(list(in_batches(samples, batch_size, ask)))
    finally:
        handle.remove()


@torch.no_grad()
def next_token_log_probabilities(model, processor, samples: Sequence, batch_size: int = 64) -> torch.Tensor:
    """Of the first token of the answers to `samples` (anything with chat `messages`), float32 (n, vocabulary), CPU."""

    def ask(part: Sequence) -> torch.Tensor:
        logits = model(**_inputs(model, processor, part), use_cache=False).logits
        return logits[:, -1].float().log_softmax(dim=-1).cpu()

    return torch.cat(list(in_batches(samples, batch_size, ask)))


def relative_entropy(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``KL(base || other)`` in nats, float64 (n,), of log-probabilities (n, vocabulary)."""
    terms = base.double().exp() * (base.double() - other.double())
    # A token that is impossible under both adds nothing.
    return terms.nan_to_num(nan=0.0, posinf=torch.inf).sum(dim=-1)
