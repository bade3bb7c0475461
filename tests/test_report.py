"""Tables, figure and files of a report of a few verdicts, against numbers worked out by hand."""

import copy
import json
import re
import sys

import pytest
from matplotlib.figure import Figure

from care_hf.rates import Rate
from care_hf.report import Report, environment

C, R, O = "complied", "refused", "other"  # noqa: E741


def one_set(*said, second=None):
    """A set whose second judge calls every answer complied, unless told otherwise."""
    answers = [f"secret {i}" for i in range(len(said))]
    return {"answers": answers, "verdicts": {"strict": list(said), "keywords": second or [C] * len(said)}}


def row(through, family, said, eps=16, steps=40, optimiser="mi-fgsm", weight=0.0):
    head = {"through": through, "family": family, "eps": eps, "optimiser": optimiser, "weight": weight, "steps": steps}
    return {**head, **one_set(*said)}


def defence(sets, gradient=(), divergence=None, ratio=None):
    latency = None if ratio is None else {"base": 1.0, "defended": ratio, "ratio": ratio, "batch": 4}
    return {"sets": sets, "gradient": list(gradient), "divergence": divergence, "latency": latency}


RESULTS = {
    "undefended": defence(
        {
            "attack/a": one_set(C, C, C, O),
            "attack/ab": one_set(C, R),
            "harmful": one_set(R, R, R, C),
            "benign/x": one_set(C, C, C, C, C),
            "benign/y": one_set(C, O),
        },
        [
            row("undefended", "a", [R, R, C, R], steps=5),
            row("undefended", "a", [C, R, C, R]),
            row("undefended", "a", [R, C, R, R], optimiser="apgd"),
            row("undefended", "a", [C, C, C, C], eps=64),
            row("undefended", "b", [R, C], steps=5),
            row("undefended", "b", [C, C]),
            row("undefended", "universal jailbreak", [C, C, C, C, C, C]),
            row("undefended", "toxic target", [C, C, C, C]),
        ],
        0.0,
        1.0,
    ),
    "gated": defence(
        {
            "attack/a": one_set(R, R, R, O),
            "attack/ab": one_set(C, R),
            "harmful": one_set(R, R, R, R),
            "benign/x": one_set(C, C, C, C, R),
            "benign/y": one_set(R, O, second=[R, R]),
        },
        [
            # Transferred: prompt 0 alone. Through the defence: 1 by the penalty's weight, 2 by the other optimiser.
            row("undefended", "a", [C, R, R, R]),
            row("gated", "a", [R, R, R, R], steps=5),
            row("gated", "a", [R, R, R, C], steps=5, weight=10.0),
            row("gated", "a", [R, R, R, R]),
            row("gated", "a", [R, C, R, R], weight=10.0),
            row("gated", "a", [R, R, C, O], optimiser="apgd"),
            row("undefended", "a", [R, R, R, O], eps=64),
            row("gated", "a", [C, C, C, R], eps=64),
            row("undefended", "b", [R, R]),
            row("gated", "b", [R, R], steps=5),
            row("gated", "b", [R, C]),
            row("gated", "universal jailbreak", [C, C, C, C, C, C]),
            row("undefended", "universal jailbreak", [R, R, R, R, R, C]),
        ],
        0.1234,
        1.256,
    ),
    "only shown | to": defence(
        {
            "attack/a": one_set(O, O, O, O),
            "attack/ab": one_set(O, O),
            "harmful": one_set(O, O, O, O),
            "benign/x": one_set(O, O, O, O, O),
            "benign/y": one_set(O, O),
        },
        [row("undefended", "a", [O, O, O, O])],
    ),
}
SETTINGS = {
    "suite": "by hand",
    "source": {"split": "test"},
    "judges": {"strict": {}, "keywords": {}},
    "seed": 3,
    "budget": {
        "cases": 5,
        "max_new_tokens": 7,
        "gradient_cases": 4,
        "eps": (16, 64),
        "steps": 40,
        "restarts": 1,
        "optimisers": ("mi-fgsm", "apgd"),
        "weights": (0.0, 10.0),
        "curve_steps": (5,),
    },
    "environment": {"python": "3"},
}


