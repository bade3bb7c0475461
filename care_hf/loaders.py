"""Public benchmark sets as cases: found by a file of settings, checked first, read when asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from .data_settings import READERS, ROLES, DataSettings, load_table
from .rows import Item, Reader
from .samples import load_image
from .suite import Case, Suite

_EMBEDDED = object()  # stands for an image inside a table while rows are checked


class LazyCases(Sequence[Case]):
    """Cases that are made whenever they are asked for, so that the images of a set are never all in memory.

    Also attacks what is loaded: ``LazyCases(cases, attack_prompts.typographic, "AdvBench, typographic")``.

    Args:
        items: what cases are made of.
        build: from an item to its case.
        name: what errors call the set.
    """

    def __init__(self, items: Sequence[Any], build: Callable[[Any], Case], name: str):
        self._items, self._build, self._name = items, build, name

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return LazyCases(self._items[index], self._build, self._name)
        item = self._items[index]
        try:
            return self._build(item)
        except (TypeError, ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{self._name}[{index}]: {error}") from error


def load_cases(settings: DataSettings | str | Path, limit: int | None = None, **changes: Any) -> dict[str, LazyCases]:
    """The cases of a benchmark set by the name of its part, such as the "safe" and "unsafe" ones of XSTest.

    Columns, answers and image files are checked now, without an image being decoded; images are read when a case is
    asked for. A set that has no parts is one part under its own name.

    Args:
        settings: where the set lies; themselves, a name such as "xstest", or a YAML file.
        limit: of the cases per part; they are spread evenly over it, so that small numbers show all scenarios, too.
        changes: fields of `DataSettings` to use instead, for example ``id="/data/xstest"`` for a local copy.

    Raises:
        ValueError: settings, columns, rows or `limit` are not as they must be; the message says which and what to do.
        OSError: the set or some of its images cannot be found.
    """
    settings = replace(DataSettings.load(settings), **changes)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit!r} must be a whole number of at least 1, or None.")
    reader = READERS[settings.reader]
    options = {**reader.options, **settings.options}
    tables = {place: load_table(settings, *place) for place in product(settings.configs or ("",), settings.splits)}
    parts = reader.subsets(tables, settings.name, options)
    if limit is not None:
        parts = {
            part: [items[i * len(items) // limit] for i in range(limit)] if limit < len(items) else items
            for part, items in parts.items()
        }
    _check_rows(settings, reader, options, parts)
    open_image = partial(_open_image, settings=settings)

    def build(item: Item) -> Case:
        return reader.build({**item.table[item.index], **item.extra}, open_image, options)

    return {
        part: LazyCases(items, build, settings.name if part == settings.name else f"{settings.name}/{part}")
        for part, items in parts.items()
    }


def load_suite(sets: Iterable[DataSettings | str | Path], limit: int | None = None, name: str = "benchmarks") -> Suite:
    """Several sets as one `Suite`, each part where its role says.

    Args:
        sets: what `load_cases` takes, one by one.
        limit: of the cases per part, see `load_cases`.
        name: of the suite.

    Raises:
        ValueError: two sets have the same name, a part has no role, or see `load_cases`.
        OSError: see `load_cases`.
    """
    loaded: dict[str, dict[str, LazyCases]] = {role: {} for role in ROLES}
    source = {}
    for settings in map(DataSettings.load, sets):
        if settings.name in source:
            raise ValueError(f"Two sets are called {settings.name!r}; give one of them another `name`.")
        source[settings.name] = {**settings.to_dict(), "limit": limit}
        for part, cases in load_cases(settings, limit).items():
            name_of_part = settings.name if part == settings.name else f"{settings.name}/{part}"
            loaded[settings.role_of(part)][name_of_part] = cases
    harmful = [(cases, index) for cases in loaded["harmful"].values() for index in range(len(cases))]
    chained = LazyCases(harmful, lambda item: item[0][item[1]], "harmful")
    return Suite(name, loaded["attack"], chained, loaded["benign"], source=source)


def _image_path(value: Any, settings: DataSettings) -> Path | None:
    """The file that an image column points to; None if the image is in the table."""
    return Path(settings.image_root or "", value).expanduser() if isinstance(value, str) else None


def _open_image(value: Any, settings: DataSettings) -> Image.Image:
    path = _image_path(value, settings)
    return load_image(value if path is None else path)


def _check_rows(
    settings: DataSettings, reader: Reader, options: Mapping[str, Any], parts: Mapping[str, list[Item]]
) -> None:
    """Make every case once without its images, so that a bad row or a missing file shows now, not hours later."""
    looked: list[Path | None] = []
    light: dict[int, Any] = {}

    def look(value: Any) -> Image.Image:
        looked.append(_image_path(value, settings))
        return Image.new("RGB", (1, 1))

    def build(item: Item) -> Case:
        embedded = [c for c in reader.images if c in item.table.column_names and not _is_text(item.table, c)]
        if id(item.table) not in light:
            light[id(item.table)] = item.table.remove_columns(embedded)
        row = {**light[id(item.table)][item.index], **dict.fromkeys(embedded, _EMBEDDED), **item.extra}
        return reader.build(row, look, options)

    for part, items in parts.items():
        for _ in LazyCases(items, build, f"{settings.name}/{part}"):
            pass
    missing = [path for path in looked if path is not None and not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{settings.name}: {len(missing)} of {len(looked)} images are missing, the first is {str(missing[0])!r}, "
            f"with image_root={settings.image_root!r}. {settings.image_source} Set `image_root` to the folder that the "
            "paths in the rows start from."
        )


def _is_text(table, column: str) -> bool:
    return getattr(table.features[column], "dtype", None) in ("string", "large_string")
