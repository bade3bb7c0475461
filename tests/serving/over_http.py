"""Answers of vLLM's OpenAI server, to many clients at once, and how far they are from those of transformers."""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines import NEW_TOKENS, Compared, compare

PORT, CLIENTS, PATIENCE = 8713, 12, 240


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_for(server: subprocess.Popen) -> None:
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with {server.returncode}; its log says why.")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"The server was not up after {PATIENCE} s.")


def ask(row: dict[str, Any]) -> tuple[list[int], list[float]]:
    """By messages where the row has them, so that the server reads the image and writes the prompt; else by ids."""
    common = {"model": "served", "temperature": 0, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    if "parts" not in row:
        choice = post("/v1/completions", {**common, "prompt": row["ids"], "logprobs": 0})["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]
    content = [{"type": "text", "text": part} for part in row["parts"]]
    if row["image"]:
        url = "data:image/png;base64," + base64.b64encode(Path(row["image"]).read_bytes()).decode()
        content[row["parts"].index("image")] = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": content}]
    answer = post("/v1/chat/completions", {**common, "messages": messages, "logprobs": True, "top_logprobs": 0})
    assert answer["prompt_token_ids"] == row["ids"], "the server wrote the prompt otherwise"
    choice = answer["choices"][0]
    return choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]


def run(folder: Path, checkpoint: str, processes: int, log: Path) -> Compared:
    result, began = Compared(f"OpenAI server, {CLIENTS} clients, tensor parallel {processes}", checkpoint), time.time()
    rows = json.loads((folder / f"{checkpoint}.json").read_text())
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / checkpoint)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(PORT), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--tensor-parallel-size", str(processes)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=settings()) as server:
        try:
            wait_for(server)
            with ThreadPoolExecutor(CLIENTS) as pool:
                compare(result, rows, list(pool.map(ask, rows)))
        finally:
            server.terminate()
    result.seconds = time.time() - began
    return result


def settings() -> dict[str, str]:
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = run(folder, "llava-gated", 1, out.with_suffix(".log"))
    out.write_text(json.dumps({"compared": [found.row()], "refused": []}))
    print(out.read_text())
    sys.exit(0 if found.passed else 1)
