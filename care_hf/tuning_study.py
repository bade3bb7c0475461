"""An optuna study as a tuning keeps it: in a folder, asked so that an interruption changes nothing."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import Recipe
from .search_space import Space
from .tuning_choice import COMPLETE, Trial
from .tuning_measures import Measured

SAMPLERS = ("tpe", "random")
STARTUP_TRIALS = 16  # at random before TPE has anything to go by; those that a search starts from are among them
STORAGE, NAME = "study.journal", "care_hf.tune"


def load_optuna():
    """The module optuna.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("Tuning needs optuna; install it with `pip install 'care_hf[tune]'`.") from error
    return optuna


class Search:
    """The trials so far, and what to try next.

    What is asked next follows from the finished trials and their number alone, for every trial has a sampler of its
    own; trials that an interruption left unfinished count as failed, which samplers do not see. One process at a time.

    Args:
        folder: keeps the study; None keeps it in memory.
        of: a fingerprint of all that the study depends on.
        space: what is searched.
        starts: parameters of what is tried first.
        sampler: of `SAMPLERS`.
        seed: of the sampler.

    Raises:
        ImportError: optuna is not installed.
        ValueError: the folder holds another study.
    """

    def __init__(
        self,
        folder: Path | None,
        of: str,
        space: Space,
        starts: Sequence[Mapping[str, Any]],
        sampler: str,
        seed: int,
    ):
        self._optuna = load_optuna()
        self._space, self._starts, self._sampler, self._seed = space, starts, sampler, seed
        self._states = self._optuna.trial.TrialState
        self._study = self._open(folder, of)

    def _open(self, folder: Path | None, of: str):
        optuna = self._optuna
        storage = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            backend = optuna.storages.journal.JournalFileBackend(str(folder / STORAGE))
            storage = optuna.storages.JournalStorage(backend)
        said = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=storage, study_name=NAME, directions=["minimize"] * 2, load_if_exists=True
            )
        finally:
            optuna.logging.set_verbosity(said)
        if study.user_attrs.setdefault("fingerprint", of) != of:
            raise ValueError(
                f"{folder} holds another tuning (another model, processor, prompts, space, sampler or seed); delete it "
                "or name another folder."
            )
        study.set_user_attr("fingerprint", of)
        for trial in study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            study.tell(trial.number, state=self._states.FAIL)
        return study

    @property
    def trials(self) -> list[Trial]:
        """All that are finished, numbered in their order."""
        finished = self._study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.PRUNED))
        return [_as_trial(number, trial.user_attrs) for number, trial in enumerate(finished)]

    def next(self, number: int, attempt: Callable[[int, Recipe], Trial]) -> Trial:
        """Choose recipe `number`, have it tried, and keep the outcome; if the attempt raises, the trial is failed."""
        self._study.sampler = self._make_sampler(number)
        waiting = self._study.get_trials(deepcopy=False, states=(self._states.WAITING,))
        if number < len(self._starts) and not waiting:
            self._study.enqueue_trial(dict(self._starts[number]))
        asked = self._study.ask()
        with self._failed_if_interrupted(asked):
            trial = attempt(number, self._space.suggest(asked))
            for name, value in _told(trial).items():
                asked.set_user_attr(name, value)
            if trial.state == COMPLETE:
                self._study.tell(asked, trial.measured.objectives)
            else:
                self._study.tell(asked, state=self._states.PRUNED)
        return trial

    @contextmanager
    def _failed_if_interrupted(self, asked) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl+C among them
            self._study.tell(asked, state=self._states.FAIL, skip_if_finished=True)
            raise

    def _make_sampler(self, number: int):
        samplers = self._optuna.samplers
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._sampler == "random":
            return samplers.RandomSampler(seed)
        with warnings.catch_warnings():
            # Joint sampling within what is asked together is marked as experimental.
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True, constant_liar=False
            )


def _told(trial: Trial) -> dict[str, Any]:
    measured = trial.measured.to_dict() if trial.measured else None
    told = {"recipe": trial.recipe.to_dict(), "state": trial.state, "reason": trial.reason, "measured": measured}
    # Samplers and dashboards see these two beside the objectives.
    return told | ({"over_refusal": trial.measured.over_refusal.value} if trial.measured else {})


def _as_trial(number: int, told: Mapping[str, Any]) -> Trial:
    measured = Measured.from_dict(told["measured"]) if told["measured"] else None
    return Trial(number, Recipe(**told["recipe"]), told["state"], measured, told["reason"])
