"""Files: digests, locks, and writes that are whole or not there."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import xxhash

from common.failures import as_user_error, errno_of, named_file


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """As digest, of a file's contents, in bounded memory."""
    with open(named_file(path), "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def json_digest(value) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    """json.loads' object_pairs_hook for which a name that comes twice is a ValueError."""
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"`{twice[0]}` comes twice")
    return dict(pairs)


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """An exclusive lock on a file, made if need be, until its process ends; waiting() is called if another has it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(folder: Path) -> TextIO:
    """Makes a folder, if need be, and a file in it, which is locked: until all that this gave are closed, or their
    processes have ended in whatever way, remove_dead leaves the folder alone."""
    folder.mkdir(exist_ok=True)
    file = open(folder / "alive", "a+")
    with suppress(OSError):  # where there are no locks nothing is removed
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def remove_dead(folders: Iterable[Path]) -> None:
    """Removes those of which no process needs `held` any more."""
    for folder in folders:
        with suppress(OSError), open(folder / "alive", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a write or a flush names this file; one that safetensors gives as text becomes one."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise
    except Exception as e:
        if code := errno_of(e):
            raise OSError(code, os.strerror(code), str(path)) from e
        raise


def write_file(path: Path, blocks: Iterable) -> dict:
    """Writes and flushes one file from blocks of bytes; its {"size": bytes, "digest": hex}."""
    state = xxhash.xxh3_128()
    with naming(path), open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            state.update(block)
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "digest": state.hexdigest()}


def replace_file(path: Path, data: str | bytes) -> None:
    """Writes a whole file in one step: whoever reads it finds the old contents or the new."""
    # In a shared folder others may write it too, in a container perhaps with our pid.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_file(temporary, [data.encode(errors="backslashreplace") if isinstance(data, str) else data])
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[str]:
    """The files that from_pretrained reads weights from: beside model.safetensors it reads no index."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return ["model.safetensors"]
    return sorted({*json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()})


def weights_digest(folder: str) -> str:
    """Of a model's safetensors files, by name, and its config.json: all that decides what its parameters are."""
    with as_user_error(f"model {folder}: its weights cannot be read"):
        files = ["config.json", *weight_files(Path(folder))]
        with ThreadPoolExecutor(8) as threads:
            digests = list(threads.map(lambda name: file_digest(Path(folder) / name), files))
    return digest(json.dumps(dict(zip(files, digests, strict=True))).encode())
