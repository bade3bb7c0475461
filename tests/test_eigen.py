"""Spans and eigenvalues against `scipy.linalg.eigh` on whole matrices, however they were found."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from care_hf import eigen
from care_hf.detectors import discriminant
from care_hf.linalg import RunningCovariance, generalized_eigh, shrink, solve_moments
from care_hf.scatter import MatrixScatter, RowScatter
from care_hf.subspace import fit_subspace


def moments(data, chunks=1):
    running = RunningCovariance(data.shape[1])
    for chunk in data.chunk(chunks):
        running.update(chunk)
    return running


def as_matrix(running):
    """The same moments in a matrix, as files of before rows were kept have them."""
    state = running.state_dict()
    state.pop("rows", None)
    return RunningCovariance.from_state({**state, "scatter": running.scatter.matrix()})


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed, n, d, rank=None, offset=0.0):
    """Rows of falling variances, in a random space of `rank` dimensions if one is given."""
    fall = torch.arange(1, d + 1).double().rsqrt()
    return (normal(seed, n, d) if rank is None else normal(seed, n, rank) @ normal(seed + 1, rank, d)) * fall + offset


def assert_solves(values, vectors, malicious, benign):
    """That scipy finds the same eigenvalues, and where they are apart the same span."""
    expected, reference = scipy.linalg.eigh(malicious.numpy(), benign.numpy())
    rank, top = len(values), expected[-1]
    np.testing.assert_allclose(values, expected[::-1][:rank], rtol=1e-7, atol=1e-9 * top)
    np.testing.assert_allclose(vectors.T @ benign @ vectors, np.eye(rank), atol=1e-7)
    left, right = malicious @ vectors, benign @ vectors * values
    assert (left - right).norm() <= 1e-5 * top * (benign @ vectors).norm()
    gap = 1.0 if rank == len(expected) else expected[-rank] - expected[-rank - 1]
    if gap > 1e-3 * top:
        assert scipy.linalg.subspace_angles(vectors.numpy(), reference[:, -rank:]).max() < 1e-4


@pytest.fixture(params=["whole", "krylov"])
def way(request, monkeypatch):
    if request.param == "krylov":
        monkeypatch.setattr(eigen, "WHOLE", 0)
    return request.param


sizes = st.integers(1, 90)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(2, 60),
    counts=st.tuples(sizes, sizes),
    rank=st.integers(1, 60),
    low=st.one_of(st.none(), st.integers(1, 8)),
    share=st.sampled_from([1e-4, 0.05, 0.5, 1.0]),
    kept=st.tuples(st.booleans(), st.booleans()),
    own=st.booleans(),
)
@pytest.mark.parametrize("least", [0, 512])
def test_rows_and_matrices_are_solved_as_by_scipy(least, seed, d, counts, rank, low, share, kept, own):
    """Benign and malicious tokens more or fewer than dimensions, in rows or not; C_m of any rank."""
    benign = moments(rows(seed, 1 + counts[0], d, offset=3.0), 3)
    malicious = moments(rows(seed + 7, counts[1], d, low, offset=3.5), 3)
    about = None if own else benign.mean
    whole = malicious.covariance(about), shrink(benign.covariance(), share)
    benign, malicious = (m if as_is else as_matrix(m) for m, as_is in zip((benign, malicious), kept, strict=True))
    rank = min(rank, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eigen, "WHOLE", least)
        found = solve_moments(malicious.moments(about), benign.whitening(share), rank)
    assert_solves(*found, *whole)


@pytest.mark.parametrize(("d", "n"), [(40, 39), (40, 40), (12, 5), (300, 120)])
def test_few_rows_give_the_moments_of_a_matrix(d, n):
    data = rows(0, n, d, offset=1e3)
    kept = moments(data, 4)
    matrix = as_matrix(kept)
    assert isinstance(kept.scatter, RowScatter if n < d else MatrixScatter)
    x, about = normal(1, d, 3), normal(2, d)
    torch.testing.assert_close(kept.covariance(about), matrix.covariance(about), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kept.covariance(), torch.cov(data.mT, correction=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kept.moments(about).product(x), kept.covariance(about) @ x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix.moments(about).product(x), kept.covariance(about) @ x, rtol=1e-9, atol=1e-9)
    assert abs(kept.ledoit_wolf_shrinkage() - matrix.ledoit_wolf_shrinkage()) < 1e-9
    assert kept.ridge(0.3) == pytest.approx(matrix.ridge(0.3), rel=1e-9)
    if n < d:
        root = kept.moments(about).root()
        assert root.shape == (d, n)
        torch.testing.assert_close(root @ root.mT, kept.covariance(about), rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(TypeError, match="root"):
            kept.moments().root()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 40), n=sizes, share=st.sampled_from([1e-6, 0.05, 0.9]))
def test_a_whitening_is_a_root_of_the_inverse(seed, d, n, share):
    running = moments(rows(seed, n + 1, d, offset=2.0))
    inverse = torch.linalg.inv(shrink(running.covariance(), share))
    for one in {id(one): one for one in (running, as_matrix(running))}.values():
        whitening = one.whitening(share)
        identity = torch.eye(d, dtype=torch.float64)
        factor = whitening.out(identity)
        torch.testing.assert_close(whitening.back(identity), factor.mT, rtol=1e-7, atol=1e-9 * factor.abs().max())
        assert (factor @ factor.mT - inverse).abs().max() <= 1e-6 * inverse.abs().max()
        assert torch.equal(whitening.out(identity), factor)  # nothing it holds was left changed


@pytest.mark.parametrize("cut", [3, 11, 12, 20])
def test_a_state_goes_on_in_rows_and_beyond(cut):
    data = rows(0, 30, 12)
    whole, first = RunningCovariance(12), RunningCovariance(12)
    for chunk in (data[:cut], data[cut:]):
        whole.update(chunk)
    first.update(data[:cut])
    state = first.state_dict()
    assert ("rows" in state) == (cut < 12) and ("scatter" in state) == (cut >= 12)
    second = RunningCovariance.from_state(state)
    second.update(data[cut:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    older = as_matrix(first)
    older.update(data[cut:])
    torch.testing.assert_close(older.covariance(), whole.covariance())
    empty = RunningCovariance.from_state(RunningCovariance(12).state_dict())
    empty.update(data)
    assert torch.equal(empty.covariance(), moments(data).covariance())


def test_rows_are_copies():
    data = rows(0, 5, 9)
    running = moments(data)
    before = running.covariance()
    data += 1
    state = running.state_dict()
    again = RunningCovariance.from_state(state)
    state["rows"] += 1
    assert torch.equal(again.covariance(), before)


def spread(values):
    """C_m with these eigenvalues against C_b, both (d, d)."""
    d = len(values)
    mixing = torch.eye(d, dtype=torch.float64) + normal(5, d, d) * 0.3 / d**0.5
    return mixing.mT @ (torch.as_tensor(values)[:, None] * mixing), mixing.mT @ mixing


def counted(monkeypatch, name):
    calls, whole = [], getattr(eigen, name)
    monkeypatch.setattr(eigen, name, lambda *args: calls.append(name) or whole(*args))
    return calls


HARD = {
    "all equal": np.ones(120),
    "twenty copies": np.r_[np.full(20, 5.0), np.linspace(1, 2, 100)],
    "copies below the largest": np.r_[9.0, np.full(3, 7.0), np.full(5, 6.5), np.linspace(1, 2, 111)],
    "close at the cut": np.r_[np.linspace(9, 5, 7), 4 + 1e-10, 4, 4 - 1e-10, np.linspace(1, 2, 110)],
    "zeros": np.zeros(120),
    "few that are not zero": np.r_[5.0, 4.0, np.zeros(118)],
    "far apart": np.r_[1e9, 1e5, np.linspace(1, 8, 118)],
}


@pytest.mark.parametrize("name", HARD)
def test_hard_spectra_are_solved(name, way):
    malicious, benign = spread(HARD[name])
    for rank in (3, 8):
        assert_solves(*generalized_eigh(malicious, benign, rank), malicious, benign)


def test_what_does_not_converge_is_decomposed_whole(monkeypatch):
    monkeypatch.setattr(eigen, "WHOLE", 0)
    malicious, benign = spread(np.linspace(1, 1.001, 150))
    calls = counted(monkeypatch, "_whole")
    monkeypatch.setattr(eigen, "STEPS", 1)
    assert_solves(*generalized_eigh(malicious, benign, 3), malicious, benign)
    assert calls
    thin = counted(monkeypatch, "_thin")
    few, many = moments(rows(0, 100, 400)), moments(rows(1, 500, 400))
    found = solve_moments(few.moments(), many.whitening(0.1), 9)
    assert_solves(*found, few.covariance(), shrink(many.covariance(), 0.1))
    assert thin and len(calls) == 1


@pytest.mark.parametrize("rank", [1, 16])
def test_a_span_is_found_within_the_promised_angle(monkeypatch, rank):
    d, calls = 700, counted(monkeypatch, "_whole")
    benign, malicious = moments(rows(0, 900, d)), moments(rows(1, 900, d, offset=0.1))
    _, vectors = solve_moments(malicious.moments(benign.mean), benign.whitening(0.02), rank)
    whole = malicious.covariance(benign.mean).numpy(), shrink(benign.covariance(), 0.02).numpy()
    reference = scipy.linalg.eigh(*whole, subset_by_index=[d - rank, d - 1])[1]
    assert scipy.linalg.subspace_angles(vectors.numpy(), reference).max() < eigen.ANGLE
    assert not calls


def test_equal_input_gives_equal_output(way):
    malicious, benign = spread(np.r_[np.full(4, 5.0), np.linspace(1, 2, 96)])
    first, second = (generalized_eigh(malicious, benign, 6) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Allocations(TorchDispatchMode):
    """Counts the results of at least `least` elements in memory that no argument had."""

    def __init__(self, least):
        super().__init__()
        self.least, self.made = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made += [str(func)] * (tensor.numel() >= self.least)
        return result


@pytest.mark.parametrize("centring", ["benign", "own"])
@pytest.mark.parametrize("projector", ["orthogonal", "oblique"])
def test_fewer_tokens_than_dimensions_never_need_a_square_matrix(centring, projector, way):
    d = 400
    benign, malicious = (moments(rows(seed, n, d), 3) for seed, n in ((0, 60), (1, 90)))
    with Allocations(d * d) as allocations:
        RunningCovariance(d).update(rows(2, 50, d))
        found, report = fit_subspace(benign, malicious, rank=4, centring=centring, projector=projector)
    assert not allocations.made
    reference, expected = fit_subspace(
        as_matrix(benign), as_matrix(malicious), rank=4, centring=centring, projector=projector
    )
    np.testing.assert_allclose(report.eigenvalues, expected.eigenvalues, rtol=1e-7)
    assert scipy.linalg.subspace_angles(found.basis.numpy(), reference.basis.numpy()).max() < 1e-4


def test_a_detector_of_few_prompts_never_needs_a_square_matrix():
    d = 300
    harmful, harmless = rows(0, 40, d, offset=0.3), rows(1, 50, d)
    with Allocations(d * d) as allocations:
        found = discriminant([(harmful, harmless)], [harmful, harmless], [[harmful, harmless]], 0.2)
    assert not allocations.made
    covariance = torch.cov(torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)]).mT, correction=0)
    difference = harmful.mean(0) - harmless.mean(0)
    covariance += torch.outer(difference, difference) / 4
    direction = torch.linalg.solve(shrink(covariance, 0.2), difference)
    torch.testing.assert_close(found.direction, direction / (direction @ difference), rtol=1e-8, atol=1e-10)


def test_many_tokens_need_one_square_matrix_beside_their_moments():
    d = 1200
    benign, malicious = moments(rows(0, 2 * d, d), 5), moments(rows(1, 2 * d, d, offset=0.3), 5)
    with Allocations(d * d) as allocations:
        fit_subspace(benign, malicious, rank=4, projector="oblique")
    assert len(allocations.made) == 1, allocations.made
    whole = malicious.covariance(), benign.covariance()
    with Allocations(d * d) as allocations:
        generalized_eigh(*whole, 4)
    assert len(allocations.made) == 1, allocations.made


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("share", [0.0, 1e-17])
def test_rows_without_a_ridge_are_singular(n, share):
    with pytest.raises(ValueError, match="benign covariance is singular; raise the shrinkage"):
        moments(rows(0, n, 50)).whitening(share)


@pytest.mark.parametrize("rank", [0, 51])
def test_the_rank_must_fit(rank):
    running = moments(rows(0, 20, 50))
    with pytest.raises(ValueError, match=f"rank={rank} must lie between 1 and d=50"):
        solve_moments(running.moments(), running.whitening(0.1), rank)
