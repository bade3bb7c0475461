import copy

import numpy as np
import pytest
import torch
from attacking import independent_losses, pixels
from conftest import random_subspace
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from care_hf.attack_steps import OPTIMISERS
from care_hf.attacks import check_budget, pgd
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.samples import Sample
from care_hf.sites import Site, record
from care_hf.subspace import SafetySubspaces
from care_hf.teacher_forcing import differentiable_pixel_values, encode, target_losses

EPS = 8


@pytest.fixture(scope="module")
def prompts(world):
    """Prompts and targets of unequal length, some of which the model answers so and some not."""
    return [*world.attack("typographic", "validation", 2), *world.attack("wrapper+image", "validation", 2)]


@pytest.fixture(scope="module")
def targets(prompts):
    return [sample.answer for sample in prompts[:3]] + ["step one"]


@pytest.fixture(scope="module")
def attacked(testbed, prompts, targets):
    return pgd(*testbed, prompts, targets, eps=EPS, steps=5)


@pytest.mark.parametrize("size", [(48, 48), (48, 61)])
def test_the_differentiable_path_is_the_processor(testbed, size):
    _, processor = testbed
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    values = differentiable_pixel_values(processor, torch.from_numpy(image).permute(2, 0, 1)[None].float())
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_other_preprocessing_is_refused(testbed, prompts, targets):
    model, processor = testbed
    large = Sample([{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 60), "red")}]}])
    with pytest.raises(ValueError, match=r"more to images of 60 x 60 than crop"):
        pgd(model, processor, [prompts[0], large], targets[:2], eps=EPS, steps=1)

    class Inverting(CLIPImageProcessorPil):
        def normalize(self, *args, **kwargs):
            return -super().normalize(*args, **kwargs)

    other = copy.copy(processor)
    other.image_processor = Inverting.from_dict(processor.image_processor.to_dict())
    with pytest.raises(ValueError, match="crop, rescale and normalise"):
        pgd(model, other, prompts, targets, eps=EPS, steps=1)


