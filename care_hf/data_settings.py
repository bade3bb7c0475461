"""Where benchmark sets lie, on the Hub or on a disk: their settings, and their tables with columns checked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .rows import Reader
from .safety_sets import SAFETY_READERS
from .settings_files import check_choice, check_types, find_file, made, meant, read_fields
from .utility_sets import UTILITY_READERS

READERS: dict[str, Reader] = SAFETY_READERS | UTILITY_READERS
ROLES = ("attack", "harmful", "benign")
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


@dataclass(frozen=True)
class DataSettings:
    """Where a set lies and what its parts are for; a YAML file of these fields under ``configs/datasets``.

    Attributes:
        name: of the set, for reports.
        reader: what its rows mean, a name of `READERS`.
        id: of the set on the Hub; or a local folder or file of parquet, JSON, JSON lines or CSV; or a builder of
            `datasets` ("csv") beside `data_files`.
        role: what every part is for, one of `ROLES`, or a mapping from parts to roles.
        configs: of the set, all of which are read; empty if it has none.
        splits: which are read.
        revision: commit, tag or branch on the Hub; a commit makes a report repeatable.
        data_files: split to file or address, for sets on the Hub that are no more than files.
        image_root: the folder to which image paths in the rows are relative.
        image_source: where images come from that the set does not hold; said when they are missing.
        columns: this package's name of a column to the set's own, or to several of which the first found is taken.
        options: further choices of the reader.
    """

    name: str
    reader: str
    id: str | Path
    role: str | Mapping[str, str]
    configs: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    revision: str | None = None
    data_files: Mapping[str, str] | None = None
    image_root: str | Path | None = None
    image_source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("configs", "splits"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else () if value is None else value
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for name in ("id", "image_root"):
            value = getattr(self, name)
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
        for name in ("columns", "options"):
            value = getattr(self, name)
            object.__setattr__(self, name, dict(value or {}) if value is None or isinstance(value, Mapping) else value)
        check_types(self)
        check_choice(f"{self.name}: reader", self.reader, tuple(READERS))
        reader = READERS[self.reader]
        self._check_keys("columns", self.columns, (*reader.columns, *reader.optional))
        self._check_keys("options", self.options, tuple(reader.options))
        roles = set(self.role.values()) if isinstance(self.role, Mapping) else {self.role}
        if not roles <= set(ROLES):
            raise ValueError(f"{self.name}: role={self.role!r} must name {ROLES}, for all parts or part by part.")
        if not self.splits:
            raise ValueError(f"{self.name}: `splits` is empty; name at least one.")

    def _check_keys(self, name: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{self.name}: {name} {unknown} mean nothing to reader {self.reader!r}; known are {known}."
                f"{meant(unknown[0], known)}"
            )

    @classmethod
    def load(cls, settings: "DataSettings | str | Path") -> "DataSettings":
        """Return settings from themselves, from a name (a file in ``configs/datasets``), or from a YAML file.

        Raises:
            ValueError: no such name or file, or the file lacks fields or has unknown ones.
        """
        if isinstance(settings, cls):
            return settings
        path = find_file(settings, "Data set", "datasets")
        return made(cls, read_fields(path), str(path))

    def role_of(self, subset: str) -> str:
        """What a part of the set is for.

        Raises:
            ValueError: `role` does not say.
        """
        role = self.role.get(subset) if isinstance(self.role, Mapping) else self.role
        if role is None:
            raise ValueError(f"{self.name}: `role` says nothing of the part {subset!r}; add it to {dict(self.role)}.")
        return role

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def load_table(settings: DataSettings, config: str, split: str):
    """One config ("" if the set has none) and split as a `datasets.Dataset`: only the reader's columns, by its names.

    Raises:
        ValueError: columns are missing, or there are no rows.
        OSError: nothing can be found there.
    """
    import datasets

    reader = READERS[settings.reader]
    try:
        table = datasets.load_dataset(**_where(settings, config, split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"{settings.name}: id={settings.id!r}, config={config or None!r}, split={split!r} cannot be loaded: "
            f"{error} Sets move and some are gated: check the id in the settings, accept the set's terms on its page "
            "and log in (`hf auth login`), or give a local copy as `id`."
        ) from error
    names = _columns(settings, reader, table.column_names, f"config={config or None!r}, split={split!r}")
    if not len(table):
        raise ValueError(f"{settings.name}: config={config or None!r}, split={split!r} has no rows.")
    return table.select_columns(list(names.values())).rename_columns({own: name for name, own in names.items()})


def _columns(settings: DataSettings, reader: Reader, found: Sequence[str], where: str) -> dict[str, str]:
    """The reader's names of columns to the set's own."""
    names, missing = {}, {}
    for name in (*reader.columns, *reader.optional):
        own = settings.columns.get(name, name)
        candidates = [own] if isinstance(own, str) else list(own)
        match = next((candidate for candidate in candidates if candidate in found), None)
        if match is not None:
            names[name] = match
        elif name in reader.columns or name in settings.columns:
            missing[name] = candidates
    if missing:
        raise ValueError(
            f"{settings.name}: id={settings.id!r}, {where} lacks the columns {missing}; it has {sorted(found)}. Is it "
            "another config or split? If columns were renamed, say so under `columns` in the settings."
        )
    return names


def _where(settings: DataSettings, config: str, split: str) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset`."""
    root = Path(settings.id).expanduser()
    if not root.exists():
        if root.is_absolute() or settings.id.startswith((".", "~")):
            raise FileNotFoundError(f"there is no {str(root)!r}; give an existing folder or file.")
        files = settings.data_files
        if files is not None and split not in files:
            raise ValueError(f"`data_files` says nothing of this split; it has {sorted(files)}.")
        files = None if files is None else {split: files[split]}
        arguments = {"name": config or None, "revision": settings.revision, "data_files": files}
        return {"path": settings.id, "split": split, **arguments}
    if _has_card(root):
        return {"path": str(root), "name": config or None, "split": split}
    if root.is_file() and len(settings.configs or ("",)) * len(settings.splits) > 1:
        raise ValueError(f"one file cannot hold the configs {settings.configs} and splits {settings.splits}.")
    files = [root] if root.is_file() else _local_files(root, config, split, several=len(settings.configs) > 1)
    builders = {BUILDERS.get(file.suffix) for file in files}
    if len(builders) > 1 or None in builders:
        raise ValueError(f"{[str(file) for file in files]} must be of one kind, one of {tuple(BUILDERS)}.")
    # Splits of local files are told by their names here, for `datasets` knows no others than train, test, validation.
    return {"path": builders.pop(), "data_files": {"train": [str(file) for file in files]}, "split": "train"}


def _has_card(root: Path) -> bool:
    """Whether a folder is a copy from the Hub whose card says which files are which split."""
    card = root / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8").partition("\n---")[0]


def _local_files(root: Path, config: str, split: str, several: bool) -> list[Path]:
    """The files of a config and split: those that are named so, or that lie in folders named so."""
    files = sorted(path for path in root.rglob("*") if path.suffix in BUILDERS)
    folders = {path: path.relative_to(root).parts[:-1] for path in files}
    of_config = [path for path in files if not config or config in folders[path]]
    if not of_config and not several:  # the folder of the config itself; never that of another config
        of_config = [path for path in files if folders[path] in ((), ("data",))]
    named = [path for path in of_config if path.stem == split or path.stem.startswith(f"{split}-")]
    matches = named or [path for path in of_config if split in folders[path]]
    if not matches:
        found = [str(path.relative_to(root)) for path in files]
        raise FileNotFoundError(
            f"no file in {str(root)!r} is called {split!r} (+ one of {tuple(BUILDERS)})"
            + (f" in a folder {config!r}" if config else "")
            + f"; found {found[:20]}. Rename it, or give the file itself as `id`."
        )
    return matches
