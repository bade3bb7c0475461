"""From rows of tables to cases: what the readers of benchmark sets share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from .suite import Case

Row = Mapping[str, Any]
OpenImage = Callable[[Any], Image.Image]
Options = Mapping[str, Any]
Tables = Mapping[tuple[str, str], Any]  # datasets by config ("" if the set has none) and split


class Item(NamedTuple):
    """Where a case lies: a row of a table, and what is known of it from elsewhere."""

    table: Any
    index: int
    extra: Row = MappingProxyType({})


Subsets = Callable[[Tables, str, Options], dict[str, list[Item]]]


def one_subset(tables: Tables, name: str, options: Options) -> dict[str, list[Item]]:
    """All rows of all tables as one part that is called like the set."""
    return {name: [Item(table, index) for table in tables.values() for index in range(len(table))]}


@dataclass(frozen=True)
class Reader:
    """How the rows of a set become cases.

    Attributes:
        build: from a row, a function that opens what its image columns hold, and options to a case.
        columns: that every row must have.
        optional: columns that are used where they are.
        images: those of both that hold images.
        subsets: from the tables by config and split, the name of the set and options to the set's named parts.
        options: what may be set, with defaults.
    """

    build: Callable[[Row, OpenImage, Options], Case]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    subsets: Subsets = one_subset
    options: Options = field(default_factory=dict)


def blank(value: Any) -> bool:
    """Whether a cell says nothing: missing, empty, or the "nan" that a detour through pandas leaves behind."""
    return value is None or (isinstance(value, (str, float)) and str(value).strip().lower() in ("", "nan"))


def label(row: Row, *columns: str) -> str:
    """The first of some cells that says anything, a list in it joined by commas; else an empty string."""
    value = next((row[column] for column in columns if not blank(row.get(column))), "")
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def chat(images: Iterable[Image.Image], text: str) -> list[dict[str, Any]]:
    """A conversation of one message, images in front of the text."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def one_image(row: Row, column: str, image: OpenImage) -> Image.Image:
    """The image in a cell.

    Raises:
        ValueError: there is none.
    """
    if blank(row[column]):
        raise ValueError(f"has no image in column {column!r}; every row of this set needs one.")
    return image(row[column])
