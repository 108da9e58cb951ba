"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
TRIES = 10


@contextlib.contextmanager
def held(folder: str | os.PathLike, name: str = "out") -> Iterator[None]:
    """Hold a folder, made if missing, against other runs, in this process too; `name` is the argument that it came as.

    The lock is the system's, on a file in the folder: it ends with the process, however that ends. The file, and folders that
    were made for it and stayed empty, are removed afterwards. Where nothing can be written, or the file system has no locks,
    nothing is held: whoever writes says the former.
    Raises ValueError where another run holds it: at once, nothing is waited for.
    """
    from filelock import FileLock, Timeout  # late: it also installs hooks for forks and the end of the process

    folder = Path(folder)
    place = folder.absolute()  # a run may change the current folder
    made = [path for path in (place, *place.parents) if not path.exists()]
    lock = FileLock(place / LOCK)
    try:
        _acquire(lock, place)
    except Timeout:
        raise ValueError(f"{name}: {folder} is being written by another process, which holds {folder / LOCK}; wait for it, or give "
                         "another folder") from None  # fmt: skip
    except OSError:
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows removes no open file
                os.unlink(place / LOCK)  # before the release: afterwards it may be the next run's
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # as soon as something lies in it
                path.rmdir()


def _acquire(lock, folder: Path) -> None:
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            return
        except FileNotFoundError:  # a run that is over took its empty folder away in between
            if not left:
                raise
