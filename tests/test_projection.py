import math

import pytest
import torch
from conftest import random_subspace
from hypothesis import given, settings
from hypothesis import strategies as st

from care_hf.projection import FUSIONS, SafetyProjection, Subspace, mixing_matrix, repair

D = 24


def dense_projector(subspace):
    """I - B R^T as a d x d matrix in float64."""
    reader = subspace.basis if subspace.reader is None else subspace.reader
    return torch.eye(len(subspace.mean), dtype=torch.float64) - subspace.basis.double() @ reader.double().T


def dense_single(h, subspace):
    """P h + beta (I - P) m, row by row."""
    p = dense_projector(subspace)
    return h.double() @ p.T + subspace.beta * (torch.eye(len(p), dtype=torch.float64) - p) @ subspace.mean.double()


def dense_fused(h, visual, text, fusion, weight, mask):
    h = h.double()
    h_visual, h_text = dense_single(h, visual), dense_single(h, text)
    if fusion == "route":
        return torch.where(mask[..., None], h_visual, h_text)
    if fusion == "union":
        bases = torch.cat([visual.basis, text.basis], 1).double()
        readers = torch.cat([s.basis if s.reader is None else s.reader for s in (visual, text)], 1).double()
        residual = torch.cat([(h_visual - h) @ visual_reader(visual), (h_text - h) @ visual_reader(text)], -1)
        x = torch.linalg.lstsq(readers.T @ bases, residual.T).solution
        return h + (bases @ x).T
    by_visual, by_text = (h_visual - h).norm(dim=-1, keepdim=True), (h_text - h).norm(dim=-1, keepdim=True)
    numerator = (h_visual - h_text).norm(dim=-1, keepdim=True) if fusion == "printed" else by_visual
    w = weight if fusion == "constant" else numerator / (by_visual + by_text)
    return w * h_visual + (1 - w) * h_text


def visual_reader(subspace):
    return (subspace.basis if subspace.reader is None else subspace.reader).double()


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_two_modalities_equal_the_dense_operator(fusion, oblique):
    visual, text = random_subspace(1, D, 3, oblique), random_subspace(2, D, 5, beta=1.3)
    h = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(7) % 3 == 0
    fused = repair(h, {"visual": visual, "text": text}, fusion, 0.3, visual_mask=mask)
    torch.testing.assert_close(fused, dense_fused(h, visual, text, fusion, 0.3, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_modality_is_applied_in_full(fusion):
    text = random_subspace(1, D, 3)
    h = torch.randn(6, D, dtype=torch.float64)
    mask = torch.tensor([True, False] * 3)
    result = repair(h, {"text": text}, fusion, visual_mask=mask)
    expected = dense_single(h, text)
    if fusion == "route":
        expected = torch.where(mask[:, None], h, expected)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, D), oblique=st.booleans())
def test_the_repair_is_a_projector(seed, rank, oblique):
    subspace = random_subspace(seed, D, rank, oblique, beta=1.0)
    h = 3 * torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    once = repair(h, {"visual": subspace})
    torch.testing.assert_close(repair(once, {"visual": subspace}), once, rtol=1e-4, atol=1e-4)  # idempotent
    torch.testing.assert_close(repair(subspace.mean.double()[None], {"visual": subspace}), subspace.mean.double()[None])
    linear = Subspace(subspace.basis, torch.zeros(D), 1.0, subspace.reader)
    operator = repair(torch.eye(D, dtype=torch.float64), {"visual": linear}).T
    torch.testing.assert_close(operator, dense_projector(subspace), rtol=1e-6, atol=1e-6)
    assert math.isclose(operator.trace().item(), D - rank, abs_tol=1e-4)
    if not oblique:
        torch.testing.assert_close(operator, operator.T, rtol=0, atol=1e-6)  # symmetric


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_the_repair_does_not_depend_on_the_unit(seed, scale):
    visual, text = random_subspace(seed, D, 3), random_subspace(seed + 1, D, 4)
    h = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for fusion in ("adaptive", "printed", "union", "constant"):
        scaled = {
            name: Subspace(s.basis, s.mean * scale, s.beta, s.reader)
            for name, s in (("visual", visual), ("text", text))
        }
        expected = scale * repair(h, {"visual": visual, "text": text}, fusion)
        torch.testing.assert_close(repair(scale * h, scaled, fusion), expected, rtol=1e-4, atol=1e-5 * scale)


def test_union_meets_both_targets_and_survives_equal_bases():
    visual, text = random_subspace(1, D, 3), random_subspace(2, D, 4)
    h = torch.randn(5, D, dtype=torch.float64)
    joint = repair(h, {"visual": visual, "text": text}, "union")
    for s in (visual, text):
        target = (s.beta * s.mean.double() @ s.basis.double()).expand(5, -1)
        torch.testing.assert_close(joint @ s.basis.double(), target, rtol=1e-4, atol=1e-4)
    same = repair(h, {"visual": visual, "text": visual}, "union")
    torch.testing.assert_close(same, dense_single(h, visual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["adaptive", "printed"])
def test_where_nothing_is_corrected_the_weight_is_a_half_and_gradients_are_finite(fusion):
    subspaces = {"visual": random_subspace(1, D, 3, beta=1.0), "text": random_subspace(2, D, 3, beta=1.0)}
    subspaces["text"] = Subspace(subspaces["text"].basis, subspaces["visual"].mean, 1.0)
    h = subspaces["visual"].mean.double()[None].repeat(2, 1)
    h[1] += 1
    h.requires_grad_(True)
    out = repair(h, subspaces, fusion)
    torch.testing.assert_close(out[0], h[0], rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_are_those_of_finite_differences(fusion):
    subspaces = {"visual": random_subspace(1, 8, 2, oblique=True), "text": random_subspace(2, 8, 3)}
    module = SafetyProjection.from_subspaces(subspaces, fusion, 0.4, 0.9)
    h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, torch.tensor([True, False, True])), (h,))