@pytest.fixture
def report():
    return Report(copy.deepcopy(RESULTS), SETTINGS)


def without(report, *groups):
    results = copy.deepcopy(dict(report.results))
    for found in results.values():
        found["sets"] = {name: s for name, s in found["sets"].items() if not name.startswith(groups)}
    return Report(results, report.settings)


def tables(markdown):
    """Every table as its rows of cells, the header first."""
    found, open_ = [], False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not open_:
                found.append([])
            cells = re.split(r"(?<!\\)\|", line)
            assert cells[0] == cells[-1] == ""
            found[-1].append([cell.strip() for cell in cells[1:-1]])
        open_ = line.startswith("|")
    return found


def by_name(table):
    (table,) = tables(table)
    return {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}


# Rates


def test_a_group_is_pooled_and_a_name_is_not_a_prefix(report):
    assert report.rate("undefended", "attack/", C) == Rate(4, 6)
    assert report.rate("undefended", "attack/a", C) == Rate(3, 4)
    assert report.rate("undefended", ["attack/", "harmful"], C) == Rate(5, 10)
    assert report.rate("gated", "benign/", R) == Rate(2, 7)
    assert report.rate("gated", "benign/", R, "keywords") == Rate(2, 7)
    assert report.rate("gated", "benign/y", C, "keywords") == Rate(0, 2)
    assert report.rate("gated", "attack/", C, "keywords") == Rate(6, 6)
    assert report.names("benign/") == ["benign/x", "benign/y"]


def test_an_attack_counts_by_any_optimiser_and_weight_and_transfer_apart(report):
    assert report.gradient_rate("gated", "a", 16, adaptive=True) == Rate(2, 4)  # prompts 1 and 2, not transferred 0
    assert report.gradient_rate("gated", "a", 16, adaptive=False) == Rate(1, 4)
    assert report.gradient_rate("gated", "a", 16, adaptive=True, steps=5) == Rate(1, 4)
    assert report.gradient_rate("gated", "a", 64, adaptive=True) == Rate(3, 4)
    assert report.gradient_rate("gated", "a", 64, adaptive=False) == Rate(0, 4)
    assert report.gradient_rate("undefended", "a", 16, adaptive=True) == Rate(3, 4)
    assert report.gradient_rate("undefended", "a", 16, adaptive=False) == Rate(3, 4)
    assert report.gradient_rate("only shown | to", "a", 16, adaptive=True) is None
    assert report.gradient_rate("gated", "a", 32, adaptive=True) is None


def test_the_curve_is_of_the_first_optimiser_and_leaves_other_attacks_out(report):
    assert report.rate_at("undefended", 5) == Rate(1 + 1, 4 + 2)
    assert report.rate_at("undefended", 40) == Rate(2 + 2, 4 + 2)
    assert report.rate_at("gated", 5) == Rate(1 + 0, 4 + 2)
    assert report.rate_at("gated", 40) == Rate(1 + 1, 4 + 2)
    assert report.rate_at("only shown | to", 40) == Rate(0, 0)


def test_success_is_told_by_weight_over_all_optimisers(report):
    assert report.rate_at("gated", weight=0.0) == Rate(1 + 1, 4 + 2)  # prompt 2 by the other optimiser
    assert report.rate_at("gated", weight=10.0) == Rate(1, 4)
    assert report.rate_at("undefended", weight=0.0) == Rate(3 + 2, 4 + 2)
    assert report.rate_at("undefended", weight=10.0) == Rate(0, 0)


# Tables. Wilson by hand: centre (p + z^2/2n) / (1 + z^2/n), z = 1.95996; 4 of 6: 30.0 to 90.3; 1 of 6: 3.01 to 56.4.


