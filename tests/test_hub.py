"""The first lines of the README, over real HTTP on loopback: fit, push, load from the hub through the Auto classes."""

import os
import subprocess
import sys
import threading

import pytest
from hub import Hub

PUSH = """
import sys, torch, care_hf
model, processor = care_hf.load_testbed()
subspaces = care_hf.SafetySubspaces.random(model, layers=[2], rank=4)
repaired = care_hf.CareForConditionalGeneration.from_base(model, subspaces)
repaired.processor = processor
repaired.push_to_hub("org/llava-care")
text, images = "<s><user><image>read the word .<assistant>", torch.zeros(3, 48, 48)
inputs = processor(text=text, images=images, return_tensors="pt")
torch.save({"inputs": dict(inputs), "logits": repaired(**inputs).logits}, sys.argv[1])
"""

LOAD = """
import sys, torch{0}
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
saved = torch.load(sys.argv[1])
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained("org/llava-care"{1})
    assert type(model).__name__ == "CareForConditionalGeneration"
    assert torch.equal(model(**saved["inputs"]).logits, saved["logits"])
assert type(AutoProcessor.from_pretrained("org/llava-care")).__name__ == "LlavaProcessor"
"""


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(code, hub, folder):
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **online, "HF_HOME": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-I", "-c", code, str(folder / "saved.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_pushed_model_loads_with_the_package_and_with_nothing_but_its_own_code(hub, tmp_path):
    run(PUSH, hub, tmp_path)
    files = hub.files["org/llava-care"]
    assert {"config.json", "model.safetensors", "modeling_care.py", "projection.py", "processor_config.json"} <= set(
        files
    )
    run(LOAD.format(", care_hf", ""), hub, tmp_path)
    hidden = "; sys.modules['care_hf'] = None"
    run(LOAD.format(hidden, ", trust_remote_code=True"), hub, tmp_path)
