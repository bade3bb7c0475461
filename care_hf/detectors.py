"""Fit the gate: linear detectors that tell harmful requests from harmless ones by one activation.

A detector is a discriminant between harmful and harmless prompts *of the same kind*, blind to what kind it is: its
covariance holds, beside the scatter within every kind, the scatter of the harmless kinds' means. That is what carries
it over to kinds of attack that it was not fitted on. Tensors only, float64 inside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import norm

from .gating import Gate
from .linalg import shrink
from .scatter import RowScatter

CLASSES = ("benign", "malicious", "neutral", "exposed")
HARMLESS = {"malicious": "benign", "exposed": "neutral"}  # what each harmful class is contrasted with
FOLDS = 4
CURVE = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # false-alarm targets of the calibration curve


@dataclass(frozen=True)
class Cell:
    """What prompts of one kind have in common: their class, their kind, and whether they have an image."""

    of: str
    kind: str
    pictured: bool


@dataclass(frozen=True, eq=False)
class Prompts:
    """Activations (n, d) of the last token of n prompts, with the `Cell` and the groups of each.

    Prompts that share a group, for example a concept or a template, are held out together.
    """

    activations: torch.Tensor
    cells: Sequence[Cell]
    groups: Sequence[tuple[str, ...]]

    def where(self, chosen: Sequence[bool]) -> "Prompts":
        """Only some of the prompts."""
        indices = [i for i, keep in enumerate(chosen) if keep]
        return Prompts(self.activations[indices], [self.cells[i] for i in indices], [self.groups[i] for i in indices])

    def by_cell(self) -> dict[Cell, torch.Tensor]:
        """The activations of every cell, in order of first appearance."""
        rows: dict[Cell, list[int]] = {}
        for i, cell in enumerate(self.cells):
            rows.setdefault(cell, []).append(i)
        return {cell: self.activations[indices] for cell, indices in rows.items()}


@dataclass(frozen=True, eq=False)
class Detector:
    """A direction w (d,) scaled so that harmful and harmless means lie at +1/2 and -1/2 of ``(h - centre) . w``."""

    direction: torch.Tensor
    centre: torch.Tensor

    def scores(self, h: torch.Tensor) -> torch.Tensor:
        """(n,) for h (n, d)."""
        return (h.to(self.direction) - self.centre) @ self.direction


def discriminant(
    contrasts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    cells: Sequence[torch.Tensor],
    nuisance: Sequence[Sequence[torch.Tensor]],
    ridge: float,
) -> Detector:
    """Fisher's discriminant of several contrasts at once: ``w = (S_within + S_nuisance + ridge)^-1 mean(mu_1 - mu_0)``.

    Args:
        contrasts: pairs of activations (n, d), harmful and harmless; each pair weighs the same.
        cells: all activations, split so that the scatter within a part is nobody's signal.
        nuisance: sets of parts whose means must not matter.
        ridge: share of the scaled identity in the covariance.

    Raises:
        ValueError: there is no contrast, or the ridge is lost beside fewer activations than dimensions.
    """
    if not contrasts:
        raise ValueError("There is no pair of harmful and harmless prompts to tell apart.")
    deviations = [torch.cat([cell.double() - cell.double().mean(dim=0) for cell in cells])]
    for parts in nuisance:
        means = torch.stack([part.double().mean(dim=0) for part in parts])
        deviations.append(means - means.mean(dim=0))
    ends = [torch.stack([pair[i].double().mean(dim=0) for pair in contrasts]).mean(dim=0) for i in (0, 1)]
    difference = ends[0] - ends[1]
    direction = _whitened_twice(deviations, difference, ridge)
    return Detector(direction / (difference @ direction), (ends[0] + ends[1]) / 2)


def _whitened_twice(deviations: Sequence[torch.Tensor], difference: torch.Tensor, ridge: float) -> torch.Tensor:
    """``C^-1 difference`` for C the shrunk sum of the covariances of sets of deviations (n, d), each of mean 0."""
    rows = torch.cat([part / len(part) ** 0.5 for part in deviations])
    count, d = rows.shape
    if count >= d or ridge == 0:
        return torch.linalg.solve(shrink(rows.mT @ rows, ridge), difference)
    scatter = RowScatter(rows)
    whitening = scatter.whitening(1 - ridge, ridge * float(scatter.trace()) / d)
    return whitening.out(whitening.back(difference[:, None]))[:, 0]


@dataclass(frozen=True, eq=False)
class Detectors:
    """What must agree before the gate fires, and its alarms, of which one is enough: for prompts without and with an
    image, or, if `pictured` is empty, for all."""

    required: list[Detector]
    alarms: list[Detector]
    pictured: list[Detector]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many there are of each."""
        return len(self.required), len(self.alarms), len(self.pictured)

    @property
    def all(self) -> list[Detector]:
        """In the order in which a `Gate` has them."""
        return [*self.required, *self.alarms, *self.pictured]