def test_a_text_only_correction_survives_adaptive_but_not_printed_fusion():
    visual, text = random_subspace(1, D, 3, beta=1.0), random_subspace(2, D, 3, beta=1.0)
    h = visual.mean.double()[None]  # the visual subspace has nothing to correct here
    adaptive = repair(h, {"visual": visual, "text": text}, "adaptive")
    torch.testing.assert_close(adaptive, dense_single(h, text), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(repair(h, {"visual": visual, "text": text}, "printed"), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strength_zero_is_the_input_bit_for_bit(dtype):
    h = torch.randn(4, D).to(dtype)
    h[0, 0], h[1, 0], h[2, 0] = -0.0, torch.inf, torch.nan
    out = repair(h, {"visual": random_subspace(1, D)}, strength=0.0)
    assert out.dtype == dtype and torch.equal(out.view(torch.uint8), h.view(torch.uint8))


def test_strength_scales_the_correction():
    h, subspaces = (
        torch.randn(4, D, dtype=torch.float64),
        {"visual": random_subspace(1, D), "text": random_subspace(2, D)},
    )
    full = repair(h, subspaces) - h
    torch.testing.assert_close(repair(h, subspaces, strength=0.25) - h, 0.25 * full)


def test_tokens_do_not_see_each_other():
    subspaces = {"visual": random_subspace(1, D), "text": random_subspace(2, D)}
    h = torch.randn(2, 5, D, dtype=torch.float64)
    for fusion in ("adaptive", "printed", "union", "constant"):
        single = torch.stack([torch.stack([repair(token[None], subspaces, fusion)[0] for token in row]) for row in h])
        torch.testing.assert_close(repair(h, subspaces, fusion), single)


def test_half_precision_activations_are_repaired_in_single():
    subspaces = {"visual": random_subspace(1, D), "text": random_subspace(2, D)}
    h = torch.randn(4, D).bfloat16()
    assert torch.equal(repair(h, subspaces), repair(h.float(), subspaces).bfloat16())


def test_buffers_stay_single_precision_when_the_model_moves():
    module = SafetyProjection.from_subspaces({"visual": random_subspace(1, D), "text": random_subspace(2, D)}, "union")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for cast in (
        module.half,
        module.double,
        lambda: module.to(torch.bfloat16),
        lambda: module.to("cpu", torch.float16),
    ):
        cast()
        for name, buffer in module.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert module.to("meta").visual.basis.is_meta


def test_what_is_not_loaded_is_not_a_number():
    module = SafetyProjection(D, {"visual": 2, "text": 3}, "union", oblique=["text"])
    floats = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    assert len(floats) == 10 and all(buffer.isnan().all() for buffer in floats)
    with pytest.raises(ValueError, match="not finite"):
        module.check()


def test_check_finds_what_does_not_belong():
    def fresh():
        return SafetyProjection.from_subspaces(
            {"visual": random_subspace(1, D), "text": random_subspace(2, D)}, "union"
        )

    fresh().check()
    for change, message in (
        (lambda m: m.visual.basis.mul_(1.1), "differs from the identity"),
        (lambda m: m.mixing.add_(0.1), "mixing"),
        (lambda m: m.fusion.fill_(0), "fusion"),
        (lambda m: m.strength.fill_(torch.nan), "strength"),
        (lambda m: m.text.beta.fill_(torch.inf), "not finite"),
    ):
        module = fresh()
        change(module)
        with pytest.raises(ValueError, match=message):
            module.check()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Subspace(torch.ones(4, 2), torch.zeros(4)), "orthonormalise the basis"),
        (lambda: Subspace(torch.eye(4)[:, :2], torch.zeros(3)), "do not fit"),
        (lambda: Subspace(torch.eye(4)[:, :2], torch.full((4,), torch.nan)), "not finite"),
        (lambda: Subspace(torch.eye(4)[:, :2], torch.zeros(4), reader=torch.eye(4)[:, 1:3]), "reader"),
        (lambda: Subspace(torch.eye(4)[:, :0], torch.zeros(4)), "1 <= k <= d"),
        (lambda: SafetyProjection(4, {"audio": 1}), "audio"),
        (lambda: SafetyProjection(4, {"text": 1}, "mean"), "fusion='mean'"),
        (lambda: repair(torch.zeros(2, D), {"text": random_subspace(0, D)}, "route"), "which are which"),
        (
            lambda: repair(
                torch.zeros(2, D), {"text": random_subspace(0, D)}, "route", visual_mask=torch.ones(3).bool()
            ),
            "shape",
        ),
        (
            lambda: repair(torch.zeros(2, D), {"text": random_subspace(0, D), "visual": random_subspace(0, 8)}),
            "hidden size",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_mixing_inverts_the_gram_matrix_of_independent_bases():
    visual, text = random_subspace(1, D, 3), random_subspace(2, D, 4)
    stacked = torch.cat([visual.basis, text.basis], 1).double()
    product = mixing_matrix("union", visual, text).double() @ (stacked.T @ stacked)
    torch.testing.assert_close(product, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-5)
