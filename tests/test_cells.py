import json

import pytest

from care_hf.cells import Cells

VALUES = [
    None,
    True,
    3,
    -0.1,
    1e-300,
    "na\u00efve \u2713",
    [1, [2.5, "x"]],
    {"a": {"b": [None]}},
    ("a", 1),
    {"4": (1,)},
]


def counting(value):
    calls = []

    def make():
        calls.append(1)
        return value

    return make, calls


def fail():
    raise AssertionError("made again")


@pytest.mark.parametrize("value", VALUES)
def test_what_is_kept_is_not_made_again(tmp_path, value):
    make, calls = counting(value)
    first = Cells(tmp_path / "new" / "folder").get({"of": 1}, make)
    assert first == Cells(tmp_path / "new" / "folder").get({"of": 1}, fail)
    # The same value comes back whether it was kept or not, tuples as lists.
    assert first == Cells(None).get({"of": 1}, make) == json.loads(json.dumps(value))
    assert len(calls) == 2


def test_without_a_folder_nothing_is_kept():
    cells, (make, calls) = Cells(None), counting([1])
    assert cells.get({}, make) == cells.get({}, make) == [1]
    assert len(calls) == 2


def test_keys_differ_in_anything_but_order(tmp_path):
    cells = Cells(tmp_path)
    keys = [{}, {"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": None}, {"a": 1, "b": 2}, {"a": 2, "b": 1}]
    keys += [{"a": {"b": 1}}, {"a": ["b", 1]}, {"a": [["b"], 1]}, {"a": True}]
    for index, key in enumerate(keys):
        assert cells.get(key, lambda index=index: index) == index
    assert [cells.get(key, fail) for key in keys] == list(range(len(keys)))
    assert cells.get({"b": 2, "a": 1}, fail) == 6
    assert len(list(tmp_path.iterdir())) == len(keys)


def test_a_cell_tells_what_it_is_of(tmp_path):
    Cells(tmp_path).get({"model": "x", "set": [1, 2]}, lambda: "found")
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"key": {"model": "x", "set": [1, 2]}, "value": "found"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_make_leaves_nothing(tmp_path, error):
    def broken():
        raise error("stop")

    with pytest.raises(error):
        Cells(tmp_path).get({"a": 1}, broken)
    assert list(tmp_path.iterdir()) == []
    assert Cells(tmp_path).get({"a": 1}, lambda: 5) == 5


def test_an_interrupted_write_is_no_cell(tmp_path, monkeypatch):
    def killed(before, after):
        raise KeyboardInterrupt

    cells = Cells(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("care_hf.cells.os.replace", killed)
        cells.get({"a": 1}, lambda: "x" * 10_000)
    for partial in tmp_path.iterdir():  # as if it were killed half-way
        partial.write_text(partial.read_text()[:50])
    assert list(tmp_path.glob("*.json")) == []
    assert Cells(tmp_path).get({"a": 1}, lambda: 5) == 5
    assert Cells(tmp_path).get({"a": 1}, fail) == 5


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_not_plain_is_refused(tmp_path, kept):
    cells, (make, calls) = Cells(tmp_path if kept else None), counting(1)
    for key in ({"a": object()}, {"a": {1, 2}}, {("a",): 1}):
        with pytest.raises(TypeError):
            cells.get(key, make)
    assert not calls
    with pytest.raises(TypeError):
        cells.get({"a": 1}, lambda: {1, 2})
    assert list(tmp_path.iterdir()) == []
