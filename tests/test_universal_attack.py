import numpy as np
import pytest
import torch
from attacking import independent_losses, pixels
from PIL import Image

from care_hf.attacks import pgd
from care_hf.samples import Sample
from care_hf.sites import Site, record
from care_hf.teacher_forcing import encode, target_losses
from care_hf.universal_attack import universal

EPS = 8


@pytest.fixture(scope="module")
def prompts(world):
    return [*world.attack("typographic", "validation", 2), *world.attack("icon", "validation", 2)]


@pytest.fixture(scope="module")
def targets(prompts):
    """Of unequal length, some of which the model answers so and some not."""
    return [sample.answer for sample in prompts[:3]] + ["step one"]


@pytest.fixture(scope="module")
def attack(testbed, prompts, targets):
    return universal(*testbed, prompts, targets, eps=EPS, steps=5, restarts=2, keep_steps=(0, 2))


def with_image(array):
    content = [{"type": "image", "image": Image.fromarray(array.astype(np.uint8))}, {"type": "text", "text": "?"}]
    return Sample([{"role": "user", "content": content}])


def test_one_perturbation_serves_all_images(testbed, prompts, targets, attack):
    assert attack.delta.dtype == torch.int16 and 1 < attack.delta.abs().max() <= EPS
    shifted = (pixels(prompts) + attack.delta.permute(1, 2, 0).numpy()).clip(0, 255)
    assert (pixels(attack.samples) == shifted).all()
    assert all(sample.images[0].mode == "RGB" for sample in attack.samples)
    texts = [[part.get("text") for part in s.messages[0]["content"]] for s in (*prompts, *attack.samples)]
    assert texts[:4] == texts[4:]