def fit_detectors(prompts: Prompts, ridge: float) -> Detectors:
    """Fit the detectors of a gate.

    Required is, where there are exposed and neutral prompts, that something is asked for that may be refused: benign
    and malicious prompts against neutral and exposed ones. Alarms tell harm, one over all contrasts and, if malicious
    prompts are of several kinds, one over those of malicious prompts alone: the first carries over to attacks that the
    second does not know.

    Raises:
        ValueError: there are no malicious or no benign prompts.
    """
    cells = prompts.by_cell()
    for name in ("benign", "malicious"):
        if not any(cell.of == name for cell in cells):
            raise ValueError(f"There are no {name} prompts to fit detectors on; add some.")
    harmless = [h for cell, h in cells.items() if cell.of in HARMLESS.values()]
    pairs = [(cell, h, _counterpart(cell, cells)) for cell, h in cells.items() if cell.of in HARMLESS]

    def alarms(among: list) -> list[Detector]:
        malicious = [pair for pair in among if pair[0].of == "malicious"]
        # Of one kind alone it would know nothing that the first does not, and mistake more.
        several = len({pair[0].kind for pair in malicious}) > 1
        chosen = [among, malicious] if several and len(malicious) < len(among) else [among]
        return [discriminant([p[1:] for p in own], list(cells.values()), [harmless], ridge) for own in chosen]

    channels = [alarms([p for p in pairs if p[0].pictured == c]) for c in sorted({p[0].pictured for p in pairs})]
    asking, not_asking = (
        [h for cell, h in cells.items() if cell.of in names]
        for names in (("benign", "malicious"), ("neutral", "exposed"))
    )
    required = []
    if not_asking:
        pair = (torch.cat(asking), torch.cat(not_asking))
        required = [discriminant([pair], list(cells.values()), [asking, not_asking], ridge)]
    return Detectors(required, channels[0], channels[1] if len(channels) > 1 else [])


def _counterpart(cell: Cell, cells: dict[Cell, torch.Tensor]) -> torch.Tensor:
    """The harmless prompts that are most like those of `cell`: of its kind if there are such, else of its modality."""
    harmless = {other: h for other, h in cells.items() if other.of == HARMLESS[cell.of]}
    if not harmless:
        raise ValueError(f"There are {cell.of} prompts but no {HARMLESS[cell.of]} ones to tell them from; add some.")
    for alike in (
        lambda c: c.kind == cell.kind and c.pictured == cell.pictured,
        lambda c: c.kind == cell.kind,
        lambda c: c.pictured == cell.pictured,
    ):
        found = [h for other, h in harmless.items() if alike(other)]
        if found:
            return torch.cat(found)
    return torch.cat(list(harmless.values()))


