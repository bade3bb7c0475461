"""What the repair adds: a 7B-sized FFN and decoder layer with and without it, and the whole testbed.

``python benchmarks/repair_cost.py`` prints ratios (repaired / base), timed in turns in the same run.
"""

import argparse
import time
from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRotaryEmbedding

import care_hf
from care_hf.gating import Gate, GateReader, TurnProjection, prompt_ends, turn_steps
from care_hf.modeling_care import CareForConditionalGeneration
from care_hf.projection import FUSIONS, SafetyProjection, Subspace
from care_hf.samples import Sample, collate
from care_hf.sites import image_token_ids
from care_hf.subspace import SafetySubspaces
from care_hf.testbed import World
from care_hf.testbed.prompts import fit_prompts

HIDDEN, INTERMEDIATE, RANK, GATED_RANK = 4096, 11008, 16, 4


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


@torch.no_grad()
def gated_layer(device: str, dtype: torch.dtype, rounds: int, synchronise) -> None:
    """One decoder layer of a 7B model, with both halves of the gated repair at once: its gate, and its correction."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=32)
    config._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(config, 0).to(device, dtype), LlamaRotaryEmbedding(config).to(device)
    basis = torch.linalg.qr(torch.randn(HIDDEN, GATED_RANK, generator=torch.Generator().manual_seed(0))).Q
    places = {
        "last": Subspace(basis, torch.zeros(HIDDEN)),
        "response": Subspace(basis, torch.zeros(8, HIDDEN)),
    }
    repair = TurnProjection.from_subspaces(places).to(device)
    gate = GateReader.from_gate(Gate((1,), torch.randn(HIDDEN, 5), torch.zeros(5), 1, 2)).to(device)
    for tokens in (600, 1):
        h = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype)
        positions = rotary(h, torch.arange(tokens, device=device)[None])
        ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
        base = partial(layer, h, position_embeddings=positions)

        def repaired(base=base, ids=ids):
            out = base()
            fires = gate(out, ids > 0)
            steps, held = turn_steps(prompt_ends(ids, (1,)), fires)
            return repair(out, torch.where(held, steps, -1))

        found = ratios(base, repaired, rounds if tokens > 1 else 20 * rounds, synchronise)
        report(f"decoder layer {HIDDEN} {dtype} gated, {tokens:4} tokens", *found)


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
    """A forward and a generation of the bundled model, 32 prompts: two FFNs repaired, or gated."""
    model, processor = care_hf.load_testbed()
    control = SafetySubspaces.random(model, layers=[3, 4], rank=RANK)
    repaired = CareForConditionalGeneration.from_base(model, control).to(device)
    model = model.to(device)
    samples = [Sample(s.messages) for s in World().benign("icon", "fit", 32)]
    batch = collate(processor, samples, image_token_ids(model.config))
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    gated = care_hf.fit(model, processor=processor, **fit_prompts(World(), 24)).to(device)
    count = sum(buffer.numel() for name, buffer in gated.named_buffers() if ".care" in name)
    share = count / sum(parameter.numel() for parameter in model.parameters())
    print(f"gated repair of the testbed: {count} values, {share:.2%} of its parameters")
    for name, other in (("printed", repaired), ("gated", gated)):
        found = ratios(lambda: model(**inputs), lambda other=other: other(**inputs), rounds, synchronise)
        report(f"testbed forward, {name}, 32 prompts of {inputs['input_ids'].shape[1]} tokens", *found)
        found = ratios(
            lambda: model.generate(**inputs, max_new_tokens=12),
            lambda other=other: other.generate(**inputs, max_new_tokens=12),
            rounds // 5,
            synchronise,
        )
        report(f"testbed generate, {name}, up to 12 tokens", *found)


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
    gated_layer(arguments.device, getattr(torch, arguments.dtype), arguments.rounds, synchronise)
    ffn(arguments.device, getattr(torch, arguments.dtype), arguments.fusions, arguments.rounds, synchronise)


if __name__ == "__main__":
    main()
