import builtins
import math
import xml.etree.ElementTree as ET
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from care_hf.diagnosis_figures import (
    draw_mediation,
    draw_neurons,
    draw_separability,
    draw_trace,
    mediation_figure,
    neurons_figure,
    separability_figure,
    trace_figure,
)
from care_hf.figure_parts import STYLES
from care_hf.mediation import Effects, Mediation
from care_hf.neurons import NeuronRanking, VerifiedNeuron
from care_hf.pair_runs import GROUPS
from care_hf.separability import Separability
from care_hf.separation import MEASURES, SiteSeparability
from care_hf.sites import Site
from care_hf.trace_results import Outcome, Trace

COMPONENTS = ("residual", "ffn", "attention")
NAMES = {"residual": "layer", "ffn": "ffn", "attention": "attention"}


def outcome(complied, refused, right, log_odds, n=10):
    malicious = ["complied"] * complied + ["refused"] * refused + ["other"] * (n - complied - refused)
    benign = ["complied"] * right + ["refused"] * (n - right)
    spread = [log_odds + 0.1 * i for i in range(n)]
    return Outcome(malicious, benign, spread, [True] * n, [0.0] * n)


def make_trace(layers=(0, 1, 2), components=COMPONENTS):
    sites = [Site(layer, component) for layer in layers for component in components]
    zero = {site: outcome(i % 7, 3, 10 - i % 5, -0.5 * i) for i, site in enumerate(sites)}
    mean = {site: outcome(5, i % 6, 10, 0.25 * i) for i, site in enumerate(sites)}
    return Trace(outcome(6, 3, 9, -1.0), {"zero": zero, "mean": mean}, {})


def make_separability(layers=(0, 1, 2), components=COMPONENTS, infinite=()):
    sites = {}
    for i, site in enumerate(Site(layer, component) for layer in layers for component in components):
        values = {"silhouette": 0.1 * i, "scatter_ratio": 0.2 + i, "mahalanobis": 3.0 + i, "auc": 0.6 + 0.04 * i}
        if str(site) in infinite:
            values |= {"scatter_ratio": math.inf, "mahalanobis": math.inf}
        sites[site] = SiteSeparability(**values, control=dict.fromkeys(MEASURES, (0.0, 0.05 + 0.01 * i)))
    return Separability(sites, {}, {"prompts": {"benign": 12, "malicious": 11}})


def make_mediation(layers=(0, 1), components=COMPONENTS, n=2):
    effects = {
        Site(layer, component): {
            group: Effects([0.4 * (g + 1) - layer] * n, [0.0] * n)
            if group != "image"
            else Effects([None] * n, [None] * n)
            for g, group in enumerate(GROUPS)
        }
        for layer in layers
        for component in components
    }
    return Mediation([1.0, 2.0][:n], [-1.0, -1.0][:n], effects, {})


def make_ranking(intervals=True):
    def unit(i, chosen):
        effect = 0.1 * i - 0.3
        ends = (effect - 0.02 * i, effect + 0.05) if intervals else (None, None)
        return VerifiedNeuron(0, i, 0.09 * i - 0.25, effect, *ends, chosen)

    verified = [unit(i, "top") for i in (7, 6, 5)] + [unit(i, "random") for i in (2, 3)]
    return NeuronRanking({0: torch.zeros(8)}, verified, {"top": 0.5, "random": None, "both": 0.875}, -1.25, {})


DRAWERS = [
    (draw_trace, make_trace, ["layer", "ffn", "attention", "unblocked", "complied, %", "right, %"]),
    (draw_separability, make_separability, ["residual", "silhouette", "AUC of a probe", "12 benign and 11 malicious"]),
    (draw_mediation, make_mediation, [*GROUPS, "layer", "ffn", "Total effect of being refused 2.50 [2.00, 3.00]"]),
    (draw_neurons, make_ranking, ["top 3: 0.500", "random 2: undefined", "all: 0.875", "estimate = effect", "-1.25"]),
]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def ends(axes, label):
    """Segments of intervals: x, lower and upper end."""
    (found,) = (one for one in axes.collections if one.get_label() == label)
    return [(a[0], a[1], b[1]) for a, b in found.get_segments()]