def test_the_gradient_is_the_finite_difference(testbed, prompts, targets, monkeypatch):
    def norm(self, h):  # transformers' own computes in float32, whose rounding drowns small differences
        return self.weight * h * (h.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model, processor = copy.deepcopy(testbed[0]).double(), testbed[1]
    repair = SafetySubspaces({Site(2, "ffn"): {"visual": random_subspace(0), "text": random_subspace(1)}})
    repaired = CareForConditionalGeneration.from_base(model, repair)
    batch = encode(repaired, processor, [Sample(s.messages) for s in prompts], targets)
    point = batch.pixels.double().requires_grad_()
    (gradient,) = torch.autograd.grad(target_losses(repaired, processor, batch, point).sum(), point)
    direction = torch.zeros_like(point)
    direction[:, :, 20:26, 10:18] = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ahead, behind = (target_losses(repaired, processor, batch, point + h * direction) for h in (1e-3, -1e-3))
    slope = (gradient * direction).sum((1, 2, 3))
    assert slope.abs().min() > 0
    torch.testing.assert_close((ahead - behind) / 2e-3, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_images_are_valid_and_do_what_is_reported(testbed, prompts, targets, optimiser):
    attacked = pgd(*testbed, prompts, targets, eps=EPS, steps=5, optimiser=optimiser)
    distance = np.abs(pixels(attacked.samples) - pixels(prompts))
    assert 1 < distance.max() <= EPS
    assert all(image.mode == "RGB" and image.size == (48, 48) for image in attacked.images)
    before, after = (independent_losses(*testbed, samples, targets) for samples in (prompts, attacked.samples))
    assert (after < before).all()
    torch.testing.assert_close(attacked.losses[0, 0].double(), before.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(attacked.loss.double(), after.double(), rtol=1e-3, atol=1e-4)
    assert torch.equal(attacked.loss, attacked.losses.amin((0, 1)))
    texts = [[part.get("text") for part in s.messages[0]["content"]] for s in (*prompts, *attacked.samples)]
    assert texts[:4] == texts[4:]


def test_restarts_never_worsen_and_differ(testbed, prompts, targets, attacked):
    single = pgd(*testbed, prompts, targets, eps=EPS, steps=5, restarts=1)
    assert torch.equal(single.losses, attacked.losses[:1])
    assert (attacked.loss <= single.loss).all()
    assert not torch.isclose(attacked.losses[0, 0], attacked.losses[1, 0]).any()


def test_a_seed_gives_the_same_images_and_another_seed_other_ones(testbed, prompts, targets, attacked):
    again = pgd(*testbed, prompts, targets, eps=EPS, steps=5)
    assert torch.equal(again.losses, attacked.losses)
    assert (pixels(again.samples) == pixels(attacked.samples)).all()
    other = pgd(*testbed, prompts, targets, eps=EPS, steps=1, seed=1)
    assert torch.equal(other.losses[0, 0], attacked.losses[0, 0])
    assert not torch.isclose(other.losses[1, 0], attacked.losses[1, 0]).any()


def test_batches_and_order_change_nothing_but_rounding(testbed, prompts, targets, attacked):
    mirrored = pgd(*testbed, prompts[::-1], targets[::-1], eps=EPS, steps=1, batch_size=1)
    torch.testing.assert_close(mirrored.losses[:, 0].flip(1), attacked.losses[:, 0], rtol=1e-3, atol=1e-4)


def test_images_of_several_sizes_keep_their_order(testbed, prompts, targets):
    wide = Image.fromarray(np.pad(pixels(prompts[:1])[0].astype(np.uint8), ((0, 0), (4, 4), (0, 0))))
    content = [{"type": "image", "image": wide}, prompts[0].messages[0]["content"][1]]
    samples = [prompts[0], Sample([{"role": "user", "content": content}]), prompts[2]]
    result = pgd(*testbed, samples, targets[:1] * 2 + targets[2:3], eps=EPS, steps=2)
    assert [image.size for image in result.images] == [(48, 48), (56, 48), (48, 48)]
    # What the processor cuts away does nothing.
    torch.testing.assert_close(result.losses[0, 0, 0], result.losses[0, 0, 1], rtol=1e-3, atol=1e-4)


def test_optimisers_share_their_start_and_then_part(testbed, prompts, targets, attacked):
    settings = {"eps": EPS, "steps": 5}
    told = pgd(*testbed, prompts, targets, **settings, optimiser="mi-fgsm", momentum=0.5)
    plain = pgd(*testbed, prompts, targets, **settings, optimiser="pgd")
    auto = pgd(*testbed, prompts, targets, **settings, optimiser="apgd")
    assert torch.equal(told.losses, attacked.losses)
    assert torch.equal(plain.losses, pgd(*testbed, prompts, targets, **settings, momentum=0.0).losses)
    for other in (plain, auto):
        assert torch.equal(other.losses[:, 0], attacked.losses[:, 0])
        assert not torch.equal(other.losses[:, 2], attacked.losses[:, 2])
    # All begin by a sign step that reaches the ball's surface.
    assert torch.equal(auto.losses[0, 1], plain.losses[0, 1])


def test_apgd_of_a_prompt_is_its_own(testbed, prompts, targets):
    settings = {"eps": EPS, "steps": 4, "optimiser": "apgd", "restarts": 1}
    together = pgd(*testbed, prompts, targets, **settings)
    alone = [pgd(*testbed, [p], [t], **settings) for p, t in zip(prompts, targets, strict=True)]
    losses = torch.cat([one.losses for one in alone], dim=2)
    # Batches round differently, which may turn the sign of a gradient near 0.
    torch.testing.assert_close(losses[:, :2], together.losses[:, :2], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(losses, together.losses, rtol=0.1, atol=0.01)


def test_one_run_gives_the_best_of_every_number_of_steps(testbed, prompts, targets, attacked):
    kept = (0, 1, 3, 5)
    calls = []
    hook = testbed[0].register_forward_hook(lambda *_: calls.append(1))
    result = pgd(*testbed, prompts, targets, eps=EPS, steps=5, keep_steps=kept)
    hook.remove()
    assert len(calls) == 2 * 6  # one for each image on the way
    assert torch.equal(result.losses, attacked.losses) and torch.equal(result.best, attacked.best)
    assert tuple(result.at_steps) == kept and attacked.at_steps == {}
    for steps, at in result.at_steps.items():
        assert torch.equal(at.losses, result.losses[:, : steps + 1])
        assert torch.equal(at.loss, result.losses[:, : steps + 1].amin((0, 1)))
        measured = independent_losses(*testbed, at.samples, targets)
        torch.testing.assert_close(at.loss.double(), measured.double(), rtol=1e-3, atol=1e-4)
    assert (pixels(result.at_steps[5].samples) == pixels(result.samples)).all()
    # A run of fewer steps takes smaller steps in the end, apart from the first.
    short = pgd(*testbed, prompts, targets, eps=EPS, steps=1)
    assert torch.equal(short.losses, result.at_steps[1].losses)
    assert (pixels(short.samples) == pixels(result.at_steps[1].samples)).all()


def test_images_beyond_the_budget_are_refused(prompts):
    check_budget(prompts, prompts, 0)

    def changed(image):
        content = [{"type": "image", "image": image}, prompts[1].messages[0]["content"][1]]
        return [prompts[0], Sample([{"role": "user", "content": content}]), *prompts[2:]]

    clean = pixels(prompts)[1]
    far = clean.copy()
    far[3, 4, 2] += 9 if far[3, 4, 2] < 128 else -9
    far = changed(Image.fromarray(far.astype(np.uint8)))
    check_budget(prompts, far, 9)
    with pytest.raises(ValueError, match=r"`attacked`\[1\] is 9 grey levels from its original, more than eps=8"):
        check_budget(prompts, far, 8)
    with pytest.raises(ValueError, match=r"`attacked`\[1\] is 9 grey levels"):
        check_budget(far, prompts, 8.9)
    image = Image.fromarray(clean.astype(np.uint8))
    for other, described in (
        (image.convert("RGBA"), "RGBA image of 48 x 48"),
        (image.convert("L").convert("F"), "F image of 48 x 48"),
        (image.crop((0, 0, 48, 40)), "RGB image of 48 x 40"),
    ):
        with pytest.raises(ValueError, match=rf"`attacked`\[1\] is a {described}; .* 8-bit RGB of 48 x 48"):
            check_budget(prompts, changed(other), 255)
    with pytest.raises(ValueError, match="4 originals and 3 attacked"):
        check_budget(prompts, prompts[:3], 8)
    without = [Sample([{"role": "user", "content": [{"type": "text", "text": "?"}]}])]
    with pytest.raises(ValueError, match=r"`attacked`\[0\] has 0 images, its original 1"):
        check_budget(prompts[:1], without, 8)


def test_no_room_returns_the_original(testbed, prompts, targets):
    result = pgd(*testbed, prompts, targets, eps=0, steps=2)
    assert (pixels(result.samples) == pixels(prompts)).all()
    assert (result.best == 0).all()


def test_a_penalty_is_lowered(testbed, prompts, targets):
    model, site = testbed[0], Site(1, "residual")
    probe = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)
    masks = []

    def score(batch):
        masks.append(batch)
        return ((activations[site] @ probe) * batch.visual).sum(1)

    with record(model, [site]) as activations:
        free, bound = (
            pgd(*testbed, prompts, targets, eps=EPS, steps=5, penalty=score, weight=weight) for weight in (0.0, 100.0)
        )
    assert (bound.penalty < free.penalty - 1).all()
    assert (bound.penalty < bound.penalties[0, 0] - 1).all()
    assert (bound.loss > free.loss).any()
    # The masks know the prompt from the target and the padding.
    batch = masks[0]
    written = batch.inputs["attention_mask"].bool()
    assert not (batch.visual & batch.text).any()
    control_tokens = 3  # <s> <user> <assistant>
    lengths = [len(testbed[1].tokenizer(target)["input_ids"]) for target in targets]
    assert (written.sum(1) - (batch.visual | batch.text).sum(1) - control_tokens).tolist() == lengths
    with pytest.raises(ValueError, match="one value per sample"):
        pgd(*testbed, prompts, targets, eps=EPS, steps=1, penalty=lambda batch: torch.tensor(0.0))


def test_the_model_is_given_back_as_it_was(llava, processor, prompts, targets):
    frozen = llava.get_input_embeddings().weight.requires_grad_(False)
    llava.train()
    llava.model.vision_tower.eval()
    with torch.no_grad():
        pgd(llava, processor, prompts[:1], targets[:1], eps=EPS, steps=1)
    assert llava.training and not llava.model.vision_tower.training
    assert [p for p in llava.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in llava.parameters())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"eps": 256}, "eps=256"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"targets": ["step"]}, "one target per sample"),
        ({"targets": [""] * 4}, "target"),
        ({"targets": ["step", ["step", "mix"], "step", "step"]}, r"`targets`\[1\] is no text"),
        ({"optimiser": "adam"}, "optimiser='adam'"),
        ({"keep_steps": (2,)}, "keep_steps"),
    ],
)
def test_bad_settings_are_named(testbed, prompts, targets, bad, message):
    settings = {"targets": targets, "eps": EPS, "steps": 1, **bad}
    with pytest.raises(ValueError, match=message):
        pgd(*testbed, prompts, **settings)


def test_a_prompt_without_an_image_is_named(testbed, world, prompts, targets):
    with pytest.raises(ValueError, match=r"`samples`\[1\] has 0 images"):
        pgd(*testbed, [prompts[0], *world.attack("wrapper", "validation", 1)], targets[:2], eps=EPS, steps=1)
