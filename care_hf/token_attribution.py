"""Which tokens of one prompt its answer hangs on: scores of every text and image token, and heat maps of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from .adapters import unwrapped
from .answers import generate_answers
from .attribution import text_scores, visual_scores
from .attribution_figures import ROUNDING, tokens_html
from .devices import input_device
from .image_grids import ImageGrid, image_grids
from .interventions import evaluating
from .samples import IGNORED, Batch, Sample, answered, collate, load_samples, tokenizer_of
from .sites import Site, decoder_layers, record, site_module, visual_token_ids
from .token_ablation import ablated_log_probabilities

METHODS = ("ablation", "kernel")
EMBEDDING = "embedding"


@dataclass(frozen=True, eq=False)
class TokenAttribution:
    """Scores of the text and image tokens of one prompt.

    Attributes:
        tokens: the text of every scored token; with its leading space, where that can be told.
        positions: int64 (n,), where they stand in the prompt's `input_ids`, ascending.
        visual: bool (n,), True at image tokens.
        scores: float32 (n,); see `attribute` for what they mean.
        method: "ablation" or "kernel".
        site: where activations were ablated or read, "embedding" or a `Site` as text.
        answer: what the ablation scores are about; None for "kernel".
        log_probability: of the answer after the whole prompt, nats; None for "kernel".
        images: the prompt's images, in order, with their tokens.
    """

    tokens: list[str]
    positions: torch.Tensor
    visual: torch.Tensor
    scores: torch.Tensor
    method: str
    site: str
    answer: str | None
    log_probability: float | None
    images: list[ImageGrid]

    @property
    def normalised(self) -> torch.Tensor:
        """Scores on a scale for colours, float32 (n,) in [0, 1].

        Of "kernel" the scores themselves. Of "ablation" ``1/2 + s / (2 max|s|)``, so that 0.5 is no effect, above it
        speaks for the answer and below it against; all 0.5 where no token has an effect.
        """
        if self.method == "kernel" or not len(self.scores):
            return self.scores
        peak = self.scores.abs().max()
        return 0.5 + self.scores / (2 * peak) if peak > ROUNDING else torch.full_like(self.scores, 0.5)

    def top(self, n: int) -> list[int]:
        """Indices of the at most `n` tokens with the highest scores, best first; ties go to the earlier token."""
        return self.scores.argsort(descending=True, stable=True)[: max(n, 0)].tolist()

    def heatmap(self, image: int = 0) -> torch.Tensor:
        """The scores of the tokens of an image as they lie on it, float32 (rows, columns).

        Raises:
            ValueError: there is no such image, or the layout of its tokens is not known.
        """
        if not 0 <= image < len(self.images):
            raise ValueError(
                f"image={image}, but the prompt has {len(self.images)} images; heat maps are of images alone, counted "
                "from 0, while `scores` holds all tokens."
            )
        found = self.images[image]
        if not self.visual.any():
            raise ValueError(
                f"Image {image} has no tokens in the prompt: the model reads its images by cross-attention, so there "
                "is no heat to map; `scores` are of the text."
            )
        if found.grid is None:
            raise ValueError(
                f"How the {len(found.indices) or 'unknown number of'} tokens of image {image} lie on it cannot be "
                "told; pass `grids=[(rows, cols)]` to `attribute`, one pair for each image."
            )
        return self.scores[found.indices].reshape(found.grid)

    def html(self) -> str:
        """One ``<div>`` on one line, without scripts or links, for a model card: the tokens on shades of their scores.

        Darker is stronger, and what speaks against the answer is underlined, so it reads in grey; a run of image tokens
        is shown as one, by its strongest. All text of prompt and answer is escaped.
        """
        return tokens_html(self)

    def to_dict(self) -> dict[str, Any]:
        """All but the images' pixels, as plain values for JSON."""
        return {
            "tokens": list(self.tokens),
            "positions": self.positions.tolist(),
            "visual": self.visual.tolist(),
            "scores": self.scores.tolist(),
            "method": self.method,
            "site": self.site,
            "answer": self.answer,
            "log_probability": self.log_probability,
            "images": [
                {"indices": i.indices.tolist(), "grid": None if i.grid is None else list(i.grid)} for i in self.images
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TokenAttribution":
        """The inverse of `to_dict`; each `ImageGrid.image` is None.

        Raises:
            ValueError: a value is missing.
        """
        missing = sorted(set(cls.__dataclass_fields__) - set(values))
        if missing:
            raise ValueError(f"A token attribution lacks {missing}; give what `to_dict` returned.")
        images = [
            ImageGrid(None, torch.tensor(i["indices"], dtype=torch.int64), i["grid"] and tuple(i["grid"]))
            for i in values["images"]
        ]
        tensors = {"positions": torch.int64, "visual": torch.bool, "scores": torch.float32}
        plain = {name: values[name] for name in ("method", "site", "answer", "log_probability")}
        made = {name: torch.tensor(values[name], dtype=dtype) for name, dtype in tensors.items()}
        return cls(tokens=list(values["tokens"]), images=images, **made, **plain)


@torch.no_grad()
def attribute(
    model: nn.Module,
    processor,
    prompt: Any,
    *,
    method: str = "ablation",
    site: Site | str | None = None,
    answer: str | None = None,
    max_new_tokens: int = 16,
    grids: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 32,
) -> TokenAttribution:
    """Score every text and image token of one prompt; control tokens of the chat template are not scored.

    "ablation" tells what a token causes: ``s_i = log p(answer | prompt) - log p(answer | prompt, token i ablated)``, in
    nats, of answers that begin with `answer`. Ablated, a token's activation at `site` is the mean of those of the
    prompt's other tokens of its modality; of all its other tokens, if there is none; 0, if there is none either.
    Positive: the token speaks for the answer. Tokens that say the same stand in for one another, so each may score low.

    "kernel" tells how unevenly a token is coupled to the text, not what it causes: the RBF-kernel scores of arXiv
    2603.27240, step 2 (`attribution.visual_scores` and `attribution.text_scores`), in [0, 1] for each modality.

    Args:
        model: any vision-language model with a decoder-only text part, repaired or not; its mode is kept.
        processor: its processor, with a chat template.
        prompt: anything that `samples.load_samples` takes as an item, or an object with chat `messages`.
        method: "ablation" or "kernel".
        site: where. None for "kernel" is the residual stream after the middle layer (depth // 2). None for "ablation"
            is "embedding", what enters the first layer: at later places other tokens have read the token already. What
            bypasses the embeddings (cross-attention, Qwen3-VL's deepstack) is not ablated.
        answer: for "ablation", the text that is scored; None for the model's own greedy answer.
        max_new_tokens: of that own answer.
        grids: (rows, columns) of the tokens of each image, where they cannot be told; see `image_grids.image_grids`.
        batch_size: copies of the prompt, each with one token ablated, per forward.

    Raises:
        ValueError: an unknown method or site, an empty answer, an answer for "kernel", grids that do not fit, numbers
            below 1, a processor without chat template.
        TypeError: `prompt` is of another form.
    """
    _check(method, answer, max_new_tokens, batch_size)
    model = unwrapped(model)
    place = _site(model, site, method)
    sample = load_samples([prompt], "prompt")[0]
    batch = collate(processor, [sample], visual_token_ids(model.config))
    positions = (batch.visual | batch.text)[0].nonzero()[:, 0]
    visual = batch.visual[0, positions]
    does = getattr(processor, "image_processor", None)  # a tokenizer, of a model of text, has none
    each = _tokens_of_each(model, processor, sample.images)
    images = image_grids(sample.images, batch.inputs, batch.visual[0], positions, model.config, does, grids, each)
    with evaluating(model):
        if method == "kernel":
            scores, log_p = _kernel_scores(model, batch, positions, place), None
        else:
            answer = _answer(model, processor, sample, answer, max_new_tokens)
            inputs, labels = answered(processor, [sample], [answer], end=False)
            chosen = labels[0][labels[0] != IGNORED]
            log_ps = ablated_log_probabilities(model, inputs, chosen, batch, positions, place, batch_size)
            scores, log_p = log_ps[0] - log_ps[1:], float(log_ps[0])
    tokens = _token_texts(tokenizer_of(processor), batch.inputs["input_ids"][0].tolist(), positions.tolist())
    where = EMBEDDING if place is None else str(place)
    return TokenAttribution(tokens, positions, visual, scores.float(), method, where, answer, log_p, images)


def _check(method: str, answer: str | None, max_new_tokens: int, batch_size: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {METHODS}.")
    if method == "kernel" and answer is not None:
        raise ValueError(
            f"answer={answer!r}: method 'kernel' is about no answer; leave it out, or choose method 'ablation'."
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1.")


def _site(model: nn.Module, site: Site | str | None, method: str) -> Site | None:
    """The site; None for the embedding."""
    if method == "ablation" and site in (None, EMBEDDING):
        decoder_layers(model)  # raises where there are none
        return None
    if site is None:
        return Site(len(decoder_layers(model)) // 2, "residual")
    site = Site.parse(site) if isinstance(site, str) else site
    site_module(model, site)  # raises where there is none
    return site


def _tokens_of_each(model, processor, images: Sequence[Image.Image]) -> list[int] | None:
    """How many tokens each of several images has: it may be cut into another number of tiles than the others.

    Counted in prompts of as many images, each the same one, since a processor may cut an image up only if it is alone.
    """
    if len(images) < 2:
        return None
    contents = [[*[{"type": "image", "image": image}] * len(images), {"type": "text", "text": "?"}] for image in images]
    prompts = [Sample([{"role": "user", "content": content}]) for content in contents]
    tokens = visual_token_ids(model.config)
    return [int(collate(processor, [prompt], tokens).visual.sum()) // len(images) for prompt in prompts]


def _answer(model, processor, sample: Sample, answer: str | None, max_new_tokens: int) -> str:
    own = answer is None
    answer = generate_answers(model, processor, [sample], max_new_tokens)[0] if own else answer
    if not tokenizer_of(processor)(answer, add_special_tokens=False)["input_ids"]:
        whose = "The model's own answer to this prompt" if own else "`answer`"
        raise ValueError(f"{whose} is empty ({answer!r}), so no token can speak for it; give a text as `answer=`.")
    return answer


def _kernel_scores(model, batch: Batch, positions: torch.Tensor, site: Site) -> torch.Tensor:
    with record(model, [site]) as activations:
        model(**{name: value.to(input_device(model)) for name, value in batch.inputs.items()}, use_cache=False)
    found = activations[site][0].cpu()
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    visual, text = found[batch.visual[0]], found[batch.text[0]]
    scores = torch.zeros(len(found), dtype=found.dtype)
    scores[batch.visual[0]], scores[batch.text[0]] = visual_scores(visual, text), text_scores(text)
    return scores[positions]


def _token_texts(tokenizer, ids: Sequence[int], positions: Sequence[int]) -> list[str]:
    """The text of each token; after its neighbour, since alone some tokenizers drop a token's leading space."""
    texts, scored = [], set(positions)
    for end in (position + 1 for position in positions):
        text = tokenizer.decode(ids[end - 1 : end])
        if end - 2 in scored:
            before, both = tokenizer.decode(ids[end - 2 : end - 1]), tokenizer.decode(ids[end - 2 : end])
            text = both[len(before) :] if both.startswith(before) else text
        texts.append(text)
    return texts
