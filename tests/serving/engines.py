"""Answers of vLLM's offline API, case after case in one process, and how far they are from those of transformers."""

import gc
import json
import os
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ.update(VLLM_WORKER_MULTIPROC_METHOD="fork")  # else each worker imports vLLM anew

NEW_TOKENS = 20
PLAIN = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "seed": 0}
BACKEND = {"hf_overrides": {"architectures": ["CareTransformersMultiModalForCausalLM"]}}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "disable_chunked_mm_input": False}


@dataclass
class Compared:
    """What came out of one case."""

    case: str
    checkpoint: str
    prompts: int = 0
    changed: int = 0
    equal: int = 0
    tokens: int = 0
    error: float = 0.0
    seconds: float = 0.0
    cached: int = 0
    preempted: int = 0
    accepted: int = 0
    failure: str = ""

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    @property
    def passed(self) -> bool:
        return not self.failure and self.prompts > 0 and self.equal == self.prompts and self.error <= 1e-4


@dataclass(frozen=True)
class Case:
    """A checkpoint and how it is served; `rounds` of the same prompts in one engine."""

    name: str
    checkpoint: str
    options: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1
    shows: str = ""  # the count that must not be 0, or the case shows nothing


GATED = "llava-gated"
CASES = (
    # First: workers are forked, which a process with threads of earlier engines does not survive.
    Case("tensor parallel 2, chunked prefill", "qwen2.5-vl-gated", TWO | CHUNKED),
    Case("tensor parallel 2", "llava-tiny", TWO),
    Case("continuous batching", GATED),
    Case("chunked prefill, 16 tokens a step", GATED, CHUNKED),
    Case("prefix caching, second time", GATED, {"block_size": 32}, rounds=2, shows="cached"),
    Case("preemption, 12 blocks of 32", GATED, {"block_size": 32, "num_gpu_blocks_override": 13}, shows="preempted"),
    Case("torch.compile", GATED, {"enforce_eager": False}),
    Case("Transformers backend, chunked prefill", GATED, BACKEND | CHUNKED),
    Case("continuous batching", "llava-printed"),
    Case("chunked prefill, 16 tokens a step", "llava-routed", CHUNKED),
    Case("chunked prefill, 16 tokens a step", "llama-gated", CHUNKED),
    Case("continuous batching", "qwen2.5-vl-gated"),
    Case("chunked prefill, 16 tokens a step", "qwen2.5-vl-gated", CHUNKED),
    Case("Transformers backend, chunked prefill", "llava_next-tiny", CHUNKED),
    Case("Transformers backend, chunked prefill", "mistral3-tiny", CHUNKED),
    Case("Transformers backend, chunked prefill", "gemma3-tiny", CHUNKED),
    Case("Transformers backend, chunked prefill", "phi3-gated", CHUNKED),
    Case("merged, stock class", "llama-merged"),
    Case("merged, stock class", "qwen2-merged"),
    Case("merged, stock class", "llava-merged"),
)
# What it loads has vLLM 0.32 start no other engine in the same process.
LAST = (Case("speculative decoding by n-grams", GATED, {"speculative_config": NGRAMS}, shows="accepted"),)


def request(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    if row["image"] is None:
        return {"prompt_token_ids": row["ids"]}
    return {"prompt": row["text"], "multi_modal_data": {"image": Image.open(row["image"])}}


def compare(result: Compared, rows: list[dict[str, Any]], answers: list[tuple[list[int], list[float]]]) -> None:
    result.prompts = len(rows)
    result.changed = sum(row["answer"] != row["base"] for row in rows)
    for row, (ids, logprobs) in zip(rows, answers, strict=True):
        result.equal += ids == row["answer"]
        result.tokens += len(ids)
        if ids == row["answer"]:
            pairs = zip(logprobs, row["logprobs"], strict=True)
            result.error = max([result.error, *(abs(one - other) for one, other in pairs)])


def run(folder: Path, case: Case) -> Compared:
    from vllm import LLM, SamplingParams

    result, began = Compared(case.name, case.checkpoint), time.perf_counter()
    rows = json.loads((folder / f"{case.checkpoint}.json").read_text())
    llm = LLM(disable_log_stats=False, model=str(folder / case.checkpoint), **PLAIN | case.options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    for _ in range(case.rounds):
        outputs = llm.generate([request(row) for row in rows], sampling, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        assert list(output.prompt_token_ids) == row["ids"], "vLLM read the prompt otherwise"
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        for output, ids in zip(outputs, answers, strict=True)
    ]
    result.cached = sum(output.num_cached_tokens or 0 for output in outputs)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result.preempted = int(counts.get("vllm:num_preemptions", 0))
    result.accepted = int(counts.get("vllm:spec_decode_num_accepted_tokens", 0))
    if case.shows and not getattr(result, case.shows):
        result.failure = f"nothing was {case.shows}"
    compare(result, rows, list(zip(answers, logprobs, strict=True)))
    result.seconds = time.perf_counter() - began
    return result


def inspect_here() -> None:
    """Not in a process for every class of model, which would import vLLM anew."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def close() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def run_all(folder: Path, cases: tuple[Case, ...], chosen: list[str]) -> list[Compared]:
    """Every case whose checkpoint or name has one of these words; all, if there are none."""
    results = []
    for case in cases:
        if chosen and not any(word in f"{case.checkpoint} {case.name}" for word in chosen):
            continue
        try:
            result = run(folder, case)
        except Exception as error:
            traceback.print_exc()
            result = Compared(case.name, case.checkpoint, failure=f"{type(error).__name__}: {str(error)[:200]}")
        results.append(result)
        print(json.dumps(result.row()), flush=True)
        close()
    return results
