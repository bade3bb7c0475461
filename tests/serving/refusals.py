"""What vLLM must not serve: broken checkpoints and settings under which the repair would not be exact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import BACKEND, PLAIN, close
from safetensors.torch import load_file, save_file

CHECKPOINT = "llava-gated"
Change = Callable[[dict[str, Any], dict[str, Any]], None]  # of config.json and of the tensors, in place


def without(part: str) -> Change:
    def change(config, tensors):
        del tensors[next(name for name in sorted(tensors) if part in name)]

    return change


def setting(name: str, value: Any) -> Change:
    def change(config, tensors):
        config[name] = value

    return change


def more(config, tensors):
    name = next(name for name in tensors if ".care." in name)
    tensors[name.replace(".4.", ".2.")] = tensors[name].clone()


def nudged(config, tensors):
    name = next(name for name in tensors if name.endswith("last.mean"))
    tensors[name] = tensors[name] + 1e-3


def nothing(config, tensors):
    pass


CASES: tuple[tuple[str, Change, dict[str, Any], str], ...] = (
    ("a tensor of the repair is missing", without(".care.last.basis"), {}, "lacks 1 tensors"),
    ("a tensor of the gate is missing", without("care_gate.readers"), {}, "lacks 1 tensors"),
    ("the same, Transformers backend", without("care_gate.readers"), BACKEND, "lacks 1 tensors"),
    ("a repair that config.json does not know", more, {}, "unknown to its config.json"),
    ("a tensor was changed", nudged, {}, "digest"),
    ("a setting was changed", setting("fusion", "adaptive"), {}, "digest"),
    ("a setting that is not known", setting("fusion", "strange"), {}, "fusion='strange'"),
    ("a later format", setting("care_format", 99), {}, "format 99"),
    ("adapters", setting("adapters", {"a": {"peft_type": "LORA"}}), {}, "merge_adapters"),
    ("weights that are made up", nothing, {"load_format": "dummy"}, "was not loaded"),
    ("embeddings in place of tokens", nothing, {"enable_prompt_embeds": True}, "enable_prompt_embeds"),
    ("the base's class", nothing, {"hf_overrides": {"architectures": ["LlavaForConditionalGeneration"]}}, "no module"),
)


def refusal(folder: Path, change: Change, options: dict[str, Any]) -> str:
    """What is said when the changed checkpoint is served; empty if it was."""
    from vllm import LLM

    broken = folder / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folder / CHECKPOINT, broken)
    config, tensors = json.loads((broken / "config.json").read_text()), load_file(broken / "model.safetensors")
    change(config, tensors)
    (broken / "config.json").write_text(json.dumps(config))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    try:
        LLM(str(broken), **PLAIN | options).generate(["harmless"], use_tqdm=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refuse_all(folder: Path) -> list[dict[str, Any]]:
    """Try every case."""
    rows = []
    for name, change, options, expected in CASES:
        said = refusal(folder, change, options)
        rows.append({"case": name, "refused": expected in said, "said": said[:300]})
        print(json.dumps(rows[-1]), flush=True)
        close()
    return rows
