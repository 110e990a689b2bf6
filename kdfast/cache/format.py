"""The files of a cache: shards in the safetensors format, and manifest.json, which names them.

    shard-00000.safetensors    indices (rows, k) uint16 or int32 · log_probs (rows, k) float16 or float32
                               token_ids (rows,) int32 · offsets (sequences + 1,) int64: where each sequence begins
    manifest.json              version, k, vocab_size, temperature, dtype, metadata, and of each shard its file, rows,
                               sequences, bytes and sha256

A file is written under another name, synced and renamed, and so is the manifest after it. So a shard that the manifest
does not name does not exist, and one that it names is whole.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

VERSION = 1
MANIFEST = "manifest.json"
SMALL_VOCAB = 65536  # up to here indices are uint16
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<u2"): "U16", np.dtype("<i4"): "I32", np.dtype("<i8"): "I64",
    DTYPES["float16"]: "F16", DTYPES["float32"]: "F32",
}  # fmt: skip
_MOST_HEADER = 1 << 20  # bytes; ours have some hundred


class CacheError(ValueError):
    """A cache that is damaged, of another version, or not what it is taken for."""


class Shard(NamedTuple):
    file: str
    rows: int
    sequences: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    k: int
    vocab_size: int
    temperature: float
    dtype: str
    metadata: dict[str, Any]
    shards: list[Shard]

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """A shard's tensors: their dtypes, and their shapes but for rows."""
        index: np.dtype[Any] = np.dtype("<u2" if self.vocab_size <= SMALL_VOCAB else "<i4")
        columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "offsets": (np.dtype("<i8"), ()),
            "indices": (index, (self.k,)),
            "log_probs": (DTYPES[self.dtype], (self.k,)),
            "token_ids": (np.dtype("<i4"), ()),
        }
        return columns


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CacheError(f"path: {path} holds no cache: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: cannot be read: {error}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CacheError(f"{file}: has version {version!r}, but this kdfast reads version {VERSION}")
    try:
        shards = [
            Shard(*(kind(each[name]) for name, kind in Shard.__annotations__.items())) for each in content["shards"]
        ]
        k, vocab_size = int(content["k"]), int(content["vocab_size"])
        numbers = float(content["temperature"]), str(content["dtype"])
        manifest = Manifest(k, vocab_size, *numbers, dict(content["metadata"]), shards)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{file}: is not a manifest: {error!r}") from None
    wrong = [
        name
        for name, is_right in {
            "k": 1 <= manifest.k <= manifest.vocab_size,
            "vocab_size": 1 <= manifest.vocab_size < 2**31,
            "temperature": 0 < manifest.temperature < math.inf,
            "dtype": manifest.dtype in DTYPES,
            "shards": all(min(x.rows, x.sequences, x.bytes) >= 0 and Path(x.file).name == x.file for x in shards),
        }.items()
        if not is_right
    ]
    if wrong:
        raise CacheError(f"{file}: {wrong[0]} is not what it may be")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    content = {"version": VERSION, **manifest._asdict(), "shards": [shard._asdict() for shard in manifest.shards]}
    temporary = path / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / MANIFEST)
    sync_folder(path)


def write_shard(path: Path, name: str, tensors: dict[str, np.ndarray[Any, Any]]) -> Shard:
    """Writes a shard; tensors: those of Manifest.columns."""
    from safetensors.numpy import save_file

    temporary = path / f"{name}.tmp"
    try:
        save_file(tensors, temporary)
        digest = file_sha256(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        os.replace(temporary, path / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path)
    return Shard(name, len(tensors["token_ids"]), len(tensors["offsets"]) - 1, size, digest)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Makes renamed files stay renamed after a power failure."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_shard(path: Path, manifest: Manifest, shard: Shard) -> tuple[int, dict[str, int]]:
    """A file descriptor, and where each tensor begins. A file that is not as the manifest has it is an error."""
    file = path / shard.file
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CacheError(f"{file}: cannot be opened: {error.strerror}") from None
    try:
        return descriptor, _starts(descriptor, file, manifest, shard)
    except BaseException:
        os.close(descriptor)
        raise


def _starts(descriptor: int, file: Path, manifest: Manifest, shard: Shard) -> dict[str, int]:
    size = os.fstat(descriptor).st_size
    if size != shard.bytes:
        raise CacheError(f"{file}: has {size} bytes, but the manifest says {shard.bytes}")
    header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    try:
        if not 2 <= header_bytes <= min(_MOST_HEADER, size - 8):
            raise ValueError(f"a header of {header_bytes} bytes")
        header = json.loads(os.pread(descriptor, header_bytes, 8))
        starts = {}
        for name, (dtype, shape) in manifest.columns().items():
            count = shard.sequences + 1 if name == "offsets" else shard.rows
            begin, end = header[name]["data_offsets"]
            expected = {"dtype": _NAMES[dtype], "shape": [count, *shape]}
            if {key: header[name][key] for key in expected} != expected:
                raise ValueError(f"{name} is not {expected}")
            wanted = count * math.prod(shape) * dtype.itemsize
            if not 0 <= begin <= end <= size - 8 - header_bytes or end - begin != wanted:
                raise ValueError(f"{name} lies at {begin} to {end}")
            starts[name] = 8 + header_bytes + begin
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{file}: is not the shard that the manifest names: {error}") from None
    return starts


def read_rows(
    descriptor: int, start: int, dtype: np.dtype, shape: tuple[int, ...], begin: int, end: int
) -> np.ndarray[Any, Any]:
    """Rows [begin, end) of a tensor, (end - begin, *shape)."""
    out = np.empty((end - begin, *shape), dtype)
    view, width = out.view(np.uint8).reshape(-1).data, math.prod(shape) * dtype.itemsize
    at, done = start + begin * width, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], at + done)
        if count == 0:
            raise CacheError("a shard ended while it was read")
        done += count
    return out


def lock(path: Path) -> IO[str]:
    """An open file; another writer of this folder gets an error as long as it is open."""
    file = (path / ".lock").open("w")
    with contextlib.suppress(ImportError):  # on Windows there is no such lock
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise BlockingIOError(f"path: another writer is writing to {path}") from None
    return file
