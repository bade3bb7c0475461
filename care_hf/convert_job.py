"""What `care convert` does: the scripts of the folder `conversion`, by name."""

import importlib
import sys
from collections.abc import Sequence

from .settings_files import meant
from .shipped import shipped

SHARED = "safe_files"  # what the scripts share


def convert(name: str, arguments: Sequence[str]) -> str:
    """Run a converter; returns what it did.

    Args:
        name: of a script, "astra-vectors" of ``conversion/astra_vectors.py``.
        arguments: its own; "--help" tells which.

    Raises:
        ValueError, TypeError, OSError, ImportError: there is no such converter, or it refuses.
    """
    folder = shipped("conversion")
    known = sorted(path.stem.replace("_", "-") for path in folder.glob("[!_]*.py") if path.stem != SHARED)
    if name not in known:
        raise ValueError(f"There is no converter {name!r}; choose one of {', '.join(known)}.{meant(name, known)}")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # where they find what they share
    module, called = importlib.import_module(name.replace("-", "_")), sys.argv[:1]
    sys.argv[:1] = [f"care convert {name}"]  # what its help calls it
    try:
        return module.main(list(arguments))
    finally:
        sys.argv[:1] = called