def held_out(groups: Sequence[tuple[str, ...]], folds: int = FOLDS) -> Iterator[tuple[list[bool], list[bool]]]:
    """Yield, per fold, which prompts to train on and which to test on: no group of a tested prompt is trained on.

    The n-th groups of all prompts are dealt out to the folds in order of first appearance. A fold tests the prompts
    all of whose groups it holds, and trains on those none of whose groups it holds.
    """
    positions = max(map(len, groups))
    fold_of: list[dict[str, int]] = [{} for _ in range(positions)]
    for labels in groups:
        for known, label in zip(fold_of, labels, strict=False):
            known.setdefault(label, len(known) % folds)
    for fold in range(folds):
        hits = [[known[label] == fold for known, label in zip(fold_of, labels, strict=False)] for labels in groups]
        yield [not any(hit) for hit in hits], [all(hit) for hit in hits]


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Scores of n prompts by detectors that saw nothing of their groups.

    Attributes:
        required: (n, r).
        alarms: (n, a), by the alarms for prompts without an image, or for all.
        pictured: (n, p), by those for prompts with one.
        cells: of every prompt.
    """

    required: torch.Tensor
    alarms: torch.Tensor
    pictured: torch.Tensor
    cells: Sequence[Cell]

    def asked(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The sets of alarms, each with the prompts, bool (n,), that it is asked about."""
        has_image = torch.tensor([cell.pictured for cell in self.cells])
        if not self.pictured.shape[1]:
            return [(self.alarms, torch.ones_like(has_image))]
        return [(self.alarms, ~has_image), (self.pictured, has_image)]

    def fires(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Where the gate would fire, bool (n,), at thresholds (r + a + p,)."""
        sizes = [scores.shape[1] for scores in (self.required, self.alarms, self.pictured)]
        required, *limits = thresholds.split(sizes)
        loud = torch.zeros(len(self.cells), dtype=torch.bool)
        for (scores, prompts), limit in zip(self.asked(), limits, strict=False):
            loud |= prompts & (scores > limit).any(dim=1)
        return (self.required > required).all(dim=1) & loud


def cross_fit(prompts: Prompts, ridge: float, folds: int = FOLDS) -> HeldOutScores:
    """Score prompts by detectors fitted without their groups.

    Raises:
        ValueError: a fold would be left without prompts to train on or to test, or without some class or modality.
    """
    counts = fit_detectors(prompts, ridge).counts
    scores: list[list[torch.Tensor]] = [[], [], []]
    cells: list[Cell] = []
    for train, test in held_out(prompts.groups, folds):
        if not any(test) or not any(train):
            raise ValueError(
                f"{len(prompts.cells)} prompts in these groups cannot be held out in {folds} folds; give prompts of "
                f"at least {folds} concepts and, where templates are named, {folds} templates, or name fewer groups."
            )
        tested, fitted = prompts.where(test), fit_detectors(prompts.where(train), ridge)
        if fitted.counts != counts:
            raise ValueError(
                "With some groups held out, no prompts of some class are left, or none with or without an image; give "
                "prompts of more groups in every class, with and without images alike."
            )
        for into, detectors in zip(scores, (fitted.required, fitted.alarms, fitted.pictured), strict=True):
            columns = [detector.scores(tested.activations) for detector in detectors]
            into.append(torch.stack(columns, dim=1) if columns else torch.zeros(len(tested.cells), 0))
        cells += tested.cells
    return HeldOutScores(*(torch.cat(parts).double() for parts in scores), cells)


def thresholds(scores: HeldOutScores, false_alarms: float) -> torch.Tensor:
    """Thresholds that a share `false_alarms` of no kind of prompt that should be answered exceeds, in a gate's order.

    The share is that of a normal distribution with the mean and deviation of the kind's held-out scores: small shares
    of few prompts are not seen otherwise. A required detector is set on the kinds of neutral and exposed prompts, and,
    where a gap is left to those of requests, in the middle of the gap; alarms are set on the benign kinds that they are
    asked about, as all others are kept off by what is required, and share the allowance.

    Raises:
        ValueError: of such prompts none were held out.
    """
    kinds = [(cell, torch.tensor([c == cell for c in scores.cells])) for cell in dict.fromkeys(scores.cells)]
    limits = []
    for column in scores.required.unbind(dim=1):
        high = _highest(column, [rows for cell, rows in kinds if cell.of in ("neutral", "exposed")], false_alarms)
        low = -_highest(-column, [rows for cell, rows in kinds if cell.of in ("benign", "malicious")], false_alarms)
        limits.append((high + low) / 2 if low > high else high)
    for alarms, prompts in scores.asked():
        own = [rows for cell, rows in kinds if cell.of == "benign" and (rows & prompts).any()]
        limits += [_highest(column, own, false_alarms / alarms.shape[1]) for column in alarms.unbind(dim=1)]
    return torch.tensor(limits, dtype=torch.float64)


def _highest(column: torch.Tensor, kinds: Sequence[torch.Tensor], share: float) -> float:
    """What a share of no kind's scores exceeds; a kind is given by its rows."""
    if not kinds:
        raise ValueError(
            "A detector has no held-out prompts that should be answered, so it gets no threshold; where malicious or "
            "exposed prompts have images, and where they have none, benign prompts must, too."
        )
    scores = [column[rows] for rows in kinds]
    return max(float(values.mean() + norm.isf(share) * values.std(correction=0)) for values in scores)


def calibration(scores: HeldOutScores, false_alarms: float) -> dict:
    """What the held-out scores say of the gate, as plain values: rates per kind at the target, and a curve over others.

    Rates are shares of prompts on which the gate fires: false alarms of all classes but "malicious".
    """

    def rates(target: float) -> dict[str, dict]:
        fires = scores.fires(thresholds(scores, target))
        table: dict[str, dict] = {}
        for cell in dict.fromkeys(scores.cells):
            rows = torch.tensor([c == cell for c in scores.cells])
            name = f"{cell.of}/{cell.kind}/{'image' if cell.pictured else 'text'}"
            table[name] = {"n": int(rows.sum()), "fires": int(fires[rows].sum())}
        return table

    def pooled(table: dict[str, dict]) -> dict[str, float]:
        shares = {}
        for of in CLASSES:
            rows = [row for name, row in table.items() if name.startswith(f"{of}/")]
            if rows:
                shares[of] = sum(row["fires"] for row in rows) / sum(row["n"] for row in rows)
        return shares

    curve = [{"target": target, **pooled(rates(target))} for target in CURVE]
    return {"target": false_alarms, "folds": FOLDS, "kinds": rates(false_alarms), "curve": curve}


def assemble(prompt_end: Sequence[int], detectors: Detectors, set_at: torch.Tensor) -> Gate:
    """One `Gate` from detectors and their thresholds."""
    limits = [at + float(d.centre @ d.direction) for d, at in zip(detectors.all, set_at.tolist(), strict=True)]
    readers = torch.stack([detector.direction for detector in detectors.all], dim=1)
    limits = torch.tensor(limits, dtype=torch.float64)
    return Gate(tuple(prompt_end), readers, limits, len(detectors.required), len(detectors.pictured))
