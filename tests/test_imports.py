import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "care_hf"

# Each module may use those of its own row and of earlier ones: data flows one way.
ORDER = [
    {
        "projection",
        "sites",
        "devices",
        "processes",
        "spans",
        "linalg",
        "eigen",
        "scatter",
        "processor_quirks",
        "samples",
        "rates",
        "suite",
        "cells",
        "budget",
        "attack_steps",
        "continuations",
        "judge_styles",
        "image_grids",
        "attribution_figures",
        "separation",
        "quantised",
        "atomic",
        "publishing",
        "memory",
        "settings_files",
        "shipped",
        "tensor_files",
    },
    {
        "gating",
        "paged_turns",
        "judges",
        "report",
        "rows",
        "attack_prompts",
        "interventions",
        "reading",
        "contrasts",
        "trace_results",
        "base_fingerprint",
        "card_results",
    },
    {"model_judges", "judge_score", "prompt_files", "safety_sets", "utility_sets"},
    {
        "configuration_care",
        "affine",
        "repair_state",
        "subspace_files",
        "detectors",
        "teacher_forcing",
        "data_settings",
        "vllm_turns",
        "vllm_sites",
    },
    {
        "repaired_module",
        "adapters",
        "vllm_settings",
        "loaders",
        "token_ablation",
        "blocking",
        "neuron_runs",
        "separability",
        "site_check",
    },
    {"undisturbed", "pair_runs", "repairing", "delegation", "loading", "vllm_repair"},
    {"replay", "vllm_models", "vllm_plugin"},
    {"recipe", "attribution", "subspace", "modeling_care", "answers", "patches", "resume", "steering_vectors"},
    {"batching", "collection", "shared_collection", "repair_files", "inspection_text", "correction", "search_values"},
    {"provenance", "inspection", "chatting", "search_space", "tuning_measures"},
    {"tuning_choice"},
    {"tuning_study"},
    {"collecting", "turns", "attacks", "preference_steering", "tracing", "token_attribution", "folding", "merge_files"},
    {"mergeability"},
    {"merged_model", "merge_check"},
    {"switching"},
    {"merging"},
    {"mediation"},
    {"turn_repair", "adaptive", "checkpoint", "defences", "universal_attack", "neurons"},
    {"diagnosis", "measuring", "figure_parts", "inspecting"},
    {"diagnosis_figures", "tuning_figure"},
    {"tuned"},
    {"site_choice", "model_card"},
    {"hub_push"},
    {"fitting"},
    {"diagnosing", "tuning_solver"},
    {"tuning"},
    {"baselines", "rivals", "testbed", "evaluation_run"},
    {"evaluation"},
    {"training", "demo"},
    {"comparison"},
    {"opening", "prompt_sources"},
    {"evaluate_job", "diagnose_job", "fit_job", "push_job", "tune_job", "convert_job"},
]
REMOTE_CODE = {
    "modeling_care",
    "configuration_care",
    "projection",
    "sites",
    "gating",
    "publishing",
    "repair_state",
    "quantised",
    "repaired_module",
    "adapters",
    "repairing",
    "delegation",
    "loading",
    "atomic",
}


def imports(path):
    """Names of the package's modules that a file uses, and of everything else that it imports at its top level."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


def test_every_module_has_its_row():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} | {"testbed"}
    assert modules == set.union(*ORDER)


@pytest.mark.parametrize("row", range(len(ORDER)))
def test_dependencies_point_one_way(row):
    allowed = set().union(*ORDER[: row + 1])
    for module in ORDER[row] - {"testbed"}:
        inside, _ = imports(PACKAGE / f"{module}.py")
        assert inside <= allowed, module


def test_remote_code_needs_nothing_installed():
    for module in REMOTE_CODE:
        inside, outside = imports(PACKAGE / f"{module}.py")
        assert inside <= REMOTE_CODE, module
        assert outside - set(sys.stdlib_module_names) <= {"torch", "transformers"}, module


def test_tensor_maths_knows_no_transformers():
    for module in ("projection", "linalg", "eigen", "scatter", "attribution"):
        assert "transformers" not in imports(PACKAGE / f"{module}.py")[1], module


def test_only_modules_for_vllm_need_it():
    for path in PACKAGE.glob("*.py"):
        _, outside = imports(path)
        assert "vllm" not in outside or path.stem.startswith("vllm_"), path
        inside, _ = imports(path)
        assert path.stem.startswith("vllm_") or not any(name.startswith("vllm_") for name in inside), path


def test_only_the_console_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert path.parent.name == "console" or "print" not in calls, path


def test_importing_loads_no_heavy_library():
    heavy = ("vllm", "scipy", "datasets", "sklearn", "typer", "peft", "optuna")
    code = f"import sys, care_hf; print(*[m for m in {heavy} if m in sys.modules])"
    baseline = code.replace(
        "care_hf", "transformers; from transformers import PreTrainedModel, AutoModelForImageTextToText"
    )
    loaded, already = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.split()
        for c in (code, baseline)
    )
    assert set(loaded) <= set(already)
