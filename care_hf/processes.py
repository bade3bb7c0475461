"""Several processes at one piece of work: what one knows all know, and where one ends all end, none waits in vain."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

BEAT = 0.2  # seconds between two exchanges of what every process is at
SILENT = 45  # seconds without a word after which a process counts as lost
LONGEST, BYTES = 1000, 16384  # of a message, and of all that a process tells in one exchange
INTERRUPTED = "was interrupted"
LAUNCHED = "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"


class ProcessFailed(ConnectionError):
    """Another of the processes at this work failed, or is gone.

    Attributes:
        told: whether the main process knows what failed, and can say so.
    """

    def __init__(self, message: str, told: bool = True):
        super().__init__(message)
        self.told = told


class Processes:
    """This process alone, and what it would have to say to others.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank, count = 0, 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def check(self) -> None:
        """Assert that no other has failed.

        Raises:
            ProcessFailed: one has.
        """

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank; waits as long as the others work.

        Raises:
            ProcessFailed: one of them failed.
        """
        return [value]

    def broadcast(self, value: Any) -> Any:
        """What the main process gave."""
        return self.gather(value if self.main else None)[0]


class _Several(Processes):
    """A thread tells the others several times a second how far this process is, and hears the same of them.

    So nobody waits in a collective operation before all have come to it: those may work longer than it has patience.
    """

    def __init__(self):
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        # Gloo's, which notices a closed connection at once, and other ones than the model's.
        self._values = distributed.new_group(backend="gloo")
        distributed.barrier(self._values)  # only now are all here, maybe long after one another
        self._beats = distributed.new_group(backend="gloo", timeout=timedelta(seconds=SILENT))
        self._at, self._ended, self._own_failure = 0, False, ""
        self._heard = [{"at": 0} for _ in range(self.count)]
        self._failure: ProcessFailed | None = None  # another's
        self._lost = False  # whether nothing more is heard
        self._at_fault = False  # whether that one was not merely interrupted, as all are by Ctrl+C
        self._over = False
        self._news, self._wake = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="care_hf.processes", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._failure is not None:
            raise self._again() from self._failure.__cause__

    def _again(self) -> ProcessFailed:
        """One of its own for every time that it is raised."""
        return ProcessFailed(str(self._failure), self._failure.told)

    def gather(self, value: Any) -> list[Any]:
        self._at += 1
        self._wake.set()
        self._wait_until(lambda: all(told["at"] >= self._at for told in self._heard))
        values = [None] * self.count
        try:
            distributed.all_gather_object(values, value, group=self._values)
        except RuntimeError as error:
            self._thread.join(SILENT)  # it learns who
            self.check()
            raise ProcessFailed(f"The connection between the {self.count} processes broke: {error}", False) from error
        return values

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this process has ended, and how; after a success wait for theirs.

        Raises:
            ProcessFailed: another failed, and this process did not, or was interrupted for that very reason.
        """
        if isinstance(error, ProcessFailed):
            return
        if error is None:
            self._ended = True
            self._wake.set()
            self._wait_until(lambda: self._over)
            for group in (self._beats, self._values):
                distributed.destroy_process_group(group)
            return
        self._own_failure = INTERRUPTED if isinstance(error, KeyboardInterrupt) else _described(error)
        self._wake.set()
        self._thread.join(SILENT + 1)
        if isinstance(error, KeyboardInterrupt) and self._failure is not None and self._at_fault:
            raise self._again() from error
        error.told = not self._lost

    def _wait_until(self, there) -> None:
        with self._news:
            while not there():
                self.check()
                self._news.wait(1)  # a signal is handled only between two waits

    def _listen(self) -> None:
        try:
            while self._exchange():
                self._wake.wait(BEAT)
                self._wake.clear()
        except Exception as error:  # gloo raises RuntimeErrors of many kinds; whatever it is, all must end
            lost = ProcessFailed(
                f"Another of the {self.count} processes is gone or has been silent for {SILENT} seconds ({error}). See "
                "what its own messages, or those of the launcher, say: if it was killed, memory may not have sufficed. "
                "What was finished is kept, and the same call goes on from there.",
                told=False,
            )
            lost.__cause__ = error
            self._failure, self._at_fault, self._lost = lost, True, True
        with self._news:
            self._over = True
            self._news.notify_all()

    def _exchange(self) -> bool:
        """Whether to go on."""
        own = {"at": self._at, "ended": self._ended, "failed": self._own_failure}
        told = json.dumps(own).encode().ljust(BYTES)
        mine = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(theirs, mine, group=self._beats)
        self._heard = [json.loads(bytes(one.tolist())) for one in theirs]
        failed = {rank: one["failed"] for rank, one in enumerate(self._heard) if one["failed"]}
        others = [rank for rank in failed if rank != self.rank]
        if others:
            # Of several, the one for which others were interrupted.
            rank = min(others, key=lambda rank: failed[rank] == INTERRUPTED)
            self._at_fault = failed[rank] != INTERRUPTED
            self._failure = ProcessFailed(
                f"Process {rank} (of {self.count}, from 0) {failed[rank].removesuffix('.')}. What was finished is "
                "kept, and the same call goes on from there."
            )
        with self._news:
            self._news.notify_all()
        return not failed and not all(one["ended"] for one in self._heard)


def _described(error: BaseException) -> str:
    text = f"failed: {type(error).__name__}: {error}"
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


_current: list[Processes] = []  # at most one: whoever joins within is with the same others


@contextmanager
def joined() -> Iterator[Processes]:
    """Work together with all processes of `torch.distributed`, if it is initialised; all must come here.

    An exception in one is raised there, and as a `ProcessFailed` in the others when they `check` or `gather` next. None
    leaves before all have finished.

    Raises:
        ProcessFailed: another failed.
    """
    if _current:
        yield _current[0]
        return
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        yield Processes()
        return
    several = _Several()
    _current.append(several)
    try:
        yield several
    except BaseException as error:
        several.leave(error)
        raise
    else:
        several.leave(None)
    finally:
        _current.clear()


def count_launched() -> int:
    """How many processes the launcher of this one started."""
    return max(int(os.environ.get(name) or 1) for name in LAUNCHED)


def described_launch() -> str | None:
    """How many processes there are, for people; None if nobody asked for several."""
    if count_launched() > 1:
        return f"{count_launched()}, each with its part of the prompts"
    # What `accelerate launch --cpu --num_processes 2` sets.
    if "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return "one: `accelerate launch --cpu` starts no more; use --multi_gpu --num_processes, without GPUs, too"
    return None


@contextmanager
def launched(cpu: bool) -> Iterator[Processes]:
    """Initialise `torch.distributed` if a launcher (accelerate, torchrun, mpirun) started several processes, and join.

    Launchers end the other processes by SIGTERM if one has failed; here that is an interruption, after which what was
    finished is saved.

    Args:
        cpu: whether to compute on processors though there are accelerators.

    Raises:
        ProcessFailed: another failed.
    """
    if count_launched() == 1:
        yield Processes()
        return
    from accelerate import PartialState

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        state = PartialState(cpu=cpu or not torch.accelerator.is_available())
        with joined() as together:
            yield together
        state.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)
