"""What the repair adds to a forward: a LLaVA of random weights with and without it, timed in turns in the same run.

What is timed is the whole model as it is used: swapped classes, hooks, the gate and its layer of the cache.

- ``python benchmarks/repair_cost.py``: one decoder layer of a 7B model on the CPU, prefill and one decoding step;
- ``... --modes compiled``: the same as one compiled graph;
- ``... --shape 7b``: all of LLaVA-1.5-7B on a GPU, with an image; eager, compiled and as CUDA graphs;
- ``... --shape tiny``: the same in seconds, on any device, to see that it runs;
- ``... --repairs gated hook lora merged``: beside what else could be done, see cost_rivals.py;
- ``... --shape testbed``: the bundled model, its gate fitted.
"""

import argparse
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from cost_rivals import RIVALS, rival
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, StaticCache
from transformers import LlavaForConditionalGeneration as Llava

import care_hf
from care_hf.gating import Gate
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import FUSIONS, Subspace
from care_hf.recipe import Recipe
from care_hf.samples import Sample, collate
from care_hf.sites import Site, hidden_size, image_token_ids
from care_hf.subspace import SafetySubspaces, random_basis
from care_hf.testbed import World
from care_hf.testbed.prompts import fit_prompts

RANK = 16  # of the repair by modality
GATED = ("gated", "quiet")  # the default recipe on a prompt where its gate fires, and on one where it does not
MODES = {"eager": None, "compiled": "default", "cudagraphs": "reduce-overhead"}
IMAGE, *PROMPT_END = range(250, 256)  # ids; "ASSISTANT:" is five tokens
CACHE = "cache" if "cache" in inspect.signature(Llava.forward).parameters else "past_key_values"
GRAPHS = "graphs, breaks, CUDA graphs skipped: base; repaired"
TIMES = ("base ms", "repaired / base", "95 %", "base / base", "added µs")
COLUMNS = ("model", "dtype", "mode", "part", "repair", *TIMES, GRAPHS)


@dataclass(frozen=True)
class Shape:
    """A model and its prompt: `layers` are repaired by modality, the last of them if gated, as the `gate` says."""

    text: dict
    vision: dict
    tokens: int
    pictured: bool
    layers: tuple[int, ...] = (0,)
    gate: int = 0


SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "max_position_embeddings": 4096}
NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
SHAPES = {
    "layer": Shape({**SEVEN, "num_hidden_layers": 1, "vocab_size": 256}, {**SMALL, "image_size": 28}, 600, False),
    "7b": Shape(
        {**SEVEN, "num_hidden_layers": 32, "vocab_size": 32064},
        {**CLIP_L, "patch_size": 14, "image_size": 336, "projection_dim": 768},
        576 + 30,
        True,
        (16, 17, 21),
        16,
    ),
    "tiny": Shape({**NARROW, "vocab_size": 256}, {**SMALL, "image_size": 56}, 16 + 30, True, (2, 3), 1),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> Llava:
    """A LLaVA of random weights, made on its device."""
    vision, text = CLIPVisionConfig(**shape.vision), LlamaConfig(**shape.text)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    with torch.device(device):
        return Llava._from_config(config, dtype=dtype).eval()


def repaired(base: Llava, shape: Shape, name: str) -> torch.nn.Module:
    """`base` under a random repair of the size of a fitted one, named after its fusion, one of `GATED`, or a rival."""
    if name in RIVALS:
        return rival(base, shape.layers[:2], RANK, name)
    if name not in GATED:
        layers = shape.layers[:2]
        return CareForConditionalGeneration.from_base(
            base, replace(SafetySubspaces.random(base, layers, RANK), fusion=name)
        ).to(base.device)
    recipe, size, generator = Recipe(), hidden_size(base), torch.Generator().manual_seed(0)
    anchors = {"last": torch.zeros(size), "response": torch.zeros(recipe.steps, size)}
    places = {place: Subspace(random_basis(size, recipe.rank, generator), mean) for place, mean in anchors.items()}
    never = 1e9 if name == "quiet" else -1e9
    gate = Gate(tuple(PROMPT_END), torch.randn(size, 5, generator=generator), torch.full((5,), never), 1, 2)
    sites = {Site(shape.layers[-1], "residual"): places}
    subspaces = SafetySubspaces(sites, gate=gate, gate_site=Site(shape.gate, "residual"))
    return CareForConditionalGeneration.from_base(base, subspaces).to(base.device)


def prompt(base: Llava, shape: Shape) -> dict:
    """A prompt of the shape's size that ends as prompts do."""
    images = (shape.vision["image_size"] // shape.vision["patch_size"]) ** 2 if shape.pictured else 0
    words = torch.arange(shape.tokens - images - len(PROMPT_END)) % 200 + 3
    ids = torch.cat([torch.full((images,), IMAGE), words, torch.tensor(PROMPT_END)])[None].to(base.device)
    if not shape.pictured:
        return {"input_ids": ids}
    side = shape.vision["image_size"]
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side).to(base.device, base.dtype)}


