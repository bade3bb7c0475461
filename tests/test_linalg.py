import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from care_hf.linalg import (
    RunningCovariance,
    generalized_eigh,
    oblique_pair,
    orthonormalize,
    shrink,
)

seeds = st.integers(0, 10**6)


def sample(seed, n=200, d=9, offset=0.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + offset)


def spd(seed, d=12):
    x = sample(seed, 3 * d, d)
    return x.T @ x / (3 * d) + 0.05 * torch.eye(d, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, cuts=st.lists(st.integers(0, 200), max_size=6), offset=st.sampled_from([0.0, 1e4]))
def test_any_chunking_in_any_order_gives_numpys_covariance(seed, cuts, offset):
    data = sample(seed, offset=offset)
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    running = RunningCovariance(9)
    for chunk in torch.tensor_split(shuffled, sorted(cuts)):
        running.update(chunk)
    assert running.count == 200
    np.testing.assert_allclose(running.mean, data.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(running.covariance(), np.cov(data.T, bias=True), rtol=1e-7, atol=1e-8)
    about = torch.ones(9, dtype=torch.float64)
    centred = data - about
    np.testing.assert_allclose(running.covariance(about), centred.T @ centred / 200, rtol=1e-7)
    assert abs(running.ledoit_wolf_shrinkage() - ledoit_wolf(data.numpy())[1]) < 1e-6


@pytest.mark.parametrize(("n", "d"), [(5, 30), (2, 3), (300, 4)])
def test_shrinkage_is_sklearns_with_few_samples_too(n, d):
    data = sample(7, n, d, offset=3.0)
    running = RunningCovariance(d)
    running.update(data)
    covariance, share = ledoit_wolf(data.numpy())
    assert abs(running.ledoit_wolf_shrinkage() - share) < 1e-8
    np.testing.assert_allclose(shrink(running.covariance(), share), covariance, atol=1e-10)


def test_state_goes_on_where_it_left_off():
    data = sample(1)
    whole, first = RunningCovariance(9), RunningCovariance(9)
    for chunk in (data[:90], data[90:]):
        whole.update(chunk)
    first.update(data[:90])
    second = RunningCovariance.from_state(first.state_dict())
    second.update(data[90:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_bad_chunks_are_refused():
    running = RunningCovariance(3)
    with pytest.raises(ValueError, match=r"\(n, 3\)"):
        running.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        running.update(torch.tensor([[0.0, torch.nan, 0.0]]))
    running.update(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="No vectors"):
        running.covariance()


@settings(deadline=None, max_examples=30)
@given(seed=seeds, rank=st.integers(1, 12))
def test_generalized_eigenvectors_are_scipys(seed, rank):
    malicious, benign = spd(seed), spd(seed + 1)
    values, vectors = generalized_eigh(malicious, benign, rank)
    expected, reference = scipy.linalg.eigh(malicious.numpy(), benign.numpy())
    np.testing.assert_allclose(values, expected[::-1][:rank], rtol=1e-8)
    angles = scipy.linalg.subspace_angles(reference[:, -rank:], vectors.numpy())
    assert angles.max() < 1e-6
    np.testing.assert_allclose(vectors.T @ benign @ vectors, np.eye(rank), atol=1e-8)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@settings(deadline=None, max_examples=20)
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_the_fitted_span_does_not_depend_on_the_unit_and_turns_with_the_axes(seed, scale):
    malicious, benign = spd(seed), spd(seed + 1)
    basis = orthonormalize(generalized_eigh(malicious, benign, 3)[1])
    scaled = orthonormalize(generalized_eigh(scale**2 * malicious, scale**2 * benign, 3)[1])
    assert scipy.linalg.subspace_angles(basis.numpy(), scaled.numpy()).max() < 1e-6
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 12)))[0])
    turned = orthonormalize(generalized_eigh(turn @ malicious @ turn.T, turn @ benign @ turn.T, 3)[1])
    assert scipy.linalg.subspace_angles((turn @ basis).numpy(), turned.numpy()).max() < 1e-5


def test_the_printed_operator_is_no_projector_and_ours_is():
    malicious, benign = spd(3) * 0.01, spd(4) * 0.01  # activations scaled by 0.1
    _, vectors = generalized_eigh(malicious, benign, 3)
    identity = torch.eye(12, dtype=torch.float64)
    printed = identity - vectors @ vectors.T
    assert torch.linalg.eigvalsh(printed).min() < -10
    basis = orthonormalize(vectors)
    ours = identity - basis @ basis.T
    np.testing.assert_allclose(ours @ ours, ours, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_the_oblique_pair_is_the_oblique_projector(seed):
    malicious, benign = spd(seed), spd(seed + 1)
    _, vectors = generalized_eigh(malicious, benign, 3)
    basis, reader = oblique_pair(benign @ vectors, vectors)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(reader.T @ basis, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(basis @ reader.T, benign @ vectors @ vectors.T, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generalized_eigh(spd(0), spd(1), 13), "rank=13"),
        (lambda: generalized_eigh(spd(0), spd(1), 0), "rank=0"),
        (lambda: generalized_eigh(spd(0), torch.zeros(12, 12), 2), "raise the shrinkage"),
        (lambda: generalized_eigh(spd(0).triu(), spd(1), 2), "malicious covariance is not symmetric"),
        (lambda: generalized_eigh(spd(0) * torch.nan, spd(1), 2), "finite"),
        (lambda: orthonormalize(torch.ones(5, 2)), "linearly dependent"),
    ],
)
def test_bad_matrices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
