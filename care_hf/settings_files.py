"""Settings in YAML files: found by path or name, read, and what is misspelt in them named with what was meant."""

import math
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from .shipped import shipped

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Path: "a path",
    Mapping: "fields, `name: value`",
}


def find_file(given: str | Path, what: str, folder: str = "", names: Collection[str] = ()) -> Path:
    """The file of settings that is meant.

    Args:
        given: a path, or the name of a file in `folder` without its ending.
        what: what errors call it: "Recipe".
        folder: inside ``configs``.
        names: further names that would have been understood.

    Raises:
        ValueError: there is no such file or name.
    """
    if Path(given).is_file():
        return Path(given)
    found = {path.stem: path for path in (shipped("configs") / folder).glob("*.yaml")}
    if str(given) in found:
        return found[str(given)]
    known = sorted({*found, *names})
    raise ValueError(
        f"{what} {str(given)!r} is neither a YAML file of settings nor one of {known}.{meant(Path(given).stem, known)}"
    )


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file; none if it is empty.

    Raises:
        ValueError: it is not YAML, the line is named; or holds anything but fields, or one twice.
        OSError: it cannot be read.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {_told(error)}.") from error
    values = {} if values is None else values
    check_mapping(values, str(path))
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a field that is there twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.composer.ComposerError(
                    problem=f"the field {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else None)
        return node


def _told(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{where}{getattr(error, 'problem', None) or error}"


def check_mapping(given: Any, where: str) -> None:
    """Assert that it holds fields.

    Raises:
        ValueError: it is a list, a text, a number.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} holds {given!r:.60}; it needs fields, `name: value`.")


def check_fields(given: Any, known: Sequence[str], where: str, needed: Collection[str] = ()) -> None:
    """Assert that all fields are known, and that those are there that must be.

    Raises:
        ValueError: they are not; of what is misspelt, what was probably meant is named.
    """
    check_mapping(given, where)
    unknown, missing = sorted(map(str, set(given) - set(known))), sorted(set(needed) - set(given))
    found = [f"{what} fields {names}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
    if found:
        hints = "".join(meant(name, [field for field in known if field not in given]) for name in unknown)
        raise ValueError(f"{where}: {', '.join(found)}; known are {list(known)}.{hints}")


def made(cls: type, given: Any, where: str) -> Any:
    """A dataclass `cls` of the fields in a file.

    Raises:
        ValueError: a field is unknown or missing, or a value does not fit; the message says where.
    """
    needed = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
    check_fields(given, [one.name for one in fields(cls)], where, needed)
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def meant(name: Any, known: Collection[str]) -> str:
    """ " Did you mean 'this'?", or nothing if nothing known looks like `name`."""
    lower = {str(one).lower(): str(one) for one in known}
    close = get_close_matches(str(name).lower(), lower, n=1)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Assert that a value is one of those that there are.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {tuple(known)}.{meant(value, known)}")


def check_types(instance: Any, besides: Collection[str] = ()) -> None:
    """Assert that the fields of a dataclass hold what their annotations say; a whole number is a number, too.

    Args:
        instance: with annotations of `int`, `float`, `str`, `bool`, None, tuples and mappings of them, and unions.
        besides: fields that are left out.

    Raises:
        TypeError: one does not; the message names field, value and what was expected.
    """
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        if name in besides or _fits(value, hint):
            continue
        hint_of_yaml = ""
        if isinstance(value, str) and float in _options(hint) and _is_number(value):
            hint_of_yaml = f" YAML takes {value} for text; write {float(value)!r}, or with a point and a sign."
        raise TypeError(f"{name}={value!r:.80} must be {_described(hint)}.{hint_of_yaml}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _options(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int  # True is an int as well
    return isinstance(value, get_origin(hint) or hint) if hint is not Any else True


def _described(hint: Any) -> str:
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(_described(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        inside = KINDS[get_args(hint)[0]].removeprefix("a ")
        return f"a list of {inside}" + "s" * inside.endswith("number")
    return KINDS[get_origin(hint) or hint]
