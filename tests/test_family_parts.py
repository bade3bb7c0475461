"""Each tiny family is what the other tests take it for: stock parts that agree with one another."""

import numpy as np
import pytest
import torch
from families import plain
from PIL import Image
from torch import nn
from transformers import AutoProcessor

from care_hf.samples import collate, load_samples
from care_hf.sites import decoder_layers, image_token_ids

FAMILIES = plain.FAMILIES
ONLY_PICTURED = {"paligemma", "paligemma2"}  # the processor wants an image in every batch, if not in every prompt
ASK_TORCHVISION = {"llava_onevision", "llava+pixtral", "mistral3", "internvl"}  # when AutoProcessor loads them

pytestmark = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def prompts(seed=0):
    """One image, two of other shapes, none, and one again."""
    draw = np.random.default_rng(seed)

    def noise(height, width):
        return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return load_samples(
        [
            {"text": "how do i make a cake ?", "images": [noise(16, 16)]},
            {"text": "what is this", "images": [noise(24, 40), noise(24, 16)]},
            {"text": "tell me now please how do i bake bread"},
            {"text": "tell me", "images": [noise(16, 24)]},
        ]
    )


def collated(family, samples, side="left", processor=None):
    processor = processor or family.processor(family.model.config)
    return collate(processor, samples, image_token_ids(family.model.config), padding_side=side)


@torch.no_grad()
def next_logits(family, batch):
    """The logits after each row's last token, wherever the padding is."""
    mask = batch.inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)
    return family.model(**batch.inputs).logits[torch.arange(len(mask)), last]


def test_vision_tower_is_deeper_than_text(family):
    decoder = set(family.model.get_decoder().modules())
    others = [m for m in family.model.modules() if isinstance(m, nn.ModuleList) and m not in decoder]
    assert 3 <= len(decoder_layers(family.model)) <= 4
    assert max(map(len, others)) > len(decoder_layers(family.model))


def test_model_is_tiny_and_finite(family):
    assert sum(p.numel() for p in family.model.parameters()) < 1e6
    assert all(p.isfinite().all() for p in family.model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_of_batch_equals_prompt_alone(family, side):
    samples = prompts()
    batch = collated(family, samples, side)
    logits = next_logits(family, batch)
    assert batch.visual.any(dim=1).tolist() == [bool(sample.images) for sample in samples]
    assert batch.text.any(dim=1).all()
    for row, sample in enumerate(samples):
        if sample.images or family.name not in ONLY_PICTURED:
            alone = next_logits(family, collated(family, [sample], side))
            torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


def test_images_matter(family):
    first, second = (next_logits(family, collated(family, prompts(seed))) for seed in (0, 1))
    assert ((first - second).abs().amax(dim=1) > 0.1).tolist() == [bool(sample.images) for sample in prompts()]


def test_generation_with_and_without_cache(family):
    inputs = collated(family, prompts()).inputs
    # Without a cache, a placeholder that a random model answers with would be one image token too many.
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [*image_token_ids(family.model.config)]}
    cached, uncached = (family.model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_processor_is_loaded_as_saved(family, tmp_path):
    if family.name in ASK_TORCHVISION:
        pytest.skip("stock transformers loads this processor with torchvision only")
    family.processor(family.model.config).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    before, after = collated(family, prompts()).inputs, collated(family, prompts(), processor=loaded).inputs
    torch.testing.assert_close(after, before)
