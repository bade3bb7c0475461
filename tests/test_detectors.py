import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from care_hf.detectors import (
    CURVE,
    FOLDS,
    Cell,
    HeldOutScores,
    Prompts,
    assemble,
    calibration,
    cross_fit,
    discriminant,
    fit_detectors,
    held_out,
    thresholds,
)
from care_hf.gating import GateReader

D = 12


def noise(seed, n=40, shift=None):
    h = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return h if shift is None else h + torch.as_tensor(shift, dtype=h.dtype)


def axis(index, size=1.0):
    vector = torch.zeros(D)
    vector[index] = size
    return vector


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(torch.as_tensor(a).double(), torch.as_tensor(b).double(), dim=0))


# The discriminant


@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
@pytest.mark.parametrize("sizes", [(60, 60), (30, 90)])
def test_two_parts_without_nuisance_give_the_direction_of_sklearn(solver, sizes):
    harmful, harmless = noise(0, sizes[0], axis(0, 2) + axis(3, -1)), noise(1, sizes[1])
    detector = discriminant([(harmful, harmless)], [harmful, harmless], [], ridge=1e-10)
    theirs = LinearDiscriminantAnalysis(solver=solver).fit(
        torch.cat([harmful, harmless]).double().numpy(), [1] * sizes[0] + [0] * sizes[1]
    )
    assert cosine(detector.direction, theirs.coef_[0]) > 1 - 1e-8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.integers(1, 3))
def test_the_direction_solves_the_normal_equations_of_numpy(seed, ridge, pairs):
    contrasts = [(noise(seed + i, 15 + i, axis(0)), noise(seed + 10 + i, 20)) for i in range(pairs)]
    nuisance = [[noise(seed + 20 + i, 8, axis(i, 4)) for i in range(3)], [noise(seed + 30 + i, 5) for i in range(2)]]
    cells = [h for pair in contrasts for h in pair] + nuisance[0]
    detector = discriminant(contrasts, cells, nuisance, ridge)

    arrays = [cell.double().numpy() for cell in cells]
    total = sum(len(a) * np.cov(a.T, bias=True) for a in arrays) / sum(map(len, arrays))
    for parts in nuisance:
        total = total + np.cov(np.stack([p.double().numpy().mean(0) for p in parts]).T, bias=True)
    total = (1 - ridge) * total + ridge * np.trace(total) / D * np.eye(D)
    means = [np.mean([pair[i].double().numpy().mean(0) for pair in contrasts], axis=0) for i in (0, 1)]
    direction = scipy.linalg.solve(total, means[0] - means[1], assume_a="pos")
    np.testing.assert_allclose(
        detector.direction, direction / (direction @ (means[0] - means[1])), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(detector.centre, (means[0] + means[1]) / 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_harmful_and_harmless_means_lie_at_plus_and_minus_one_half(seed, pairs):
    contrasts = [(noise(seed + i, 12 + i, axis(i)), noise(seed + 10 + i, 9)) for i in range(pairs)]
    detector = discriminant(contrasts, [h for pair in contrasts for h in pair], [], ridge=0.1)
    ends = [np.mean([float(detector.scores(pair[i]).mean()) for pair in contrasts]) for i in (0, 1)]
    np.testing.assert_allclose(ends, [0.5, -0.5], atol=1e-6)


def test_it_is_blind_to_what_kind_a_prompt_is():
    shift = axis(1, 3) + axis(2, 3)
    harmful, harmless = noise(0, 200, axis(0, 2) + 0.2 * shift), noise(1, 200)
    kinds = [noise(2 + i, 200, shift * size) for i, size in enumerate((-40, 0, 40))]
    cells = [harmful, harmless, *kinds]
    seeing = discriminant([(harmful, harmless)], cells, [], ridge=1e-6)
    blind = discriminant([(harmful, harmless)], cells, [kinds], ridge=1e-6)
    assert abs(float(seeing.direction @ shift.double())) > 0.2
    assert abs(float(blind.direction @ shift.double())) < 0.02
    means = torch.stack([blind.scores(kind).mean() for kind in kinds])
    assert float(means.max() - means.min()) < 0.5 and float(seeing.scores(kinds[2]).mean()) > 5


def test_a_discriminant_needs_a_contrast():
    with pytest.raises(ValueError, match="no pair"):
        discriminant([], [noise(0)], [], 0.1)


# Which prompts are told from which


def prompts(table, groups=None):
    """Prompts from (class, kind, pictured, activations) rows; group i of FOLDS * 2 in turn unless told."""
    cells = [Cell(of, kind, pictured) for of, kind, pictured, h in table for _ in h]
    whole = torch.cat([h for *_, h in table])
    return Prompts(whole, cells, groups or [(f"g{i % (2 * FOLDS)}",) for i in range(len(cells))])


def alarm_of(contrasts, table, harmless, ridge=0.1):
    return discriminant(contrasts, [h for *_, h in table], [harmless], ridge)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([("a", True), ("a", False), ("b", True)], ["a/True"]),  # its kind and modality
        ([("a", False), ("b", True)], ["a/False"]),  # its kind
        ([("b", True), ("c", True), ("b", False)], ["b/True", "c/True"]),  # its modality
        ([("b", False), ("c", False)], ["b/False", "c/False"]),  # whatever there is
    ],
)
def test_harm_is_told_from_the_harmless_prompts_most_like_it(others, expected):
    harmful = noise(0, 20, axis(0, 3))
    harmless = {f"{kind}/{pictured}": noise(1 + i, 20, axis(1 + i, 2)) for i, (kind, pictured) in enumerate(others)}
    table = [("malicious", "a", True, harmful)]
    table += [("benign", kind, pictured, harmless[f"{kind}/{pictured}"]) for kind, pictured in others]
    detectors = fit_detectors(prompts(table), 0.1)
    assert detectors.counts == (0, 1, 0)
    counterpart = torch.cat([harmless[name] for name in expected])
    reference = alarm_of([(harmful, counterpart)], table, list(harmless.values()))
    torch.testing.assert_close(detectors.alarms[0].direction, reference.direction)


