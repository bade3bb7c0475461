"""How far two sets of activations lie apart, beside what random labels give: tensors in, numbers out, float64 inside.

In d = 4096 dimensions a few hundred vectors look separated whatever their labels, so no measure says much by itself.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CLASSES = ("benign", "malicious")
MEASURES = ("silhouette", "scatter_ratio", "mahalanobis", "auc")
LEAST_SHRINKAGE = 1e-9  # with which any covariance but 0 can be inverted


@dataclass(frozen=True)
class SiteSeparability:
    """How far the two classes lie apart at one site; what the measures are, `separate` says.

    Attributes:
        silhouette: in [-1, 1].
        scatter_ratio: from 0; inf if all activations within each class are equal and those of the classes are not.
        mahalanobis: from 0; inf likewise.
        auc: in [0, 1]; 0.5 is chance, and less is what chance gives, too.
        control: per measure the mean and the 95 % quantile over random labels.
    """

    silhouette: float
    scatter_ratio: float
    mahalanobis: float
    auc: float
    control: Mapping[str, tuple[float, float]]


# Labels, their folds, and random labels


@dataclass(frozen=True, eq=False)
class Labelling:
    """Labels of n rows, and the folds in which a probe is tried on them.

    Attributes:
        malicious: bool (n,).
        splits: indices to train on and to test on; in both are rows of both classes.
    """

    malicious: np.ndarray
    splits: list[tuple[np.ndarray, np.ndarray]]


def plan_labellings(
    groups: Sequence[Sequence[int]], folds: int, permutations: int, shrinkage: str | float, seed: int
) -> list[Labelling]:
    """The true labels and then `permutations` random ones, so that all sites are measured with the same.

    Args:
        groups: numbers of the groups of benign and of malicious rows.
        folds: see `separate`, as the others.
        permutations: random labellings.
        shrinkage: only checked, so that a bad one is named before long work.
        seed: of the folds and of the random labels.

    Raises:
        ImportError, ValueError: as `separate`.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError as error:
        raise ImportError("Separability needs scikit-learn; install it with `pip install scikit-learn`.") from error
    _check_settings(folds, permutations, shrinkage, seed)
    _check_counts(groups, folds)
    group = np.concatenate([np.asarray(own) for own in groups])
    true = np.arange(len(group)) >= len(groups[0])
    grouped = len(set(group.tolist())) < len(group)
    cut = (StratifiedGroupKFold if grouped else StratifiedKFold)(folds, shuffle=True, random_state=seed)
    blocks = np.unique(2 * group + true, return_inverse=True)[1]
    of_block = np.zeros(blocks.max() + 1, dtype=bool)
    of_block[blocks] = true
    rng = np.random.default_rng(seed)
    plan: list[Labelling] = []
    while len(plan) <= permutations:
        labels = rng.permutation(of_block)[blocks] if plan else true
        found = cut.split(np.zeros(len(labels)), labels, group if grouped else None)
        splits = [fold for fold in found if all(0 < labels[part].sum() < len(part) for part in fold)]
        if splits:
            plan.append(Labelling(labels, splits))
        elif not plan:
            raise ValueError(f"None of {folds} folds holds prompts of both classes; pass other `groups=` or `folds=`.")
    return plan


