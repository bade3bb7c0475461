import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_hf.attribution import attribute_tokens, rbf_kernel, text_scores, top_tokens, visual_scores


def tokens(seed, n, d=6):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_kernel(a, b, pairs):
    distances = ((a[:, None] - b[None]) ** 2).sum(-1)
    sigma = np.sqrt(0.5 * np.median(distances[pairs]))
    return np.exp(-distances / (2 * sigma**2))


def scaled(scores):
    return (scores - scores.min()) / (scores.max() - scores.min())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n_v=st.integers(2, 12), n_t=st.integers(3, 9))
def test_scores_are_the_formula_with_explicit_centring(seed, n_v, n_t):
    visual, text = tokens(seed, n_v), tokens(seed + 1, n_t)
    v, t = visual.numpy(), text.numpy()
    centring = np.eye(n_t) - np.ones((n_t, n_t)) / n_t
    cross = dense_kernel(v, t, np.ones((n_v, n_t), bool)) @ centring
    np.testing.assert_allclose(visual_scores(visual, text), scaled((cross**2).sum(1)), atol=1e-9)
    own = centring @ dense_kernel(t, t, ~np.eye(n_t, dtype=bool)) @ centring
    np.testing.assert_allclose(text_scores(text), scaled((own**2).sum(1)), atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-2, 1e2))
def test_scores_do_not_depend_on_unit_origin_or_axes(seed, scale):
    visual, text = tokens(seed, 8), tokens(seed + 1, 5)
    turn = torch.linalg.qr(tokens(seed + 2, 6)).Q
    shift = tokens(seed + 3, 1)

    def move(x):
        return (x @ turn + shift) * scale

    torch.testing.assert_close(
        visual_scores(move(visual), move(text)), visual_scores(visual, text), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(text_scores(move(text)), text_scores(text), rtol=1e-5, atol=1e-5)


def test_an_image_token_near_one_text_token_scores_highest():
    text = tokens(0, 6) * 3
    visual = tokens(1, 10) * 0.1 + text.mean(0)
    visual[4] = text[2]
    assert visual_scores(visual, text).argmax() == 4


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (visual_scores(tokens(0, 0), tokens(1, 3)), []),
        (visual_scores(tokens(0, 3), tokens(1, 0)), [1, 1, 1]),
        (visual_scores(tokens(0, 3), tokens(1, 1)), [1, 1, 1]),
        (visual_scores(tokens(0, 1), tokens(1, 4)), [1]),
        (visual_scores(torch.ones(3, 2), torch.ones(4, 2)), [1, 1, 1]),
        (text_scores(tokens(0, 0)), []),
        (text_scores(tokens(0, 1)), [1]),
        (text_scores(tokens(0, 2)), [1, 1]),
        (text_scores(torch.ones(5, 3)), [1] * 5),
    ],
)
def test_degenerate_prompts_are_defined(scores, expected):
    assert scores.tolist() == expected


def test_a_zero_median_gives_the_limit_of_the_kernel():
    points = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0]])
    assert torch.equal(rbf_kernel(points), (torch.cdist(points, points) == 0).float())


def test_top_tokens():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.2])
    assert top_tokens(scores, 2).tolist() == [1, 3]
    assert top_tokens(scores, 1).tolist() == [1]  # ties go to the earlier token
    assert top_tokens(scores, 0.5).tolist() == [1, 2, 3]
    assert top_tokens(scores, 1e-9).tolist() == [1]
    assert top_tokens(scores, 99).tolist() == [0, 1, 2, 3, 4]
    assert top_tokens(torch.ones(0), 3).tolist() == []


def test_methods():
    visual, text = tokens(0, 8), tokens(1, 6)
    every = attribute_tokens(visual, text, 2, 2, method="all")
    assert [len(i) for i in every] == [8, 6]
    first, again, other = (
        attribute_tokens(visual, text, 3, 0.5, "random", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert [len(i) for i in first] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    kernel = attribute_tokens(visual, text, 3, 0.5)
    assert torch.equal(kernel[0], top_tokens(visual_scores(visual, text), 3))
    with pytest.raises(ValueError, match="method='best'"):
        attribute_tokens(visual, text, 1, 1, "best")
