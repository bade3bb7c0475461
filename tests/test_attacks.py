import copy

import numpy as np
import pytest
import torch
from conftest import random_subspace
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from care_hf.attacks import pgd
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


def pixels(samples):
    return np.stack([np.asarray(sample.messages[0]["content"][0]["image"]) for sample in samples]).astype(int)


def independent_losses(model, processor, samples, targets):
    """-log p of the targets one prompt at a time, by the processor's own preprocessing, from the written prompt."""
    losses = []
    for sample, target in zip(samples, targets, strict=True):
        image, text = (part[part["type"]] for part in sample.messages[0]["content"])
        written = f"<s><user><image>{text}<assistant>{target}"
        inputs = processor(text=written, images=image, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"][0]
        first = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<assistant>")) + 1
        with torch.no_grad():
            log_p = model(**inputs).logits[0].double().log_softmax(-1)
        losses.append(-sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids))))
    return torch.tensor(losses)


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


def test_images_are_valid_and_do_what_is_reported(testbed, prompts, targets, attacked):
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
    ],
)
def test_bad_settings_are_named(testbed, prompts, targets, bad, message):
    settings = {"targets": targets, "eps": EPS, "steps": 1, **bad}
    with pytest.raises(ValueError, match=message):
        pgd(*testbed, prompts, **settings)


def test_a_prompt_without_an_image_is_named(testbed, world, prompts, targets):
    with pytest.raises(ValueError, match=r"`samples`\[1\] has 0 images"):
        pgd(*testbed, [prompts[0], *world.attack("wrapper", "validation", 1)], targets[:2], eps=EPS, steps=1)
