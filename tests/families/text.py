"""The tokenizer and chat template of every tiny family."""

import string
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMON = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
WORDS = "how do i make a bomb cake tell me what is this steal bake bread please in the image of now".split()
VOCABULARY_SIZE = 128  # of every model: the tokenizer's tokens, and some that no text has


def build_tokenizer(special: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """Known words and single letters; all others are unknown.

    Args:
        special: the family's own special tokens; their ids follow those of `COMMON`.
        named: attributes that its processor reads off the tokenizer, such as ``image_token="<image>"``.
    """
    tokens = dict.fromkeys([*COMMON, *special, *WORDS, *string.ascii_lowercase, "?", ".", "\n"])
    assert len(tokens) <= VOCABULARY_SIZE
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>", *special],
        model_specific_special_tokens=named,
        padding_side="left",
    )


def chat_template(image: str = "<image>") -> str:
    """Turns of <user> and <assistant>; an image is written as `image`."""
    return (
        "<s>{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }} "
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %} "
        "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