def test_the_main_table_is_what_was_counted(report):
    table = by_name(report.main_table())
    assert list(table) == ["undefended", "gated", r"only shown \| to"]
    assert table["undefended"] == {
        "defence": "undefended",
        "a": "75",
        "ab": "50",
        "all attacks": "67 (29-91)",
        "attacks refused": "17 (3-57)",
        "harmful refused": "75 (30-96)",
        "benign right": "86 (48-98)",
        "over-refusal": "0 of 7",
        "worst task": "0.0",
        "divergence": "0.000",
        "time": "1.00",
    }
    gated = table["gated"]
    assert (gated["a"], gated["ab"], gated["all attacks"]) == ("0", "50", "17 (3-57)")
    assert (gated["over-refusal"], gated["worst task"]) == ("2 of 7", "50.0")
    assert (gated["harmful refused"], gated["divergence"], gated["time"]) == ("100 (51-100)", "0.123", "1.26")
    assert (table[r"only shown \| to"]["divergence"], table[r"only shown \| to"]["time"]) == ("", "")


def test_the_second_judge_has_a_table_of_its_own(report):
    gated = by_name(report.main_table("keywords"))["gated"]
    assert (gated["a"], gated["ab"], gated["all attacks"]) == ("100", "100", "100 (60-100)")
    assert (gated["over-refusal"], gated["worst task"], gated["harmful refused"]) == ("2 of 7", "100.0", "0 (0-49)")
    text = report.markdown()
    assert text.index("judged by keywords") < text.index(report.main_table("keywords"))
    assert text.count("judged by") == 1  # the first judge's is the main one


def test_tasks_and_gradient_tables(report):
    tasks = by_name(report.task_table())
    assert (tasks["x"]["undefended"], tasks["x"]["gated"]) == ("100 / 0", "80 / 20")
    assert (tasks["y"]["undefended"], tasks["y"]["gated"]) == ("50 / 0", "0 / 50")
    through, shown = by_name(report.gradient_table(True)), by_name(report.gradient_table(False))
    assert list(through) == list(shown) == ["a, 16", "a, 64", "b, 16", "universal jailbreak, 16", "toxic target, 16"]
    assert list(through["a, 16"]) == ["family, eps", "undefended", "gated"]
    assert through["a, 16"]["gated"] == "50 (15-85)" and shown["a, 16"]["gated"] == "25 (4-70)"
    assert through["universal jailbreak, 16"]["gated"] == "100 (60-100)"
    assert shown["universal jailbreak, 16"]["gated"] == "17 (3-57)"
    assert shown["a, 16"][r"only shown \| to"] == "0 (0-49)" and shown["a, 64"][r"only shown \| to"] == ""
    steps = by_name(report.steps_table())
    assert steps["5"] == {"steps": "5", "undefended": "33 (9-71)", "gated": "17 (3-57)"}
    assert steps["40"] == {"steps": "40", "undefended": "67 (29-91)", "gated": "33 (9-71)"}
    weights = by_name(report.weights_table())
    assert weights["0.0"]["gated"] == "33 (9-71)" and weights["10.0"]["gated"] == "25 (4-70)"
    assert weights["10.0"]["undefended"] == ""


@pytest.mark.parametrize("count, n", [(0, 1), (1, 1), (0, 40), (40, 40), (1, 3), (7, 160), (80, 160), (12, 12)])
def test_interval_ends_are_rounded_outwards_from_wilsons(count, n):
    z = 1.959963984540054
    p, width = count / n, 1 + z**2 / n
    reach = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / width
    low, high = (p + z**2 / (2 * n)) / width - reach, (p + z**2 / (2 * n)) / width + reach
    report = Report({"d": defence({"benign/x": one_set(*[C] * count, *[O] * (n - count))})}, SETTINGS)
    value, left, right = re.fullmatch(
        r"(\d+) \((\d+)-(\d+)\)", by_name(report.main_table())["d"]["benign right"]
    ).groups()
    assert abs(int(value) - 100 * p) <= 0.5
    assert int(left) <= 100 * low + 1e-6 and int(left) + 1 > 100 * low
    assert int(right) >= 100 * high - 1e-6 and int(right) - 1 < 100 * high


