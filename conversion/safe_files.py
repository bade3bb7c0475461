"""What all converters share: foreign files read without running code in them, and files that are whole or not there."""

import json
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def load_pickle(path: str | Path) -> Any:
    """Read a file of `torch.save`: tensors and plain containers only, on the CPU, mapped rather than read where it can.

    Raises:
        ValueError: the file holds anything else, which could be code, or is broken.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain containers, which could be code and is not run, or is no file "
            "of torch.save; expected what torch.load reads with weights_only=True. Where it comes from, save its "
            f"tensors alone. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole file of torch.save ({error}); copy it again.") from error


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        ValueError: the file is broken.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again.") from error


@contextmanager
def whole(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Yields where to write; what is there takes the name `path` once all is written, and vanishes if anything fails.

    Args:
        path: the name it gets; its folder exists.
        folder: whether a folder is written, not a file.

    Raises:
        FileExistsError: something has that name already.
        FileNotFoundError: the folder that it should lie in does not exist.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another output, or move it away first.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} would lie in a folder that does not exist; make it first.")
    # Beside its final place: a rename is at once only within one file system.
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        target = beside / path.name
        if folder:
            target.mkdir()
        yield target
        target.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole(path) as target:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, target, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those that its index names, or else all; safetensors where there are any.

    Raises:
        FileNotFoundError: there are none.
    """
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).exists():
            names = set(json.loads((folder / index).read_text())["weight_map"].values())
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{folder / index} names {outside}; expected files of its own folder.")
            return [folder / name for name in sorted(names)]
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(f"{folder} has no weights, neither *.safetensors nor pytorch_model*.bin; copy them there.")


def stream_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a weight file, one after the other."""
    return _walk(path, lambda file, name: file.get_tensor(name), lambda tensor: tensor)


def tensor_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of its tensors, which are not read."""
    return _walk(path, lambda file, name: tuple(file.get_slice(name).get_shape()), lambda t: tuple(t.shape))


def _walk(path: Path, from_safetensors: Callable, from_tensor: Callable) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  no dict
                    yield name, from_safetensors(file, name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again.") from error
        return
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no plain dict of tensors; expected the state dict of a model.")
    yield from ((name, from_tensor(tensor)) for name, tensor in state.items())


class Shards:
    """Weights of a checkpoint, written in files of a bounded size.

    Args:
        folder: where they are written.
        size: bytes in memory, and in a file, before a further tensor begins another.
    """

    def __init__(self, folder: Path, size: int = 2 * 2**30):
        self.folder, self.size = folder, size
        self._files: list[list[str]] = []
        self._waiting: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        if self._bytes and self._bytes + tensor.nbytes > self.size:
            self._flush()
        self._waiting[name] = tensor.clone().contiguous()  # what is mapped from a file may share its storage
        self._bytes, self._total = self._bytes + tensor.nbytes, self._total + tensor.nbytes

    def _flush(self) -> None:
        save_file(self._waiting, self.folder / f"shard-{len(self._files)}", metadata={"format": "pt"})
        self._files.append([*self._waiting])
        self._waiting, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self._waiting:
            self._flush()
        where = {}
        for number, names in enumerate(self._files):
            final = f"model-{number + 1:05}-of-{len(self._files):05}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / final)
            where |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def check_vectors(vectors: dict[Any, torch.Tensor], what: str, path: str | Path) -> int:
    """Assert that all are finite and of one shape (d,); returns d.

    Raises:
        ValueError: one is not, or there are none.
    """
    if not vectors:
        raise ValueError(f"{path} holds no {what}; expected at least one.")
    size = next(iter(vectors.values())).shape
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.shape != size or not vector.is_floating_point():
            raise ValueError(
                f"{path}: {what} {name} is {vector.dtype} {tuple(vector.shape)}; expected floating point (d,), "
                f"the same for all: the first has {tuple(size)}."
            )
        if not torch.isfinite(vector).all():
            raise ValueError(f"{path}: {what} {name} is not finite; it is broken where it comes from.")
    return len(next(iter(vectors.values())))


def run(main: Callable[[Sequence[str] | None], str]) -> None:
    """Run a script: say what it did, or in one line what is wrong, with exit status 1."""
    try:
        sys.stdout.write(f"{main(None)}\n")
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
