"""Run prompts through a model batch by batch: batches that do not fit are halved, and what is done is kept."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from . import resume
from .devices import input_device
from .interventions import evaluating
from .memory import attempt
from .processes import Processes
from .spans import Spans
from .spans import size as size_of

AUTO_ON_ACCELERATOR, AUTO_ON_CPU = 128, 16  # with what batch_size="auto" begins

Found = TypeVar("Found")


def first_size(batch_size: int | str, model: PreTrainedModel) -> int:
    """With how many prompts per forward to begin: `batch_size`, or, if it is "auto", many for the model's device."""
    if batch_size != "auto":
        return batch_size
    return AUTO_ON_CPU if input_device(model).type == "cpu" else AUTO_ON_ACCELERATOR


def run_batches(
    model: PreTrainedModel,
    todo: Mapping[str, Spans],
    compute: Callable[[str, int, int], Found],
    keep: Callable[[str, Found], None],
    *,
    size: int,
    description: str,
    finished: int = 0,
    save: Callable[[], None] | None = None,
    together: Processes | None = None,
) -> None:
    """Compute and keep every batch of every set, with the model in evaluation mode and no gradients.

    Where memory does not suffice, the batch is halved and run again, and those after it are as small.

    Args:
        model: it comes back in the mode that it was in.
        todo: which prompts of each set; a batch is of one set only.
        compute: what is found of a set's prompts from the second argument on and before the third; it changes nothing.
        keep: takes in what was found of a set's next prompts, in their order.
        size: how many prompts a batch has at first.
        description: of the progress bar.
        finished: how many prompts, beside those to do, the bar counts as done.
        save: writes what was kept; called every `resume.SAVE_SECONDS`, at the end, and when anything is raised.
        together: the processes of which this is one: it ends when another fails.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for a single prompt.
        ProcessFailed: another process failed.
    """
    together = together or Processes()
    count = finished + sum(map(size_of, todo.values()))
    hidden = {} if together.main else {"disable": True}
    progress = logging.tqdm(total=count, initial=finished, desc=description, unit="prompt", **hidden)
    saved, unsaved = time.monotonic(), False
    try:
        with progress, evaluating(model), torch.no_grad():
            for name, span in [(name, span) for name, spans in todo.items() for span in spans]:
                start = span.start
                while start < span.stop:
                    together.check()
                    stop = min(start + size, span.stop)
                    what = f"one prompt alone, number {start} of `{name}` (from 0)"
                    found = attempt(lambda n=name, a=start, b=stop: compute(n, a, b), stop - start, what)
                    if found is None:
                        size = (stop - start) // 2
                        continue
                    unsaved = True  # before it is true: an interrupted `keep` may have finished
                    keep(name, found)
                    progress.update(stop - start)
                    start = stop
                    if save and time.monotonic() - saved >= resume.SAVE_SECONDS:
                        save()
                        saved, unsaved = time.monotonic(), False
    finally:
        # Also after Ctrl+C or a failing prompt: what was computed is not lost.
        if save and unsaved:
            save()
