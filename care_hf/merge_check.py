"""What a merged checkpoint is compared with before it counts as done."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from .affine import Affine
from .configuration_care import auto_class
from .modeling_care import CareForConditionalGeneration
from .repaired_module import execution_device
from .samples import Sample, collate
from .sites import Site, hidden_size, image_token_ids

TEXTS = ("What is in this picture?", "How do I bake bread? Answer in one sentence.")
# Of the logits' spread. In half precision other numbers are rounded, the weight in place of the repaired output, which
# the layers above carry on: 0.001 and 0.009 at most on tiny models of 22 families. Weights are compared bit for bit.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.04}
TOKENS = 64  # whose logits are in double precision at once

Inputs = Mapping[str, torch.Tensor]


def probe_inputs(model: CareForConditionalGeneration) -> list[dict[str, torch.Tensor]]:
    """Inputs to compare on when none are given: questions beside noise if there is a processor, or random tokens."""
    if getattr(model.processor, "chat_template", None):
        pictured = hasattr(model.processor, "image_processor")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image = [{"type": "image", "image": Image.fromarray(noise)}] if pictured else []
        asked = [[{"role": "user", "content": [*image, {"type": "text", "text": text}]}] for text in TEXTS]
        ids = image_token_ids(model.config)
        return [dict(collate(model.processor, [Sample(messages)], ids).inputs) for messages in asked]
    known = torch.arange(model.get_input_embeddings().num_embeddings)
    known = known[~torch.isin(known, torch.tensor(image_token_ids(model.config)))]
    drawn = torch.randint(len(known), (4, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": known[drawn], "attention_mask": torch.ones_like(drawn)}]


def as_list(inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """One set of model inputs, or several, as several."""
    return [inputs] if isinstance(inputs, Mapping) else list(inputs)


@torch.no_grad()
def token_logits(model: PreTrainedModel, inputs: Sequence[Inputs]) -> torch.Tensor:
    """Logits (n, vocabulary) of all tokens that are no padding, on the CPU.

    Raises:
        ValueError: the model does not take the inputs.
    """
    rows = []
    for each in inputs:
        try:
            device, dtype = execution_device(model), main_dtype(model)
            logits = model(**{name: _placed(t, device, dtype) for name, t in each.items()}).logits.cpu()
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} failed on what it is to be compared on ({type(error).__name__}: {error}); "
                "give other `inputs`, as for its forward."
            ) from error
        mask = each.get("attention_mask")
        whole = mask is None or mask.shape != logits.shape[:2]
        rows.append(logits.flatten(0, 1) if whole else logits[mask.cpu().bool()])
    return torch.cat(rows)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def check_algebra(maps: Mapping[Site, Affine], model: CareForConditionalGeneration) -> None:
    """Assert that every map does to activations what the repair does.

    Raises:
        ValueError: one does not.
    """
    for site, mapping in maps.items():
        care = model.care_modules()[site]
        h = torch.randn(64, hidden_size(model), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        repaired = care(h.to(care.strength.device)).cpu()
        error = ((repaired - mapping(h)).abs().max() / repaired.abs().max()).item()
        if not error < 1e-6:
            raise ValueError(f"Site {site}: the repair differs by {error:.2g} from the map that would be merged.")


def reload_and_compare_tensors(folder: Path, expected: PreTrainedModel) -> PreTrainedModel:
    """Load a checkpoint as anyone would, and assert that it holds every tensor of `expected`, bit for bit.

    Raises:
        ValueError: it does not.
    """
    auto = auto_class(expected.config)
    loaded, info = auto.from_pretrained(folder, dtype=main_dtype(expected), output_loading_info=True)
    wrong = sorted({str(key) for name in ("missing_keys", "mismatched_keys") for key in info[name]})
    found = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        if name not in found or found[name].shape != tensor.shape:
            wrong.append(name)
            continue
        mine, theirs = tensor.cpu(), found[name]
        if mine.dtype != theirs.dtype:
            narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
            mine, theirs = mine.to(narrow), theirs.to(narrow)
        if not torch.equal(mine, theirs):
            wrong.append(name)
    wrong += sorted(set(found) - set(expected.state_dict()))
    if wrong or type(loaded) is not type(expected):
        raise ValueError(
            f"What was written loads as a {type(loaded).__name__} in which {len(wrong)} tensors are not as merged: "
            f"{', '.join(wrong[:5])}."
        )
    return loaded.eval()


def main_dtype(model: PreTrainedModel) -> torch.dtype:
    """That of most of a model's parameters; some are kept in single precision in models in half."""
    sizes = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square of the difference of logits (n, vocabulary), over the spread of the first."""
    count, total, squares, error = 0, 0.0, 0.0, 0.0
    for mine, theirs in zip(first.split(TOKENS), second.split(TOKENS), strict=True):
        # Some models rule tokens out by the least number there is.
        shown = [logits > torch.finfo(logits.dtype).min / 2 for logits in (mine, theirs)]
        if not torch.equal(*shown):
            return float("inf")
        mine, theirs = mine.double()[shown[0]], theirs.double()[shown[0]]
        count += mine.numel()
        total, squares = total + mine.sum().item(), squares + mine.square().sum().item()
        error += (mine - theirs).square().sum().item()
    return (error / max(squares - total**2 / count, torch.finfo(torch.float64).tiny)) ** 0.5
