"""Run transformers' own common model tests on the wrapper and on stock LLaVA, and compare them test by test.

    pip install -e ".[suite]"
    python tests/transformers_suite/run.py --out docs/results/transformers_tests.md

The tests come from the source archive of the installed transformers, fetched by pip and unpacked in a temporary folder;
none of them is kept here. Exits with 1 if the wrapper fails a test that stock LLaVA passes, or skips one without a
reason.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from report import compare, outcomes, written

HERE = Path(__file__).resolve().parent
MODULE = "care_model_tests.py"
NEEDED = {"pytest": "pytest", "parameterized": "parameterized", "psutil": "psutil", "accelerate": "accelerate"}

# What the common tests import, but the archive does not hold; an archive that does is taken as it is.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def fetch(folder: Path) -> Path:
    """The source archive of the installed transformers, by pip unless it lies in `folder` already."""
    wanted = version("transformers")
    archive = folder / f"transformers-{wanted}.tar.gz"
    if not archive.exists():
        print(f"Fetching the source archive of transformers {wanted} ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*download, "--dest", str(folder), f"transformers=={wanted}"])
        if done.returncode or not archive.exists():
            raise SystemExit(
                f"pip did not fetch the source archive of transformers {wanted}; without network, give --archive."
            )
    return archive


def unpack(archive: Path, folder: Path) -> list[str]:
    """Lay out the suite in `folder`, ours beside it; returns the modules of tests that the archive lacks."""
    with tarfile.open(archive) as packed:
        for member in packed:
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/"):
                packed.extract(member, folder, filter="data")
    suite = folder / "tests"
    if not (suite / "test_modeling_common.py").exists():
        raise SystemExit(f"{archive} holds no tests/test_modeling_common.py.")
    lacking = [name for name in STUBS if not (suite / name).exists()]
    for name in lacking:
        (suite / name).parent.mkdir(exist_ok=True)
        (suite / name).write_text(STUBS[name])
    for package in (suite, *(suite / Path(name).parent for name in STUBS)):
        (package / "__init__.py").touch()
    (suite / MODULE).write_text((HERE / MODULE).read_text())
    # Not the settings of whatever lies above.
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    return lacking


def run(folder: Path, more: list[str]) -> Path:
    """Run ours and stock LLaVA's tests in one pytest; returns its report."""
    report = folder / "report.xml"
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--no-header", "--disable-warnings", *more]
    done = subprocess.run(
        [*command, f"--junitxml={report}", f"tests/{MODULE}"], cwd=folder, env=environment, stdout=subprocess.PIPE
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run the suite:\n{done.stdout.decode()[-4000:]}")
    return report


def main() -> int:
    """Fetch, run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="source archive of transformers; fetched by pip if not given")
    parser.add_argument("--cache", type=Path, help="folder that keeps the fetched archive")
    parser.add_argument("--out", type=Path, help="Markdown file for the report")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --, such as -k training")
    options = parser.parse_args()
    lacking = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if lacking:
        parser.error(f"transformers' tests need packages that are not installed: pip install {' '.join(lacking)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, begun = Path(temporary), time.monotonic()
        if options.cache:
            options.cache.mkdir(parents=True, exist_ok=True)
        stubbed = unpack(options.archive or fetch(options.cache or folder), folder)
        found = outcomes(run(folder, options.pytest))
    comparison = compare(found)
    text = written(comparison, stubbed, HERE / MODULE)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text)
    print(f"{time.monotonic() - begun:.0f} s; {len(comparison.worse)} failures that stock LLaVA does not have.")
    return 1 if comparison.worse or comparison.unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
