"""Peak memory of `care_hf.merge`, on a LLaVA of 7B-sized layers with random bfloat16 weights.

``python benchmarks/merge_memory.py --layers 32`` writes the base to a temporary folder (13 GB at 32 layers, as many
again for the merged one) and merges in processes of their own: from the model in memory with the base's files found,
from memory alone, and from a repaired checkpoint's folder. Printed is how far the anonymous memory of the process
rises, sampled every 5 ms. That is what has to fit in memory; pages of mapped checkpoint files, which the system takes
back when it needs them, are not part of it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

WAYS = ("files of the base", "from memory", "from a folder")
SHARD = 2 * 2**30


def anonymous() -> float:
    """Anonymous resident memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak:
    """The highest anonymous memory while entered."""

    def __enter__(self):
        self.before = self.highest = anonymous()
        self.going = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.going:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()

    @property
    def rise(self) -> float:
        return self.highest - self.before


def write_base(folder: Path, layers: int) -> int:
    """Write random weights shard by shard, and return their bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from care_hf.merge_files import saved_tensors

    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers}
    config = LlavaConfig(text_config={**text, "num_attention_heads": 32, "vocab_size": 32000}, vision_config=vision)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    config.dtype, config.architectures = "bfloat16", [type(model).__name__]
    config.save_pretrained(folder)
    files, shard, total = {}, {}, 0
    pool = torch.empty(2**24 + 43).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def flush():
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in saved_tensors(model, model.state_dict()).items():
        drawn = pool.repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()].reshape(tensor.shape)
        shard[name] = drawn + 1 if name.endswith("norm.weight") else drawn
        total += drawn.nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def repaired(base: Path, layers: int):
    """The base, mapped from its files, with random bases and anchors at its two middle layers."""
    import torch
    from transformers import AutoModelForImageTextToText

    from care_hf import CareForConditionalGeneration, SafetySubspaces

    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto").eval()
    random = SafetySubspaces.random(model, [layers // 2, layers // 2 + 1], 16)
    anchor = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.1
    sites = {site: {name: replace(s, mean=anchor) for name, s in by.items()} for site, by in random.sites.items()}
    return CareForConditionalGeneration.from_base(model, SafetySubspaces(sites, "constant"))


def measure(way: str, folder: Path, layers: int) -> dict:
    """Merge one way, and return what it took."""
    import torch

    import care_hf

    model = repaired(folder / "base", layers)
    if way == "from a folder":
        model.save_pretrained(folder / "care", max_shard_size="1GB")
        model = folder / "care"
    elif way == "from memory":
        model.vlm.config._name_or_path = ""
    torch.ones(512, 512).to(torch.bfloat16) @ torch.ones(512, 512).to(torch.bfloat16)  # what is allocated once
    start = time.perf_counter()
    with Peak() as peak:
        merged = care_hf.merge(model, folder / "merged")
    seconds = time.perf_counter() - start
    return {"rise": peak.rise, "seconds": seconds, "difference": merged.difference, "rewritten": merged.rewritten}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], Path(arguments.child[1]), arguments.layers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base").mkdir()
        size = write_base(Path(folder) / "base", arguments.layers)
        for way in arguments.ways:
            command = [sys.executable, __file__, "--layers", str(arguments.layers), "--child", way, folder]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                raise SystemExit(finished.stderr)
            found = json.loads(finished.stdout.splitlines()[-1])
            shutil.rmtree(Path(folder) / "merged")
            print(
                f"{way}: {size / 2**30:.1f} GiB merged in {found['seconds']:.0f} s, anonymous memory + "
                f"{found['rise']:.0f} MiB, logits differ by {found['difference']:.2g} of their spread",
                flush=True,
            )


if __name__ == "__main__":
    main()
