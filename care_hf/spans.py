"""Which prompts of a row are meant: sorted ranges that neither overlap nor touch."""

from collections.abc import Iterable
from typing import TypeAlias

Spans: TypeAlias = list[range]


def tidy(ranges: Iterable[range]) -> Spans:
    """Any ranges as spans.

    Raises:
        ValueError: two of them overlap.
    """
    spans: Spans = []
    for one in sorted((r for r in ranges if len(r)), key=lambda r: r.start):
        if spans and one.start < spans[-1].stop:
            raise ValueError(f"The ranges {spans[-1]} and {one} overlap.")
        if spans and one.start == spans[-1].stop:
            one = range(spans.pop().start, one.stop)
        spans.append(one)
    return spans


def size(spans: Iterable[range]) -> int:
    """How many are meant."""
    return sum(map(len, spans))


def missing(spans: Spans, total: int) -> Spans:
    """Those of the first `total` that are not meant."""
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), total]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]


def part(spans: Spans, index: int, count: int) -> Spans:
    """The `index`-th of `count` parts, which are equal up to one and in order."""
    total, passed, found = size(spans), 0, []
    first, last = total * index // count, total * (index + 1) // count
    for span in spans:
        inside = range(span.start + max(first - passed, 0), min(span.start + last - passed, span.stop))
        found += [inside] if len(inside) else []
        passed += len(span)
    return found


def contains(spans: Spans, others: Iterable[range]) -> bool:
    """Whether all of `others` are meant."""
    return all(any(span.start <= one.start and one.stop <= span.stop for span in spans) for one in others)


def to_plain(spans: Spans) -> int | list[list[int]]:
    """As JSON holds them: how many, if they are the first ones."""
    if not spans:
        return 0
    if len(spans) == 1 and spans[0].start == 0:
        return spans[0].stop
    return [[span.start, span.stop] for span in spans]


def from_plain(told: int | list[list[int]]) -> Spans:
    """What `to_plain` gave.

    Raises:
        TypeError, ValueError: it is something else.
    """
    return tidy([range(told)] if isinstance(told, int) else [range(start, stop) for start, stop in told])
