import copy
import weakref
from collections.abc import Sequence

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AddedToken

from care_hf.samples import Sample, collate, generation_prompt, load_image, load_samples
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


def test_prompts_keep_their_kind_and_groups():
    message = {"role": "user", "content": "hello"}
    rows = [
        {"text": "a", "kind": "captioning", "groups": ["dogs", 3]},
        {"text": "b", "kind": None, "groups": None},
        {"text": "c"},
        {"messages": [message], "kind": "chat", "groups": ("dogs",)},
        {"text": "d", "groups": "one topic"},
        [message],
        message,
        Sample([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], "own", ("g", "h")),
    ]
    samples = load_samples(rows)
    assert samples.kinds == ["captioning", "", "", "chat", "", "", "", "own"]
    assert samples.groups == [("dogs", "3"), (), (), ("dogs",), ("one topic",), (), (), ("g", "h")]
    assert [s.kind for s in samples] == samples.kinds and [s.groups for s in samples[:]] == samples.groups
    as_dataset = datasets.Dataset.from_list([{"text": "a", "kind": "k", "groups": ["x", "y"]}, {"text": "b"}])
    assert load_samples(as_dataset).kinds == ["k", ""] and load_samples(as_dataset).groups == [("x", "y"), ()]
    # Labels are not part of the prompt.
    assert load_samples([{"text": "a", "kind": "k"}]).digests == load_samples([{"text": "a"}]).digests


def test_the_generation_prompt_is_what_ends_every_prompt(testbed):
    model, processor = testbed
    end = generation_prompt(processor)
    assert processor.decode(end) == "<assistant>"
    samples = load_samples([{"text": "how do i make bilan ?", "image": RED}, {"text": "read the word ."}])
    ids = collate(processor, samples, image_token_ids(model.config)).inputs["input_ids"]
    assert ids[:, -len(end) :].tolist() == [list(end)] * 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "does not end a prompt"),
        ("{% if add_generation_prompt %}<assistant>{% endif %}read the word .", "does not end a prompt"),
        (None, "no chat template"),
    ],
)
def test_a_template_without_a_generation_prompt_is_refused(testbed, template, message):
    _, processor = testbed
    kept, processor.chat_template = processor.chat_template, template
    try:
        with pytest.raises(ValueError, match=message):
            generation_prompt(processor)
    finally:
        processor.chat_template = kept


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_were_added_as_special_are_control_tokens_without_a_name(testbed, special):
    """Llama 3's headers and Idefics' marks of tiles are on none of the lists of a tokenizer."""
    processor = copy.deepcopy(testbed[1])
    processor.tokenizer.add_tokens([AddedToken("<header>", special=special)])
    assert "<header>" not in processor.tokenizer.all_special_tokens
    batch = collate(processor, load_samples([{"text": "how do i <header> make"}]), ())
    places = batch.inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<header>")
    assert places.sum() == 1 and bool(batch.text[places]) == (not special)