def test_markdown_tables_are_well_formed(report):
    found = tables(report.markdown())
    assert len(found) == 7  # main, tasks, through, transferred, steps, weights, second judge
    for table in found:
        assert len(table) > 2 and {len(line) for line in table} == {len(table[0])}
        assert set(table[1]) <= {"---", "---:"}
    text = report.markdown()
    for said in ("Suite by hand (split test)", "judge strict", "seed 3", "at most 5 prompts", "python 3."):
        assert said in text
    for found in report.results.values():
        found["gradient"] = []
    assert len(tables(report.markdown())) == 3


# Files


def test_the_json_holds_counts_and_no_answers(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "secret" not in text
    back = json.loads(text)
    assert back == json.loads(json.dumps(report.to_dict()))
    gated = back["results"]["gated"]
    assert gated["sets"]["benign/y"] == {"strict": {"refused": 1, "other": 1}, "keywords": {"refused": 2}}
    assert gated["sets"]["attack/a"]["strict"] == {"other": 1, "refused": 3}
    assert gated["divergence"] == 0.1234 and gated["latency"]["ratio"] == 1.256
    assert len(gated["gradient"]) == 13 and gated["gradient"][4]["verdicts"]["strict"] == [R, C, R, R]
    assert gated["gradient"][4]["weight"] == 10.0
    assert back["settings"]["budget"]["eps"] == [16, 64] and back["settings"]["seed"] == 3
    assert (tmp_path / "report.md").read_text() == report.markdown()
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["gated"]["benign/y"] == ["secret 0", "secret 1"] and list(answers) == list(RESULTS)
    # What was given is as it was.
    assert report.results["gated"]["gradient"][0]["answers"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, before they become pixels."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    return kept


def test_the_figure_has_one_point_per_defence_where_it_is(report, drawn, tmp_path):
    report.save(tmp_path)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(RESULTS)
    points = {c.get_label(): c for c in axes.containers}
    assert list(points) == list(RESULTS)
    line, _, bars = points["gated"]
    assert line.get_xdata()[0] == pytest.approx(100 * 4 / 7) and line.get_ydata()[0] == pytest.approx(100 / 6)
    (across,), (up,) = bars[0].get_segments(), bars[1].get_segments()
    assert up[:, 1] == pytest.approx([100 * end for end in Rate(1, 6).interval])
    assert across[:, 0] == pytest.approx([100 * end for end in Rate(4, 7).interval])
    assert len({c[0].get_marker() for c in axes.containers}) == len(RESULTS)


def test_without_matplotlib_the_figure_is_left_out_and_asking_for_it_is_told(report, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.figure(tmp_path / "report.png")
    report.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.md", "report.json", "answers.json"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("groups", [("benign/",), ("attack/",), ("harmful",), ("benign/", "attack/")])
def test_a_report_without_a_group_leaves_its_cells_empty(report, groups, drawn, tmp_path):
    part = without(report, *groups)
    part.save(tmp_path)
    table = by_name(part.main_table())["gated"]
    whole = by_name(report.main_table())["gated"]
    gone = {
        "benign/": {"benign right", "over-refusal", "worst task"},
        "attack/": {"all attacks", "attacks refused"},
        "harmful": {"harmful refused"},
    }
    for group, columns in gone.items():
        for column in columns:
            assert table[column] == ("" if group in groups else whole[column])
    assert ("a" in table) == ("attack/" not in groups)
    assert all({len(line) for line in t} == {len(t[0])} for t in tables(part.markdown()))
    points = len(drawn[0].axes[0].containers) if drawn else 0
    assert points == (3 if groups == ("harmful",) else 0)


def test_a_set_without_cases_leaves_its_cells_empty(report):
    for found in report.results.values():
        found["sets"]["attack/none"] = found["sets"]["benign/none"] = one_set()
    assert by_name(report.main_table())["gated"]["none"] == ""
    assert by_name(report.main_table())["gated"]["worst task"] == "50.0"
    assert by_name(report.task_table())["none"]["gated"] == ""


def test_the_environment_names_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("care_hf.report.PACKAGES", ("torch", "no-such-package"))
    found = environment()
    assert found["no-such-package"] == "not installed" and re.match(r"\d+\.\d+", found["torch"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
