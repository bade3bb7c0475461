import dataclasses
import html.parser
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import qwen_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.answers import generate_answers
from care_hf.attribution import text_scores, visual_scores
from care_hf.attribution_figures import colour, draw
from care_hf.gating import Gate
from care_hf.image_grids import ImageGrid, image_grids
from care_hf.projection import Subspace
from care_hf.samples import collate, generation_prompt, load_samples
from care_hf.sites import Site, image_token_ids, record
from care_hf.token_attribution import TokenAttribution, attribute

RED = np.zeros((48, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
QUESTION = "how do i make bilan ?"
QWEN_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<vs>", "<ve>", "<user>", "<model>"]
QWEN_TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}"
    "<vs><|image_pad|><ve>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


class ImageProcessor(Qwen2_5_VLProcessor):
    """The stock processor without videos, which need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    vocabulary = [*QWEN_TOKENS, *(f"\u2581w{i}" for i in range(40))]
    core = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, merges=[], ignore_merges=True, unk_token="<unk>")
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=QWEN_TOKENS[4:],
    )
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    processor = ImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=QWEN_TEMPLATE)
    config = qwen_config(len(vocabulary), 4, 5, 6, 7, spread=0.3)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def noise(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def log_p_alone(model, processor, prompt, answer, position=None, module=None, pool=None):
    """log p(answer) of one row, the module's output (the decoder's input embeddings if None) replaced at `position`."""
    inputs = collate(processor, load_samples([prompt]), ()).inputs
    ids = inputs["input_ids"]
    target = torch.tensor([processor.tokenizer(answer, add_special_tokens=False)["input_ids"]])
    inputs["input_ids"] = torch.cat([ids, target], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(target)], 1)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype) if "pixel_values" in inputs else None

    def change(h):
        h = h.clone()
        if position is not None:
            others = [h[0, i] for i in pool if i != position]
            h[0, position] = sum(others) / len(others) if others else 0
        return h

    if module is None:
        handle = model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "inputs_embeds": change(kwargs["inputs_embeds"])}),
            with_kwargs=True,
        )
    else:
        handle = module.register_forward_hook(
            lambda _, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
    with torch.no_grad():
        logits = model(**{k: v for k, v in inputs.items() if v is not None}).logits[0]
    handle.remove()
    begin = ids.shape[1]
    p = logits.softmax(-1)
    return sum(p[begin + k - 1, token].log().item() for k, token in enumerate(target[0]))


def expected_scores(model, processor, prompt, found, module=None, atol=1e-9):
    whole = log_p_alone(model, processor, prompt, found.answer)
    assert whole == pytest.approx(found.log_probability, abs=atol)
    scores = []
    for position, visual in zip(found.positions.tolist(), found.visual.tolist(), strict=True):
        pool = found.positions[found.visual == visual].tolist()
        scores.append(whole - log_p_alone(model, processor, prompt, found.answer, position, module, pool))
    return scores


@pytest.mark.parametrize("site", [None, "2.ffn", "1.attention", "0.residual"])
def test_ablation_is_one_token_at_a_time_in_float64(llava, processor, site):
    model = llava.double()
    layers = model.get_decoder().layers
    module = {
        None: None,
        "2.ffn": layers[2].mlp,
        "1.attention": layers[1].self_attn,
        "0.residual": layers[0],
    }[site]
    prompt = {"text": QUESTION, "image": noise(0, 48, 48)}
    found = attribute(model, processor, prompt, site=site, answer="step one mix", batch_size=16)
    assert found.site == (site or "embedding") and found.method == "ablation"
    np.testing.assert_allclose(found.scores, expected_scores(model, processor, prompt, found, module), atol=1e-6)
    assert found.scores.abs().max() > 1e-3


def test_ablation_on_qwen_is_one_token_at_a_time_for_images_of_different_sizes(qwen):
    model, processor = qwen
    content = [
        {"type": "image", "image": noise(1, 24, 16)},
        {"type": "text", "text": "w1 w2"},
        {"type": "image", "image": noise(2, 16, 32)},
        {"type": "text", "text": "w3"},
    ]
    messages = [{"role": "user", "content": content}]
    model.double()
    try:
        found = attribute(model, processor, messages, answer="w7 w8", batch_size=5)
        expected = expected_scores(model, processor, messages, found)
    finally:
        model.float()
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert [image.grid for image in found.images] == [(2, 3), (4, 2)]
    assert found.images[0].indices.tolist() == [*range(6)]
    assert found.images[1].indices.tolist() == [*range(8, 16)]
    assert torch.equal(found.heatmap(1), found.scores[8:16].reshape(4, 2))
    assert [found.tokens[i] for i in (6, 7, 16)] == ["w1", " w2", "w3"]


def deciding_model(model, processor, trigger, answer, otherwise):
    """Uniform attention in layer 0 carries coordinate 0 of any token to coordinate 1, which the head reads: all else 0.

    Coordinate 0 is the text trigger's or, through vision tower and projector, a bright patch's; 2 is everyone's.
    """
    model.requires_grad_(False)
    decoder = model.get_decoder()
    for layer in decoder.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    first = decoder.layers[0].self_attn
    for weight in (first.q_proj.weight, first.k_proj.weight, first.v_proj.weight):
        weight.zero_()
    first.v_proj.weight[0, 0] = first.o_proj.weight[1, 0] = 1
    embeddings = model.get_input_embeddings().weight
    embeddings[:, :2], embeddings[:, 2] = 0, 1
    if trigger is not None:
        embeddings[processor.tokenizer.convert_tokens_to_ids(trigger), 0] = 60
    head = model.get_output_embeddings().weight
    head.zero_()
    ids = processor.tokenizer.convert_tokens_to_ids([answer, otherwise])
    head[ids[0], 1], head[ids[1], 2] = 100, 1

    tower = model.model.vision_tower
    tower.embeddings.patch_embedding.weight.zero_()
    tower.embeddings.patch_embedding.weight[0] = 1 / tower.embeddings.patch_embedding.weight[0].numel()
    tower.embeddings.position_embedding.weight.zero_()
    tower.embeddings.position_embedding.weight[:, 1] = 1
    for layer in tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    projector = model.model.multi_modal_projector
    for parameter in projector.parameters():
        parameter.zero_()
    projector.linear_1.weight[0, 0] = projector.linear_2.weight[0, 0] = 3
    projector.linear_2.bias[2] = 1
    return model


def test_a_text_trigger_that_decides_the_answer_ranks_first(llava, processor):
    model = deciding_model(llava, processor, "\u2581make", "\u2581step", "\u2581hazard")
    prompt = {"text": "how do i make a list ?", "image": Image.new("RGB", (48, 48))}
    without = load_samples([{**prompt, "text": "how do i list ?"}])
    assert generate_answers(model, processor, without, 1) == ["hazard"]
    found = attribute(model, processor, prompt, max_new_tokens=1)
    assert found.answer == "step"
    best = found.top(1)[0]
    assert found.tokens[best] == " make"
    others = torch.cat([found.scores[:best], found.scores[best + 1 :]])
    assert found.scores[best] > 1 and (others < found.scores[best] / 10).all()
    assert found.normalised[best] == 1 and found.normalised.argmax() == best


@pytest.mark.parametrize("tile", [(2, 4), (5, 0)])
def test_an_image_patch_that_decides_the_answer_ranks_first(llava, processor, tile):
    model = deciding_model(llava, processor, None, "\u2581step", "\u2581hazard")
    pixels = np.zeros((48, 48, 3), np.uint8)
    dark = load_samples([{"text": QUESTION, "image": pixels}])
    assert generate_answers(model, processor, dark, 1) == ["hazard"]
    pixels[8 * tile[0] : 8 * tile[0] + 8, 8 * tile[1] : 8 * tile[1] + 8] = 255
    found = attribute(model, processor, {"text": QUESTION, "image": pixels}, max_new_tokens=1)
    assert found.answer == "step" and found.visual[found.top(1)[0]]
    heat = found.heatmap()
    assert heat.shape == (6, 6) and divmod(int(heat.argmax()), 6) == tile
    assert heat.max() > 1 and heat.flatten().sort().values[-2] < heat.max() / 10


def test_kernel_scores_are_those_of_the_activations(testbed, world):
    model, processor = testbed
    sample = world.attack("icon", "test", 3)[0]
    batch = collate(processor, load_samples([sample.messages]), image_token_ids(model.config))
    for site in (None, "1.ffn", Site(4, "attention")):
        place = Site(3, "residual") if site is None else Site.parse(str(site))
        with record(model, [place]) as activations, torch.no_grad():
            model(**batch.inputs)
        visual, text = activations[place][batch.visual], activations[place][batch.text]
        found = attribute(model, processor, sample, method="kernel", site=site)
        torch.testing.assert_close(found.scores[found.visual], visual_scores(visual, text))
        torch.testing.assert_close(found.scores[~found.visual], text_scores(text))
        assert found.site == str(place) and found.answer is None and found.log_probability is None
        assert torch.equal(found.normalised, found.scores)


def test_what_is_scored_is_the_text_and_the_image_and_not_control_tokens(testbed):
    model, processor = testbed
    found = attribute(model, processor, {"text": QUESTION, "image": RED})
    ids = collate(processor, load_samples([{"text": QUESTION, "image": RED}]), ()).inputs["input_ids"][0]
    control = set(processor.tokenizer.all_special_ids) - {model.config.image_token_id}
    assert found.positions.tolist() == [i for i, token in enumerate(ids.tolist()) if token not in control]
    assert torch.equal(found.visual, ids[found.positions] == model.config.image_token_id)
    words = [t for t, visual in zip(found.tokens, found.visual, strict=True) if not visual]
    assert "".join(words).strip() == QUESTION and words[1:4] == [" do", " i", " make"]
    assert found.positions.dtype == torch.int64 and found.scores.dtype == torch.float32
    assert found.answer == generate_answers(model, processor, load_samples([{"text": QUESTION, "image": RED}]), 16)[0]
    # What the model saw is the picture, whole, since it has the model's size.
    np.testing.assert_allclose(np.asarray(found.images[0].image), RED, atol=1)


def test_the_picture_is_what_the_model_sees_of_it(testbed):
    model, processor = testbed
    wide = np.zeros((48, 96, 3), np.uint8)
    wide[:, 24:72] = RED  # the rest is cropped
    found = attribute(model, processor, {"text": QUESTION, "image": wide}, method="kernel")
    np.testing.assert_allclose(np.asarray(found.images[0].image), RED, atol=1)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_scores_do_not_depend_on_the_batch(testbed, batch_size):
    model, processor = testbed
    prompt = {"text": QUESTION, "image": RED}
    base = attribute(model, processor, prompt, answer="step one")
    torch.testing.assert_close(
        attribute(model, processor, prompt, answer="step one", batch_size=batch_size).scores,
        base.scores,
        atol=1e-4,
        rtol=1e-4,
    )


def test_every_form_of_a_prompt_gives_the_same(testbed, world):
    model, processor = testbed
    prompt = world.attack("icon", "test", 3)[1]
    sample = load_samples([prompt.messages])[0]
    forms = [
        prompt,
        prompt.messages,
        sample,
        {"messages": prompt.messages},
        {"text": prompt.text, "image": prompt.image},
    ]
    found = [attribute(model, processor, form, method="kernel") for form in forms]
    assert all(torch.equal(f.scores, found[0].scores) and f.tokens == found[0].tokens for f in found)


def repairs(model, processor):
    yield SafetySubspaces.random(model, [0, 2], 4)
    # A gate that always fires, and repairs the last prompt token and the first answer tokens.
    gate = Gate(generation_prompt(processor), torch.zeros(128, 1), torch.tensor([-1.0]))
    directions = torch.linalg.qr(torch.randn(128, 8, generator=torch.Generator().manual_seed(0))).Q
    turn = {"last": Subspace(directions, torch.zeros(128)), "response": Subspace(directions, torch.zeros(2, 128))}
    yield SafetySubspaces({Site(3, "residual"): turn}, gate=gate, gate_site=Site(2, "residual"))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_repaired_model_is_attributed_as_it_answers(testbed, kind):
    model, processor = testbed
    repaired = CareForConditionalGeneration.from_base(model, [*repairs(model, processor)][kind])
    prompt = {"text": QUESTION, "image": RED}
    base, found = (attribute(m, processor, prompt, answer="step one") for m in (model, repaired))
    assert not torch.allclose(found.scores, base.scores, atol=1e-3)
    with repaired.disable():
        torch.testing.assert_close(attribute(repaired, processor, prompt, answer="step one").scores, base.scores)
    assert found.log_probability == pytest.approx(log_p_alone(repaired, processor, prompt, "step one"), abs=1e-4)
    best = found.top(1)[0]
    where, pool = found.positions[best].item(), found.positions[found.visual == found.visual[best]].tolist()
    without = log_p_alone(repaired, processor, prompt, "step one", where, pool=pool)
    assert found.scores[best].item() == pytest.approx(found.log_probability - without, abs=1e-3)


def test_text_alone(testbed, qwen):
    for (model, processor), text in ((testbed, "read the word ."), (qwen, "w1 w2 w3")):
        found = attribute(model, processor, {"text": text}, answer=text)
        assert "".join(found.tokens).strip() == text and not found.visual.any() and found.images == []
        expected = expected_scores(model, processor, {"text": text}, found, atol=1e-4)
        np.testing.assert_allclose(found.scores, expected, atol=1e-3)
        with pytest.raises(ValueError, match="0 images"):
            found.heatmap()
        kernel = attribute(model, processor, {"text": text}, method="kernel").scores
        assert kernel.min() >= 0 and kernel.max() == 1


def test_one_text_token_is_replaced_by_the_mean_of_all_others_and_alone_by_zero(qwen):
    model, processor = qwen
    found = attribute(model, processor, {"text": "w1"}, answer="w2 w3")
    assert found.tokens == ["w1"] and found.positions.tolist() == [2]  # after <s><user>, before <model>
    whole, lone = (
        log_p_alone(model, processor, {"text": "w1"}, "w2 w3", *rest) for rest in ((), (2, None, [0, 1, 2, 3]))
    )
    assert found.scores.item() == pytest.approx(whole - lone, abs=1e-4) and abs(whole - lone) > 1e-3
    assert attribute(model, processor, {"text": "w1"}, method="kernel").scores.tolist() == [1]
    kept, processor.chat_template = processor.chat_template, "{{ messages[0].content[0].text }}"
    try:
        found = attribute(model, processor, {"text": "w1"}, answer="w2")
        whole, zero = (log_p_alone(model, processor, {"text": "w1"}, "w2", *rest) for rest in ((), (0, None, [])))
        assert found.positions.tolist() == [0] and found.scores.item() == pytest.approx(whole - zero, abs=1e-4)
    finally:
        processor.chat_template = kept


def test_a_prompt_without_words_has_no_scores(testbed, tmp_path):
    model, processor = testbed
    for method in ("ablation", "kernel"):
        found = attribute(model, processor, {"text": ""}, method=method)
        assert found.tokens == [] and found.scores.tolist() == [] and found.top(3) == []
        assert found.normalised.tolist() == [] and "<div>" in found.html()
        draw(found, tmp_path / "empty.png")


def test_equal_scores_where_nothing_has_an_effect(llava, processor):
    model = deciding_model(llava, processor, None, "\u2581step", "\u2581hazard")
    prompt = {"text": QUESTION}
    model.get_input_embeddings().weight[:] = model.get_input_embeddings().weight[:1]
    found = attribute(model, processor, prompt, answer="step")
    assert found.scores.abs().max() < 1e-5 and found.normalised.tolist() == [0.5] * len(found.tokens)
    assert attribute(model, processor, prompt, method="kernel").normalised.tolist() == [1] * len(found.tokens)


@pytest.mark.parametrize("method", ["ablation", "kernel"])
def test_the_mode_of_every_module_is_kept(llava, processor, method):
    prompt = {"text": QUESTION, "image": RED}
    answer = "step" if method == "ablation" else None
    expected = attribute(llava, processor, prompt, method=method, answer=answer)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llava.modules()]
    llava.train()
    llava.model.vision_tower.eval()
    llava.get_decoder().layers[1].self_attn.attention_dropout = 0.9
    found = attribute(llava, processor, prompt, method=method, answer=answer)
    assert torch.equal(found.scores, expected.scores)
    assert llava.training and llava.get_decoder().layers[1].self_attn.training
    assert not any(module.training for module in llava.model.vision_tower.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llava.modules()]
    with pytest.raises(ValueError, match="`answer` is empty"):
        attribute(llava, processor, prompt, answer="")
    assert llava.training and not found.scores.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradient"}, "method='gradient' is not known"),
        ({"method": "kernel", "answer": "yes"}, "answer='yes': method 'kernel'"),
        ({"method": "kernel", "site": "embedding"}, "'embedding' is not a site"),
        ({"site": "99.ffn"}, "Site 99.ffn: the model has 6"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"answer": ""}, r"`answer` is empty \(''\).*give a text as `answer=`"),
        ({"grids": []}, r"grids=\[\], but the prompt has 1 images"),
        ({"grids": [(6, 6), (6, 6)]}, "but the prompt has 1 images"),
        ({"grids": [(4, 6)]}, r"have \[24\] tokens, but the images have \[36\]"),
        ({"grids": [(0, 6)]}, "give .rows, columns. of tokens"),
    ],
)
def test_bad_arguments_are_named(testbed, options, message):
    model, processor = testbed
    with pytest.raises(ValueError, match=message):
        attribute(model, processor, {"text": QUESTION, "image": RED}, **options)


def test_bad_prompts_and_processors_are_named(testbed, llava, processor):
    with pytest.raises(TypeError, match=r"`prompt`\[0\]: is a str"):
        attribute(*testbed, QUESTION)
    llava.requires_grad_(False)
    llava.get_output_embeddings().weight.zero_()
    llava.generation_config.eos_token_id = 0  # greedy of equal logits is the first token, which now ends
    with pytest.raises(ValueError, match="The model's own answer to this prompt is empty"):
        attribute(llava, processor, {"text": QUESTION})
    template, testbed[1].chat_template = testbed[1].chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            attribute(*testbed, {"text": QUESTION})
    finally:
        testbed[1].chat_template = template


def grids_of(layout, images, inputs=None, grids=None, each=None):
    """Grids of a prompt written with "v" for image tokens and anything else for others."""
    visual = torch.tensor([c == "v" for c in layout])
    scored = torch.tensor([i for i, c in enumerate(layout) if c in "vt"], dtype=torch.int64)
    pictures = [Image.new("RGB", (8, 8))] * images
    return image_grids(pictures, inputs or {}, visual, scored, SimpleNamespace(), SimpleNamespace(), grids, each)


@pytest.mark.parametrize(
    ("layout", "each", "indices"),
    [
        ("vvvvvvvvt", [2, 6], [[0, 1], [2, 3, 4, 5, 6, 7]]),  # one run, which equal shares would cut elsewhere
        ("vvcvvcvvcvv", [2, 6], [[0, 1], [2, 3, 4, 5, 6, 7]]),
        ("vvvvtvct", [3, 4], [[0, 1, 2, 3], [5]]),  # of something else: runs tell
        ("vvvvvvvvt", [3, 4], [[], []]),
    ],
)
def test_images_of_known_numbers_of_tokens_are_parted(layout, each, indices):
    assert [image.indices.tolist() for image in grids_of(layout, 2, each=each)] == indices


def single(images):
    return {"pixel_values": torch.zeros(images, 3, 8, 8)}


@pytest.mark.parametrize(
    ("layout", "images", "inputs", "indices", "shapes"),
    [
        ("ttvvvvt", 1, single(1), [[2, 3, 4, 5]], [(2, 2)]),
        ("cvvvvct", 1, single(1), [[0, 1, 2, 3]], [(2, 2)]),
        ("vvvvvt", 1, single(1), [[0, 1, 2, 3, 4]], [None]),  # no square
        ("vvvvvvvvt", 2, single(2), [[0, 1, 2, 3], [4, 5, 6, 7]], [(2, 2), (2, 2)]),  # side by side: equal shares
        ("vvvvtvct", 2, single(2), [[0, 1, 2, 3], [5]], [(2, 2), (1, 1)]),
        ("vvcvv", 1, single(1), [[0, 1, 2, 3]], [None]),  # rows or tiles, not one square
        ("vvvv", 1, {"pixel_values": torch.zeros(1, 4, 3, 8, 8)}, [[0, 1, 2, 3]], [None]),  # four tiles
        ("vvvv", 1, {"pixel_values": torch.zeros(4, 3, 8, 8)}, [[0, 1, 2, 3]], [None]),  # four tiles, flat
        ("vvvv", 1, {}, [[0, 1, 2, 3]], [None]),
        ("vvcvvcvvcvv", 2, single(2), [[0, 1, 2, 3], [4, 5, 6, 7]], [None, None]),  # whole runs
        ("vvvvcvcv", 2, single(2), [[], []], [None, None]),  # equal shares would cut a run
        ("vvvt", 2, single(2), [[], []], [None, None]),  # no equal shares
        ("ttt", 0, {}, [], []),
        ("ttt", 2, {}, [[], []], [None, None]),
        (
            "vvvvvvtvv",
            2,
            {"image_grid_thw": torch.tensor([[1, 2, 3], [2, 1, 1]])},
            [[*range(6)], [7, 8]],
            [(2, 3), None],
        ),
        ("vvvvt", 1, {"image_grid_thw": torch.tensor([[1, 3, 3]]), **single(1)}, [[0, 1, 2, 3]], [(2, 2)]),
    ],
)
def test_images_are_parted(layout, images, inputs, indices, shapes):
    found = grids_of(layout, images, inputs)
    assert [image.indices.tolist() for image in found] == indices
    assert [image.grid for image in found] == shapes


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.booleans())
def test_given_grids_part_images_anyhow(shapes, apart):
    layout = ("t" if apart else "").join("v" * (rows * columns) for rows, columns in shapes)
    found = grids_of(f"ct{layout}t", len(shapes), grids=shapes) if apart else None
    by_size = grids_of(f"ct{layout}t", len(shapes), {"image_grid_thw": torch.tensor([(1, *s) for s in shapes])})
    for images in (found, by_size):
        if images is None:
            continue
        assert [image.grid for image in images] == shapes
        begin = 1
        for image, (rows, columns) in zip(images, shapes, strict=True):
            assert image.indices.tolist() == [*range(begin, begin + rows * columns)]
            begin += rows * columns + apart


def test_an_unknown_layout_is_asked_for_and_taken(qwen):
    found = TokenAttribution(
        ["i"] * 5,
        torch.arange(5),
        torch.ones(5, dtype=torch.bool),
        torch.arange(5.0),
        "ablation",
        "embedding",
        "a",
        -1.0,
        [ImageGrid(None, torch.arange(5), None)],
    )
    with pytest.raises(ValueError, match=r"the 5 tokens of image 0 .* pass `grids=\[\(rows, cols\)\]`"):
        found.heatmap()
    with pytest.raises(ValueError, match="image=1, but the prompt has 1 images"):
        found.heatmap(1)
    prompt = {"text": "w1", "image": noise(0, 24, 16)}
    assert attribute(*qwen, prompt, method="kernel", grids=[(3, 2)]).heatmap().shape == (3, 2)


def made(scores, tokens=None, visual=(), images=(), method="ablation"):
    scores = torch.tensor(scores, dtype=torch.float32)
    flags = torch.zeros(len(scores), dtype=torch.bool)
    flags[list(visual)] = True
    tokens = tokens or [f" t{i}" for i in range(len(scores))]
    of_answer = ("yes", -0.5) if method == "ablation" else (None, None)
    return TokenAttribution(
        tokens, torch.arange(len(scores)), flags, scores, method, "embedding", *of_answer, list(images)
    )


FINITE = st.floats(-50, 50, width=32)


@given(st.lists(FINITE, min_size=1, max_size=12), st.integers(0, 15))
def test_scale_and_order(scores, n):
    found = made(scores)
    scale = found.normalised
    assert ((scale >= 0) & (scale <= 1)).all()
    torch.testing.assert_close(made([-s for s in scores]).normalised, 1 - scale)
    peak = max(map(abs, scores))
    expected = [0.5 + (score / peak / 2 if peak > 1e-6 else 0) for score in scores]
    np.testing.assert_allclose(scale, expected, atol=1e-6)
    assert found.top(n) == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]


@given(
    st.lists(st.tuples(st.text(max_size=4), FINITE, st.booleans()), max_size=8),
    st.sampled_from(["ablation", "kernel"]),
)
def test_plain_values_survive_json(rows, method):
    visual = [i for i, row in enumerate(rows) if row[2]]
    images = [ImageGrid(Image.new("RGB", (4, 4)), torch.tensor(visual, dtype=torch.int64), (1, len(visual)))]
    found = made([row[1] for row in rows], [row[0] for row in rows], visual, images if visual else [], method)
    back = TokenAttribution.from_dict(json.loads(json.dumps(found.to_dict())))
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(back, field.name)
        if field.name == "images":
            assert [(i.indices.tolist(), i.grid) for i in one] == [(i.indices.tolist(), i.grid) for i in other]
            assert all(i.image is None for i in other)
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other) and one.dtype == other.dtype
        else:
            assert one == other
    if visual:
        assert torch.equal(back.heatmap(), found.heatmap())


def test_plain_values_that_lack_one_are_refused():
    with pytest.raises(ValueError, match=r"lacks \['scores', 'site'\]"):
        TokenAttribution.from_dict({k: v for k, v in made([1.0]).to_dict().items() if k not in ("scores", "site")})


class Spans(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.styles = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "span":
            self.styles.append(dict(attrs)["style"])
            self.texts.append("")

    def handle_data(self, data):
        self.texts[-1] += data


def luminance(rgb):
    return np.asarray(rgb, dtype=float) @ [0.299, 0.587, 0.114]


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5))
def test_html_shows_tokens_as_they_are_and_nothing_runs(tokens):
    readable = "".join(tokens).isprintable()  # an HTML parser changes NUL, surrogates and the like
    tokens = [*tokens, "<script>alert(1)</script>", "a & b", '"><img src=x>', "one\n\ntwo"]
    text = made([0.1 * i for i in range(len(tokens))], tokens).html()
    assert not set(text) & set("\r\n")
    parsed = Spans(text)
    assert parsed.tags == {"div", "span", "br"}
    line_breaks = str.maketrans("\r\n\t", "\u21b5\u21b5 ")
    if readable:
        assert parsed.texts[1:] == [token.translate(line_breaks) for token in tokens]


def test_html_tells_size_by_darkness_and_sign_by_a_line():
    found = made([0.0, 1.0, -2.0, 0.5, 2.0, -4.0, 9.0], visual=[3, 4, 5])
    parsed = Spans(found.html())
    assert parsed.texts[1:] == [" t0", " t1", " t2", " [3 image tokens, strongest -4.000 nats] ", " t6"]
    assert ["underline" in style for style in parsed.styles[1:]] == [False, False, True, True, False]
    shades = [style.split("background-color:#")[1][:6] for style in parsed.styles[1:]]
    grey = [luminance([int(shade[i : i + 2], 16) for i in (0, 2, 4)]) for shade in shades]
    assert grey[0] == pytest.approx(255) and grey[0] > grey[1] > grey[2] > grey[3] > grey[4]
    assert "yes" in parsed.texts[0] and "underlined" in parsed.texts[0]
    assert "underline" not in made([0.0, 1.0], method="kernel").html()


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_darkness_tells_size_whatever_the_sign(a, b):
    if abs(a) > abs(b) + 0.1:
        assert luminance(colour(a)) < luminance(colour(b))
    # Black text is legible: a contrast of 4.5 as WCAG has it.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour(a) / 255]
    assert (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) / 0.05 > 4.5


def drawn(found, path):
    draw(found, path)
    return np.asarray(Image.open(path).convert("L"), dtype=float)


def test_the_drawing_shows_scores_and_signs_in_grey(tmp_path):
    images = [ImageGrid(Image.new("RGB", (32, 32), "white"), torch.arange(4), (2, 2))]
    one = drawn(made([0.1, 0.2, 0.3, 2.0, 1.0], visual=range(4), images=images), tmp_path / "a.png")
    other = drawn(made([2.0, 0.2, 0.3, 0.1, 1.0], visual=range(4), images=images), tmp_path / "b.png")
    against = drawn(made([0.1, 0.2, 0.3, -2.0, 1.0], visual=range(4), images=images), tmp_path / "c.png")
    changed = np.argwhere(one != other)
    middle = changed.mean(0)
    upper = (one - other)[: int(middle[0]), : int(middle[1])]
    lower = (one - other)[int(middle[0]) :, int(middle[1]) :]
    assert upper.max() > 50 and lower.min() < -50  # the heat moved from lower right to upper left
    rows, columns = changed.min(0) + 4, middle.astype(int) - 4
    assert one[rows[0] : columns[0], rows[1] : columns[1]].std() < 1  # blocks, not a blur
    # Hatching, where the sign alone differs.
    place = (slice(int(middle[0]) + 4, changed.max(0)[0] - 4), slice(int(middle[1]) + 4, changed.max(0)[1] - 4))
    assert one[place].std() < 1 < 10 < against[place].std()


def test_drawings_in_text_form_hold_the_tokens(tmp_path):
    tokens = [" costs", " $5", " & <b>", " " + "x" * 100, "\n"]
    draw(made([1.0, 2.0, 3.0, 0.5, 0.1], tokens), tmp_path / "a.svg")
    draw(made([1.0, 2.0, 3.0, -0.5, 0.1], tokens), tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "costs" in text and "$5" in text and "&amp; &lt;b&gt;" in text and "x" * 40 in text and "\u21b5" in text
    assert (tmp_path / "b.svg").read_text().count("pattern") > 0


def test_every_image_is_drawn_and_one_of_unknown_layout_without_heat(testbed, tmp_path):
    model, processor = testbed
    images = [{"type": "image", "image": noise(i, 48, 48)} for i in range(2)]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]
    found = attribute(model, processor, messages, method="kernel")
    assert [image.grid for image in found.images] == [(6, 6), (6, 6)]
    assert found.images[1].indices.tolist() == [*range(36, 72)]
    draw(found, tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    assert text.count("6 x 6 tokens") >= 2 and "image 1" in text and "kernel score" in text
    draw(TokenAttribution.from_dict(found.to_dict()), tmp_path / "bare.png")
    unknown = made([1.0, 2.0], visual=[0, 1], images=[ImageGrid(Image.new("RGB", (4, 4)), torch.arange(2), None)])
    draw(unknown, tmp_path / "unknown.svg")
    assert "layout of tokens not known" in (tmp_path / "unknown.svg").read_text()


def test_drawing_needs_matplotlib_and_a_known_suffix(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a.pdf' must end in one of \('.png', '.svg'\)"):
        draw(made([1.0]), tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw(made([1.0]), tmp_path / "a.png")