class Decoding:
    """Greedy decoding of some tokens after a prompt; `rewind` puts the cache back, outside of the time taken."""

    def __init__(self, model, call: Callable, inputs: dict, count: int, static: bool):
        self.call, self.count, config = call, count, model.config.get_text_config()
        length = inputs["input_ids"].shape[1] + count
        self.cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
        # The prefill is not compiled: `generate` does not either.
        self.first = model(**inputs, **{CACHE: self.cache}, logits_to_keep=1).logits.argmax(-1)

    def __call__(self) -> None:
        token = self.first
        for _ in range(self.count):
            torch.compiler.cudagraph_mark_step_begin()
            token = self.call(input_ids=token, **{CACHE: self.cache}).logits[:, -1:].argmax(-1)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            if isinstance(self.cache, StaticCache):
                layer.cumulative_length.sub_(self.count)
            else:
                layer.crop(-self.count)


class Prefill:
    """The forward of a whole prompt."""

    def __init__(self, model, call: Callable, inputs: dict):
        model(**inputs)  # what transformers installs on a first forward does not compile
        self.call = partial(call, **inputs, logits_to_keep=1)

    def __call__(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.call()

    def rewind(self) -> None:
        pass


def ratios(base: Callable, other: Callable, rounds: int, synchronise: Callable, between=lambda name: None) -> dict:
    """Medians over rounds in which `other` and `base`, twice, take turns.

    The ratio of `base` to itself is the control: what it is off 1 is noise. `between` is called after each, untimed.
    """
    calls = {"base": base, "other": other, "control": base}
    rows = []
    for index in range(rounds + 3):
        row = {}
        for name in sorted(calls, key=lambda name: (list(calls).index(name) + index) % 3):
            synchronise()
            start = time.perf_counter()
            calls[name]()
            synchronise()
            row[name] = time.perf_counter() - start
            between(name)
        rows.append(row)
    rows = rows[3:]  # warm-up
    found = sorted(row["other"] / row["base"] for row in rows)
    off = round(0.98 * len(found) ** 0.5)  # order statistics around the median
    low, high = (found[max(0, min(len(found) - 1, len(found) // 2 + sign * off))] for sign in (-1, 1))
    return {
        "base ms": f"{1e3 * median(row['base'] for row in rows):.2f}",
        "repaired / base": f"{median(found):.4f}",
        "95 %": f"{low:.4f} to {high:.4f}",
        "base / base": f"{median(row['control'] / row['base'] for row in rows):.4f}",
        "added µs": f"{1e6 * median(row['other'] - row['base'] for row in rows):.0f}",
    }


def compiled(model, mode: str):
    """`model` itself, or compiled to one graph."""
    return model if MODES[mode] is None else torch.compile(model, mode=MODES[mode], fullgraph=True, dynamic=False)


def compare(base, other, make: Callable, mode: str, rounds: int, synchronise: Callable) -> dict:
    """Ratios of what `make` makes of both models, and what became of them when compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tasks = {"base": make(base, compiled(base, mode)), "other": make(other, compiled(other, mode))}
    graphs = []
    for task in tasks.values():
        task()
        task.rewind()
        found = torch._dynamo.utils.counters
        counts = (
            found["stats"]["unique_graphs"],
            sum(found["graph_break"].values()),
            found["inductor"]["cudagraph_skips"],
        )
        graphs.append(" ".join(map(str, counts)))
        found.clear()

    def rewind(name):
        tasks["other" if name == "other" else "base"].rewind()

    row = ratios(tasks["base"], tasks["other"], rounds, synchronise, rewind)
    return {**row, GRAPHS: "; ".join(graphs) if MODES[mode] else ""}


class Table:
    """Rows, printed as they come."""

    def __init__(self):
        self.rows: list[dict] = []
        self._print(COLUMNS)
        self._print(["---"] * len(COLUMNS))

    def add(self, **row) -> None:
        self.rows.append(row)
        self._print([row.get(name, "") for name in COLUMNS])

    @staticmethod
    def _print(cells) -> None:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


@torch.no_grad()
def measure(table: Table, arguments: argparse.Namespace, dtype: str, synchronise: Callable) -> None:
    """All rows of one model."""
    shape = SHAPES[arguments.shape]
    base = build(shape, arguments.device, getattr(torch, dtype))
    inputs = prompt(base, shape)
    for name in arguments.repairs:
        other = repaired(base, shape, name)
        for mode in arguments.modes:
            parts = {
                f"prefill of {shape.tokens}": (partial(Prefill, inputs=inputs), 1),
                f"decoding of {arguments.new}": (
                    partial(Decoding, inputs=inputs, count=arguments.new, static=mode != "eager"),
                    arguments.more,
                ),
            }
            for part, (make, times) in parts.items():
                found = compare(base, other, make, mode, times * arguments.rounds, synchronise)
                table.add(model=arguments.shape, dtype=dtype, mode=mode, part=part, repair=name, **found)


@torch.no_grad()
def testbed(table: Table, arguments: argparse.Namespace, synchronise: Callable) -> None:
    """A forward and a generation of the bundled model, 32 prompts: two FFNs repaired, or gated."""
    model, processor = care_hf.load_testbed()
    control = SafetySubspaces.random(model, layers=[3, 4], rank=RANK)
    printed = CareForConditionalGeneration.from_base(model, control).to(arguments.device)
    model = model.to(arguments.device)
    samples = [Sample(s.messages) for s in World().benign("icon", "fit", 32)]
    batch = collate(processor, samples, image_token_ids(model.config))
    inputs = {name: value.to(arguments.device) for name, value in batch.inputs.items()}
    gated = care_hf.fit(model, processor=processor, **fit_prompts(World(), 24)).to(arguments.device)
    for name, other in (("adaptive", printed), ("fitted", gated)):
        parts = {
            f"forward, 32 prompts of {inputs['input_ids'].shape[1]}": (lambda model: model(**inputs), 10),
            "generate, up to 12": (lambda model: model.generate(**inputs, max_new_tokens=12), 2),
        }
        for part, (call, times) in parts.items():
            found = ratios(partial(call, model), partial(call, other), times * arguments.rounds, synchronise)
            table.add(model="testbed", dtype="float32", mode="eager", part=part, repair=name, **found)
    count = sum(buffer.numel() for name, buffer in gated.named_buffers() if ".care" in name)
    share = count / sum(parameter.numel() for parameter in model.parameters())
    print(f"\nGated repair of the testbed: {count} values, {share:.2%} of its parameters.")


def parse() -> argparse.Namespace:
    """The command line; what is not given depends on the shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="layer", choices=[*SHAPES, "testbed"])
    parser.add_argument("--device", help="cuda for 7b, else cpu")
    parser.add_argument("--dtypes", nargs="+", help="bfloat16 for 7b, else float32 and bfloat16")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="all for 7b and tiny, else eager")
    parser.add_argument("--repairs", nargs="+", choices=[*FUSIONS, *GATED, *RIVALS], help="all for layer, else some")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new", type=int, help="tokens decoded; 1 for layer, else 32")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    given = parser.parse_args()
    large, layer = given.shape == "7b", given.shape == "layer"
    given.device = given.device or ("cuda" if large else "cpu")
    given.dtypes = given.dtypes or (["bfloat16"] if large else ["float32", "bfloat16"])
    given.modes = given.modes or (["eager"] if layer else list(MODES))
    given.repairs = given.repairs or ([*FUSIONS, *GATED] if layer else ["adaptive", *GATED])
    given.new = given.new or (1 if layer else 32)
    given.more = 20 if layer else 1  # rounds of decoding for each of prefill: a single token takes milliseconds
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device here, so nothing is measured on a GPU; for a CPU say --device cpu.\n")
    if "cudagraphs" in given.modes and not given.device.startswith("cuda"):
        given.modes.remove("cudagraphs")
        print("No CUDA graphs: not on a GPU.")
    return given


def main() -> None:
    """Parse the command line and print the ratios."""
    arguments = parse()
    on_gpu = arguments.device.startswith("cuda")
    versions = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads; no GPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": arguments.rounds,
    }
    print(", ".join(f"{name} {value}" for name, value in versions.items()), end="\n\n")
    table, synchronise = Table(), torch.cuda.synchronize if on_gpu else lambda: None
    if arguments.shape == "testbed":
        testbed(table, arguments, synchronise)
    else:
        for dtype in arguments.dtypes:
            measure(table, arguments, dtype, synchronise)
    if arguments.json:
        arguments.json.write_text(json.dumps({**versions, "rows": table.rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