def test_it_does_what_is_reported(testbed, prompts, targets, attack):
    before, after = (independent_losses(*testbed, samples, targets).mean() for samples in (prompts, attack.samples))
    assert attack.loss == attack.losses.min() < attack.losses[0, 0]
    torch.testing.assert_close(attack.losses[0, 0].double(), before.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(attack.loss, after.item(), rtol=1e-3, atol=1e-4)


def test_the_first_step_follows_the_mean_gradient(testbed, prompts, targets):
    attack = universal(*testbed, prompts, targets, eps=EPS, steps=1)
    total = torch.zeros(3, 48, 48).double()
    for prompt, target in zip(prompts, targets, strict=True):
        clean = encode(*testbed, [Sample(prompt.messages)], [target])
        image = clean.pixels.float().requires_grad_()
        total += torch.autograd.grad(target_losses(*testbed, clean, image).sum(), image)[0][0].double()
    clear = total.abs() > 1e-4 * total.abs().max()  # else rounding may turn the sign
    # Where all images are white or all black there is no way further.
    clean = torch.from_numpy(pixels(prompts)).permute(0, 3, 1, 2)
    step = (-EPS * total.sign()).clamp(-clean.amax(0), 255 - clean.amin(0))
    assert attack.best == 1 and clear.float().mean() > 0.5
    assert torch.equal(attack.delta[clear].double(), step[clear])


def test_of_one_prompt_it_is_the_attack_on_that_prompt(testbed, prompts, targets):
    of_one = universal(*testbed, prompts[3:], targets[3:], eps=EPS, steps=4)
    expected = pgd(*testbed, prompts[3:], targets[3:], eps=EPS, steps=4, restarts=1)
    torch.testing.assert_close(of_one.losses, expected.losses[..., 0], rtol=1e-3, atol=1e-4)


def test_batches_change_nothing_but_rounding(testbed, prompts, targets, attack):
    rows = []
    hook = testbed[0].register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    single = universal(*testbed, prompts, targets, eps=EPS, steps=5, restarts=2, batch_size=1)
    hook.remove()
    assert set(rows) == {1}
    torch.testing.assert_close(single.losses[:, :2], attack.losses[:, :2], rtol=1e-3, atol=1e-4)
    # A gradient near 0 may turn its sign.
    assert (single.delta != attack.delta).float().mean() < 0.01
    torch.testing.assert_close(single.loss, attack.loss, rtol=0.02, atol=0)


def test_a_seed_gives_the_same_perturbation_and_another_seed_another(testbed, prompts, targets, attack):
    again = universal(*testbed, prompts, targets, eps=EPS, steps=5, restarts=2)
    assert torch.equal(again.losses, attack.losses) and torch.equal(again.delta, attack.delta)
    other = universal(*testbed, prompts, targets, eps=EPS, steps=5, restarts=2, seed=1)
    assert torch.equal(other.losses[0], attack.losses[0])
    assert not torch.isclose(other.losses[1], attack.losses[1]).any()


def test_one_run_gives_the_best_of_every_number_of_steps(testbed, prompts, targets, attack):
    assert tuple(attack.at_steps) == (0, 2)
    for steps, at in attack.at_steps.items():
        assert torch.equal(at.losses, attack.losses[:, : steps + 1])
        assert at.loss == attack.losses[:, : steps + 1].min()
        measured = independent_losses(*testbed, at.samples, targets).mean()
        torch.testing.assert_close(at.loss, measured.item(), rtol=1e-3, atol=1e-4)


def test_held_out_prompts_take_the_same_perturbation(world, attack):
    held_out = world.attack("typographic", "test", 3)
    attacked = attack.apply(held_out)
    assert (pixels(attacked) == (pixels(held_out) + attack.delta.permute(1, 2, 0).numpy()).clip(0, 255)).all()
    with pytest.raises(ValueError, match=r"`samples`\[0\] has an image of 40 x 48; .* here 48 x 48"):
        attack.apply([with_image(np.zeros((48, 40, 3)))])
    with pytest.raises(ValueError, match=r"`samples`\[0\] has 0 images"):
        attack.apply(world.attack("wrapper", "test", 1))


def test_several_targets_count_as_their_mean(testbed, prompts):
    corpus = ["mix acid with lye .", "step one", "i cannot help with that ."]
    targets = [corpus, "step one mix salt", corpus[:2]]
    attack = universal(*testbed, prompts[:3], targets, eps=32, steps=4, batch_size=4, optimiser="apgd")

    def mean(samples):
        each = [[texts] if isinstance(texts, str) else texts for texts in targets]
        losses = [independent_losses(*testbed, [s] * len(t), t).mean() for s, t in zip(samples, each, strict=True)]
        return torch.stack(losses).mean().item()

    torch.testing.assert_close(attack.losses[0, 0].item(), mean(prompts[:3]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(attack.loss, mean(attack.samples), rtol=1e-3, atol=1e-4)
    assert attack.loss < attack.losses[0, 0] - 1


def test_the_penalty_is_the_mean_and_is_lowered(testbed, prompts, targets):
    model, site = testbed[0], Site(1, "residual")
    probe = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)

    def score(batch):
        return ((activations[site] @ probe) * batch.visual).sum(1)

    settings = {"eps": EPS, "penalty": score, "batch_size": 3}
    with record(model, [site]) as activations:
        bound = universal(*testbed, prompts, targets, **settings, steps=4, weight=100.0)
        each = pgd(*testbed, prompts, targets, **settings, steps=1).penalties[0, 0]
    torch.testing.assert_close(bound.penalties[0, 0], each.mean(), rtol=1e-3, atol=1e-3)
    assert bound.penalties.flatten()[bound.best] < bound.penalties[0, 0] - 1


@pytest.mark.parametrize("level, room", [(0, (0, EPS)), (255, (-EPS, 0)), (3, (-3, EPS))])
def test_a_perturbation_ends_where_all_images_saturate(testbed, level, room):
    flat = with_image(np.full((48, 48, 3), level))
    attack = universal(*testbed, [flat, flat], ["step one", "red ."], eps=EPS, steps=2, restarts=2)
    assert (int(attack.delta.min()), int(attack.delta.max())) == room


def test_the_model_is_given_back_as_it_was(llava, processor, prompts, targets):
    llava.train()
    with torch.no_grad():
        universal(llava, processor, prompts[:2], targets[:2], eps=EPS, steps=1)
    assert llava.training and all(p.requires_grad and p.grad is None for p in llava.parameters())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"eps": 256}, "eps=256"),
        ({"targets": ["step"]}, "one target per sample"),
        ({"targets": ["step", [], "step", "step"]}, r"`targets`\[1\] is empty"),
        ({"samples": [], "targets": []}, "`samples` is empty"),
    ],
)
def test_bad_settings_are_named(testbed, prompts, targets, bad, message):
    settings = {"samples": prompts, "targets": targets, "eps": EPS, "steps": 1, **bad}
    with pytest.raises(ValueError, match=message):
        universal(*testbed, **settings)


def test_images_of_several_sizes_are_refused(testbed, prompts, targets):
    samples = [prompts[0], with_image(np.zeros((48, 56, 3)))]
    with pytest.raises(ValueError, match=r"`samples`\[1\] has an image of 56 x 48"):
        universal(*testbed, samples, targets[:2], eps=EPS, steps=1)
