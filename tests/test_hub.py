"""Repaired models over real HTTP on loopback, pushed and loaded in processes of their own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hub import TOKEN, serving
from test_imports import REMOTE_CODE

ROOT = Path(__file__).parents[1]
HERE = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
# -S leaves out the .pth files by which care_hf is installed, so that it is not to be had at all.
BARE = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
MISSING = """
try:
    import care_hf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("care_hf is there")
"""

# One checkpoint in one file, then another in shards in its place, on a branch too, a private one; other families.
PUSH = """
import torch, care_hf
from families import FAMILIES, collated
model, processor = care_hf.load_testbed()
told = {}

def repaired(base, seed, processor):
    subspaces = care_hf.SafetySubspaces.random(base, layers=[2], rank=4, seed=seed)
    made = care_hf.CareForConditionalGeneration.from_base(base, subspaces)
    made.processor = processor
    return made

@torch.no_grad()
def push(made, name, repo, inputs, **options):
    commit = made.push_to_hub(repo, **options)
    told[name] = {"inputs": dict(inputs), "logits": made(**inputs).logits, "commit": commit.oid, "repo": repo}

text, images = "<s><user><image>read the word .<assistant>", torch.zeros(3, 48, 48)
inputs = processor(text=text, images=images, return_tensors="pt")
push(repaired(model, 0, processor), "first", "org/llava-care", inputs)
second = repaired(model, 1, processor)
second.generation_config.max_new_tokens = 3
push(second, "second", "org/llava-care", inputs, max_shard_size="1MB")
push(repaired(model, 2, processor), "branch", "org/llava-care", inputs, revision="trial")
push(repaired(model, 3, processor), "private", "org/secret", inputs, private=True)
for name in ("llama", "qwen2_5_vl"):
    family = FAMILIES[name]
    made = repaired(family.model, 0, family.processor(family.model.config))
    push(made, name, f"org/{name}", collated(family).inputs)
torch.save(told, sys.argv[1])
"""

LOAD = """
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
told = torch.load(sys.argv[1], weights_only=False)

@torch.no_grad()
def load(auto, name, **options):
    one = told[name]
    model = auto.from_pretrained(one["repo"], **MORE, **options)
    assert type(model).__name__ == "CareForConditionalGeneration"
    if options.get("dtype") is None:
        assert torch.equal(model(**one["inputs"]).logits, one["logits"]), (auto, name)
    return model
"""

EVERYTHING = """
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = load(auto, "second")
assert not torch.equal(told["first"]["logits"], told["second"]["logits"])
generated = model.generate(**told["second"]["inputs"], do_sample=False, eos_token_id=-1)
assert model.generation_config.max_new_tokens == 3
assert generated.shape[1] == told["second"]["inputs"]["input_ids"].shape[1] + 3
load(AutoModelForImageTextToText, "first", revision=told["first"]["commit"])
load(AutoModelForImageTextToText, "branch", revision="trial")
load(AutoModel, "private")
load(AutoModelForCausalLM, "llama")
load(AutoModelForImageTextToText, "qwen2_5_vl")
load(AutoModelForImageTextToText, "second", device_map={"": "cpu"})
load(AutoModel, "second", device_map="auto")
half = load(AutoModelForImageTextToText, "second", dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16 and half.vlm.get_input_embeddings().weight.dtype == torch.bfloat16
assert next(iter(half.care_modules().values())).visual.basis.dtype == torch.float32
for repo, options, told in (
    ("org/secret", {"token": False, "cache_dir": "fresh"}, "private repository"),
    ("org/llava-care", {"revision": "0" * 40}, "not a valid git identifier"),
):
    try:
        AutoModel.from_pretrained(repo, **MORE, **options)
    except OSError as error:
        assert told in str(error), error
    else:
        raise AssertionError(repo)
processor = transformers.AutoProcessor.from_pretrained("org/llava-care")
assert type(processor).__name__ == "LlavaProcessor"
content = [{"type": "image"}, {"type": "text", "text": "read the word ."}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
assert text.endswith("<assistant>"), text
"""


@pytest.fixture(scope="module")
def hub():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """The folder of what was pushed, and of a cache."""
    folder = tmp_path_factory.mktemp("hub")
    run(HERE + PUSH, hub, folder)
    return folder


def run(code, hub, folder, *flags, **more):
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **online, "HF_HOME": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1", **more}
    command = [sys.executable, "-I", *flags, "-c", code, str(folder / "saved.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def test_all_that_a_repo_needs_is_in_it(hub, pushed):
    files = hub.files["org/llava-care"]
    shards = {name for name in files if name.startswith("model-") and name.endswith(".safetensors")}
    assert len(shards) > 2 and "model.safetensors.index.json" in files and "model.safetensors" not in files
    code = {name.removesuffix(".py") for name in files if name.endswith(".py")}
    assert code == REMOTE_CODE
    rest = {"config.json", "generation_config.json", "processor_config.json", "chat_template.jinja", "README.md"}
    assert rest | {"reproduce.json"} <= set(files)
    first, *_ = [files for files in hub.repos["org/llava-care"].commits.values() if files]
    assert "model.safetensors" in first and "model.safetensors.index.json" not in first
    assert hub.repos["org/secret"].private and not hub.repos["org/llava-care"].private
    folders = (str(ROOT), str(Path.home()) + "/", str(pushed))
    told = [(n, f) for files in hub.files.values() for n, data in files.items() for f in folders if f.encode() in data]
    assert not told


def test_a_pushed_model_loads_where_the_package_is_installed(hub, pushed):
    run(HERE + "import care_hf\nMORE = {}\n" + LOAD + EVERYTHING, hub, pushed)


def test_a_pushed_model_loads_with_nothing_but_its_own_code_and_then_offline(hub, pushed):
    remote = BARE + MISSING + 'MORE = {"trust_remote_code": True}\n' + LOAD
    run(remote + EVERYTHING, hub, pushed, "-S", HF_HOME=str(pushed / "bare"))
    asked = len(hub.requests)
    offline = remote + 'load(AutoModel, "second")\nload(AutoModelForCausalLM, "llama")\n'
    run(offline, hub, pushed, "-S", HF_HOME=str(pushed / "bare"), HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked


def test_a_pushed_model_loads_where_the_package_is_hidden_and_is_pushed_again_as_transformers_does_it(hub, pushed):
    code = "import sys; sys.modules['care_hf'] = None\nMORE = {'trust_remote_code': True}\n" + LOAD
    code += 'load(AutoModel, "first", revision=told["first"]["commit"]).push_to_hub("org/again")\n'
    code += 'told["first"]["repo"] = "org/again"\nload(AutoModelForImageTextToText, "first")\n'
    run(code, hub, pushed, HF_HOME=str(pushed / "hidden"))
    files = hub.files["org/again"]
    assert b"automatically generated" in files["README.md"] and "modeling_care.py" in files
