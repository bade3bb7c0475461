"""Forwards that end after the last place that is read: what they put out, what they leave undone, what they leave."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import FAMILIES, collated

from care_hf.devices import input_device
from care_hf.interventions import ended_after
from care_hf.reading import read
from care_hf.sites import Site, decoder_layers, record, site_module

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def in_full(model, sites, inputs):
    with record(model, sites) as activations, torch.no_grad():
        model.base_model(**inputs, use_cache=False)
    return activations


def places(model, last):
    """All sites up to a layer that the model has."""
    found = []
    for site in (Site(layer, part) for layer in range(last + 1) for part in ("attention", "ffn", "residual")):
        try:
            site_module(model, site)
        except ValueError:
            continue
        found.append(site)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for site, tensor in expected.items():
        assert torch.equal(found[site], tensor), site


class Calls:
    """Which decoder layers computed anything, by what is inside them."""

    def __init__(self, model):
        self.layers, self._handles = set(), []
        for index, layer in enumerate(decoder_layers(model)):
            for module in list(layer.modules())[1:]:
                self._handles.append(module.register_forward_pre_hook(lambda *_, i=index: self.layers.add(i)))

    def close(self):
        for handle in self._handles:
            handle.remove()


@families
def test_activations_are_those_of_a_whole_forward_bit_for_bit(family):
    model, inputs = family.model, collated(family, side="right").inputs
    depth = len(decoder_layers(model))
    for last in range(depth):
        sites = places(model, last)
        expected, calls = in_full(model, sites, inputs), Calls(model)
        with torch.no_grad():
            found = read(model, sites, inputs)
        calls.close()
        assert_equal(found, expected)
        assert calls.layers == set(range(last + 1))


@families
def test_nothing_is_left_of_it(family):
    model, inputs = family.model, collated(family).inputs
    before = model.generate(**inputs, **GREEDY)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    own = [dict(module.__dict__) for module in decoder_layers(model)]
    with torch.no_grad():
        read(model, [Site(1, "residual")], inputs)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert own == [dict(module.__dict__) for module in decoder_layers(model)]
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


def test_nothing_is_left_of_one_that_fails():
    family = FAMILIES["llava"]
    model, inputs = family.model, collated(family).inputs

    def fail(*_):
        raise KeyboardInterrupt

    handle = decoder_layers(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(model, [Site(2, "ffn")], inputs)
    handle.remove()
    sites = places(model, 3)
    with torch.no_grad():
        assert_equal(read(model, sites, inputs), in_full(model, sites, inputs))
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=rf"layer={layer}: the model has 4 decoder layers \(0 to 3\)"):
        ended_after(FAMILIES["llava"].model, layer).__enter__()


# What else stands in for a forward


def offload(model, how, folder):
    """Spread a model over processor and disk; where its weights are in use they are on the processor."""
    if how == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, str(folder), torch.device("cpu"))
    prefix = next(name for name, m in model.named_modules() if m is decoder_layers(model))
    inside = {f"{prefix}.{i}": "disk" if i % 2 else "cpu" for i in range(len(decoder_layers(model)))}
    parts = [name for name, m in model.named_modules() if name and not prefix.startswith(name) and name.count(".") <= 2]
    others = [name for name in parts if not name.startswith(prefix)]
    rest = {name: "cpu" for name in others if not any(name.startswith(f"{outer}.") for outer in others)}
    return dispatch_model(model, {**rest, **inside}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def on_meta(model):
    return {name for name, tensor in model.named_parameters() if tensor.is_meta}


@pytest.mark.parametrize("how", ["cpu", "disk", "both"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "internvl", "llama"])
def test_offloaded_weights_are_brought_no_further_and_taken_away_again(name, how, tmp_path):
    plain, inputs = FAMILIES[name].model, collated(FAMILIES[name]).inputs
    model = offload(copy.deepcopy(plain), how, tmp_path)
    away = on_meta(model)
    sites = places(plain, 1)
    expected, brought = in_full(plain, sites, inputs), set()
    for index, layer in enumerate(decoder_layers(model)):
        for module in list(layer.modules())[1:]:
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                bring = hook.pre_forward
                hook.pre_forward = lambda *a, i=index, bring=bring, **k: brought.add(i) or bring(*a, **k)
    with torch.no_grad():
        assert_equal(read(model, sites, inputs), expected)
    assert brought == ({0, 1} if how != "both" else brought) and brought <= {0, 1}
    assert away and on_meta(model) == away and input_device(model).type == "cpu"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    assert on_meta(model) == away


def test_weights_that_nothing_brings_are_named():
    with torch.device("meta"):
        model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no weights.*device_map"):
        read(model, [Site(0, "ffn")], {"input_ids": torch.tensor([[5]])})


@pytest.mark.parametrize("what", ["whole", "layers"])
def test_a_compiled_model_is_read_like_a_plain_one(what):
    family = FAMILIES["llava"]
    model, inputs = family.build(), collated(family).inputs
    compiled = []

    def backend(graph, examples):
        compiled.append(graph)
        return graph.forward

    for module in [model.model] if what == "whole" else decoder_layers(model):
        module.compile(backend=backend)
    with torch.no_grad():
        logits = model(**inputs).logits  # compiled before anything is read
        count = len(compiled)
        sites = places(model, 2)
        assert count and read(model, sites[:1], inputs)
        assert_equal(read(model, sites, inputs), in_full(family.model, sites, inputs))
        assert len(compiled) == count
        torch.testing.assert_close(model(**inputs).logits, logits)
        assert len(compiled) == count  # what was compiled serves on
