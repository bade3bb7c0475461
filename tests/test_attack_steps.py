from fractions import Fraction
from math import ceil, cos, pi

import pytest
import torch

from care_hf.attack_steps import OPTIMISERS, AutoSteps, Search, SignSteps, checkpoints, climb

STEPS = 60


def paper_checkpoints(steps):
    """Section 3.2 of arXiv 2003.01690, exactly."""
    fractions = [Fraction(0), Fraction(22, 100)]
    while fractions[-1] <= 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - Fraction(3, 100), Fraction(6, 100)))
    return sorted({ceil(p * steps) for p in fractions[1:] if p <= 1})


def paper_apgd(f, slope, x, low, high, size, steps):
    """Algorithm 1 of arXiv 2003.01690 for one search, in plain Python with whole histories; minimises.

    Returns every point evaluated, and the step size that was in force when it was reached.
    """

    def project(point):
        return [min(max(value, a), b) for value, a, b in zip(point, low, high, strict=True)]

    points, values, sizes, successes = [x], [f(x)], [size], []
    here, value, before, last = x, f(x), None, 0
    for k in range(steps):
        if k in paper_checkpoints(steps):
            few = sum(successes[last:k]) < 0.75 * (k - last)
            same = sizes[last] == sizes[k] and min(values[: last + 1]) == min(values)
            if few or same:
                size, best = size / 2, values.index(min(values))
                here, value = points[best], values[best]
            last = k
        ahead = project([v - size * ((g > 0) - (g < 0)) for v, g in zip(here, slope(here), strict=True)])
        if before is not None:
            ahead = project([v + 0.75 * (z - v) + 0.25 * (v - w) for v, z, w in zip(here, ahead, before, strict=True)])
        successes.append(f(ahead) < value)
        before, here, value = here, ahead, f(ahead)
        points.append(here)
        values.append(value)
        sizes.append(size)
    return points, sizes


