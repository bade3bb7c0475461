"""What to do where memory does not suffice for a batch: halve it, and run it again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

ADVICE = (
    "Shorten it or shrink its images, load the model in a smaller dtype, quantised or with device_map='auto', or end "
    "what else is on the device."
)

Found = TypeVar("Found")
logger = logging.get_logger(__name__)


def attempt(compute: Callable[[], Found], count: int, what: str) -> Found | None:
    """What `compute` finds of `count` prompts; None if memory does not suffice for them.

    Args:
        compute: it changes nothing, for it may be run again.
        count: of prompts; a single one is not given up without an error.
        what: what the error calls it.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for one prompt.
    """
    try:
        return compute()
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        if count == 1:
            raise torch.OutOfMemoryError(f"Memory does not suffice for {what}: {error} {ADVICE}") from error
    # Only here is the exception gone, and with its frames what the batch held.
    clear_device_cache(garbage_collection=True)
    logger.warning(f"A batch of {count} prompts does not fit into memory; halved to {count // 2}.")
    return None


def in_batches(samples: Sequence[Any], batch_size: int, compute: Callable[[Sequence[Any]], Found]) -> Iterator[Found]:
    """What `compute` finds of runs of at most `batch_size` samples, in order.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for one sample.
    """
    start = 0
    while start < len(samples):
        part = samples[start : start + batch_size]
        found = attempt(lambda part=part: compute(part), len(part), "one prompt alone")
        if found is None:
            batch_size = len(part) // 2
            continue
        yield found
        start += len(part)
