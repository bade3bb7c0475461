"""How far classes lie apart: against dense numpy and closed forms, and on the bundled model."""

import builtins
import contextlib
import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from care_hf import separability
from care_hf.interventions import rewritten
from care_hf.samples import load_samples
from care_hf.separability import Separability, measure_separability, read_activations
from care_hf.separation import MEASURES, SiteSeparability, group_ids, separate
from care_hf.sites import Site, decoder_layers, site_module
from care_hf.suite import Case
from care_hf.testbed.prompts import fit_prompts

QUICK = {"folds": 2, "permutations": 1}
SHAPES = [(30, 20, 6), (12, 17, 60)]  # more rows than features, and fewer


def draw(seed, n_benign=30, n_malicious=20, d=6, shift=1.0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) / d**0.5
    benign, malicious = (rng.standard_normal((n, d)) @ mix + 3 for n in (n_benign, n_malicious))
    malicious += shift * rng.standard_normal(d)
    return torch.from_numpy(benign), torch.from_numpy(malicious)


def values(found):
    return [getattr(found, name) for name in MEASURES]


# Measures against numpy


def numpy_silhouette(benign, malicious):
    own = {0: benign, 1: malicious}
    scores = []
    for of in (0, 1):
        within, across = cdist(own[of], own[of]), cdist(own[of], own[1 - of])
        a, b = within.sum(axis=1) / (len(own[of]) - 1), across.mean(axis=1)
        scores += list((b - a) / np.maximum(a, b))
    return np.mean(scores)


def numpy_scatter_ratio(benign, malicious):
    x = np.concatenate([benign, malicious])
    total = np.cov(x.T, bias=True)
    within = sum(len(c) / len(x) * np.cov(c.T, bias=True) for c in (benign, malicious))
    return np.trace(total - within) / np.trace(within)


def numpy_mahalanobis(benign, malicious, shrinkage):
    residuals = np.concatenate([c - c.mean(axis=0) for c in (benign, malicious)])
    covariance = residuals.T @ residuals / len(residuals)
    if shrinkage == "ledoit-wolf":
        covariance = ledoit_wolf(residuals)[0]
    else:
        scale = np.trace(covariance) / len(covariance)
        covariance = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
    difference = malicious.mean(axis=0) - benign.mean(axis=0)
    return math.sqrt(difference @ np.linalg.inv(covariance) @ difference)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", 0.3])
def test_geometry_is_what_dense_numpy_computes(shape, shrinkage):
    benign, malicious = draw(3, *shape)
    found = separate(benign, malicious, shrinkage=shrinkage, **QUICK)
    dense = benign.numpy(), malicious.numpy()
    assert found.silhouette == pytest.approx(numpy_silhouette(*dense), rel=1e-9)
    assert found.scatter_ratio == pytest.approx(numpy_scatter_ratio(*dense), rel=1e-9)
    assert found.mahalanobis == pytest.approx(numpy_mahalanobis(*dense, shrinkage), rel=1e-8)


def test_scatter_and_distance_of_a_hand_made_case():
    # Means 0 and 4; within-class variances 1 and 1; n 4 and 8; the overall mean is 8/3.
    benign, malicious = torch.tensor([[-1.0], [1.0]] * 2), torch.tensor([[3.0], [5.0]] * 4)
    found = separate(benign, malicious, **QUICK)
    assert found.scatter_ratio == pytest.approx((4 * (8 / 3) ** 2 + 8 * (4 / 3) ** 2) / 12)
    assert found.mahalanobis == pytest.approx(4) and found.auc == 1


def test_no_shrinkage_gives_the_plain_distance():
    benign, malicious = draw(8, 60, 50, 4)
    found = separate(benign, malicious, shrinkage=0, **QUICK)
    assert found.mahalanobis == pytest.approx(numpy_mahalanobis(benign.numpy(), malicious.numpy(), 0.0), rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 20, 6), (20, 25, 60)])