@pytest.mark.parametrize(("draw", "make", "labels"), DRAWERS)
def test_files(draw, make, labels, tmp_path):
    for suffix in (".png", ".svg"):
        for name in ("first", "second"):
            draw(make(), tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        image.load()
        grey = np.asarray(image.convert("L"))
    assert min(grey.shape) > 400
    assert grey.min() < 64 and grey.max() == 255
    # Nothing is cut off: the rim is empty.
    assert np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).min() == 255
    root = ET.parse(tmp_path / "first.svg").getroot()
    texts = "\n".join("".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text"))
    for label in labels:
        assert label in texts
    assert b"<dc:date>" not in (tmp_path / "first.svg").read_bytes()


@pytest.mark.parametrize(("draw", "make", "labels"), DRAWERS)
def test_bad_paths(draw, make, labels, tmp_path):
    for name in ("figure.pdf", "figure"):
        with pytest.raises(ValueError, match=rf"{name}'.*'\.png', '\.svg'"):
            draw(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        draw(make(), str(tmp_path / "missing" / "figure.SVG"))


@pytest.mark.parametrize(("draw", "make", "labels"), DRAWERS)
def test_without_matplotlib(draw, make, labels, tmp_path, monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw(make(), tmp_path / "figure.png")


def test_components_differ_in_grey():
    for first, second in (("residual", "ffn"), ("residual", "attention"), ("ffn", "attention")):
        for name in ("linestyle", "marker"):
            assert STYLES[first][name] != STYLES[second][name]
        light = [np.dot(ImageColor.getrgb(STYLES[one]["color"]), (0.299, 0.587, 0.114)) for one in (first, second)]
        assert abs(light[0] - light[1]) > 25
    assert [STYLES[one].get("markerfacecolor") for one in COMPONENTS] == [None, "white", None]


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_trace_values(mode):
    trace = make_trace()
    rows = trace_figure(trace, mode).axes
    assert len(rows) == 4
    assert [axes.get_ylabel().split(",")[0] for axes in rows] == [
        "attacks\ncomplied",
        "attacks\nrefused",
        "benign\nright",
        "log-odds of refusal",
    ]
    kinds = [("malicious", "complied"), ("malicious", "refused"), ("benign", "complied")]
    for component in COMPONENTS:
        label = NAMES[component]
        outcomes = [trace.blocked[mode][Site(layer, component)] for layer in (0, 1, 2)]
        for axes, kind in zip(rows, kinds, strict=False):
            rates = [trace.rate(one, *kind) for one in outcomes]
            line = lines(axes)[label]
            assert line.get_ydata() == pytest.approx([100 * rate.value for rate in rates])
            assert np.rint(line.get_xdata()).tolist() == [0, 1, 2]
            for (x, low, high), place, rate in zip(
                ends(axes, f"_{label} interval"), line.get_xdata(), rates, strict=True
            ):
                assert (x, low, high) == pytest.approx((place, *(100 * end for end in rate.interval)))
        changes = [trace.log_odds_change(one) for one in outcomes]
        assert lines(rows[3])[label].get_ydata() == pytest.approx([change.value for change in changes])
        found = [pair[1:] for pair in ends(rows[3], f"_{label} interval")]
        assert np.allclose(found, [(change.low, change.high) for change in changes])
    base = [100 * trace.rate(trace.unblocked, *kind).value for kind in kinds]
    assert [lines(axes)["unblocked"].get_ydata()[0] for axes in rows] == [*base, 0]
    band = next(patch for patch in rows[0].patches if patch.get_label() == "_unblocked interval")
    low, high = trace.rate(trace.unblocked, "malicious", "complied").interval
    assert band.get_extents().transformed(rows[0].transData.inverted()).intervaly == pytest.approx(
        [100 * low, 100 * high]
    )


def test_trace_modes():
    trace = make_trace()
    first, named = (lines(trace_figure(trace, mode).axes[0])["ffn"].get_ydata() for mode in (None, "zero"))
    assert first.tolist() == named.tolist()
    assert "'mean'" in trace_figure(trace, "mean").get_suptitle()
    with pytest.raises(ValueError, match=r"mode='other' is not in the trace; choose one of \('zero', 'mean'\)"):
        trace_figure(trace, "other")
    with pytest.raises(ValueError, match="mode=None is not in the trace"):
        trace_figure(Trace(trace.unblocked, {}, {}))
    with pytest.raises(ValueError, match="no site to draw"):
        trace_figure(Trace(trace.unblocked, {"mean": {}}, {}))


@pytest.mark.parametrize(("layers", "components"), list(product([(3,), (2, 9, 40)], [COMPONENTS, ("attention",)])))
def test_few_sites(layers, components, tmp_path):
    figure = trace_figure(make_trace(layers, components))
    assert sorted(set(lines(figure.axes[0])) - {"unblocked"}) == sorted(NAMES[one] for one in components)
    assert len(lines(figure.axes[0])[NAMES[components[-1]]].get_xdata()) == len(layers)
    if components == ("attention",):
        assert lines(figure.axes[0])["attention"].get_xdata().tolist() == list(layers)
    assert figure.axes[-1].get_xlim() == (layers[0] - 0.5, layers[-1] + 0.5)
    figure = mediation_figure(make_mediation(layers, components))
    assert len(figure.axes) == len(components) + 1  # the scale
    assert [label.get_text() for label in figure.axes[len(components) - 1].get_xticklabels()] == list(map(str, layers))
    for name, one in (("a", figure), ("b", separability_figure(make_separability(layers, components)))):
        one.savefig(tmp_path / f"{name}.png")


def test_one_prompt_has_no_interval():
    one = outcome(1, 0, 1, 0.5, n=1)
    figure = trace_figure(Trace(one, {"mean": {Site(0, "ffn"): one}}, {}))
    assert not figure.axes[3].collections
    assert len(figure.axes[0].collections) == 1
    empty = Outcome(["refused"], [], [0.0], [], [])
    line = lines(trace_figure(Trace(empty, {"mean": {Site(0, "ffn"): empty}}, {})).axes[2])["ffn"]
    assert np.isnan(line.get_ydata()).all()


def test_separability_values():
    found = make_separability()
    rows = separability_figure(found).axes
    assert len(rows) == len(MEASURES)
    for axes, measure in zip(rows, MEASURES, strict=True):
        for component in COMPONENTS:
            sites = [found.sites[Site(layer, component)] for layer in (0, 1, 2)]
            assert lines(axes)[component].get_ydata().tolist() == [getattr(one, measure) for one in sites]
            control = lines(axes)[f"_control {component}"]
            assert control.get_ydata().tolist() == [one.control[measure][1] for one in sites]
            assert control.get_linestyle() == lines(axes)[component].get_linestyle()
            assert control.get_linewidth() < lines(axes)[component].get_linewidth()
    assert [axes.get_ylim()[0] for axes in rows[1:3]] == [0, 0]


def test_infinite_separability(tmp_path):
    found = make_separability(infinite=("0.ffn", "2.ffn"))
    figure = separability_figure(found)
    for axes, infinite in zip(figure.axes, (False, True, True, False), strict=True):
        assert ("_infinite ffn" in lines(axes)) == infinite
        assert [text.get_text() for text in axes.texts] == ["\u221e", "\u221e"] * infinite
        assert "_infinite residual" not in lines(axes)
    edge, line = (lines(figure.axes[1])[name] for name in ("_infinite ffn", "ffn"))
    assert edge.get_xdata().tolist() == [0, 2]
    assert np.isnan(line.get_ydata()).tolist() == [True, False, True]
    box = figure.axes[1].bbox
    assert edge.get_transform().transform(edge.get_xydata())[:, 1] == pytest.approx([box.y1] * 2)
    every = make_separability(infinite=[f"{layer}.{component}" for layer in range(3) for component in COMPONENTS])
    for one in every.sites.values():
        one.control["mahalanobis"] = (math.inf, math.inf)
    draw_separability(every, tmp_path / "infinite.png")
    assert "_infinite control ffn" in lines(separability_figure(every).axes[2])


def test_mediation_cells():
    mediation = make_mediation()
    figure = mediation_figure(mediation)
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["layer", "ffn", "attention"]
    for axes, component in zip(figure.axes, COMPONENTS, strict=False):
        told = {text.get_position(): text.get_text() for text in axes.texts}
        assert len(told) == 6
        mesh = axes.collections[0].get_array().reshape(4, 2)
        for (row, group), layer in product(enumerate(GROUPS), (0, 1)):
            if group == "image":
                assert mesh.mask[row, layer]
                continue
            share = 100 * mediation.share(Site(layer, component), group)
            assert told[layer, row] == f"{share:.0f}".replace("-0", "0")
            assert mesh[row, layer] == pytest.approx(share)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
        hatched = [patch.get_xy() for patch in axes.patches if patch.get_hatch()]
        assert hatched == [(-0.5, -0.5), (0.5, -0.5)]
    assert figure.get_suptitle() == (
        f"Total effect of being refused {mediation.total} nats, 2 pairs\nhatched: measured in no pair"
    )
    assert told[0, 1] == "32" and told[1, 1] == "-8"  # 0.8 and -0.2 of 2.5


def test_mediation_lightness_is_magnitude():
    mesh = mediation_figure(make_mediation()).axes[0].collections[0]
    top = mesh.norm.vmax
    assert mesh.norm.vmin == -top
    light = mesh.to_rgba(np.linspace(-top, top, 9))[:, :3] @ (0.299, 0.587, 0.114)
    assert (np.diff(light[:5]) > 0).all() and (np.diff(light[4:]) < 0).all()
    assert light[:4] == pytest.approx(light[:4:-1], abs=0.06)
    assert light.min() > 0.5  # black numbers are legible on it


def test_mediation_scale():
    figure = mediation_figure(make_mediation())
    assert [axes.collections[0].norm.vmax for axes in figure.axes[:3]] == pytest.approx([64] * 3)  # 1.6 of 2.5
    beyond = make_mediation(layers=(0, 9)).effects  # 0.4 * 2 - 9 of 2.5
    figure = mediation_figure(Mediation([1.0, 2.0], [-1.0, -1.0], beyond, {}))
    assert figure.axes[0].collections[0].norm.vmax == 100
    assert "-328" in [text.get_text() for text in figure.axes[0].texts]


def test_mediation_of_many_layers():
    wide = mediation_figure(make_mediation(range(41), ("ffn",))).axes[0]
    assert {text.get_text() for text in wide.texts} == {"\u2212"}
    assert {text.get_position()[0] for text in wide.texts} == set(range(1, 41))
    assert mediation_figure(make_mediation(range(40), ("ffn",))).axes[0].texts[-1].get_text() != "\u2212"


def test_mediation_of_missing_places():
    mediation = make_mediation(n=1)
    effects = {site: by for site, by in mediation.effects.items() if str(site) != "1.attention"}
    figure = mediation_figure(Mediation(mediation.refused, mediation.jailbroken, effects, {}))
    assert len([patch for patch in figure.axes[2].patches if patch.get_hatch()]) == 5
    assert figure.get_suptitle().startswith("Total effect of being refused 2.00 nats, 1 pair\n")
    # No total effect, so no share, but there are pairs.
    figure = mediation_figure(Mediation([1.0], [1.0], effects, {}))
    assert not figure.axes[0].texts
    assert len([patch for patch in figure.axes[0].patches if patch.get_hatch()]) == 2


def test_neurons():
    ranking = make_ranking()
    axes = neurons_figure(ranking).axes[0]
    found = lines(axes)
    for chosen, label in (("top", "top 3: 0.500"), ("random", "random 2: undefined")):
        units = [unit for unit in ranking.verified if unit.chosen == chosen]
        assert found[label].get_xydata().tolist() == [[unit.estimate, unit.effect] for unit in units]
        expected = [(unit.estimate, unit.low, unit.high) for unit in units]
        assert np.allclose(ends(axes, f"_{chosen} interval"), expected)
    assert found["top 3: 0.500"].get_marker() != found["random 2: undefined"].get_marker()
    identity = found["estimate = effect"]
    assert identity.get_slope() == 1 and identity.get_xy1() == (0, 0)
    (legend,) = neurons_figure(ranking).legends
    assert "all: 0.875" in legend.get_title().get_text()
    assert not neurons_figure(make_ranking(intervals=False)).axes[0].collections
