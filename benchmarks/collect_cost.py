"""What collecting activations costs beside a plain forward of the same prompts, on a LLaVA of random weights.

``python benchmarks/collect_cost.py`` times both in turns in one run, for sites in the middle of the decoder, at two
thirds and at its end, and prints medians of the ratios with their spread. Beside them it says what share of a forward's
multiplications is due up to the site, which is what ending there could save at best.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from care_hf.collecting import _Collector
from care_hf.recipe import Recipe
from care_hf.samples import collate, load_samples
from care_hf.sites import Site, visual_token_ids
from care_hf.testbed import World
from care_hf.testbed.building import build_processor
from care_hf.testbed.prompts import fit_prompts

LAYERS, WIDTH, FFN, HEADS = 16, 512, 1376, 8
PLACES = {"middle": LAYERS // 2, "two thirds": 2 * LAYERS // 3, "end": LAYERS - 1}


def build(processor) -> LlavaForConditionalGeneration:
    """A LLaVA whose decoder does nearly all of the work, for the testbed's processor."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )  # fmt: skip
    size, patch = processor.image_processor.size, processor.patch_size
    side = size.get("height") or size["shortest_edge"]
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=patch,
    )  # fmt: skip
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image)
    config.vision_feature_select_strategy = processor.vision_feature_select_strategy
    return LlavaForConditionalGeneration(config).eval()


def timed(work: Callable[[], object]) -> float:
    """Seconds of the processor, of which other programs take none, unlike of those on the wall."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.no_grad()
def main() -> None:
    """Time plain forwards and collecting in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)  # several wait for one another, and waiting is counted
    processor = build_processor()
    model = build(processor)
    prompts = fit_prompts(World(), options.batches * options.batch_size, ["typographic"], exposure=False)
    samples = load_samples(prompts["malicious"][-options.batches * options.batch_size :])
    size, image_tokens = options.batch_size, visual_token_ids(model.config)
    parts = [range(start, start + size) for start in range(0, len(samples), size)]

    def forward() -> None:
        for part in parts:
            batch = collate(processor, [samples[i] for i in part], image_tokens, padding_side="right")
            model(**batch.inputs, use_cache=False)

    def collect(layer: int) -> None:
        recipe = Recipe.load("paper").replace(layers=(layer,), rank=8)
        collector = _Collector(model, processor, recipe, [Site(layer, recipe.component)])
        for part in parts:
            found = collector.read("benign", part.start, [samples[i] for i in part], [samples.digests[i] for i in part])
            collector.keep("benign", found)

    batch = collate(processor, [samples[i] for i in parts[0]], image_tokens)
    n = len(samples)
    print(
        f"CPU, one thread of {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{LAYERS} layers of width {WIDTH}, FFN {FFN}; {n} prompts in batches of {size}, padded to "
          f"{batch.inputs['input_ids'].shape[1]} tokens; {options.rounds} rounds")  # fmt: skip
    works = {"plain forward again": forward} | {
        f"collect at layer {layer} ({name})": lambda layer=layer: collect(layer) for name, layer in PLACES.items()
    }
    for work in (forward, *works.values()):
        work()
    ratios: dict[str, list[float]] = {name: [] for name in works}
    seconds = []
    for _ in range(options.rounds):
        for name, work in works.items():
            seconds.append(timed(forward))  # right before what it is compared with
            ratios[name].append(timed(work) / seconds[-1])
    print(f"plain forward: {median(seconds):.2f} s of the processor, median of {len(seconds)}\n")
    print("| / plain forward | median | quartiles | smallest to largest | layers computed |")
    print("| --- | ---: | ---: | ---: | ---: |")
    depths = [1.0, *((layer + 1) / LAYERS for layer in PLACES.values())]
    for (name, found), depth in zip(ratios.items(), depths, strict=True):
        low, _, high = quantiles(found, n=4)
        spread = f"{low:.3f} to {high:.3f} | {min(found):.3f} to {max(found):.3f}"
        print(f"| {name} | {median(found):.3f} | {spread} | {depth:.3f} |")


if __name__ == "__main__":
    main()
