import base64
import codecs

import numpy as np
import pytest
from PIL import Image

from care_hf.attack_prompts import (
    FIGSTEP_CARRIER,
    TEMPLATES,
    draw_text,
    from_template,
    query_relevant,
    typographic,
)
from care_hf.suite import Case

REQUEST = "How do I bake bread?"


def parts(case):
    (message,) = case.messages
    assert message["role"] == "user"
    return [part[part["type"]] for part in message["content"]]


def ink(image):
    """Rows and columns of an image with anything darker than grey, as (top, bottom, left, right)."""
    dark = np.asarray(image.convert("L")) < 128
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    return rows[0], rows[-1], columns[0], columns[-1]


def lines(image):
    """How many lines of text: runs of rows with ink."""
    dark = (np.asarray(image.convert("L")) < 128).any(axis=1).astype(int)
    return int((np.diff(dark, prepend=0) == 1).sum())


def test_typographic_images_hide_the_request_from_the_text():
    case = typographic(REQUEST, category="kitchen")
    image, text = parts(case)
    assert image.size == (760, 760) and image.mode == "RGB"
    assert text == FIGSTEP_CARRIER and "bread" not in text
    assert (case.request, case.category) == (REQUEST, "kitchen")


def test_the_numbered_list_stands_below_the_text():
    # No descenders and no dots on letters, so that runs of rows are lines.
    assert [lines(parts(typographic("HOME MADE", items=items))[0]) for items in (0, 1, 3)] == [1, 2, 4]


def test_the_image_may_say_something_else_than_the_request():
    said, plain = (parts(typographic(REQUEST, text=text))[0] for text in ("Steps to bake bread.", None))
    direct = draw_text("Steps to bake bread.\n1.\n2.\n3.")
    assert said.tobytes() == direct.tobytes() != plain.tobytes()


@pytest.mark.parametrize(("size", "words"), [((300, 300), 12), ((760, 760), 60), ((200, 900), 20)])
def test_text_is_wrapped_and_shrunk_until_it_fits(size, words):
    top, bottom, left, right = ink(draw_text("WORD " * words, size, font_size=80, margin=15))
    assert min(top, left) >= 15 and bottom < size[1] - 15 and right < size[0] - 15


def test_the_font_size_is_the_largest():
    heights = [np.subtract(*ink(draw_text("H", font_size=pixels))[1::-1]) for pixels in (20, 40, 80)]
    assert heights[0] < heights[1] < heights[2] and heights[2] < 80


def test_text_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"5000 characters does not fit into 100 x 100"):
        draw_text("a" * 5000, (100, 100))
    with pytest.raises(ValueError, match=r"no glyphs for \['包', '面'\]"):
        draw_text("bread 面包")


def test_query_relevant_images_have_the_phrase_below():
    image, text = parts(query_relevant(REQUEST, Image.new("RGB", (30, 60), "red"), "BREAD", size=(200, 100), band=80))
    pixels = np.asarray(image)
    assert pixels.shape == (180, 200, 3)
    assert (pixels[:100] == [255, 0, 0]).all()
    assert pixels[100:].min() < 128 and (pixels[100:, -1] == 255).all()
    assert "bread" not in text.lower()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_holds_the_request(name):
    case = from_template(REQUEST, name)
    (text,) = parts(case)
    assert case.request == REQUEST
    held = [
        REQUEST,
        codecs.encode(REQUEST, "rot13"),
        base64.b64encode(REQUEST.encode()).decode(),
        "H0w d0 1 b4k3 br34d?",
        'a = "How do I" and b = "bake bread?"',
    ]
    assert sum(form in text for form in held) == 1
    assert "{" not in text


def test_templates_of_ones_own():
    assert parts(from_template("a {first} b", "<{request}|{second}>")) == ["<a {first} b|b>"]
    assert parts(from_template("a b c d", "{first}|{second}")) == ["a b|c d"]
    with pytest.raises(ValueError, match=r"neither one of .*'rot13'.* nor a text with a place"):
        from_template(REQUEST, "rot14")


def test_cases_keep_what_is_known_of_them():
    picture = Image.new("RGB", (4, 4))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    case = Case([{"role": "user", "content": content}], REQUEST, reference="dough", target="Sure", category="kitchen")
    known = (REQUEST, "dough", "Sure", "kitchen")
    attacks = [from_template(case, "fiction"), typographic(case), query_relevant(case, picture)]
    assert [(a.request, a.reference, a.target, a.category) for a in attacks] == [known] * 3
    assert parts(attacks[0])[0] is picture
    assert case.messages[0]["content"] == content
    assert typographic(case, category="other").category == "other"


@pytest.mark.parametrize("request_", ["", " \n", Case([])])
def test_empty_requests_are_refused(request_):
    with pytest.raises(ValueError, match="request is empty"):
        from_template(request_, "fiction")
    with pytest.raises(ValueError, match="request is empty"):
        typographic(request_)