def _check_settings(folds: int, permutations: int, shrinkage: str | float, seed: int) -> None:
    for name, value, least in (("folds", folds, 2), ("permutations", permutations, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
    share = isinstance(shrinkage, (int, float)) and not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1
    if shrinkage != "ledoit-wolf" and not share:
        raise ValueError(f"shrinkage={shrinkage!r} must be 'ledoit-wolf' or a number in [0, 1].")


def _check_counts(groups: Sequence[Sequence[int]], folds: int) -> None:
    for name, own in zip(CLASSES, groups, strict=True):
        if len(own) < 2 * folds:
            raise ValueError(
                f"There are {len(own)} {name} prompts, and folds={folds} needs at least {2 * folds} of each class; "
                "give more prompts or lower `folds`."
            )
        if len(set(own)) < folds:
            raise ValueError(
                f"The {name} prompts are of {len(set(own))} groups, and folds={folds} needs at least {folds}: give "
                "prompts of more groups, lower `folds`, or pass `groups=` (prompts that share a label, be it by way of "
                "others, are one group)."
            )


def group_ids(labels: Sequence[Iterable[Hashable]]) -> list[int]:
    """One number per prompt; prompts that share a label, be it by way of others, have the same."""
    known: dict[Hashable, int] = {}
    edges = [(i, len(labels) + known.setdefault(x, len(known))) for i, own in enumerate(labels) for x in own]
    size = len(labels) + len(known)
    graph = coo_array((np.ones(len(edges)), tuple(np.reshape(edges, (-1, 2)).T.astype(int))), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(labels)].tolist()


def given_groups(groups: Mapping[str, Sequence[Hashable]] | None, counts: Sequence[int]) -> list[list[int]]:
    """Numbers for the groups of benign and of malicious prompts; without groups each prompt has its own."""
    if groups is None:
        groups = {"benign": range(counts[0]), "malicious": range(counts[0], sum(counts))}
    if set(groups) != set(CLASSES) or [len(groups[name]) for name in CLASSES] != list(counts):
        found = {name: len(own) for name, own in groups.items()}
        raise ValueError(f"`groups` must hold {counts[0]} 'benign' and {counts[1]} 'malicious' labels; got {found}.")
    ids = group_ids([(label,) for name in CLASSES for label in groups[name]])
    return [ids[: counts[0]], ids[counts[0] :]]


# Measures of one site


def separate(
    benign: torch.Tensor,
    malicious: torch.Tensor,
    *,
    groups: Mapping[str, Sequence[Hashable]] | None = None,
    folds: int = 5,
    permutations: int = 20,
    shrinkage: str | float = "ledoit-wolf",
    seed: int = 0,
) -> SiteSeparability:
    """Measure how far two sets of activations lie apart, in float64; the same seed gives the same numbers.

    With n_c of n rows in class c, class means m_c and overall mean m:

    - silhouette: mean over rows of ``(b - a) / max(a, b)``, a and b the mean Euclidean distances to the other rows of
      the own and to those of the other class (Rousseeuw 1987; scikit-learn).
    - scatter_ratio: ``tr(S_B) / tr(S_W)``, ``S_B = sum_c n_c/n (m_c - m)(m_c - m)^T`` and ``S_W = 1/n sum_i
      (x_i - m_c(i))(x_i - m_c(i))^T``: each class weighs by its size.
    - mahalanobis: ``sqrt(D^T C^-1 D)`` with ``D = m_malicious - m_benign``, ``C = (1 - s) S_W + s tr(S_W)/d I``, and s
      after Ledoit and Wolf (2004), or given; at least 1e-9.
    - auc: of a logistic regression (L2, scikit-learn's C = 1) on standardised features that predicts held-out rows:
      the share of the pairs of a malicious and a benign row of one fold that the scores rank right. That is the mean
      of the folds' AUCs weighted by their numbers of pairs: scores of different folds are by different probes, and are
      not compared. Features are standardised over all rows, which tells the probe nothing about labels.

    If all rows are equal these are 0, 0, 0 and 0.5. The control gives the same measures with random labels: labels are
    dealt anew to whole blocks, a block being the rows of one class in one group, so that what groups have in common
    separates random labels as much as it could the true ones.

    Args:
        benign: (n_b, d), any floating dtype.
        malicious: (n_m, d).
        groups: labels of the rows under "benign" and "malicious"; rows that share one, in either class, are held out
            together. None: every row for itself.
        folds: of the cross-validation.
        permutations: random labellings.
        shrinkage: s, "ledoit-wolf" or a number in [0, 1].
        seed: of the folds and of the random labels.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes do not fit; a value is not finite; a class has fewer than ``2 * folds`` rows or fewer groups
            than folds; an argument is out of range.
    """
    if benign.ndim != 2 or malicious.ndim != 2 or benign.shape[1] != malicious.shape[1] or not benign.shape[1]:
        raise ValueError(
            f"`benign` {tuple(benign.shape)} and `malicious` {tuple(malicious.shape)} must be (n_b, d) and (n_m, d)."
        )
    for name, values in (("benign", benign), ("malicious", malicious)):
        if not torch.isfinite(values).all():
            raise ValueError(f"`{name}` holds values that are not finite; check the activations that it comes from.")
    plan = plan_labellings(given_groups(groups, (len(benign), len(malicious))), folds, permutations, shrinkage, seed)
    return separate_planned(torch.cat([benign.cpu(), malicious.cpu()]), plan, shrinkage)


def separate_planned(x: torch.Tensor, plan: Sequence[Labelling], shrinkage: str | float) -> SiteSeparability:
    """`separate` rows (n, d) with the labels of a plan, the true ones first; `x` must be finite."""
    from sklearn.metrics import silhouette_score

    x = x.double()
    equal_rows = torch.unique(x, dim=0, return_inverse=True)[1].numpy()
    if equal_rows.max() == 0:
        return SiteSeparability(0.0, 0.0, 0.0, 0.5, {n: (0.5, 0.5) if n == "auc" else (0.0, 0.0) for n in MEASURES})
    d, centred = x.shape[1], x - x.mean(dim=0)
    spread = centred.square().mean(dim=0).sqrt()
    # A constant feature. Where rounding hides that, what is divided is the same in all rows: no more than an intercept.
    spread[spread == 0] = 1
    coordinates, standardised = _coordinates(centred), _coordinates(centred / spread).numpy()
    distances = torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for labelling in plan:
        labels = labelling.malicious
        found["silhouette"].append(float(silhouette_score(distances, labels, metric="precomputed")))
        if all(len(set(equal_rows[labels == of])) == 1 for of in (False, True)):
            ratio = distance = math.inf
        else:
            ratio, distance = _scatter(coordinates, torch.from_numpy(labels), d, shrinkage)
        found["scatter_ratio"].append(ratio)
        found["mahalanobis"].append(distance)
        found["auc"].append(_auc(standardised, labelling))
    control = {name: _summary(values[1:]) for name, values in found.items()}
    return SiteSeparability(*(found[name][0] for name in MEASURES), control)


def _coordinates(x: torch.Tensor) -> torch.Tensor:
    """(n, min(n, d)) with all inner products of the rows of `x` (n, d), which is all that the measures depend on."""
    return torch.linalg.qr(x.mT, mode="r").R.mT.contiguous() if len(x) < x.shape[1] else x


def _summary(values: Sequence[float]) -> tuple[float, float]:
    # Without interpolation, which infinities do not have.
    return float(np.mean(values)), sorted(values)[-(-95 * len(values) // 100) - 1]


def _scatter(x: torch.Tensor, malicious: torch.Tensor, d: int, shrinkage: str | float) -> tuple[float, float]:
    """Scatter ratio and Mahalanobis distance of coordinates `x` of rows that have d features."""
    n, parts = len(x), (x[~malicious], x[malicious])
    difference = parts[1].mean(dim=0) - parts[0].mean(dim=0)
    residuals = torch.cat([part - part.mean(dim=0) for part in parts])
    covariance = residuals.mT @ residuals / n
    within = covariance.trace()
    between = len(parts[0]) * len(parts[1]) / n**2 * difference.square().sum()
    share = _ledoit_wolf(residuals, covariance, d) if shrinkage == "ledoit-wolf" else float(shrinkage)
    share = max(share, LEAST_SHRINKAGE)
    identity = torch.eye(len(covariance), dtype=x.dtype)
    shrunk = (1 - share) * covariance + share * within / d * identity
    return float(between / within), float((difference @ torch.linalg.solve(shrunk, difference)).clamp(min=0).sqrt())


def _ledoit_wolf(residuals: torch.Tensor, covariance: torch.Tensor, d: int) -> float:
    """As `RunningCovariance.ledoit_wolf_shrinkage`, of centred rows with d features of which coordinates are given."""
    n, squares = len(residuals), covariance.square().sum()
    delta = squares / d - (covariance.trace() / d) ** 2
    beta = (residuals.square().sum(dim=1).square().mean() - squares) / (n * d)
    return float((beta.clamp(min=0) / delta).clamp(max=1)) if delta > 0 else 0.0


def _auc(x: np.ndarray, labelling: Labelling) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    labels, right, pairs = labelling.malicious, 0.0, 0
    for train, test in labelling.splits:
        probe = LogisticRegression(max_iter=1000).fit(x[train], labels[train])
        count = int(labels[test].sum()) * int((~labels[test]).sum())
        right += count * roc_auc_score(labels[test], probe.decision_function(x[test]))
        pairs += count
    return float(right / pairs)
