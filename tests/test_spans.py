"""Spans against sets of numbers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_hf.spans import contains, from_plain, missing, part, size, tidy, to_plain

TOTAL = 30
numbers = st.sets(st.integers(0, TOTAL - 1))


def spans_of(chosen):
    return tidy(range(n, n + 1) for n in sorted(chosen, reverse=True))


def meant(spans):
    return [n for span in spans for n in span]


@given(numbers)
def test_spans_are_sorted_and_neither_overlap_nor_touch(chosen):
    spans = spans_of(chosen)
    assert meant(spans) == sorted(chosen) and size(spans) == len(chosen)
    assert all(one.stop < other.start for one, other in itertools.pairwise(spans))
    assert from_plain(to_plain(spans)) == spans
    assert isinstance(to_plain(spans), int) == (chosen == set(range(len(chosen))))


@given(numbers)
def test_what_is_missing_is_the_rest(chosen):
    assert meant(missing(spans_of(chosen), TOTAL)) == sorted(set(range(TOTAL)) - chosen)


@given(numbers, st.integers(1, 7))
def test_parts_are_even_in_order_and_the_whole(chosen, count):
    parts = [part(spans_of(chosen), index, count) for index in range(count)]
    assert [n for one in parts for n in meant(one)] == sorted(chosen)
    sizes = [size(one) for one in parts]
    assert max(sizes) - min(sizes) <= 1


@given(numbers, numbers)
def test_spans_contain_those_of_a_subset(chosen, others):
    assert contains(spans_of(chosen), spans_of(others)) == (others <= chosen)


def test_overlaps_are_refused():
    with pytest.raises(ValueError, match=r"range\(0, 3\) and range\(2, 5\) overlap"):
        tidy([range(2, 5), range(3)])
