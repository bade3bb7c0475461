import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from care_hf import shipped
from care_hf.comparison import Comparison
from care_hf.data_settings import DataSettings
from care_hf.model_judges import load_judge
from care_hf.prompt_files import PromptSets
from care_hf.recipe import Recipe
from care_hf.settings_files import check_types, meant, read_fields

ROOT = Path(__file__).parents[1]
LOADERS = {
    "recipe": Recipe.load,
    "comparison": Comparison.load,
    "prompts": PromptSets.load,
    "data": DataSettings.load,
    "judge": load_judge,
}


def written(folder, text):
    path = folder / "some.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\nc: 2\n", r"some\.yaml is not YAML: line \d, column \d: "),
        ("a: 1\n\tb: 2\n", r"some\.yaml is not YAML: line 2, column 1: found character '\\t'"),
        ("a: 1\nb: 2\na: 3\n", r"some\.yaml is not YAML: line 3, column 1: the field 'a' is there twice"),
        ("a: {b: 1, b: 2}", r"the field 'b' is there twice"),
        (b"a: \xff\xfe", r"some\.yaml is not YAML: .*utf-8"),
        ("!!python/object/apply:os.getcwd []", r"some\.yaml is not YAML: line 1"),
        ("[" * 5000, r"some\.yaml is not YAML: "),
        ("- a\n- b\n", r"some\.yaml holds \['a', 'b'\]; it needs fields, `name: value`"),
        ("rank", r"some\.yaml holds 'rank'; it needs fields"),
        ("1: 2\nnone: 3", r"some\.yaml: unknown fields \['1', 'none'\]"),
    ],
)
def test_what_is_no_file_of_fields_is_refused_by_every_loader(load, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, text))


def test_a_file_reads_as_yaml_reads_it():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert read_fields(path) == yaml.safe_load(path.read_text())


def test_merged_fields_may_be_overruled(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n"
    assert read_fields(written(tmp_path, text)) == yaml.safe_load(text)
    assert read_fields(written(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("recipe", "ranks: 3", r"unknown fields \['ranks'\]; known are .* Did you mean 'rank'\?"),
        ("recipe", "gate-layer: 3", "Did you mean 'gate_layer'"),
        ("recipe", "Strength: 3", "Did you mean 'strength'"),
        ("recipe", "component: residuall", "component='residuall' is not known.*Did you mean 'residual'"),
        ("recipe", "layers: twothirds", "Did you mean 'two-thirds'"),
        ("recipe", "scope: [last, respons]", "Did you mean 'response'"),
        ("recipe", "modalities: [visuals]", "Did you mean 'visual'"),
        ("data", "name: a\nreader: xstests\nid: x\nrole: benign", "reader='xstests' is not known.*mean 'xstest'"),
        ("data", "name: a\nreader: xstest\nid: x\nroles: benign", r"\['roles'\], missing fields \['role'\].*'role'"),
        ("prompts", "benin: a\nmalicious: b", r"\['benin'\], missing fields \['benign'\].*mean 'benign'"),
        ("comparison", "defenses: {}", r"\['defenses'\], missing fields \['defences'\].*mean 'defences'"),
        ("comparison", "defences: {a: {kind: repairs}}", "'a': kind='repairs' is not a defence.*mean 'repair'"),
        ("comparison", "defences: {a: {kind: repair, changes: {ranks: 1}}}", "changes of the recipe.*mean 'rank'"),
        ("comparison", "defences: {}", "defences is empty"),
        ("judge", "label: toxic\ntreshold: 0.5", "Did you mean 'threshold'"),
    ],
)
def test_what_was_probably_meant_is_named(kind, text, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s)some.yaml: .*{message}"):
        LOADERS[kind](written(tmp_path, text))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("recipe", "llava-1.5", r"Recipe 'llava-1.5' is neither .* Did you mean 'llava-1.5-7b'"),
        ("recipe", "gate", "Did you mean 'gated'"),
        ("recipe", "configs/papr.yaml", "Did you mean 'paper'"),
        ("recipe", "../configs/default", "is neither a YAML file"),
        ("comparison", "mian", r"one of \['ablations', 'main', 'transfer'\]. Did you mean 'main'"),
        ("data", "xs-test", "Did you mean 'xstest'"),
        ("judge", "llama_guard", "Did you mean 'llama_guard_3_8b'"),
    ],
)
def test_files_that_ship_go_by_name_and_a_wrong_name_is_answered_by_the_nearest(kind, name, message):
    with pytest.raises(ValueError, match=message):
        LOADERS[kind](name)


