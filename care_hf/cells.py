"""Finished pieces of long work in a folder, each in a file named by a hash of all that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Cells:
    """A memory of plain values by key.

    Args:
        folder: where they are kept; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder else None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON holds it, or what it gave for an equal key before.

        Raises:
            TypeError: key or value is not plain.
        """
        if not self.folder:
            json.dumps(key, sort_keys=True)  # refuses what a folder would refuse, before the work
            return json.loads(json.dumps(make()))
        path = self._path(key)
        if path.exists():
            return json.loads(path.read_text())["value"]
        text = json.dumps({"key": key, "value": make()})
        # Whole or not at all: an interrupted run must not leave half a cell.
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, path)
        return json.loads(text)["value"]

    def holds(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a value for an equal key."""
        return self.folder is not None and self._path(key).exists()

    def _path(self, key: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{name}.json"
