"""Fits on several real processes: they find what one finds, and where one ends all end, and go on later."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.linalg
import torch
from process_worker import load, prompts, rows_of, solve

from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.collection import Collection
from care_hf.fit_job import KEPT
from care_hf.testbed.files import write_files
from care_hf_console.app import app

HERE = Path(__file__).parent
PATHS = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCH = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2"]
MINUTE = 60


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def started(command, **environment):
    return subprocess.Popen(
        list(map(str, command)),
        env={**ENVIRONMENT, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Processes:
    """Two of them, whom no launcher looks after."""

    def __init__(self, folder, *jobs):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        command = [sys.executable, HERE / "process_worker.py", folder / "jobs.json", folder]
        self.ranks = [started(command, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]

    def wait(self, *ranks, timeout=150):
        """What became of these processes."""
        found = []
        try:
            for rank in ranks:
                _, errors = self.ranks[rank].communicate(timeout=timeout)
                assert self.ranks[rank].returncode == 0, errors
                found.append(json.loads((self.folder / f"{rank}.json").read_text()))
        finally:
            self.end()
        return found

    def end(self):
        for process in self.ranks:
            process.kill()


def wait_for(path, processes, seconds=100):
    """The number of the process that has come to the place where it stops."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until and processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    return int(path.read_text())


@pytest.fixture(scope="module")
def alone():
    """What one process finds, by recipe; and how many rows of batches it puts through the model."""
    found = {}
    for name in ("paper", "gated"):
        model, processor = load({"double": True})
        rows = counted(model)
        found[name] = solve(model, processor, {"recipe": name}), sum(rows)
    return found


def counted(model):
    """The number of prompts in every forward from now on."""
    rows = []
    model.model.register_forward_pre_hook(lambda m, a, given: rows.append(rows_of(given)), with_kwargs=True)
    return rows


def angle(first, second):
    assert {s: set(by) for s, by in first.sites.items()} == {s: set(by) for s, by in second.sites.items()}
    pairs = [(by[m].basis, second.sites[s][m].basis) for s, by in first.sites.items() for m in by]
    return max(scipy.linalg.subspace_angles(*(basis.double().numpy() for basis in pair)).max() for pair in pairs)


def assert_same(found, expected):
    assert angle(found, expected) < 1e-6
    for site, places in expected.sites.items():
        for name, subspace in places.items():
            torch.testing.assert_close(found.sites[site][name].mean, subspace.mean, rtol=0, atol=1e-6)
    assert (found.gate is None) == (expected.gate is None)
    if expected.gate is not None:
        torch.testing.assert_close(found.gate.readers, expected.gate.readers, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.gate.thresholds, expected.gate.thresholds, rtol=1e-5, atol=1e-6)
    told = ("data", "prompts", "base", "judge")
    assert {n: found.metadata.get(n) for n in told} == {n: expected.metadata.get(n) for n in told}


# Together


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    paper, gated = ({"recipe": name, "double": True} for name in ("paper", "gated"))
    jobs = [
        {**paper, "name": "paper", "delays": [0.02, 0, 0]},
        {**paper, "name": "paper again", "delays": [0, 0.02, 0]},
        {**gated, "name": "gated", "resume": str(folder / "gated.kept")},
        {**gated, "name": "old", "resume": str(folder / "old.kept"), "first": 18},
        {
            **gated,
            "name": "updated",
            "resume": str(folder / "new.kept"),
            "update": str(folder / "old.kept"),
            "after": 18,
        },
        {**gated, "name": "others", "others": 1},
        {**gated, "name": "broken", "resume": str(folder / "broken.kept"), "at": [1, 9], "then": "raise"},
        {**gated, "name": "mended", "resume": str(folder / "broken.kept")},
    ]
    results = Processes(folder, *jobs).wait(0, 1)
    return folder, results


@pytest.mark.parametrize("name", ["paper", "paper again", "gated", "updated", "mended"])
def test_two_processes_find_what_one_finds(together, alone, name):
    folder, results = together
    recipe = "paper" if "paper" in name else "gated"
    expected, rows = alone[recipe]
    assert_same(SafetySubspaces.load(folder / f"{name}.safetensors"), expected)
    assert len({result[name]["digest"] for result in results}) == 1
    if name in ("paper", "gated"):
        # The places are checked by both, with one prompt; and a class may be odd.
        assert all(result[name]["rows"] <= rows / 2 + 10 for result in results)


def test_it_does_not_matter_which_is_faster(together):
    _, results = together
    assert results[0]["paper"]["digest"] == results[0]["paper again"]["digest"]


def test_what_they_kept_is_one_file_in_the_end(together):
    folder, _ = together
    assert sorted(path.name for path in folder.glob("*.kept")) == ["broken.kept", "gated.kept", "new.kept", "old.kept"]
    kept = Collection.load(folder / "gated.kept")
    assert {name: [range(n)] for name, n in kept.counts.items()} == kept.done
    assert kept.counts == {name: len(items) for name, items in prompts("gated").items()}


def test_other_prompts_in_one_process_are_refused_in_all(together):
    _, results = together
    for result in results:
        assert result["others"]["error"] == "ValueError"
        assert result["others"]["message"].startswith("Processes 1 (of 2, from 0) were given other prompts")


def test_what_fails_in_one_process_is_told_in_the_other(together):
    _, (first, second) = together
    assert second["broken"] | {"seconds": 0} == {
        "error": "ValueError", "message": "this prompt is broken", "seconds": 0,
    }  # fmt: skip
    assert first["broken"]["error"] == "ProcessFailed"
    assert "Process 1 (of 2, from 0) failed: ValueError: this prompt is broken. What" in first["broken"]["message"]
    # What they had is not done again.
    assert sum(one["mended"]["rows"] for one in (first, second)) < sum(one["gated"]["rows"] for one in (first, second))


# One ends


@pytest.mark.parametrize(("victim", "at", "end"), [(1, 14, "kill"), (0, 7, "kill"), (1, 14, "stop")])
def test_a_process_that_is_gone_ends_the_other_and_later_one_goes_on(alone, tmp_path, victim, at, end):
    kept, other = tmp_path / "kept", 1 - victim
    job = {"name": "gated", "recipe": "gated", "double": True, "resume": str(kept), "at": [victim, at], "then": "wait"}
    job["delays"] = [0.4 * (rank == other) for rank in range(2)]  # it is not done before
    processes = Processes(tmp_path / "out", {**job, "silent": 5} if end == "stop" else job)
    try:
        number = wait_for(tmp_path / "out" / "here", processes.ranks)
        os.kill(number, signal.SIGKILL if end == "kill" else signal.SIGSTOP)
        gone = time.monotonic()
        (result,) = processes.wait(other, timeout=MINUTE)
    finally:
        processes.end()
    assert time.monotonic() - gone < MINUTE
    assert result["gated"]["error"] == "ProcessFailed"
    assert "Another of the 2 processes is gone or has been silent for" in result["gated"]["message"]
    assert kept.exists() and (tmp_path / "kept.rank1").exists()
    # Alone, without a process that would own the file of the other.
    model, processor = load({"double": True})
    rows = counted(model)
    assert_same(solve(model, processor, {"recipe": "gated", "resume": str(kept)}), alone["gated"][0])
    assert sum(rows) < alone["gated"][1] - 20  # a batch was answered, token by token
    assert not (tmp_path / "kept.rank1").exists()


# Launched


@pytest.mark.parametrize("victim", [0, 1])
def test_a_launched_process_that_is_killed_ends_all_and_finished_batches_survive(alone, tmp_path, victim):
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    job = {"name": "paper", "recipe": "paper", "double": True, "resume": str(kept), "as_console": True}
    job |= {"at": [victim, 4], "then": "wait", "delays": [0.4 * (rank != victim) for rank in range(2)]}
    (out / "jobs.json").write_text(json.dumps([job]))
    worker = [HERE / "process_worker.py", out / "jobs.json", out]
    launcher = started([*LAUNCH, "--main_process_port", free_port(), *worker])
    try:
        os.kill(wait_for(out / "here", [launcher]), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=MINUTE)
    finally:
        launcher.kill()
    assert launcher.returncode and f"rank      : {victim}" in errors and "SIGKILL" in errors
    del job["at"], job["delays"]
    (out / "here").unlink()
    (out / "jobs.json").write_text(json.dumps([job]))
    launcher = started([*LAUNCH, "--main_process_port", free_port(), *worker])
    _, errors = launcher.communicate(timeout=2 * MINUTE)
    assert launcher.returncode == 0, errors
    assert_same(SafetySubspaces.load(out / "paper.safetensors"), alone["paper"][0])
    rows = sum(json.loads((out / f"{rank}.json").read_text())["paper"]["rows"] for rank in range(2))
    assert rows <= alone["paper"][1] + 1 - 2 * 4  # both check the places; two batches were done by the one that is gone
    assert not list(tmp_path.glob("kept.rank*"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, 0, 4)
    write_files(folder / "more", 0, 24)
    return folder


def fit_command(files, out, *more):
    given = ["--benign", files / "benign.jsonl", "--malicious", files / "more" / "malicious.jsonl"]
    return list(map(str, ["fit", files / "model", *given, "--out", out, "--batch-size", "1", "--json", *more]))


def test_the_console_fits_on_launched_processes(files, tmp_path, capsys):
    launcher = started(
        [*LAUNCH, "--main_process_port", free_port(), "-m", "care_hf", *fit_command(files, tmp_path / "2")]
    )
    output, errors = launcher.communicate(timeout=2 * MINUTE)
    assert launcher.returncode == 0, errors
    app(fit_command(files, tmp_path / "1"), standalone_mode=False)
    assert json.loads(output)["out"] == str(tmp_path / "2")  # one object: only one process speaks
    assert errors.count("Fits a repair of") == 1 and "2, each with its part of the prompts" in errors
    two, one = (
        SafetySubspaces.from_model(CareForConditionalGeneration.from_pretrained(tmp_path / name)) for name in "21"
    )
    assert_same(two, one)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "21"]
    assert names[0] == names[1] and KEPT in names[0] and "README.md" in names[0]


def test_a_mistake_is_told_once_by_all_that_were_launched(files, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"text": "what is this ?", "image": str(tmp_path / "nowhere.png")}) + "\n")
    command = fit_command(files, tmp_path / "out", "--malicious", str(broken))
    launcher = started([*LAUNCH, "--main_process_port", free_port(), "-m", "care_hf", *command])
    output, errors = launcher.communicate(timeout=MINUTE)
    assert launcher.returncode and json.loads(output)["exit_code"] == 2
    assert errors.count("does not exist") == 1 and "care_hf FAILED" in errors


def test_a_launcher_that_starts_one_process_only_is_told_of(files, tmp_path, monkeypatch, capsys):
    # As `accelerate launch --cpu --num_processes 2` does.
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("ACCELERATE_USE_CPU", "True")):
        monkeypatch.setenv(name, value)
    app(fit_command(files, tmp_path / "out"), standalone_mode=False)
    assert "one: `accelerate launch --cpu` starts no more; use --multi_gpu" in " ".join(capsys.readouterr().err.split())
