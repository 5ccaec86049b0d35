"""Files: digests, locks, and writes that are whole or not there."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from common.failures import UserError


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """As digest, of a file's contents, in bounded memory."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            state.update(block)
    return state.hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """An exclusive lock on a file, made if need be; waiting() is called first if another process has it.

    The kernel frees it when its process ends, however it ends.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_file(path: Path, data: str | bytes) -> None:
    """Writes a whole file in one step: whoever reads it finds the old contents or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # in a shared folder others may write it too
    write_file(temporary, [data.encode() if isinstance(data, str) else data])
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_file(path: Path, blocks: Iterable) -> dict:
    """Writes and flushes one file from blocks of bytes; its entry in the manifest."""
    state, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            state.update(block)
            size += memoryview(block).nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "digest": state.hexdigest()}


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def weight_digests(model_folder: str, cache_dir: str) -> dict[str, str]:
    """The digest of each safetensors file of a model, by file name, read in parallel and remembered in cache_dir."""
    memo_path = Path(cache_dir) / "weight_digests.json"
    memo = _read_memo(memo_path)
    files = sorted(Path(model_folder).glob("*.safetensors"))
    try:
        stamps = {path: f"{path.resolve()}:{file_stamp(path)}" for path in files}
        unknown = [path for path in files if stamps[path] not in memo]
        with ThreadPoolExecutor(8) as pool:
            memo.update(zip((stamps[path] for path in unknown), pool.map(file_digest, unknown), strict=True))
    except OSError as e:
        raise UserError(f"model {model_folder}: {e.filename} cannot be read: {e.strerror}") from None
    if unknown:
        with suppress(OSError):  # the next run reads the weights again
            memo_path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(memo_path, json.dumps({"weights": memo, "digest": _memo_digest(memo)}))
    return {path.name: memo[stamps[path]] for path in files}


def _read_memo(path: Path) -> dict[str, str]:
    """What weight_digests remembers; nothing if it is not as written, for a wrong digest stands for other weights."""
    try:
        content = json.loads(path.read_text())
        memo, expected = content["weights"], content["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return memo if _memo_digest(memo) == expected else {}


def _memo_digest(memo: dict[str, str]) -> str:
    return digest(json.dumps(memo, sort_keys=True).encode())


def file_stamp(path: str | Path) -> tuple[int, int, int, int] | None:
    """Changes whenever the file does: its size, times of change and inode; None if it has gone."""
    try:
        s = os.stat(path)
    except OSError:
        return None
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino
