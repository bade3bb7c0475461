"""The generalised eigenproblem at scale against scipy: ``python benchmarks/solve_scale.py``.

Times `linalg.generalized_eigh` on matrices, or `subspace.fit_subspace` on rows where tokens < d, in turns with
`scipy.linalg.eigh(C_m, C_b)`, in the same process on the same cores, and compares spans and residuals. Of every
solver its best round counts, by the clock and by the processor time of all threads. A process of its own finds how far
`fit_subspace` raises the peak resident memory over that of the imports, the moments that it is given included.
``--device cuda`` puts all but scipy there; ``--testbed`` prints the eigenvalues that two of the spectra are made after.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import scipy.fft
import scipy.linalg
import torch

from care_hf import eigen
from care_hf.linalg import RunningCovariance, generalized_eigh, shrink, solve_moments
from care_hf.subspace import fit_subspace

RANK, CHUNK, RIDGE = 16, 1024, 0.02
DRIVERS = {"full": "gvd, its default", "subset": "gvx, subset_by_index"}
FALLS = {"falling": (93, 62, 0.94), "flat": (20, 9.4, 0.56)}  # eigenvalues: the first, the second, then a power
CASES = [  # d, spectrum, tokens of each class (0: matrices of given eigenvalues), drivers of scipy
    (1024, "falling", 1280, "full subset"),
    (2048, "falling", 2560, "full subset"),
    (4096, "falling", 5120, "full subset"),
    (8192, "falling", 10240, "full subset"),
    (2048, "flat", 2560, "full subset"),
    (4096, "flat", 5120, "full subset"),
    (1024, "noise", 1280, "full subset"),
    (2048, "noise", 2560, "full subset"),
    (4096, "noise", 5120, "full subset"),
    (8192, "noise", 10240, "full subset"),
    (2048, "alike", 2560, "full subset"),
    (2048, "cluster", 0, "full subset"),
    (4096, "alike", 5120, "full subset"),
    (4096, "cluster", 0, "full subset"),
    (4096, "falling", 500, "full subset"),
    (4096, "falling", 1500, "full subset"),
    (4096, "falling", 4000, "full subset"),
    (8192, "falling", 1500, ""),
]


def moments(d: int, spectrum: str, tokens: int, device: str) -> dict[str, RunningCovariance]:
    """Moments of synthetic activations, whose variances fall as 1 / i; the classes differ by `spectrum`.

    "falling" and "flat": in all directions, by variances that fall as the testbed's do at its FFNs under the recipe
    "paper", for visual tokens (93, 62, 34, ... 8.8 the 16th, 5.0 the 25th, 2.2 the 40th) or text (20, 9.4, 8.6, ...
    2.9, 2.1, 1.3). "noise": in twelve directions and by a shift of the mean alone, so that of k = 16 the last are
    sampling noise, hardly apart from the next. "alike": by chance.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    scale = torch.arange(1, d + 1).rsqrt()
    shift, directions = normal(d) * scale / 2, normal(12, d) * scale * torch.logspace(0, -1, 12)[:, None]
    signs = normal(d).sign()
    found = {}
    for name in ("benign", "malicious"):
        found[name] = RunningCovariance(d)
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            chunk = normal(count, d)
            if name == "malicious" and spectrum in FALLS:
                first, second, power = FALLS[spectrum]
                variances = second * (2 / torch.arange(1, d + 1)) ** power
                variances[0] = first
                # Turned, so that no axis is an eigenvector.
                chunk = torch.from_numpy(scipy.fft.dct((chunk * variances.sqrt() * signs).numpy(), norm="ortho"))
            chunk *= scale
            if name == "malicious" and spectrum == "noise":
                chunk += shift + normal(count, 12) @ directions
            found[name].update(chunk.to(device))
    return found


def clustered(d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """C_m and C_b whose eigenvalues 11 to 22 lie within 1e-9 of each other: there is no span of 16, but a residual."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64).to(device).mul_(0.4 / d**0.5)
    mixing.diagonal().add_(1)
    mixing *= torch.arange(1, d + 1, device=device).double().rsqrt()
    values = 2 / torch.arange(1, d + 1, device=device).double().sqrt()
    values[:10] = torch.linspace(40, 8, 10)
    values[10:22] = 4 * (1 + torch.linspace(0, 1e-9, 12, dtype=torch.float64, device=device))
    return mixing.mT @ (values[:, None] * mixing), mixing.mT @ mixing


def matrices(kept: dict[str, RunningCovariance]) -> tuple[torch.Tensor, torch.Tensor]:
    """C_m about the benign mean, and C_b, shrunk."""
    benign = kept["benign"]
    return kept["malicious"].covariance(benign.mean), shrink(benign.covariance(), RIDGE)


def timed(call, device: str = "cpu") -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    start = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def best(rounds) -> list[float]:
    return [min(taken) for taken in zip(*rounds, strict=True)]


def times(d: int, spectrum: str, tokens: int, drivers: str, device: str) -> dict:
    """Ratios and agreement, in this process."""
    kept = moments(d, spectrum, tokens, device) if tokens else {}
    malicious, benign = matrices(kept) if kept else clustered(d, device)
    given, thin = [matrix.cpu().numpy() for matrix in (malicious, benign)], 0 < tokens < d
    if not thin:
        kept.clear()

    def solve():
        if thin:
            fit_subspace(**kept, rank=RANK, shrinkage=RIDGE)
        else:
            generalized_eigh(malicious, benign, RANK)

    ours, theirs = [], {driver: [] for driver in drivers.split()}
    with mock.patch.object(eigen, "_whole", wraps=eigen._whole) as whole:
        for _ in range(max(1, min(3, 8192 // d))):
            ours += [timed(solve, device) for _ in range(2)]
            for driver, rounds in theirs.items():
                subset = {"subset_by_index": [d - RANK, d - 1]} if driver == "subset" else {}
                spans = []
                rounds.append(timed(lambda: spans.append(scipy.linalg.eigh(*given, **subset)[1]), device))  # noqa: B023
                reference = spans[0][:, -RANK:]
    if thin:
        about = kept["malicious"].moments(kept["benign"].mean)
        pairs = solve_moments(about, kept["benign"].whitening(RIDGE), RANK)
    else:
        pairs = generalized_eigh(malicious, benign, RANK)
    values, vectors = (tensor.cpu().numpy() for tensor in pairs)
    told = {"whole": whole.call_count > 0, "ours": best(ours), "residual": residual(given, values, vectors)}
    if theirs:
        told["angle"] = float(scipy.linalg.subspace_angles(vectors, reference).max())
        told["their residual"] = residual(given, None, reference)
    ratios = {
        driver: [t / o for t, o in zip(best(rounds), best(ours), strict=True)] for driver, rounds in theirs.items()
    }
    return {**told, "ratios": ratios}


def residual(given, values, vectors) -> float:
    """The largest ``|C_m u - lambda C_b u| / (lambda_1 |C_b u|)``; Rayleigh quotients where no values are given."""
    left, right = (matrix @ vectors for matrix in given)
    if values is None:
        values = (vectors * left).sum(axis=0) / (vectors * right).sum(axis=0)
    norms = [np.linalg.norm(columns, axis=0) for columns in (left - right * values, right)]
    return float((norms[0] / norms[1]).max() / values.max())


def peak(d: int, spectrum: str, tokens: int, device: str) -> dict:
    """Peak of `fit_subspace` and of what it is given, in matrices of d x d float64, in this process."""
    unit = 8 * d * d
    scipy.linalg.eigh(np.eye(4))
    importlib.import_module("scipy.sparse.linalg")  # loaded once, no part of the solution

    # What an allocator, a thread pool or BLAS keeps is no matrix.
    fit_subspace(**moments(1024, spectrum, 1280, device), rank=RANK, shrinkage=RIDGE)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    kept = moments(d, spectrum, tokens, device)
    ctypes.CDLL(None).malloc_trim(0)
    given = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew, so that making the moments is no part of it
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(eigen, "_whole", wraps=eigen._whole) as whole:
        fit_subspace(**kept, rank=RANK, shrinkage=RIDGE)
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated() / unit}
    return {
        "given": (given - before) / unit,
        "peak": (resident("VmHWM") - before) / unit,
        "whole": whole.call_count > 0,
    }


def resident(name: str) -> int:
    """Resident memory now ("VmRSS") or at most ("VmHWM"), bytes; Linux alone tells."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, default=8192, help="leave out what has a larger d")
    parser.add_argument("--spectra", nargs="+", default={spectrum for _, spectrum, *_ in CASES})
    parser.add_argument("--testbed", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "CASE"), help="a single measurement, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.testbed:
        testbed_eigenvalues()
        return
    if arguments.one:
        what, (d, spectrum, tokens, drivers) = arguments.one[0], CASES[int(arguments.one[1])]
        device = arguments.device
        if what == "peak":
            print(json.dumps(peak(d, spectrum, tokens, device)))
        else:
            print(json.dumps(times(d, spectrum, tokens, drivers, device)))
        return
    print(
        f"{arguments.threads} threads, {platform.processor() or platform.machine()}, device {arguments.device}, "
        f"torch {torch.__version__}, scipy {scipy.__version__}, k = {RANK}\n"
    )
    heads = ["d", "spectrum", "tokens a class", "route", "ours, s (CPU)"]
    heads += [f"scipy ({name}) / ours (CPU)" for name in DRIVERS.values()]
    heads += ["largest angle", "residual (scipy's)", "peak, d x d (given)"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for index, (d, spectrum, *_) in enumerate(CASES):
        if d <= arguments.largest and spectrum in arguments.spectra:
            print(row(index, arguments), flush=True)


def testbed_eigenvalues() -> None:
    """Print the forty largest of the bundled model's FFNs under the recipe "paper"."""
    import care_hf
    from care_hf.fitting import collect
    from care_hf.recipe import Recipe
    from care_hf.testbed import World
    from care_hf.testbed.prompts import fit_prompts

    model, processor = care_hf.load_testbed()
    prompts = fit_prompts(World(), 200, ("typographic", "icon"), exposure=False)
    print({name: len(items) for name, items in prompts.items()})
    recipe = Recipe.load("paper").replace(rank=40)
    solved = collect(model, processor=processor, recipe=recipe, **prompts).solve(recipe)
    for name, report in json.loads(solved.metadata["reports"]).items():
        print(name, " ".join(f"{value:.3g}" for value in report["eigenvalues"]))


def row(index: int, arguments: argparse.Namespace) -> str:
    """One case, measured in processes of their own."""
    d, spectrum, tokens, _ = CASES[index]
    found = measured("times", index, arguments)
    memory = measured("peak", index, arguments) if tokens else {}
    route = "whole" if found["whole"] else ("rows" if 0 < tokens < d else "matrices")
    ratios = [
        "{:.1f} ({:.1f})".format(*found["ratios"][n]) if n in found["ratios"] else "not measured" for n in DRIVERS
    ]
    cells = [d, spectrum, tokens or "", route, "{:.2f} ({:.2f})".format(*found["ours"]), *ratios]
    cells.append(f"{found['angle']:.0e}" if "angle" in found else "not measured")
    cells.append(
        f"{found['residual']:.0e}" + (f" ({found['their residual']:.0e})" if "their residual" in found else "")
    )
    cells.append(f"{memory['peak']:.2f} ({memory.get('given', 0):.2f})" if memory else "")
    return "| " + " | ".join(map(str, cells)) + " |"


def measured(what: str, index: int, arguments: argparse.Namespace) -> dict:
    run = [sys.executable, __file__, "--one", what, str(index), "--device", arguments.device]
    run += ["--threads", str(arguments.threads)]
    settings = {"OPENBLAS_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
