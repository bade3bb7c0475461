"""The bundled small VLM and its world: something harmless to jailbreak and repair within a minute on a CPU."""

from pathlib import Path

from .world import World, WorldSample

__all__ = ["World", "WorldSample", "load_testbed"]

DATA = Path(__file__).parent / "data"
SEEDS = (0, 1)


def load_testbed(seed: int = 0):
    """Load a bundled checkpoint: a stock `LlavaForConditionalGeneration` (float32) and its stock `LlavaProcessor`.

    Args:
        seed: 0 or 1, trained independently from scratch in the same world.

    Returns:
        ``(model, processor)``, the model in evaluation mode.

    Raises:
        ValueError: no checkpoint of that seed is bundled.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    if seed not in SEEDS:
        raise ValueError(
            f"No testbed of seed {seed!r} is bundled; choose one of {SEEDS}, or train it: see docs/testbed.md."
        )
    folder = DATA / f"seed{seed}"
    # Stored in float16 to keep the package small; computed in float32, since half precision is slow on a CPU.
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(folder)