def full_table(size=4.0, n=24):
    """All classes with and without images; harm on axis 0, asking on axis 1, the image on axis 2."""
    table = []
    for i, pictured in enumerate((False, True)):
        image = axis(2, 3.0 * pictured)
        for j, (of, kind) in enumerate(
            [
                ("benign", "a"),
                ("malicious", "a"),
                ("neutral", "q"),
                ("exposed", "q"),
                ("benign", "b"),
                ("malicious", "b"),
            ]
        ):
            harm = axis(0, size) if of in ("malicious", "exposed") else torch.zeros(D)
            asking = axis(1, 8.0) if of in ("benign", "malicious") else torch.zeros(D)
            table.append((of, kind, pictured, noise(10 * i + j, n, harm + asking + image)))
    return table


def test_all_classes_give_one_required_detector_and_two_alarms_per_modality():
    table = full_table()
    detectors = fit_detectors(prompts(table), 0.1)
    assert detectors.counts == (1, 2, 2)
    by = {(of, kind, pictured): h for of, kind, pictured, h in table}
    harmless = [h for of, _, _, h in table if of in ("benign", "neutral")]
    for pictured, alarms in zip((False, True), (detectors.alarms, detectors.pictured), strict=True):
        pairs = [
            (by["malicious", "a", pictured], by["benign", "a", pictured]),
            (by["exposed", "q", pictured], by["neutral", "q", pictured]),
            (by["malicious", "b", pictured], by["benign", "b", pictured]),
        ]
        for alarm, own in zip(alarms, (pairs, pairs[::2]), strict=True):
            torch.testing.assert_close(alarm.direction, alarm_of(own, table, harmless).direction)
    asking = [h for of, _, _, h in table if of in ("benign", "malicious")]
    not_asking = [h for of, _, _, h in table if of in ("neutral", "exposed")]
    reference = discriminant(
        [(torch.cat(asking), torch.cat(not_asking))], asking + not_asking, [asking, not_asking], 0.1
    )
    torch.testing.assert_close(detectors.required[0].direction, reference.direction)


def test_malicious_prompts_of_one_kind_have_no_alarm_of_their_own():
    table = [row for row in full_table() if row[:2] != ("malicious", "b")]
    assert fit_detectors(prompts(table), 0.1).counts == (1, 1, 1)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("benign",), "no malicious prompts"),
        (("malicious",), "no benign prompts"),
        (("benign", "malicious", "exposed"), "exposed prompts but no neutral"),
    ],
)
def test_classes_that_are_missing_are_named(kept, message):
    with pytest.raises(ValueError, match=message):
        fit_detectors(prompts([row for row in full_table() if row[0] in kept]), 0.1)


