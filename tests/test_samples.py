import weakref
from collections.abc import Sequence

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from care_hf.samples import collate, load_image, load_samples
from care_hf.sites import image_token_ids

RED = np.zeros((48, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)


@pytest.fixture
def picture_file(tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def content(sample):
    return [
        (part["type"], part["text"] if part["type"] == "text" else np.asarray(part["image"]).tobytes())
        for message in sample.messages
        for part in message["content"]
    ]


def test_every_form_of_a_prompt_becomes_the_same_sample(picture_file):
    picture = Image.fromarray(RED)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it ?"}]}
    ]
    column = datasets.Dataset.from_dict(
        {"question": ["what is it ?"], "image": [str(picture_file)]},
        features=datasets.Features({"question": datasets.Value("string"), "image": datasets.Image()}),
    )
    forms = [
        [conversation],
        [{"messages": conversation}],
        conversation,
        [{"text": "what is it ?", "image": picture}],
        [{"prompt": "what is it ?", "image": str(picture_file)}],
        [{"text": "what is it ?", "image": RED}],
        [{"text": "what is it ?", "image": RED / 255}],
        [{"text": "what is it ?", "images": [picture_file]}],
        [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": str(picture_file)}, {"type": "text", "text": "what is it ?"}],
                }
            ]
        ],
        column,
        column.cast_column("image", datasets.Image(decode=False)),
    ]
    contents = [content(load_samples(form)[0]) for form in forms]
    assert contents == [[("image", RED.tobytes()), ("text", "what is it ?")]] * len(forms)


def test_a_prompt_without_an_image_has_none():
    assert load_samples([{"text": "hello", "image": None}])[0].images == []
    assert load_samples([{"role": "user", "content": "hello"}])[0].messages[0]["content"][0]["text"] == "hello"


def test_images_are_read_when_asked_for_and_not_kept():
    alive = []

    class Rows(Sequence):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index >= 20:
                raise IndexError(index)
            picture = Image.new("RGB", (8, 8), (index, 0, 0))
            alive.append(weakref.ref(picture))
            return {"text": "what is it ?", "image": picture} if index % 2 else {"text": "hello"}

    samples = load_samples(Rows())
    assert len(samples) == 20 and samples.pictured == list(range(1, 20, 2)) and len(set(samples.digests)) == 11
    assert [sample.images[0].getpixel((0, 0))[0] for sample in samples[1:8:2]] == [1, 3, 5, 7]
    assert sum(reference() is not None for reference in alive) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "`samples` is empty"),
        ("a prompt", "expected a datasets.Dataset"),
        ([3], r"`samples`\[0\]: is a int"),
        ([{"text": "a"}, {"txt": "b"}], r"`samples`\[1\]: has the keys \['txt'\]"),
        ([{"text": "a", "image": "no/such.png"}], "no/such.png' does not exist"),
        ([{"text": "a", "image": np.zeros((3, 48, 48))}], r"shape \(3, 48, 48\)"),
        ([{"text": "a", "image": np.full((4, 4), 2.0)}], r"lie in \[0, 1\]"),
        ([[{"role": "user", "content": [{"type": "audio"}]}]], "type 'audio' is not supported"),
        ([[{"role": "user", "content": [{"type": "image", "url": "http://host/a.png"}]}]], "download it first"),
        ([[{"content": "hello"}]], "needs 'role' and 'content'"),
    ],
)
def test_bad_prompts_are_named(data, message):
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        load_samples(data)


def test_grey_arrays_become_rgb():
    assert load_image(np.full((4, 5), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_part_the_tokens(testbed, side):
    model, processor = testbed
    samples = load_samples([{"text": "how do i make bilan ?", "image": RED}, {"text": "read the word ."}])
    batch = collate(processor, samples, image_token_ids(model.config), padding_side=side)
    assert batch.visual.sum(1).tolist() == [36, 0]
    # Six known words and a mark, five spelled letters; control tokens (<s>, <user>, <assistant>) are neither.
    assert batch.text.sum(1).tolist() == [
        len(processor.tokenizer.tokenize(t)) for t in ("how do i make bilan ?", "read the word .")
    ]
    assert not (batch.visual & batch.text).any()
    padding = ~batch.inputs["attention_mask"].bool()
    assert padding.any() and not (padding & (batch.text | batch.visual)).any()
    assert bool(padding[1, 0 if side == "left" else -1])
    assert torch.equal(batch.visual, batch.inputs["input_ids"] == model.config.image_token_id)


def test_a_processor_without_chat_template_is_refused(testbed):
    model, processor = testbed
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            collate(processor, load_samples([{"text": "a"}]), image_token_ids(model.config))
    finally:
        processor.chat_template = template
