"""Moments of several streams merged, against those of all vectors at once."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from care_hf.linalg import RunningCovariance


@pytest.mark.parametrize("sizes", [(40, 25), (1, 60), (0, 30), (30, 0), (3, 4, 50)])
@pytest.mark.parametrize("far", [0.0, 1e3])
def test_merged_moments_are_those_of_all_chunks(sizes, far):
    generator = torch.Generator().manual_seed(len(sizes))
    chunks = [torch.randn(n, 8, generator=generator, dtype=torch.float64) + far + i for i, n in enumerate(sizes)]
    parts = []
    for chunk in chunks:
        parts.append(RunningCovariance(8))
        for some in chunk.split(9):
            parts[-1].update(some)
    before = parts[-1].state_dict()
    merged = RunningCovariance(8)
    for one in parts:
        merged.merge(one)
    assert all(torch.equal(tensor, parts[-1].state_dict()[name]) for name, tensor in before.items())
    tokens = torch.cat(chunks).numpy()
    assert merged.count == len(tokens)
    np.testing.assert_allclose(merged.mean.numpy(), tokens.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance().numpy(), np.cov(tokens.T, bias=True), rtol=1e-9, atol=1e-9)
    expected = ledoit_wolf(tokens)[1]
    np.testing.assert_allclose(merged.ledoit_wolf_shrinkage(), expected, rtol=1e-6, atol=1e-8)
    # What came from a merge goes on as any.
    whole = RunningCovariance(8)
    for chunk in [*chunks, chunks[-1]]:
        whole.update(chunk)
    merged.update(chunks[-1])
    np.testing.assert_allclose(merged.ledoit_wolf_shrinkage(), whole.ledoit_wolf_shrinkage(), rtol=1e-6, atol=1e-9)


def test_moments_of_another_dimension_are_not_merged():
    with pytest.raises(ValueError, match="dimension 3 do not fit those of 8"):
        RunningCovariance(8).merge(RunningCovariance(3))


@pytest.mark.parametrize("count", [3, 50])
def test_moments_merged_into_none_are_the_same_to_the_last_bit(count):
    one, other = RunningCovariance(8), RunningCovariance(8)
    one.update(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)))
    other.merge(one)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
