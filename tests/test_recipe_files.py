import inspect
import re

import pytest
import torch
import yaml
from families import FAMILIES
from transformers import AutoModelForImageTextToText

from care_hf.recipe import RECIPES, Recipe
from care_hf.shipped import shipped

# Family, decoder layers and hidden size, by the config.json of each model on the Hub.
MODELS = {
    "llava-1.5-7b": ("llava", 32, 4096),
    "llava-next-mistral-7b": ("llava_next", 32, 4096),
    "llava-onevision-qwen2-7b": ("llava_onevision", 28, 3584),
    "qwen2-vl-7b": ("qwen2_vl", 28, 3584),
    "qwen2.5-vl-7b": ("qwen2_5_vl", 28, 3584),
    "qwen3-vl-8b": ("qwen3_vl", 36, 4096),
    "internvl3-8b": ("internvl", 28, 3584),
    "gemma-3-4b": ("gemma3", 34, 2560),
    "smolvlm2-2.2b": ("smolvlm", 24, 2048),
}
PRINTED = {"paper-llava-1.5-7b": ([16, 17], "llava-1.5-7b"), "paper-qwen2.5-vl-7b": ([12, 13, 14], "qwen2.5-vl-7b")}
GENERAL = {"default", "paper"}


def build(family, depth):
    """A model of that family and depth, without weights."""
    config = FAMILIES[family].config()
    text = config.get_text_config()
    values = {**text.to_dict(), "num_hidden_layers": depth, "layer_types": None}
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not text}
    name = next(name for name in config.sub_configs if getattr(config, name) is text)
    taken = inspect.signature(type(text)).parameters
    deeper = type(text)(**{key: value for key, value in values.items() if key in taken or "kwargs" in taken})
    rest = {k: v for k, v in config.to_dict().items() if k not in config.sub_configs and k != "layer_types"}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(type(config)(**{**rest, **parts, name: deeper}))


def comments(name):
    return " ".join((shipped("configs") / f"{name}.yaml").read_text().partition("\n\n")[0].replace("# ", "").split())


def test_every_recipe_file_is_known_here():
    assert {path.stem for path in shipped("configs").glob("*.yaml")} == {*MODELS, *PRINTED, *GENERAL}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_recipe_names_the_layers_that_the_default_would_choose(name):
    family, depth, width = MODELS[name]
    assert f": {depth} decoder layers, hidden size {width}." in comments(name)
    assert "Not verified: nothing was run on this model" in comments(name)
    model, recipe = build(family, depth), Recipe.load(name)
    assert recipe.find_sites(model) == Recipe().find_sites(model)
    assert recipe.gate_site(model) == Recipe().gate_site(model)
    assert recipe.replace(layers="two-thirds", gate_layer="middle") == Recipe()
    assert all(isinstance(layer, int) for layer in (*recipe.layers, recipe.gate_layer))


@pytest.mark.parametrize("name", PRINTED)
def test_the_printed_recipes_differ_from_paper_in_their_layers_alone(name):
    layers, of = PRINTED[name]
    family, depth, width = MODELS[of]
    assert f": {depth} decoder layers, hidden size {width}." in comments(name)
    for said in ("from the paper, not verified here", "Rank, beta and shares of tokens are not published"):
        assert said in comments(name)
    recipe = Recipe.load(name)
    assert recipe.replace(layers="middle") == RECIPES["paper"]
    assert [str(site) for site in recipe.find_sites(build(family, depth))] == [f"{layer}.ffn" for layer in layers]


@pytest.mark.parametrize("name", [*MODELS, *PRINTED])
def test_every_line_is_commented_and_the_model_named_as_on_the_hub(name):
    text = (shipped("configs") / f"{name}.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line)
    assert re.search(r"[\w-]+/[\w.-]+[:)]", comments(name))
    assert Recipe.load(shipped("configs") / f"{name}.yaml") == Recipe.load(name) == Recipe(**yaml.safe_load(text))
