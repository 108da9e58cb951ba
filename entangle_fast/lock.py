"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def held(folder: str | os.PathLike, name: str = "out") -> Iterator[None]:
    """Hold a folder, made if missing, against other runs, in this process too; `name` is the argument that it came as.

    The lock is the system's, on a file in the folder: it ends with the process, however that ends. The file, and folders that
    were made for it and stayed empty, are removed afterwards. What cannot be locked because nothing can be written there is not
    held: whoever writes says so.
    Raises ValueError where another run holds it: at once, nothing is waited for.
    """
    from filelock import FileLock, Timeout  # late: it also installs hooks for forks and the end of the process

    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
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
                os.unlink(folder / LOCK)  # before the release: afterwards it may be the next run's
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # as soon as something lies in it
                path.rmdir()
