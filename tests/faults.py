"""File operations that fail, crash, or lose what was not flushed, one chosen operation at a time.

Disk stands between the product and the file system: it counts each change (a file opened for writing, a
block written, a flush, a folder made, a rename, a removal) and lets the n-th one go wrong.
"""

import builtins
import contextlib
import errno
import os
import threading
from pathlib import Path

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Crash(BaseException):
    """The process ends here; nothing after it changes a file."""


class Disk:
    """Use as `with Disk(monkeypatch, modules, n, "crash"):`; the number of changes so far is `count`.

    how: "crash" raises Crash at the n-th change, a write being half done, and at every one after it; "full"
    raises ENOSPC at the n-th change if it needs space, and at every later one that does; a callable is
    called in place of the n-th change.
    modules: those whose `open` is replaced; os functions are replaced everywhere.
    """

    def __init__(self, monkeypatch, modules, fail_at: int = 0, how="crash"):
        self.monkeypatch, self.modules, self.fail_at, self.how = monkeypatch, modules, fail_at, how
        self.count, self.is_down, self.lock = 0, False, threading.RLock()
        self.unflushed = set()  # inodes of files with blocks that were not flushed
        self.entries = {}  # inode of a folder -> [how to undo each change since it was flushed, given its path]
        self.real = {name: getattr(os, name) for name in CHANGES}

    def __enter__(self) -> "Disk":
        for name in CHANGES:
            self.monkeypatch.setattr(os, name, lambda *args, name=name, **kwargs: self._change(name, args, kwargs))
        for module in self.modules:
            self.monkeypatch.setattr(module, "open", self._open, raising=False)
        return self

    def __exit__(self, *_) -> None:
        self.monkeypatch.undo()

    def step(self, needs_space: bool, half=None) -> None:
        """Counts a change that is about to be made, or raises."""
        with self.lock:
            self.count += 1
            is_chosen = self.count == self.fail_at
            if callable(self.how):
                if is_chosen:
                    self.how()
            elif self.is_down or is_chosen:
                if self.how == "crash":
                    if half is not None and not self.is_down:
                        half()
                    self.is_down = True
                    raise Crash
                self.is_down = True
                if needs_space:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _change(self, name: str, args: tuple, kwargs: dict):
        self.step(needs_space=name in ("mkdir", "fsync"))
        path, undo = Path(str(args[0])), None
        if name in ("rename", "replace"):
            target = Path(args[1])
            if path.parent == target.parent and not target.exists():  # lose_power knows no move between folders
                undo = lambda folder: self.real["rename"](folder / target.name, folder / path.name)  # noqa: E731
        elif name == "mkdir":
            undo = lambda folder: self.real["rmdir"](folder / path.name)  # noqa: E731
        elif name == "fsync":
            inode = os.fstat(args[0]).st_ino
            self.unflushed.discard(inode)
            self.entries.pop(inode, None)
        result = self.real[name](*args, **kwargs)
        if undo:
            self.entries.setdefault(path.parent.stat().st_ino, []).append(undo)
        return result

    def _open(self, path, mode="r", *args, **kwargs):
        if not set(mode) & set("wax"):
            return builtins.open(path, mode, *args, **kwargs)
        self.step(needs_space=True)
        path = Path(path)
        if not path.exists():
            undos = self.entries.setdefault(path.parent.stat().st_ino, [])
            undos.append(lambda folder: self.real["unlink"](folder / path.name))
        file = builtins.open(path, mode, *args, **kwargs)
        self.unflushed.add(os.fstat(file.fileno()).st_ino)
        return _File(file, self)

    def lose_power(self, folder: Path) -> None:
        """What a machine that stops may do: blocks and entries that were not flushed are gone."""
        for path in [p for p in folder.rglob("*") if p.is_file() and p.stat().st_ino in self.unflushed]:
            os.truncate(path, path.stat().st_size // 2)
        folders = {path.stat().st_ino: path for path in [folder, *folder.rglob("*")] if path.is_dir()}
        for inode in sorted(self.entries, key=lambda i: -len(folders.get(i, folder).parts)):  # inner ones first
            for undo in reversed(self.entries[inode]):
                with contextlib.suppress(OSError):  # deleted since
                    undo(folders.get(inode, Path("/nowhere")))


class _File:
    """A file being written whose writes are counted."""

    def __init__(self, file, disk: Disk):
        self.file, self.disk = file, disk

    def write(self, data):
        data = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        self.disk.step(needs_space=True, half=lambda: self.file.write(data[: len(data) // 2]))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
