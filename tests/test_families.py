"""The wrapper on Qwen2.5-VL, whose checkpoints are renamed on loading; its vision tower is the deeper one here."""

import pytest
import torch
from tiny import qwen_config
from transformers import AutoModel, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.projection import repair
from care_hf.sites import Site, decoder_layers, record

IMAGE, START, END = 90, 91, 92


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = qwen_config(99, IMAGE, 93, START, END, depth=5)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def inputs():
    """One image of 4 x 4 patches, merged to 4 tokens, between text; the second row left-padded and without an image."""
    first = [5, START, *[IMAGE] * 4, END, 6, 7, 8]
    second = [0] * 6 + [9, 10, 11, 12]
    return {
        "input_ids": torch.tensor([first, second]),
        "attention_mask": torch.tensor([[1] * 10, [0] * 6 + [1] * 4]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 10]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_sites_are_those_of_the_text_decoder(qwen):
    assert len(decoder_layers(qwen)) == 3 and len(qwen.model.visual.blocks) == 5
    assert decoder_layers(qwen) is qwen.model.language_model.layers


@pytest.mark.parametrize("fusion", ["adaptive", "route"])
def test_it_is_repaired_saved_loaded_and_switched_off(qwen, inputs, fusion, tmp_path):
    random = SafetySubspaces.random(qwen, layers=[1, 2], rank=4)
    subspaces = SafetySubspaces(random.sites, fusion)
    base = qwen(**inputs).logits
    repaired = CareForConditionalGeneration.from_base(qwen, subspaces)
    site = Site(1, "ffn")
    with record(repaired.vlm, [site]) as after, torch.no_grad():
        logits = repaired(**inputs).logits
    with repaired.disable(), record(repaired.vlm, [site]) as before, torch.no_grad():
        assert torch.equal(repaired(**inputs).logits, base)
    expected = repair(before[site], random.sites[site], fusion, visual_mask=inputs["input_ids"] == IMAGE)
    torch.testing.assert_close(after[site], expected)
    assert not torch.allclose(logits, base, atol=1e-2)

    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = repaired.generate(**inputs, **options)
    assert torch.equal(repaired.generate(**inputs, **options, use_cache=False), tokens)

    repaired.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is CareForConditionalGeneration and type(loaded.vlm) is type(qwen)
        assert torch.equal(loaded(**inputs).logits, logits)
        assert torch.equal(loaded.generate(**inputs, **options), tokens)