def test_files_that_ship_go_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("qwen3-vl-8b") == Recipe.load(ROOT / "configs" / "qwen3-vl-8b.yaml")
    assert Comparison.load("main") == Comparison.load(ROOT / "configs" / "evaluation" / "main.yaml")
    assert DataSettings.load("xstest") == DataSettings.load(ROOT / "configs" / "datasets" / "xstest.yaml")
    Path("xstest").mkdir()  # of the data, maybe
    assert DataSettings.load("xstest").reader == "xstest"


# Wrong types


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda field: field.name)
def test_wrong_types_name_the_field_the_value_and_what_was_expected(field, tmp_path):
    for value in ({"a": 1}, [[1]]):
        with pytest.raises(ValueError, match=rf"(?s)some\.yaml: {field.name}=.* must be "):
            Recipe.load(written(tmp_path, yaml.safe_dump({field.name: value})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: '4'", r"rank='4' must be a whole number\.$"),
        ("rank: yes", r"rank=True must be a whole number\."),
        ("rank: 4.0", r"rank=4.0 must be a whole number\."),
        ("beta: 1e-3", r"beta='1e-3' must be a number\. YAML takes 1e-3 for text; write 0\.001"),
        ("beta: .nan", r"beta=nan must be a number\."),
        ("seed: null", r"seed=None must be a whole number\."),
        ("layers: 3", r"layers=3 must be text or a list of whole numbers\."),
        ("layers: [3.0]", r"layers=\(3\.0,\) must be text or a list of whole numbers\."),
        ("modalities: visual", r"modalities='visual' must be a list of text\."),
        ("gate: off", r"gate=False must be text\."),
        ("shrinkage: [1]", r"shrinkage=\[1\] must be text or a number\."),
    ],
)
def test_wrong_types_read_like_this(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Recipe.load(written(tmp_path, text))
    with pytest.raises(TypeError, match=message):
        Recipe(**yaml.safe_load(text))


def test_other_settings_are_of_their_types_too(tmp_path):
    for text, message in [
        ("name: a\nreader: xstest\nid: x\nrole: benign\nrevision: 1234567", "revision=1234567 must be text or null"),
        ("name: a\nreader: xstest\nid: x\nrole: benign\ncolumns: [a]", "columns=.* must be fields"),
        ("name: a\nreader: xstest\nid: x\nrole: benign\nsplits: 3", "splits=3 must be a list of text"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataSettings.load(written(tmp_path, text))
    for text, message in [
        ("defences: {a: {kind: repair, families: 3}}", "'a': families=3 must be a list of text"),
        ("defences: {a: {kind: repair, changes: }}", "'a': changes=None must be fields"),
        ("defences: {a: {kind: repair}}\nbudget: {eps: 16}", "budget: eps=16 must be a list of whole numbers"),
        ("defences: {a: {kind: repair}}\nbudget: {cases: 2.5}", "budget: cases=2.5 must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Comparison.load(written(tmp_path, text))


def test_types_are_those_of_the_annotations():
    @dataclass
    class Some:
        a: int | str = 1
        b: tuple[float, ...] = ()
        c: bool = True

    for right in (Some(), Some("auto"), Some(b=(1, 2.5)), Some(c=False)):
        check_types(right)
    for wrong in (Some(1.0), Some(True), Some(b=[1]), Some(b=("a",)), Some(c=1), Some(c=None)):
        with pytest.raises(TypeError, match="must be"):
            check_types(wrong)
    check_types(Some(None, c=1), besides=("a", "c"))


def test_nothing_is_meant_by_what_looks_like_nothing():
    assert meant("xyzzy", ("rank", "beta")) == ""
    assert meant("BETA", ("rank", "beta")) == " Did you mean 'beta'?"


# Where they are


def test_the_folders_are_found_in_a_wheel_and_in_a_checkout_and_a_strangers_are_not(tmp_path, monkeypatch):
    package = tmp_path / "care_hf"
    (tmp_path / "configs").mkdir()
    package.mkdir()
    monkeypatch.setattr(shipped, "PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="installed without its folder 'configs'"):
        shipped.shipped("configs")
    (tmp_path / "pyproject.toml").touch()
    assert shipped.shipped("configs") == tmp_path / "configs"
    (package / "configs").mkdir()
    assert shipped.shipped("configs") == package / "configs"


def test_a_wheel_holds_them(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("care_hf", "configs", "conversion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", "lib"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def inside(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    for name in ("configs", "conversion"):
        assert inside(tmp_path / "lib" / "care_hf" / name) == inside(tmp_path / name) != set()
    built = {name for name in inside(tmp_path / "lib" / "care_hf") if not name.startswith(("configs/", "conversion/"))}
    console = {f"console/{name}" for name in inside(tmp_path / "lib" / "care_hf_console")}
    assert built | console == inside(tmp_path / "care_hf") and "console/app.py" in console - built
