"""Progress where there is no terminal: a line now and then, or nothing."""

import sys
import time

from tqdm.std import tqdm

from .voice import SECONDS, duration


class Silent(tqdm):
    """A tqdm bar that shows nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": True})


class Lines(tqdm):
    """A tqdm bar that prints whole lines, not sooner than `SECONDS` after one another."""

    def __init__(self, *args, **kwargs):
        self.told = time.monotonic()
        super().__init__(*args, **{**kwargs, "mininterval": SECONDS, "file": sys.stderr, "leave": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print how far it is, if it is on the way."""
        now = self.format_dict
        done, total = now["n"], now["total"]
        if done == now["initial"] or done == total or time.monotonic() - self.told < SECONDS:
            return
        self.told = time.monotonic()
        line = f"  {now['prefix'].removesuffix(': ') or 'Working'}: {done} of {total or '?'} {now['unit']}s, "
        line += f"{duration(now['elapsed'])} elapsed"
        if total and done > now["initial"]:
            left = now["elapsed"] * (total - done) / (done - now["initial"])
            line += f", {duration(left)} left"
        print(line, file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Nothing: lines stay."""

    def moveto(self, n: int) -> None:
        """Nothing: there is no cursor."""
