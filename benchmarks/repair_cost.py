"""What the repair adds: one 7B-sized FFN with and without it, and a whole forward of the testbed.

``python benchmarks/repair_cost.py`` prints ratios (repaired / base), timed in turns in the same run.
"""

import argparse
import time
from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import care_hf
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import FUSIONS, SafetyProjection, Subspace
from care_hf.samples import Sample, collate
from care_hf.sites import image_token_ids
from care_hf.subspace import SafetySubspaces
from care_hf.testbed import World

HIDDEN, INTERMEDIATE, RANK = 4096, 11008, 16


def ratios(base, repaired, rounds: int, synchronise) -> tuple[float, float, float]:
    """Median milliseconds of `base`, and the median ratios of `repaired` and of `base` itself to it, timed in turns.

    The ratio of `base` to itself is the control: what it is off 1 is noise.
    """
    calls = {"base": base, "repaired": repaired, "control": base}
    rows = []
    for index in range(rounds + 2):
        row = {}
        for name in sorted(calls, reverse=bool(index % 2)):
            synchronise()
            start = time.perf_counter()
            calls[name]()
            synchronise()
            row[name] = time.perf_counter() - start
        rows.append(row)
    rows = rows[2:]  # warm-up
    repaired_ratio, control = (median(row[name] / row["base"] for row in rows) for name in ("repaired", "control"))
    return 1e3 * median(row["base"] for row in rows), repaired_ratio, control


def report(name: str, base: float, ratio: float, control: float) -> None:
    """Print one line."""
    print(f"{name}: base {base:8.2f} ms, repaired / base {ratio:.3f} (base / base {control:.3f})", flush=True)


@torch.no_grad()
def ffn(device: str, dtype: torch.dtype, fusions: list[str], rounds: int, synchronise) -> None:
    """One FFN of a 7B model."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
    mlp = LlamaMLP(config).to(device, dtype)
    for fusion in fusions:
        projection = SafetyProjection.from_subspaces(random_site(), fusion=fusion).to(device)
        for tokens in (600, 1):
            h = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype)
            mask = torch.arange(tokens, device=device)[None] < tokens * 0.96
            mask = mask if fusion == "route" else None
            # One token takes milliseconds: more rounds cost nothing.
            repeats = rounds if tokens > 1 else 20 * rounds
            found = ratios(partial(mlp, h), partial(repaired_ffn, mlp, projection, h, mask), repeats, synchronise)
            report(f"FFN {HIDDEN}x{INTERMEDIATE} {dtype} {fusion:9} {tokens:4} tokens", *found)


def repaired_ffn(mlp, projection, h, mask):
    """What a repaired FFN computes."""
    return projection(mlp(h), mask)


def random_site():
    """Two random subspaces of the benchmark's size."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(HIDDEN, RANK, generator=generator)).Q for _ in range(2)]
    return {name: Subspace(basis, torch.zeros(HIDDEN)) for name, basis in zip(("visual", "text"), bases, strict=True)}


@torch.no_grad()
def testbed(device: str, rounds: int, synchronise) -> None:
    """A forward of the bundled model, 32 prompts, two FFNs repaired."""
    model, processor = care_hf.load_testbed()
    control = SafetySubspaces.random(model, layers=[3, 4], rank=RANK)
    repaired = CareForConditionalGeneration.from_base(model, control).to(device)
    model = model.to(device)
    samples = [Sample(s.messages) for s in World().benign("icon", "fit", 32)]
    batch = collate(processor, samples, image_token_ids(model.config))
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    found = ratios(lambda: model(**inputs), lambda: repaired(**inputs), rounds, synchronise)
    report(f"testbed forward, 32 prompts of {inputs['input_ids'].shape[1]} tokens", *found)


def main() -> None:
    """Parse the command line and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fusions", nargs="+", default=FUSIONS, choices=FUSIONS)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    synchronise = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")
    testbed(arguments.device, 10 * arguments.rounds, synchronise)
    ffn(arguments.device, getattr(torch, arguments.dtype), arguments.fusions, arguments.rounds, synchronise)


if __name__ == "__main__":
    main()
