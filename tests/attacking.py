"""What attacks are checked against: their images as arrays, and the model's losses by another way."""

import numpy as np
import torch


def pixels(samples):
    return np.stack([np.asarray(sample.messages[0]["content"][0]["image"]) for sample in samples]).astype(int)


def independent_losses(model, processor, samples, targets):
    """-log p of the targets one prompt at a time, by the processor's own preprocessing, from the written prompt."""
    losses = []
    for sample, target in zip(samples, targets, strict=True):
        image, text = (part[part["type"]] for part in sample.messages[0]["content"])
        written = f"<s><user><image>{text}<assistant>{target}"
        inputs = processor(text=written, images=image, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"][0]
        first = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids("<assistant>")) + 1
        with torch.no_grad():
            log_p = model(**inputs).logits[0].double().log_softmax(-1)
        losses.append(-sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids))))
    return torch.tensor(losses)
