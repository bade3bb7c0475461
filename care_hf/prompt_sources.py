"""Prompts by name: files, folders, data sets of the Hub, and benchmark sets that come with the package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .loaders import load_cases
from .prompt_files import FORMATS, read_rows
from .settings_files import meant
from .shipped import shipped

ACCEPTED = (
    f"a file ({', '.join(FORMATS)}), a folder of `datasets`, a data set of the Hub (owner/name, owner/name:split, "
    "owner/name:config:split), a benchmark set of configs/datasets (advbench, xstest:safe), or a YAML file like those"
)


@dataclass(frozen=True, eq=False)
class Source:
    """Prompts, and where they are from."""

    name: str
    prompts: Sequence[Any]

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts from {self.name}"


def read_source(name: str, limit: int | None = None) -> Source:
    """Open the prompts of a name; image files are read when they are asked for.

    Args:
        name: see `ACCEPTED`; of a set with parts, "name:part" is one of them.
        limit: of prompts, spread evenly over the set.

    Raises:
        ValueError: it has no rows or parts like that.
        OSError: there is nothing of that name.
    """
    path = Path(name)
    if path.is_file() and path.suffix in FORMATS:
        prompts = _Beside(read_rows(path), path.parent)
    elif path.is_dir():
        prompts = _read_folder(path)
    elif (settings := _settings(name)) is not None:
        prompts = _read_benchmark(name, *settings)
    elif path.suffix in FORMATS:  # a data set of the Hub may be called so; somebody's file is more probable
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no file {name}.{meant(path.name, beside)}")
    else:
        prompts = _read_hub(name)
    if not len(prompts):
        raise ValueError(f"{name} has no prompts.")
    if limit is not None and limit < len(prompts):
        chosen = [i * len(prompts) // limit for i in range(limit)]
        prompts = prompts.select(chosen) if hasattr(prompts, "select") else [prompts[i] for i in chosen]
    return Source(name, prompts)


class _Beside(Sequence):
    """Rows of a file, in which paths of images are relative to the file, or to the working folder."""

    def __init__(self, rows: Sequence[Any], folder: Path):
        self.rows, self.folder = rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        for key in ("image", "images"):
            value = row.get(key)
            if value is not None:
                row[key] = [self._placed(v) for v in value] if isinstance(value, list) else self._placed(value)
        return row

    def _placed(self, image: Any) -> Any:
        beside = self.folder / image if isinstance(image, str) else None
        return str(beside) if beside is not None and beside.is_file() else image


def _settings(name: str) -> tuple[Path, str] | None:
    """The file of settings of a benchmark set, and the part that is asked for."""
    for whole, part in ((name, ""), (name.rpartition(":")[0], name.rpartition(":")[2])):
        for path in (Path(whole), shipped("configs") / "datasets" / f"{whole}.yaml"):
            if whole and path.suffix in (".yaml", ".yml") and path.is_file():
                return path, part
    return None


def _read_benchmark(name: str, settings: Path, part: str) -> list[Any]:
    parts = load_cases(settings)
    if part and part not in parts:
        raise ValueError(f"{name}: the set has no part {part!r}; it has {sorted(parts)}.")
    chosen = [parts[part]] if part else list(parts.values())
    return [case for cases in chosen for case in cases]


def _read_folder(path: Path):
    from datasets import Dataset, load_dataset, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = load_from_disk(str(path))
        if not isinstance(found, Dataset):
            raise ValueError(f"{path} holds the splits {sorted(found)}; name the folder of one of them.")
        return found
    return load_dataset(str(path), split="train")


def _read_hub(name: str):
    import datasets

    path, *where = name.split(":")
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or len(where) > 2:
        raise FileNotFoundError(f"No prompts are called {name!r}; give {ACCEPTED}.")
    config, split = ([None, *where] if len(where) < 2 else where) if where else (None, "train")
    try:
        return datasets.load_dataset(path, config, split=split)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}: {error}") from error
