from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from care_hf.recipe import RECIPES, Recipe
from care_hf.sites import Site

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(("file", "name"), [("default.yaml", "gated"), ("paper.yaml", "paper")])
def test_the_commented_files_are_the_named_recipes_and_complete(file, name):
    values = yaml.safe_load((CONFIGS / file).read_text())
    assert set(values) == {field.name for field in fields(Recipe)}
    assert Recipe.load(CONFIGS / file) == RECIPES[name] == Recipe.load(name)
    lines = [line for line in (CONFIGS / file).read_text().splitlines() if line and not line.startswith("#")]
    assert [line.partition(":")[0] for line in lines if "#" not in line] == []


def test_the_default_is_the_gated_one_and_the_printed_method_another():
    assert Recipe() == RECIPES["gated"] == Recipe.load(None) != RECIPES["paper"]
    printed = {"scope": "all", "layers": "middle", "component": "ffn", "rank": 16, "basis": "filter"}
    assert RECIPES["paper"] == Recipe(**printed, anchor="benign", gate="none")


def test_to_dict_round_trips_through_yaml(tmp_path):
    recipe = Recipe(layers=(1, 2), component="residual", keep_text=3, shrinkage=0.2, fusion="route")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "deep"}, "layers='deep'"),
        ({"layers": ()}, "decoder layers counted from 0"),
        ({"layers": (-1,)}, "decoder layers counted from 0"),
        ({"component": "mlp"}, "component='mlp'"),
        ({"modalities": ("audio",)}, "modalities"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"keep_text": 0}, "keep_text=0"),
        ({"keep_visual": 1.5}, "keep_visual=1.5"),
        ({"shrinkage": "oas"}, "shrinkage='oas'"),
        ({"shrinkage": 2}, "shrinkage=2"),
        ({"fusion": "mean"}, "fusion='mean'"),
        ({"beta": "1"}, "beta='1'"),
        ({"strength": None}, "strength=None"),
        ({"scope": "last"}, "scope='last'"),
        ({"scope": ()}, "must be 'all', 'prompt', or one or both"),
        ({"scope": ("last", "prompt")}, "must be 'all', 'prompt', or one or both"),
        ({"scope": "all"}, "scope='all' needs basis='filter', not 'pattern'"),
        ({"scope": "prompt", "basis": "filter"}, "scope='prompt' needs gate='none', not 'linear'"),
        ({"scope": "all", "basis": "filter", "gate": "none"}, "knows no refused activations"),
        ({"projector": "oblique"}, "belongs to basis='filter'"),
        ({"basis": "pca"}, "basis='pca'"),
        ({"sites": "4.ffn"}, "sites='4.ffn' must be 'auto', or places by name"),
        ({"sites": ()}, r"sites=\(\) must be"),
        ({"sites": 4}, "sites=4 must be"),
        ({"sites": (4,)}, r"sites=\(4,\) must be"),
        ({"sites": ("4.ffn", Site(5, "ffn"))}, "must be 'auto', or places by name"),
        ({"sites": ("4",)}, "component='' is not known"),
        ({"sites": ("4.layer",)}, "component='layer' is not known"),
        ({"sites": ("-1.ffn",)}, "'-1.ffn' is not a site"),
        ({"sites": ("ffn.4",)}, "'ffn.4' is not a site"),
        ({"anchor": "malicious"}, "anchor='malicious'"),
        ({"gate": "mlp"}, "gate='mlp'"),
        ({"gate_layer": "deep"}, "gate_layer='deep'"),
        ({"gate_ridge": 0}, "gate_ridge=0 must lie between 0 and 1"),
        ({"false_alarms": 1}, "false_alarms=1 must lie between 0 and 1"),
        ({"false_alarms": "1%"}, "false_alarms='1%'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(**changes)


def test_unknown_names_and_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match="'no-such' is neither"):
        Recipe.load("no-such")
    (tmp_path / "r.yaml").write_text("ranks: 3")
    with pytest.raises(ValueError, match=r"\['ranks'\]"):
        Recipe.load(tmp_path / "r.yaml")


def test_middle_is_the_papers_pair(testbed):
    model, _ = testbed
    assert [str(site) for site in Recipe.load("paper").find_sites(model)] == ["3.ffn", "4.ffn"]
    with pytest.raises(ValueError, match="6 decoder layers"):
        Recipe(layers=(2, 6)).find_sites(model)


def test_what_belongs_together_is_accepted():
    for scope in ("all", "prompt"):
        for anchor in ("benign", "none"):
            assert not Recipe(scope=scope, basis="filter", gate="none", anchor=anchor).by_turn
    for scope in (["last"], ["response"], ("last", "response")):
        for change in ({"gate": "none"}, {"basis": "filter", "projector": "oblique"}, {"anchor": "benign"}):
            recipe = Recipe(scope=scope, **change)
            assert recipe.by_turn and recipe.scope == tuple(scope)


def test_the_gate_reads_before_what_asks_it_and_a_repair_of_all_tokens_asks_none(testbed):
    model, _ = testbed
    assert str(Recipe().gate_site(model)) == "3.residual" and [str(s) for s in Recipe().find_sites(model)] == [
        "4.residual"
    ]
    assert str(Recipe(gate_layer=4).gate_site(model)) == "4.residual"  # read, then repaired
    assert str(Recipe(gate_layer="two-thirds").gate_site(model)) == "4.residual"
    assert str(Recipe.load("paper").gate_site(model)) == "3.residual"
    for recipe in (Recipe(gate_layer=5), Recipe(layers=(4, 3), component="ffn"), Recipe(layers=(0, 5))):
        with pytest.raises(ValueError, match="run before the gate decides"):
            recipe.gate_site(model)
    for layer in (6, -1):
        with pytest.raises(ValueError, match=f"gate_layer={layer}: the model has 6"):
            Recipe(gate_layer=layer).gate_site(model)


def test_sites_by_name_are_in_place_of_layers_and_component(testbed):
    model, _ = testbed
    named = Recipe(sites=["5.ffn", "4.residual", "4.attention", "5.ffn"], layers=(9,), component="ffn")
    assert [str(site) for site in named.find_sites(model)] == ["4.attention", "4.residual", "5.ffn"]
    same, by_layer = Recipe(sites=("3.ffn", "4.ffn")), Recipe(layers=(3, 4), component="ffn")
    assert same.find_sites(model) == by_layer.find_sites(model)
    with pytest.raises(ValueError, match=r"the model has 6 decoder layers, so no \['6.ffn', '7.residual'\]"):
        Recipe(sites=("7.residual", "2.ffn", "6.ffn")).find_sites(model)
    with pytest.raises(ValueError, match=r"sites \['3.ffn'\] run before the gate decides"):
        Recipe(sites=("3.ffn", "4.ffn")).gate_site(model)
    assert str(Recipe(sites=("3.residual",)).gate_site(model)) == "3.residual"


def test_sites_that_a_diagnosis_chooses_wait_for_it(testbed):
    model, _ = testbed
    assert str(Recipe(sites="auto").gate_site(model)) == "3.residual"
    with pytest.raises(ValueError, match=r"takes its sites from a diagnosis; pass `fit\(..., diagnosis="):
        Recipe(sites="auto").find_sites(model)


@pytest.mark.parametrize("sites", ["auto", ("4.residual", "5.ffn"), None])
def test_sites_round_trip_through_yaml(tmp_path, sites):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(Recipe(sites=sites).to_dict()))
    assert Recipe.load(tmp_path / "r.yaml") == Recipe(sites=sites)
