"""Headers of safetensors files and single tensors of them, in a folder or on the Hub, without the rest of the files."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from safetensors import safe_open
from safetensors.torch import load

FIRST = 1 << 17  # bytes that are asked for to begin with: most headers are shorter
LONGEST = 100_000_000  # bytes of a header, the limit of safetensors
NEAR = 1 << 18  # bytes between two tensors that are read along rather than asked for apart
WHOLE = 1 << 26  # bytes that a server without ranges may send along


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it ("BF16"), its shape, and the bytes that it takes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


class LocalFiles:
    """The files of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path | None:
        """A small file, whole; None if there is none."""
        path = self.folder / name
        return path if path.is_file() else None

    def header(self, name: str) -> dict[str, Stored] | None:
        """What a safetensors file holds; None if there is none.

        Raises:
            SafetensorError: it is broken or truncated.
        """
        path = self.path(name)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
            return {key: stored(s.get_dtype(), s.get_shape()) for key, s in slices.items()}

    def tensors(self, name: str, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Some tensors of a file."""
        with safe_open(self.folder / name, "pt") as file:
            return {key: file.get_tensor(key) for key in keys}


class HubFiles:
    """The files of a repo at one commit: small ones are downloaded, of weights no more is read than is asked for.

    Args:
        repo: its id.
        revision: the commit.
        token: as in `huggingface_hub`.
    """

    def __init__(self, repo: str, revision: str | None = None, token: str | bool | None = None):
        self.repo, self.revision, self.token = repo, revision, token
        self._headers: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> Path | None:
        """A small file, whole, downloaded if need be; None if there is none.

        Raises:
            OSError: the repo or its revision is not there, or may not be read.
        """
        try:
            found = Path(hf_hub_download(self.repo, name, revision=self.revision, token=self.token))
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # there is no connection, and it is not in the cache
                raise
            return None
        return found

    def pinned(self, path: Path) -> "HubFiles":
        """The same repo at the commit of a downloaded file of it, so that what follows is of that commit."""
        return HubFiles(self.repo, path.parent.name, self.token)

    def _cached(self, name: str) -> LocalFiles | None:
        found = try_to_load_from_cache(self.repo, name, revision=self.revision)
        return LocalFiles(Path(found).parent) if isinstance(found, str) else None

    def header(self, name: str) -> dict[str, Stored] | None:
        """What a safetensors file holds; None if there is none.

        Raises:
            ValueError: its header is broken, or the file is truncated.
            OSError: it cannot be read.
        """
        cached = self._cached(name)
        if cached is not None:
            return cached.header(name)
        try:
            first, size = self._read(name, 0, FIRST)
        except EntryNotFoundError:
            return None
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or length > min(LONGEST, size - 8):
            raise ValueError(f"{name} is no whole safetensors file (a header of {length} bytes in a file of {size})")
        content = first[8 : 8 + length]
        if len(content) < length:
            content += self._read(name, 8 + len(content), 8 + length)[0]
        places = _parse(name, content, size - 8 - length)
        self._headers[name] = {"begin": 8 + length, "places": places}
        return {key: one for key, (one, _) in places.items()}

    def tensors(self, name: str, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Some tensors of a file whose header was read.

        Raises:
            OSError: they cannot be read.
        """
        cached = self._cached(name)
        if cached is not None:
            return cached.tensors(name, keys)
        places, begin = self._headers[name]["places"], self._headers[name]["begin"]
        content = {}
        for run in _runs({key: places[key][1] for key in keys}):
            start, end = places[run[0]][1][0], max(places[key][1][1] for key in run)
            read, _ = self._read(name, begin + start, begin + end)
            content |= {key: read[places[key][1][0] - start : places[key][1][1] - start] for key in run}
        return _decoded({key: (places[key][0], content[key]) for key in keys})

    def _read(self, name: str, start: int, end: int) -> tuple[bytes, int]:
        """The bytes from `start` to `end`, fewer where the file ends before; and the size of the file."""
        if start == end:
            return b"", 0
        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = build_hf_headers(token=self.token)
        headers |= {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
        try:
            with get_session().stream("GET", url, headers=headers) as response:
                return self._received(response, name, start, end)
        except OSError:
            raise
        except Exception as error:  # of the client, whose errors depend on its version
            raise OSError(f"{name} of {self.repo} cannot be read ({error!r}); try again, or download it.") from error

    def _received(self, response: Any, name: str, start: int, end: int) -> tuple[bytes, int]:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code == 206:
            return response.read(), int(response.headers["content-range"].rpartition("/")[2])
        size = int(response.headers["content-length"])
        if min(end, size) > WHOLE:
            raise OSError(f"The server gives {name} only whole, {size} bytes; download it, and name the folder.")
        content = b""
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= end:
                break
        return content[start:end], size


def stored(dtype: str, shape: Collection[int]) -> Stored:
    """A tensor of that type, called as in a file or as in torch ("bfloat16").

    Raises:
        ValueError: the name does not say how many bits it has.
    """
    found = re.search(r"\d{1,3}", dtype)
    if found is None and dtype != "BOOL":
        raise ValueError(f"{dtype!r} is no type of numbers")
    return Stored(dtype, tuple(shape), math.prod(shape) * int(found[0] if found else 8) // 8)


def _parse(name: str, header: bytes, size: int) -> dict[str, tuple[Stored, tuple[int, int]]]:
    """Tensors and their places in the `size` bytes that follow the header."""
    places = {}
    try:
        for key, entry in json.loads(header).items():
            if key == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            one = stored(entry["dtype"], [_whole(n) for n in entry["shape"]])
            if not 0 <= _whole(start) <= _whole(end) <= size or end - start != one.bytes:
                raise ValueError(f"{key} is {entry}, in {size} bytes")
            places[key] = one, (start, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} is no whole safetensors file ({error!r:.300})") from error
    if sum(one.bytes for one, _ in places.values()) != size:
        raise ValueError(f"{name} is no whole safetensors file (its header does not account for its {size} bytes)")
    return places


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


def _runs(places: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Keys that lie near one another, to be read at once, in their order."""
    runs: list[list[str]] = []
    end = 0
    for key in sorted(places, key=places.__getitem__):
        if runs and places[key][0] - end <= NEAR:
            runs[-1].append(key)
        else:
            runs.append([key])
        end = max(end, places[key][1]) if len(runs[-1]) > 1 else places[key][1]
    return runs


def _decoded(content: Mapping[str, tuple[Stored, bytes]]) -> dict[str, torch.Tensor]:
    """Tensors of their bytes, by way of a file that holds no others."""
    header, data = {}, b""
    for key, (one, of_tensor) in content.items():
        offsets = [len(data), len(data) + len(of_tensor)]
        header[key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": offsets}
        data += of_tensor
    text = json.dumps(header).encode()
    return load(len(text).to_bytes(8, "little") + text + data)