def test_the_probe_is_a_logistic_regression_on_all_standardised_features(shape):
    benign, malicious = draw(5, *shape, shift=0.1)
    found = separate(benign, malicious, folds=5, permutations=1, seed=4)
    x, y = torch.cat([benign, malicious]).numpy(), np.repeat([False, True], shape[:2])
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    right = pairs = 0
    for train, test in StratifiedKFold(5, shuffle=True, random_state=4).split(x, y):
        scores = LogisticRegression(tol=1e-8, max_iter=10_000).fit(x[train], y[train]).decision_function(x[test])
        gaps = scores[y[test]][:, None] - scores[~y[test]][None]
        right, pairs = right + (gaps > 0).sum() + 0.5 * (gaps == 0).sum(), pairs + gaps.size
    # The tolerances of the fits differ, which may swap a pair.
    assert 0.2 < found.auc < 1 and found.auc == pytest.approx(right / pairs, abs=1.5 / pairs)


def test_features_scaled_on_all_rows_tell_the_probe_nothing():
    auc, strict = [], []
    for seed in range(6):
        benign, malicious = draw(seed, 30, 30, 40, shift=0.2)
        auc.append(separate(benign, malicious, folds=5, permutations=1).auc)
        x, y = torch.cat([benign, malicious]).numpy(), np.repeat([False, True], 30)
        folds = StratifiedKFold(5, shuffle=True, random_state=0).split(x, y)
        for train, test in folds:
            scores = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[train], y[train])
            scores = scores.decision_function(x[test])
            strict.append((scores[y[test]][:, None] > scores[~y[test]][None]).mean())
    assert np.mean(auc) == pytest.approx(np.mean(strict), abs=0.02)


# Closed forms and properties


@pytest.mark.parametrize("delta", [0.0, 1.0, 2.0])
def test_two_gaussians_are_told_apart_as_theory_says(delta):
    rng = np.random.default_rng(0)
    benign, malicious = torch.from_numpy(rng.standard_normal((2, 1500, 4)))
    malicious[:, 1] += delta
    found = separate(benign, malicious[:1000], permutations=1)
    # The best linear score is the coordinate itself, and two of them differ by a normal of variance 2.
    assert found.auc == pytest.approx(norm.cdf(delta / math.sqrt(2)), abs=0.03)
    assert found.mahalanobis == pytest.approx(delta, abs=0.15)
    assert found.scatter_ratio == pytest.approx(0.6 * 0.4 * delta**2 / 4, abs=0.02)


def test_what_a_plane_divides_is_told_apart():
    benign, malicious = draw(1, 40, 40, 5, shift=0)
    normal = torch.ones(5, dtype=torch.float64)
    benign = benign - torch.outer((benign @ normal).clamp(min=0) + 3, normal)
    found = separate(benign, malicious + 3, permutations=2)
    assert found.auc == 1 and found.silhouette > 0.3


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(SHAPES),
    scale=st.sampled_from([1e-4, 0.5, 2.0, 1e4]),
    offset=st.sampled_from([0.0, -7.0, 1e4]),
)
def test_the_unit_and_the_origin_do_not_matter(seed, shape, scale, offset):
    benign, malicious = draw(seed, *shape)
    expected = separate(benign, malicious, **QUICK)
    found = separate(benign * scale + offset * scale, malicious * scale + offset * scale, **QUICK)
    np.testing.assert_allclose(values(found)[:3], values(expected)[:3], rtol=1e-5, atol=1e-8)
    assert found.auc == pytest.approx(expected.auc, abs=0.02)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_swapped_classes_and_a_rotated_space_keep_the_geometry(seed, shape):
    benign, malicious = draw(seed, *shape)
    rotation = torch.linalg.qr(draw(seed + 1, shape[2], 4, shape[2])[0]).Q
    expected = values(separate(benign, malicious, **QUICK))[:3]
    np.testing.assert_allclose(values(separate(malicious, benign, **QUICK))[:3], expected, rtol=1e-6, atol=1e-9)
    turned = separate(benign @ rotation, malicious @ rotation, **QUICK)
    np.testing.assert_allclose(values(turned)[:3], expected, rtol=1e-6, atol=1e-9)
    assert -1 <= expected[0] <= 1 and min(expected[1:]) >= 0


# Controls and groups


