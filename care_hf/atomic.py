"""Write files and folders whole or not at all: whoever is killed, or runs out of disk, leaves what was there before."""

import ctypes
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What transformers looks for in a checkpoint: of two kinds of weights it would take the one file, not the shards.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
LAST = "config.json"  # without it nothing loads
STAGING = ".saving-"
ABANDONED = 24 * 3600  # seconds after which a staging folder is one that a killed process left


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which holds the old or the new content at any moment.

    A link is replaced, and what it leads to left alone.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}{STAGING}{uuid.uuid4().hex[:8]}")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder to save a checkpoint into; at the end its files take their places in `folder`.

    Other files that `folder` holds stay, old weights that are not among the new ones go. If the block raises, `folder`
    is left as it was. A new folder, and on Linux one without subfolders, changes in one step. Otherwise file by file,
    `config.json` away before the others and back after them: whoever is killed then leaves what does not load, and the
    new checkpoint in a hidden folder beside it.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the disk is full, or something may not be written.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, keep = _staging(target), False
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if not _swap(staging, target):
            keep = True  # until all is in its place
            _move(staging, target)
            keep = False
        _sync(target.parent)
    except OSError as error:
        if not keep:
            raise
        saved = f"what was to be saved is whole in {staging}"
        raise OSError(f"{folder} could not be replaced ({error}); {saved}.") from error
    finally:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)


def _staging(target: Path) -> Path:
    """A new folder on the disk of `target`: beside it, or inside where nothing can be put beside it."""
    name = f".{target.name}{STAGING}"
    left = [path for path in target.parent.iterdir() if path.name.startswith(name)]
    for path in left:
        if time.time() - path.stat().st_mtime > ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
    beside = target.parent / f"{name}{uuid.uuid4().hex[:8]}"
    inside = target / beside.name
    if target.exists() and (
        target.stat().st_dev != target.parent.stat().st_dev or not os.access(target.parent, os.W_OK)
    ):
        inside.mkdir()
        return inside
    beside.mkdir()
    return beside


def _swap(staging: Path, target: Path) -> bool:
    """Put `staging`, with the other files of `target`, in the place of `target` in one step, where that is possible."""
    if not target.exists():
        os.rename(staging, target)
        return True
    if (
        staging.parent == target
        or target == Path.cwd()
        or any(p.is_dir() and not p.is_symlink() for p in target.iterdir())
    ):
        return False  # links to subfolders are files here
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if exchange is None:
        return False
    kept = [path for path in _others(staging, target) if not (staging / path.name).exists()]
    try:
        for path in kept:
            os.link(path, staging / path.name, follow_symlinks=False)
        shutil.copymode(target, staging)
    except OSError:
        for path in kept:  # no hard links on this file system: nothing is lost yet
            (staging / path.name).unlink(missing_ok=True)
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange(here, os.fsencode(staging), here, os.fsencode(target), both) == 0:
        return True
    for path in kept:
        (staging / path.name).unlink()
    return False


def _others(staging: Path, target: Path) -> list[Path]:
    """What stays in `target` when `staging` comes: all but old weights, if there are new ones."""
    new = {path.name for path in staging.iterdir()}
    weights = any(map(WEIGHTS.fullmatch, new))
    return [
        path
        for path in target.iterdir()
        if path != staging and path.name not in new and not (weights and WEIGHTS.fullmatch(path.name))
    ]


def _move(staging: Path, target: Path) -> None:
    """File by file, so that at no moment a mix of old and new loads."""
    stay = {path.name for path in _others(staging, target)}
    new = sorted(staging.iterdir(), key=lambda path: (path.name == LAST, path.name))
    if new and new[-1].name == LAST:
        (target / LAST).unlink(missing_ok=True)
        _sync(target)
    for path in target.iterdir():
        if path != staging and path.name not in stay and WEIGHTS.fullmatch(path.name):
            path.unlink()
    for path in new:
        place = target / path.name
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True)
        else:
            _put(path, place)
    _sync(target)


def _put(path: Path, place: Path) -> None:
    """Replace `place` by `path`, which stays as well where the file system has hard links."""
    partial = place.with_name(f".{place.name}{STAGING}{uuid.uuid4().hex[:8]}")
    try:
        os.link(path, partial)
    except OSError:
        partial = path
    os.replace(partial, place)


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files are in a folder."""
    if os.name == "nt":
        return  # Windows opens no folders, and syncs no file that was not opened to write
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