@pytest.fixture
def quadratics():
    """Four convex quadratics ``(x - c)^T A (x - c)`` in three dimensions, and a box; two minima lie outside."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT + torch.diag(torch.tensor([30.0, 1.0, 0.1], dtype=torch.float64))
    centres = torch.tensor([[1.3, -2.1, 0.4], [4.0, 9.0, -3.3], [-20.0, 0.7, 2.2], [0.01, 0.02, -0.03]]).double()
    return matrices, centres, torch.full((4, 3), -8.0).double(), torch.full((4, 3), 8.0).double()


def value_and_gradient(matrices, centres, point):
    pull = (matrices @ (point - centres)[..., None])[..., 0]
    return ((point - centres) * pull).sum(1), 2 * pull


def follow(rule, objective, steps):
    """Every point, objective and step size on the way."""
    points, values, sizes = [], [], []
    for _ in range(steps + 1):
        value, gradient = objective(rule.point)
        points.append(rule.point)
        values.append(value)
        sizes.append(getattr(rule, "size", None))
        rule.advance(value, gradient)
    return torch.stack(points), torch.stack(values), sizes


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 50, 100, 1000])
def test_checkpoints_are_the_papers(steps):
    assert checkpoints(steps) == paper_checkpoints(steps)


def test_the_first_checkpoints_by_hand():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(5) == [2, 3, 4, 5]


@pytest.mark.parametrize("steps, size", [(5, 16), (20, 16), (STEPS, 16), (STEPS, 0.4)])
def test_apgd_is_the_papers_algorithm(quadratics, steps, size):
    matrices, centres, low, high = quadratics
    start = torch.tensor([[5.0, 5.0, -5.0], [-8.0, 8.0, 1.0], [7.0, -7.0, 0.0], [3.0, 3.0, 3.0]]).double()
    rule = AutoSteps(start, low, high, steps=steps, size=size)
    points, _, sizes = follow(rule, lambda x: value_and_gradient(matrices, centres, x), steps)
    for row in range(4):
        matrix, centre = matrices[row].tolist(), centres[row].tolist()

        def slope(x, matrix=matrix, centre=centre):
            return [2 * sum(a * (v - c) for a, v, c in zip(line, x, centre, strict=True)) for line in matrix]

        def f(x, slope=slope, centre=centre):
            return sum((v - c) * g / 2 for v, c, g in zip(x, centre, slope(x), strict=True))

        search = (values[row].tolist() for values in (start, low, high))
        expected, of_steps = paper_apgd(f, slope, *search, size, steps)
        torch.testing.assert_close(points[:, row], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
        assert [of_all[row].item() for of_all in sizes] == of_steps
    if size < 1:  # some searches have halved at checkpoints of their own
        assert len({tuple(of_all[row].item() for of_all in sizes) for row in range(4)}) > 1


def test_apgds_two_conditions_by_hand():
    # Checkpoints 22, 41, 57. Row 0 gets better at all steps but few, and never better than its start: condition 2 holds
    # at 22 and, as it has just halved, not at 41. Row 1 gets better all the time until 41, then at 12 of 16 steps, just
    # enough for condition 1; row 2 at 11.
    stuck = [0, *range(100, 78, -1), *range(100, 65, -1)]
    falling = list(range(0, -42, -1))
    enough, few = ([-41 - (k if k <= wins else 0) for k in range(1, 17)] for wins in (12, 11))
    losses = torch.tensor([stuck[:58], falling + enough, falling + few], dtype=torch.float64)
    box = torch.full((3, 2), 1e6).double()
    rule = AutoSteps(torch.zeros(3, 2).double(), -box, box, steps=100, size=16)
    points, sizes = [], []
    for k in range(58):
        points.append(rule.point)
        rule.advance(losses[:, k], torch.ones(3, 2).double())
        sizes.append(rule.size.tolist())
    assert sizes[21] == [16, 16, 16] and sizes[22] == [8, 16, 16]
    assert sizes[40] == sizes[56] == [8, 16, 16] and sizes[41] == [8, 16, 16]
    assert sizes[57] == [4, 16, 8]
    # From the best point, by a halved step, and the difference from the point before the restart.
    expected = points[0] - 0.75 * 8 + 0.25 * (points[0] - points[21])
    torch.testing.assert_close(points[23][0], expected[0])
    expected = points[52] - 0.75 * 8 + 0.25 * (points[52] - points[56])
    torch.testing.assert_close(rule.point[2], expected[2])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_known_minimum_in_a_box_is_approached(optimiser):
    # Separable, so that the minimum in the box is the clamped one.
    curvature = torch.tensor([[1.0, 3.0, 0.1, 10.0], [1.0, 1.0, 1.0, 1.0]]).double()
    centres = torch.tensor([[3.3, -20.0, 1.0, 0.5], [9.0, -9.0, 0.2, -6.1]]).double()
    low, high = torch.full((2, 4), -8.0).double(), torch.full((2, 4), 8.0).double()
    minimum = centres.clamp(low, high)

    def objective(x):
        return (curvature * (x - centres).square()).sum(1), 2 * curvature * (x - centres)

    rule = Search(8, 100, 1, optimiser).rule(torch.zeros(2, 4).double(), low, high)
    points, values, _ = follow(rule, objective, 100)
    assert ((points >= low) & (points <= high)).all()
    best = points[values.argmin(0), torch.arange(2)]
    torch.testing.assert_close(best, minimum, rtol=0, atol=0.5)
    excess = values.amin(0) - objective(minimum)[0]
    assert (excess >= 0).all()
    assert (excess < 0.01 * (values[0] - objective(minimum)[0])).all()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_searches_in_a_batch_do_not_touch_each_other(quadratics, optimiser):
    matrices, centres, low, high = quadratics
    start = torch.zeros(4, 3).double()

    def run(rows):
        rule = Search(8, STEPS, 1, optimiser).rule(start[rows], low[rows], high[rows])
        return follow(rule, lambda x: value_and_gradient(matrices[rows], centres[rows], x), STEPS)[0]

    whole = run(slice(None))
    for row in range(4):
        torch.testing.assert_close(run([row])[:, 0], whole[:, row], rtol=0, atol=1e-9)


def test_the_sign_steps_by_hand():
    rule = SignSteps(
        torch.zeros(1, 2), torch.full((1, 2), -9.0), torch.full((1, 2), 4.0), steps=4, size=2, momentum=0.5
    )
    gradients = torch.tensor([[[1.0, -3.0]], [[-1.0, -3.0]], [[0.0, -5.0]], [[1.0, 0.0]]])
    # Velocities, each gradient divided by its mean size: (0.5, -1.5), (-0.25, -2.25), (-0.125, -3.125), (1.94, -1.56)
    signs = torch.tensor([[1, -1], [-1, -1], [-1, -1], [1, -1]])
    point = torch.zeros(2)
    for step in range(4):
        rule.advance(torch.zeros(1), gradients[step])
        point = (point - (1 + cos(pi * step / 4)) * signs[step]).clamp(-9, 4)
        torch.testing.assert_close(rule.point[0], point)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_climb_keeps_the_best_whole_levels_it_evaluated(quadratics, optimiser):
    matrices, centres, low, high = quadratics
    seen = []

    def evaluate(levels, backward):
        value, gradient = value_and_gradient(matrices, centres, levels)
        seen.append((levels, value))
        return torch.stack([value, levels.sum(1)]), gradient if backward else None

    starts = [torch.zeros(4, 3).double(), torch.full((4, 3), 5.4).double()]
    climbed = climb(Search(8, 10, 2, optimiser, keep_steps=(0, 3)), starts, low, high, evaluate, weight=2.0)
    assert len(seen) == 22
    levels, values = (torch.stack(part).unflatten(0, (2, 11)) for part in zip(*seen, strict=True))
    assert torch.equal(levels, levels.round())
    assert torch.equal(climbed.losses, values) and torch.equal(climbed.penalties, levels.sum(-1))
    for kept in (0, 3, 10):
        objective = (values + 2 * levels.sum(-1))[:, : kept + 1].flatten(0, 1)
        expected = levels[:, : kept + 1].flatten(0, 1)[objective.argmin(0), torch.arange(4)]
        assert torch.equal(climbed.found[kept], expected)
        assert torch.equal(climbed.best[kept], objective.argmin(0))
    assert climbed.found.keys() == climbed.best.keys() == {0, 3, 10}


def test_a_loss_that_is_not_finite_is_refused():
    def evaluate(levels, backward):
        return torch.full((2, 1), torch.nan), levels if backward else None

    box = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="after 0 steps of restart 0 is not finite"):
        climb(Search(1, 1, 1), [box], box, box, evaluate)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"eps": -1}, "eps=-1"),
        ({"optimiser": "adam"}, "optimiser='adam' is not known"),
        ({"step_size": -2}, "step_size=-2"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": 0.5, "optimiser": "apgd"}, "setting of 'mi-fgsm' alone"),
        ({"keep_steps": (1, 4)}, r"keep_steps=\(1, 4\) must lie between 0 and steps=3"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        Search(**{"eps": 8, "steps": 3, "restarts": 1, **bad})