def test_random_labels_are_not_told_apart_where_the_true_ones_are():
    benign, malicious = draw(2, 40, 40, 200, shift=0.5)
    found = separate(benign, malicious, permutations=20)
    assert found.auc == 1 and found.control["auc"][0] == pytest.approx(0.5, abs=0.06)
    for name in MEASURES:
        mean, high = found.control[name]
        assert mean <= high < getattr(found, name)
    # In so many dimensions random labels have means that lie apart: a distance alone says little.
    assert found.control["mahalanobis"][0] > 1


def test_the_control_is_mean_and_quantile_of_shuffled_rows():
    benign, malicious = draw(4, 20, 20, 3, shift=0)
    found = separate(benign, malicious, folds=2, permutations=200)
    x, rng = torch.cat([benign, malicious]).numpy(), np.random.default_rng(99)
    ratios = [numpy_scatter_ratio(rows[:20], rows[20:]) for rows in (rng.permutation(x) for _ in range(2000))]
    mean, high = found.control["scatter_ratio"]
    assert mean == pytest.approx(np.mean(ratios), abs=3 * np.std(ratios) / 200**0.5)
    assert np.quantile(ratios, 0.9) < high < np.quantile(ratios, 0.985)


def grouped(seed, groups=40, size=4, d=60):
    """Groups of one class each, of equal rows but for noise; nothing beside the group tells the class."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((groups, d)), size, axis=0)
    x = torch.from_numpy(centres + 0.02 * rng.standard_normal(centres.shape))
    half, labels = len(x) // 2, np.repeat(np.arange(groups), size).tolist()
    return x[:half], x[half:], {"benign": labels[:half], "malicious": labels[half:]}


def test_a_label_that_only_the_group_tells_is_found_out():
    held_out, leaking = [], []
    for seed in range(10):
        benign, malicious, groups = grouped(seed)
        held_out.append(separate(benign, malicious, groups=groups, permutations=1).auc)
        leaking.append(separate(benign, malicious, permutations=1).auc)
    assert np.mean(held_out) == pytest.approx(0.5, abs=0.12) and min(leaking) > 0.99


def test_the_control_keeps_groups_together():
    benign, malicious, groups = grouped(7)
    together = separate(benign, malicious, groups=groups, permutations=20)
    apart = separate(benign, malicious, permutations=20)
    assert together.scatter_ratio == apart.scatter_ratio
    # Twenty groups a side differ by chance as much as the true labels do; eighty shuffled rows differ less.
    assert together.scatter_ratio < 1.3 * together.control["scatter_ratio"][1]
    assert together.scatter_ratio > apart.control["scatter_ratio"][1]
    assert together.control["auc"][0] == pytest.approx(0.5, abs=0.12)


def test_groups_with_both_classes_are_held_out_whole_too():
    # The class is written in a feature of the group's own: known groups are solved, others are not.
    rng, size = np.random.default_rng(1), 3
    signs = np.repeat(np.eye(30), size, axis=0) * np.repeat(rng.choice([-1, 1], 30), size)[:, None]
    benign = torch.from_numpy(signs + 0.01 * rng.standard_normal(signs.shape))
    malicious = torch.from_numpy(-signs + 0.01 * rng.standard_normal(signs.shape))
    labels = np.repeat(np.arange(30), size).tolist()
    shared = separate(benign, malicious, groups={"benign": labels, "malicious": labels}, permutations=5)
    assert separate(benign, malicious, permutations=1).auc == 1
    assert shared.auc == pytest.approx(0.5, abs=0.15) and shared.control["auc"][0] == pytest.approx(0.5, abs=0.15)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 8), max_size=2), min_size=1, max_size=9))
def test_group_ids_join_whatever_is_linked(labels):
    linked = np.array([[i == j or bool(set(a) & set(b)) for j, b in enumerate(labels)] for i, a in enumerate(labels)])
    closed = np.linalg.matrix_power(linked.astype(float), len(labels)) > 0
    ids = np.array(group_ids(labels))
    assert np.array_equal(ids[:, None] == ids[None], closed)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    benign, malicious = draw(6, shift=0.2)
    first = separate(benign, malicious, folds=3, permutations=4, seed=1)
    assert first == separate(benign, malicious, folds=3, permutations=4, seed=1)
    other = separate(benign, malicious, folds=3, permutations=4, seed=2)
    assert first.control != other.control and first.mahalanobis == other.mahalanobis


# Degenerate input


def test_equal_activations_are_not_apart():
    same = torch.full((10, 40), 0.1)
    found = separate(same, same, **QUICK)
    assert values(found) == [0, 0, 0, 0.5] and found.control["auc"] == (0.5, 0.5)


@pytest.mark.parametrize("d", [3, 40])
def test_classes_that_are_points_are_infinitely_apart(d):
    found = separate(torch.full((10, d), 0.1), torch.full((12, d), 0.3), permutations=5)
    assert values(found) == [pytest.approx(1), math.inf, math.inf, 1]
    assert math.isfinite(found.control["mahalanobis"][1]) and found.control["scatter_ratio"][1] < 1


def test_equal_classes_are_not_apart():
    benign, _ = draw(9, 20, 20, 30)
    pairs = {"benign": range(20), "malicious": range(20)}
    found = separate(benign, benign.clone(), groups=pairs, permutations=2)
    assert found.scatter_ratio == pytest.approx(0, abs=1e-20) and found.mahalanobis == pytest.approx(0, abs=1e-9)
    assert found.silhouette < 0 and found.auc == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_feature_changes_nothing_but_the_share(value):
    benign, malicious = draw(10, shift=0.3)
    constant = torch.full((1,), value, dtype=torch.float64)
    wider = [torch.cat([x, constant.expand(len(x), 1)], dim=1) for x in (benign, malicious)]
    expected, found = (separate(*x, shrinkage=0, **QUICK) for x in ((benign, malicious), wider))
    np.testing.assert_allclose(values(found), values(expected), rtol=1e-5)


def test_too_few_rows_or_groups_are_named():
    benign, malicious = draw(0, 9, 30)
    with pytest.raises(ValueError, match=r"9 benign prompts, and folds=5 needs at least 10 .*lower `folds`"):
        separate(benign, malicious)
    labels = {"benign": range(30), "malicious": [f"topic {i % 4}" for i in range(20)]}
    with pytest.raises(ValueError, match=r"malicious prompts are of 4 groups, and folds=5 needs at least 5"):
        separate(*draw(0), groups=labels)
    separate(*draw(0), groups=labels, folds=4, permutations=1)


def test_bad_arguments_are_named():
    benign, malicious = draw(0)
    for message, changes in (
        ("folds=1 ", {"folds": 1}),
        ("permutations=0 ", {"permutations": 0}),
        ("seed=-1 ", {"seed": -1}),
        ("shrinkage='some'", {"shrinkage": "some"}),
        (r"shrinkage=1\.5", {"shrinkage": 1.5}),
        (r"30 'benign' and 20 'malicious' labels; got \{'benign': 30\}", {"groups": {"benign": range(30)}}),
    ):
        with pytest.raises(ValueError, match=message):
            separate(benign, malicious, **changes)
    with pytest.raises(ValueError, match=r"\(30, 6\).*\(20, 5\)"):
        separate(benign, malicious[:, 1:])
    malicious[3, 2] = torch.nan
    with pytest.raises(ValueError, match="`malicious` holds values that are not finite"):
        separate(benign, malicious)


def test_scikit_learn_is_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        separate(*draw(0))


# Models


@pytest.fixture(scope="module")
def prompts(world):
    """Plain requests with and without images; prompts about one concept are one group."""
    found = fit_prompts(world, 20, exposure=False)
    return {"malicious": found["malicious"], "benign": found["benign"][:20]}


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_activations_are_those_of_single_forwards(testbed, prompts, tokens):
    model, processor = testbed
    samples = {name: load_samples(prompts[name][:7]) for name in ("benign", "malicious")}
    sites = [Site(0, "attention"), Site(2, "ffn"), Site(3, "residual")]
    found = read_activations(model, processor, samples, sites, tokens, 5)
    alone = {"layer": [], "ffn": []}
    layers = model.model.language_model.layers
    handle = layers[2].mlp.register_forward_hook(lambda m, a, output: alone["ffn"].append(output[0]))
    try:
        for item in [*prompts["benign"][:7], *prompts["malicious"][:7]]:
            inputs = processor.apply_chat_template(
                item["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with torch.no_grad():
                alone["layer"].append(model(**inputs, output_hidden_states=True).hidden_states[4][0])
    finally:
        handle.remove()
    for site, states in ((sites[1], alone["ffn"]), (sites[2], alone["layer"])):
        expected = torch.stack([h[-1] if tokens == "last" else h.mean(dim=0) for h in states])
        assert found[site].dtype == torch.float32
        torch.testing.assert_close(found[site], expected, rtol=1e-4, atol=1e-4)


def test_every_site_is_measured_as_its_activations_say(testbed, prompts):
    model, processor = testbed
    found = measure_separability(model, processor, **prompts, folds=3, permutations=2, seed=3)
    order = [Site(i, c) for i in range(6) for c in ("attention", "ffn", "residual")]
    assert list(found.sites) == order and found.skipped == {}
    samples = {name: load_samples(prompts[name]) for name in ("benign", "malicious")}
    groups = {name: [g[0] for g in items.groups] for name, items in samples.items()}
    site = Site(3, "residual")
    h = read_activations(model, processor, samples, [site], "last", 16)[site]
    expected = separate(h[:20], h[20:], groups=groups, folds=3, permutations=2, seed=3)
    np.testing.assert_allclose(values(found.sites[site]), values(expected), rtol=1e-4)
    assert found.settings == {
        "tokens": "last",
        "folds": 3,
        "permutations": 2,
        "shrinkage": "ledoit-wolf",
        "seed": 3,
        "prompts": {"benign": 20, "malicious": 20},
        "groups": len({g for own in groups.values() for g in own}),
    }
    # The testbed refuses plain requests, so that late layers know what is one.
    assert found.sites[Site(5, "residual")].auc > 0.9


@pytest.fixture
def planted(llava, processor):
    """Pairs of prompts that differ by one token, of which the FFN of layer 2 alone knows."""
    ids = [processor.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("red", "blue")]
    embedding = llava.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[ids[0]] = embedding.weight[ids[1]]
    rows, direction = [], torch.zeros(128)
    direction[:64] = 5
    handle = llava.model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.__setitem__(slice(None), [(kwargs["input_ids"] == ids[0]).any(dim=1)]),
        with_kwargs=True,
    )

    def shifted(sign):
        return lambda h, stream: h + sign * rows[0][:, None, None] * direction

    words = "circle square triangle cross ring diamond".split()
    texts = [f"{a} {b} {{}} {c}" for a, b, c in zip(words * 2, words[1:] * 3, words[2:] * 3, strict=False)]
    texts = list(dict.fromkeys(texts))
    items = {
        name: [{"text": text.format(colour), "groups": [text]} for text in texts]
        for name, colour in (("malicious", "red"), ("benign", "blue"))
    }
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        stack.enter_context(rewritten(llava, Site(2, "ffn"), shifted(1)))
        stack.enter_context(rewritten(llava, Site(2, "residual"), shifted(-1)))
        yield llava, items


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_a_signal_that_is_at_one_site_alone_is_found_there(planted, processor, tokens):
    model, items = planted
    found = measure_separability(model, processor, **items, tokens=tokens, folds=3, permutations=3)
    for measure in MEASURES:
        assert found.best(measure) == Site(2, "ffn")
    assert found.sites[Site(2, "ffn")].auc == 1
    others = [one.auc for site, one in found.sites.items() if site != Site(2, "ffn")]
    assert max(others) < 0.8 and np.mean(others) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="measure='accuracy' is not known"):
        found.best("accuracy")


def test_components_that_a_layer_lacks_are_skipped_with_the_reason(llava, processor, prompts):
    model = copy.deepcopy(llava)
    layer = decoder_layers(model)[1]
    mlp = layer.mlp
    del layer.mlp
    object.__setattr__(layer, "mlp", lambda x: mlp(x))
    found = measure_separability(model, processor, **prompts, folds=2, permutations=1)
    assert set(found.skipped) == {"1.ffn"} and "Use the component 'residual'" in found.skipped["1.ffn"]
    assert len(found.sites) == 17 and Site(1, "ffn") not in found.sites
    with pytest.raises(ValueError, match=r"1\.ffn"):
        measure_separability(model, processor, **prompts, sites=[Site(1, "ffn")])


def test_objects_with_messages_are_prompts_and_equal_prompts_one_group(testbed, world, prompts):
    model, processor = testbed
    cases = {name: [Case(p["messages"]) for p in items] for name, items in prompts.items()}
    cases["benign"] += cases["benign"][:3]
    found = measure_separability(model, processor, **cases, sites=[Site(1, "ffn")], folds=2, permutations=1)
    distinct = len({d for items in cases.values() for d in load_samples([c.messages for c in items]).digests})
    assert found.settings["prompts"] == {"benign": 23, "malicious": 20} and found.settings["groups"] == distinct


def test_the_model_comes_back_in_the_mode_that_it_was_in(testbed, prompts):
    model, processor = testbed
    seen = []
    handle = model.model.register_forward_pre_hook(lambda *_: seen.append(model.training))
    model.train()
    try:
        measure_separability(model, processor, **prompts, sites=[Site(0, "ffn")], batch_size=20, **QUICK)
        assert model.training and seen == [False, False]
    finally:
        handle.remove()
        model.eval()
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))
    assert not site_module(model, Site(0, "ffn"))._forward_hooks


def test_what_cannot_be_measured_is_refused_before_any_forward(testbed, prompts, monkeypatch):
    model, processor = testbed
    monkeypatch.setattr(separability, "read_activations", lambda *_: pytest.fail("read"))
    few = {"malicious": prompts["malicious"], "benign": prompts["benign"][:6]}
    one = {name: [{**p, "groups": ("same",)} for p in items] for name, items in prompts.items()}
    mixed = {"malicious": prompts["malicious"], "benign": prompts["benign"] + prompts["malicious"][:2]}
    for message, items, changes in (
        ("6 benign prompts, and folds=5 needs at least 10", few, {}),
        ("of 1 groups, and folds=5", one, {}),
        ("2 prompts are both malicious and benign", mixed, {}),
        ("tokens='first'", prompts, {"tokens": "first"}),
        ("batch_size=0", prompts, {"batch_size": 0}),
        (r"Site 9\.ffn: the model has 6 decoder layers", prompts, {"sites": [Site(9, "ffn")]}),
        ("`sites` is empty", prompts, {"sites": []}),
        ("20 'benign' and 20 'malicious' labels", prompts, {"groups": {"benign": [1], "malicious": [2]}}),
    ):
        with pytest.raises(ValueError, match=message):
            measure_separability(model, processor, **items, **changes)


def test_activations_that_are_not_finite_are_refused(llava, processor, prompts):
    with torch.no_grad():
        llava.model.language_model.layers[3].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"site 3\.ffn are not finite on a benign prompt"):
        measure_separability(llava, processor, **prompts, **QUICK)


# Files and tables


def example():
    first = SiteSeparability(0.25, math.inf, math.inf, 0.75, dict.fromkeys(MEASURES, (0.125, 0.5)))
    second = SiteSeparability(0.5, 1.0, 2.0, 0.75, dict.fromkeys(MEASURES, (0.0625, math.inf)))
    return Separability(
        {Site(1, "ffn"): first, Site(12, "residual"): second}, {"3.attention": "gated"}, {"prompts": {"benign": 9}}
    )


def test_it_comes_back_from_strict_json():
    text = json.dumps(example().to_dict(), allow_nan=False)
    assert Separability.from_dict(json.loads(text)) == example()


def test_a_measured_one_comes_back_from_json(testbed, prompts):
    found = measure_separability(*testbed, **prompts, sites=[Site(4, "ffn")], **QUICK)
    assert Separability.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_table_has_every_site_beside_its_controls():
    lines = example().table().splitlines()
    assert lines[0] == "| site | silhouette | scatter ratio | Mahalanobis | AUC |" and len(lines) == 4
    assert lines[2] == (
        "| 1.ffn | 0.250 (0.125, 0.500) | inf (0.125, 0.500) | inf (0.125, 0.500) | 0.750 (0.125, 0.500) |"
    )
    assert {line.count("|") for line in lines} == {6}
    assert example().best() == Site(1, "ffn") and example().best("silhouette") == Site(12, "residual")
