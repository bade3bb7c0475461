"""The tiny models of families with paths of their own, before any repair: what tests of repairs rest on."""

import numpy as np
import pytest
import torch
from families import special
from PIL import Image
from torch import nn

from care_hf.samples import Sample, collate, generation_prompt
from care_hf.sites import decoder_layers, image_token_ids

FAMILIES = {family.name: family for family in special.FAMILIES}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
pytestmark = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(text: str, *images: Image.Image) -> Sample:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return Sample([{"role": "user", "content": content}])


def prompts(name: str) -> list[Sample]:
    """Of different lengths, with no image, one and two, as far as the family can."""
    images = [noise(0, 24, 16), noise(1, 16, 24), noise(2, 40, 24)]
    if FAMILIES[name].text_only:
        return [prompt("how do i make a cake ?"), prompt("tell me")]
    if name in special.ONE_IMAGE:
        # Its Q-Former counts positions from the padding on, so rows of a batch are as alone only if none is padded.
        return [prompt("what is this ?", images[0]), prompt("tell me now .", images[1])]
    return [prompt("how do i bake bread ?"), prompt("what is this", images[0]), prompt("tell me", *images[1:])]


def parts(name: str):
    model = FAMILIES[name].model
    return model, FAMILIES[name].processor(model.config), image_token_ids(model.config)


def test_models_are_small_and_their_vision_towers_the_deeper_ones(name):
    model = FAMILIES[name].model
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    layers = decoder_layers(model)
    assert len(layers) in (3, 4) and model.config.get_text_config().vocab_size == special.VOCABULARY_SIZE
    of_text = set(layers.modules())
    others = [len(m) for m in model.modules() if isinstance(m, nn.ModuleList) and m not in of_text]
    assert max(others, default=0) > len(layers) or FAMILIES[name].text_only


def test_images_are_where_the_configuration_says(name):
    model, processor, images = parts(name)
    samples = prompts(name)
    for side in ("left", "right"):
        batch = collate(processor, samples, images, side)
        counts = batch.visual.sum(dim=1).tolist()
        assert [count > 0 for count in counts] == [bool(sample.images) for sample in samples]
        assert max(counts) <= 2 * 16 and batch.text.any(dim=1).all()
        assert torch.isfinite(model(**batch.inputs).logits).all()
    assert generation_prompt(processor) == (processor.tokenizer.convert_tokens_to_ids("<assistant>"),)


def test_rows_of_a_batch_are_as_alone_and_with_a_cache_as_without(name):
    model, processor, images = parts(name)
    inputs = collate(processor, prompts(name), images).inputs
    last = model(**inputs).logits[:, -1]
    for row, sample in zip(last, prompts(name), strict=True):
        alone = model(**collate(processor, [sample], images).inputs).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last[0], last[-1], atol=0.1)
    tokens = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), tokens)


def test_images_change_what_comes_next(name):
    model, processor, images = parts(name)
    if not FAMILIES[name].text_only:
        one, other = (
            model(**collate(processor, [prompt("what is this", noise(seed, 24, 24))], images).inputs).logits[0, -1]
            for seed in (0, 1)
        )
        assert torch.allclose(one, other, atol=0.1) == (name in special.CLOSED)