# Holding out


labels = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=2).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(labels, min_size=1, max_size=25), st.integers(2, 5))
def test_no_group_of_a_tested_prompt_is_trained_on(groups, folds):
    splits = list(held_out(groups, folds))
    assert len(splits) == folds
    tested = [0] * len(groups)
    for train, test in splits:
        for position in range(2):
            of = [
                {g[position] for g, keep in zip(groups, rows, strict=True) if keep and len(g) > position}
                for rows in (train, test)
            ]
            assert not of[0] & of[1]
        assert not any(a and b for a, b in zip(train, test, strict=True))
        tested = [count + is_tested for count, is_tested in zip(tested, test, strict=True)]
    assert max(tested) <= 1
    assert all(count == 1 for count, group in zip(tested, groups, strict=True) if len(group) == 1)


def test_held_out_scores_are_those_of_detectors_fitted_without_the_groups():
    given = prompts(full_table())
    scores = cross_fit(given, 0.1)
    assert len(scores.cells) == len(given.cells)
    assert (scores.required.shape[1], scores.alarms.shape[1], scores.pictured.shape[1]) == (1, 2, 2)
    start = 0
    for train, test in held_out(given.groups):
        fitted = fit_detectors(given.where(train), 0.1)
        tested = given.where(test)
        rows = slice(start, start := start + len(tested.cells))
        assert scores.cells[rows] == tested.cells
        for name in ("required", "alarms", "pictured"):
            for column, detector in enumerate(getattr(fitted, name)):
                torch.testing.assert_close(getattr(scores, name)[rows, column], detector.scores(tested.activations))


def test_what_cannot_be_held_out_is_named():
    table = full_table(n=4)
    with pytest.raises(ValueError, match="cannot be held out in 4 folds"):
        cross_fit(prompts(table, [("one",)] * 48), 0.1)
    # All prompts of a class share a group, so that the fold that holds it out is left without any.
    for of, message in (("malicious", "no malicious prompts"), ("pictured", "or none with or without an image")):
        rows = [row for row in table if of == "malicious" or row[0] != "malicious" or not row[2]]
        alone = [row[0] == "malicious" if of == "malicious" else row[0] == "exposed" and row[2] for row in rows]
        groups = [("shared" if is_alone else f"g{i}",) for is_alone in alone for i in range(4)]
        with pytest.raises(ValueError, match=message):
            cross_fit(prompts(rows, groups), 0.1)


# Thresholds


def normal_scores(n, required=1, alarms=1, pictured=1, seed=0):
    """Scores of normal kinds: alarms about 0, or 8 if harmful; what is required about 0, or 5 if something is asked."""
    rng = np.random.default_rng(seed)
    cells, columns = [], []
    for has_image in (False, True):
        for of, kind in (("benign", "a"), ("benign", "b"), ("neutral", "q"), ("exposed", "q"), ("malicious", "a")):
            cells += [Cell(of, kind, has_image)] * n
            asks, harm = of in ("benign", "malicious"), of in ("malicious", "exposed")
            spread = 2.0 if kind == "b" else 1.0
            columns.append(
                np.column_stack(
                    [rng.normal(5.0 * asks, 1.0, (n, required)), rng.normal(8.0 * harm, spread, (n, alarms + pictured))]
                )
            )
    values = torch.from_numpy(np.concatenate(columns))
    return HeldOutScores(*values.split([required, alarms, pictured], dim=1), cells)


