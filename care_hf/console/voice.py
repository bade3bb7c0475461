"""How the console speaks: sentences, indented facts, progress, a closing summary; or JSON; or nothing."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

MISTAKE, INTERRUPTED = 2, 130  # exit codes; 0 is success, 1 what nobody foresaw
TRACEBACK = "CARE_TRACEBACK"
RANKS = "RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"  # a process's number, by launcher
SECONDS = 10  # between lines of progress where there is no terminal


class Voice:
    """Says what a command does.

    Args:
        as_json: only the result goes to the standard output, as one JSON object; the rest to the standard error.
        quiet: nothing but the result as JSON, if asked for, and errors.

    Attributes:
        speaks: whether this process says anything; of several that a launcher started the first does.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.speaks = all(os.environ.get(name, "0") == "0" for name in RANKS)
        self.as_json, self.quiet = as_json, quiet or not self.speaks
        self.started = time.monotonic()
        self.console = Console(stderr=as_json, quiet=self.quiet, highlight=False, markup=False, emoji=False)

    def say(self, sentence: str) -> None:
        """A plain sentence."""
        self.console.print(sentence)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """What was found, indented, a line each; None is left out."""
        grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in facts.items():
            if value is not None:
                grid.add_row(f"  {label}", str(value))
        self.console.print(grid)

    def show(self, table: Table) -> None:
        """A table."""
        self.console.print(table)

    def next_steps(self, steps: Mapping[str, str]) -> None:
        """What to do next: commands, whole lines that can be copied, with what they are for."""
        self.say("Next:")
        for command, purpose in steps.items():
            self.console.print(f"  {purpose}\n    {command}", soft_wrap=True)

    def result(self, result: Mapping[str, Any]) -> None:
        """What scripts read; printed if JSON is asked for."""
        if self.as_json and self.speaks:
            sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self.started

    @property
    def elapsed(self) -> str:
        """The same as words."""
        return duration(self.seconds)

    @contextmanager
    def command(self) -> Iterator["Voice"]:
        """Run a command: a user's mistake is told without a traceback, and an interruption is no failure of anything.

        Raises:
            typer.Exit: with `MISTAKE` or `INTERRUPTED`.
        """
        try:
            with self._libraries():
                yield self
        except KeyboardInterrupt as error:
            if self._must_tell(error):
                self._fail("Interrupted. What was finished is kept; the same command goes on from there.", INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if not _is_mistake(error):
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            if self._must_tell(error):
                self._fail(str(error) or type(error).__name__, MISTAKE)
            raise typer.Exit(MISTAKE) from error

    def _must_tell(self, error: BaseException) -> bool:
        """Whether no other process does; see `care_hf.processes`."""
        return self.speaks or not getattr(error, "told", False)

    def _fail(self, message: str, code: int) -> None:
        # Not soft-wrapped where there is a terminal: rich breaks lines at words.
        Console(stderr=True, highlight=False, markup=False, emoji=False).print(
            message, style="red" if code == MISTAKE else None, soft_wrap=not sys.stderr.isatty()
        )
        self.result({"error": message, "exit_code": code})

    @contextmanager
    def _libraries(self) -> Iterator[None]:
        """What libraries say: progress bars in a terminal, elsewhere a line now and then; or nothing."""
        bars = not self.quiet and sys.stderr.isatty()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # which read files in no time
        from transformers.utils import logging

        from .progress import Lines, Silent

        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR if self.quiet else logging.WARNING)
        other = Silent if self.quiet else Lines
        hook = None if bars else lambda factory, args, kwargs: other(*args, **kwargs)
        before = logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)
            logging.set_verbosity(verbosity)


def _is_mistake(error: Exception) -> bool:
    """Whether an error is the user's to mend, and says how."""
    torch = sys.modules.get("torch")  # not loaded before a command needs it
    memory = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    return isinstance(error, (ValueError, TypeError, OSError, ImportError, FloatingPointError, *memory))


def duration(seconds: float) -> str:
    """Seconds as words: "41 s", "3 min 20 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
