"""Each tiny family is what the other tests take it for: stock parts that agree with one another."""

import pytest
import torch
from families import FAMILIES, collated, prompts
from torch import nn
from transformers import AutoProcessor

from care_hf.sites import decoder_layers


@pytest.fixture(params=FAMILIES)
def family(request):
    with torch.no_grad():
        yield FAMILIES[request.param]


def next_logits(family, batch):
    """The logits after each row's last token, wherever the padding is."""
    mask = batch.inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)
    return family.model(**batch.inputs).logits[torch.arange(len(mask)), last]


def test_vision_tower_is_deeper_than_text(family):
    layers = decoder_layers(family.model)
    of_text = set(layers.modules())
    others = [len(m) for m in family.model.modules() if isinstance(m, nn.ModuleList) and m not in of_text]
    assert len(layers) == 4
    assert family.text_only or max(others) > 4


def test_model_is_tiny_and_finite(family):
    assert sum(p.numel() for p in family.model.parameters()) < 1e6
    assert all(value.isfinite().all() for value in family.model.state_dict().values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_of_batch_equals_prompt_alone(family, side):
    samples = prompts(family)
    batch = collated(family, samples, side)
    logits = next_logits(family, batch)
    counts = batch.visual.sum(dim=1)
    assert (counts > 0).tolist() == [bool(sample.images) for sample in samples]
    assert counts.max() <= 64 and batch.text.any(dim=1).all()
    assert len(set(batch.inputs["attention_mask"].sum(dim=1).tolist())) > 1
    for row, sample in zip(logits, samples, strict=True):
        alone = next_logits(family, collated(family, [sample], side))
        torch.testing.assert_close(row, alone[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits[-1], atol=0.1)


def test_images_matter(family):
    first, second = (next_logits(family, collated(family, prompts(family, seed))) for seed in (0, 1))
    matters = (first - second).abs().amax(dim=1) > 0.1
    assert matters.tolist() == [bool(sample.images) for sample in prompts(family)]


def test_generation_with_and_without_cache(family):
    inputs = collated(family).inputs
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, uncached = (family.model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_processor_is_loaded_as_saved(family, tmp_path):
    if family.lacks:
        pytest.skip(f"it lacks {family.lacks}")
    family.processor(family.model.config).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(collated(family, processor=loaded).inputs, collated(family).inputs)