@pytest.mark.parametrize(("alarms", "pictured"), [(1, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("target", [0.01, 0.05])
def test_the_target_share_of_normal_scores_exceeds_a_threshold(target, alarms, pictured):
    scores = normal_scores(4000, alarms=alarms, pictured=pictured)
    _, *limits = thresholds(scores, target).split([1, alarms, pictured])
    for has_image in (False, True):
        own, limit = (scores.pictured, limits[1]) if pictured and has_image else (scores.alarms, limits[0])
        for kind in ("a", "b"):
            rows = torch.tensor([cell == Cell("benign", kind, has_image) for cell in scores.cells])
            share = float((own[rows] > limit).any(dim=1).double().mean())
            # The wider kind sets the threshold; the narrower one stays far below.
            assert abs(share - target) < 0.3 * target if kind == "b" else share < target / 3
    wide = [torch.tensor([c.kind == "b" and (c.pictured == p or not pictured) for c in scores.cells]) for p in (0, 1)]
    for column, at in enumerate(limits[0]):
        values = scores.alarms[wide[0], column]
        if pictured:
            expected = float(values.mean() + norm.isf(target / alarms) * values.std(correction=0))
            np.testing.assert_allclose(at, expected)


def test_what_is_required_is_set_in_the_middle_of_a_gap_and_at_its_foot_without_one():
    scores = normal_scores(2000)
    wide = thresholds(scores, 0.01)[0]
    assert abs(float(wide) - 2.5) < 0.15
    close = replace(scores, required=scores.required * torch.tensor(0.2))
    # Scaled, the gap stays a gap; moved down among the others, the askers leave none.
    assert abs(float(thresholds(close, 0.01)[0]) - 0.5) < 0.05
    asking = torch.tensor([cell.of in ("benign", "malicious") for cell in scores.cells])
    overlapping = torch.where(asking[:, None], scores.required - 4, scores.required)
    limit = thresholds(replace(scores, required=overlapping), 0.01)[0]
    assert abs(float(limit) - norm.isf(0.01)) < 0.15


def test_a_detector_without_harmless_prompts_gets_no_threshold():
    scores = normal_scores(20)
    text = [not (cell.of == "benign" and cell.pictured) for cell in scores.cells]
    cells = [cell for cell, keep in zip(scores.cells, text, strict=True) if keep]
    kept = HeldOutScores(scores.required[text], scores.alarms[text], scores.pictured[text], cells)
    with pytest.raises(ValueError, match="gets no threshold"):
        thresholds(kept, 0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_assembled_gate_fires_where_the_scores_do(seed, asks, both):
    table = full_table(size=1.5, n=8)
    table = [row for row in table if (asks or row[0] in ("benign", "malicious")) and (both or not row[2])]
    given = prompts(table)
    detectors = fit_detectors(given, 0.1)
    per_modality = 1 + asks  # one over all contrasts, one over those of malicious prompts, if there are others
    assert detectors.counts == (int(asks), per_modality, both * per_modality)
    h = noise(seed, len(given.cells)) * 3
    columns = [
        torch.stack([d.scores(h) for d in found], dim=1) if found else torch.zeros(len(h), 0).double()
        for found in (detectors.required, detectors.alarms, detectors.pictured)
    ]
    scores = HeldOutScores(*columns, given.cells)
    generator = torch.Generator().manual_seed(seed)
    set_at = torch.randn(len(detectors.all), generator=generator).double() * 0.3
    gate = assemble([3, 4], detectors, set_at)
    assert gate.prompt_end == (3, 4)
    assert (gate.required, gate.alarms, gate.pictured) == detectors.counts
    reader = GateReader.from_gate(gate)
    assume((reader.margins(h).abs() > 1e-4).all())
    pictured = torch.tensor([cell.pictured for cell in given.cells])
    assert torch.equal(reader(h, pictured), scores.fires(set_at))


def test_the_calibration_counts_what_fires_by_kind():
    scores = normal_scores(200)
    report = calibration(scores, 0.02)
    assert json.loads(json.dumps(report)) == report
    assert (report["target"], report["folds"]) == (0.02, FOLDS)
    fires = scores.fires(thresholds(scores, 0.02))
    expected = {}
    for cell, fired in zip(scores.cells, fires.tolist(), strict=True):
        row = expected.setdefault(f"{cell.of}/{cell.kind}/{'image' if cell.pictured else 'text'}", {"n": 0, "fires": 0})
        row["n"], row["fires"] = row["n"] + 1, row["fires"] + fired
    assert report["kinds"] == expected
    assert [point["target"] for point in report["curve"]] == list(CURVE)
    at = next(point for point in report["curve"] if point["target"] == 0.02)
    for of in ("benign", "malicious", "neutral", "exposed"):
        rows = [row for name, row in expected.items() if name.startswith(of)]
        assert at[of] == sum(r["fires"] for r in rows) / sum(r["n"] for r in rows)
    assert at["malicious"] > 0.95 and at["benign"] < 0.05
