"""Which tokens of a prompt carry the image-text coupling: RBF-kernel scores (arXiv 2603.27240, step 2).

The paper calls the score mutual information; it is the squared norm of a row of a centred kernel matrix, scaled to
[0, 1].
"""

import math

import torch


def rbf_kernel(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """``K_ij = exp(-D_ij / (2 sigma^2))``, D squared Euclidean distances, ``sigma^2 = median(D) / 2``.

    Args:
        a: (n, d).
        b: (m, d); None for the kernel of `a` with itself, whose median leaves out the zero diagonal.

    Returns:
        (n, m) in a's dtype; where the median is 0 the kernel is its limit, 1 at distance 0 and 0 elsewhere.
    """
    other = a if b is None else b
    distances = torch.cdist(a, other).square()
    if b is None:
        off_diagonal = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        pairs = distances[off_diagonal]
    else:
        pairs = distances.flatten()
    if len(pairs) == 0:
        return torch.ones_like(distances)
    # Mean of the two middle values, as numpy's median: torch.median takes the lower one, which is less symmetric.
    ordered = pairs.sort().values
    median = (ordered[(len(pairs) - 1) // 2] + ordered[len(pairs) // 2]) / 2
    if median == 0:
        return (distances == 0).to(a.dtype)
    return torch.exp(-distances / median)


def visual_scores(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Score every visual token by how unevenly it is coupled to the text tokens.

    ``s_i = |K_i,: H|^2`` with ``H = I - 11^T / n_t``, n_t times the variance of a row of the cross kernel.

    Args:
        visual: (n_v, d).
        text: (n_t, d).

    Returns:
        (n_v,) in [0, 1]; all 1 where the scores are equal, as with at most one text token.
    """
    if len(visual) == 0 or len(text) == 0:
        return torch.ones(len(visual), device=visual.device)
    kernel = rbf_kernel(visual, text)
    return _normalise((kernel - kernel.mean(dim=1, keepdim=True)).square().sum(dim=1))


def text_scores(text: torch.Tensor) -> torch.Tensor:
    """Score every text token: ``s_i = |(H K H)_i,:|^2`` of the text's own kernel.

    Args:
        text: (n_t, d).

    Returns:
        (n_t,) in [0, 1]; all 1 where the scores are equal, as with at most two tokens.
    """
    if len(text) == 0:
        return torch.ones(0, device=text.device)
    kernel = rbf_kernel(text)
    centred = kernel - kernel.mean(dim=0, keepdim=True) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
    return _normalise(centred.square().sum(dim=1))


def _normalise(scores: torch.Tensor) -> torch.Tensor:
    low, high = scores.min(), scores.max()
    # Below this spread the scores differ by rounding alone, and a token's rank would be noise.
    if high - low <= 1e-6 * high.clamp(min=torch.finfo(scores.dtype).tiny):
        return torch.ones_like(scores)
    return (scores - low) / (high - low)


def top_tokens(scores: torch.Tensor, keep: int | float) -> torch.Tensor:
    """Indices of the best tokens in ascending order, int64; ties go to the earlier token.

    Args:
        scores: (n,).
        keep: see `kept_count`.
    """
    return scores.argsort(descending=True, stable=True)[: kept_count(len(scores), keep)].sort().values


def kept_count(total: int, keep: int | float) -> int:
    """How many of `total` tokens `keep` keeps: a count (int), or a share in (0, 1] (float, rounded up)."""
    return min(total, keep if isinstance(keep, int) else math.ceil(keep * total))


def attribute_tokens(
    visual: torch.Tensor,
    text: torch.Tensor,
    keep_visual: int | float,
    keep_text: int | float,
    method: str = "kernel",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens of one prompt that enter the subspaces.

    Args:
        visual: activations of the image tokens, (n_v, d).
        text: activations of the text tokens, (n_t, d).
        keep_visual: how many image tokens, see `kept_count`.
        keep_text: how many text tokens.
        method: "kernel", "random" (the control: as many, drawn by `generator`), or "all".
        generator: a CPU generator, for "random".

    Returns:
        Two ascending int64 index tensors, into `visual` and `text`.

    Raises:
        ValueError: the method is not known.
    """
    if method == "all":
        return tuple(torch.arange(len(t), device=t.device) for t in (visual, text))
    if method == "kernel":
        scores = visual_scores(visual, text), text_scores(text)
    elif method == "random":
        scores = tuple(torch.rand(len(t), generator=generator).to(t.device) for t in (visual, text))
    else:
        raise ValueError(f"method={method!r} is not known; choose 'kernel', 'random' or 'all'.")
    return top_tokens(scores[0], keep_visual), top_tokens(scores[1], keep_text)
