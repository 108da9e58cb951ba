"""A folder has one run at a time, and nobody is kept out of one by a run that is over."""

import subprocess
import sys

import filelock
import pytest

from entangle_fast.lock import LOCK, held

HOLD = """
import sys, time
from entangle_fast.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def other(folder):
    """Another process that holds the folder until its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def refused(folder):
    said = rf"^out: {folder} is being written by another process, which holds {folder / LOCK}; wait for it, or give another folder$"
    with pytest.raises(ValueError, match=said), held(folder):
        raise AssertionError("it was let in")


def test_a_folder_is_held_once(tmp_path):
    with other(tmp_path) as process:
        refused(tmp_path)
        refused(tmp_path)  # the refused one took nothing away
        process.communicate()
    with held(tmp_path):
        refused(tmp_path)  # in one process too
        with held(tmp_path / "inner", "folder"), pytest.raises(ValueError, match="^folder: "), held(tmp_path / "inner", "folder"):
            pass
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_keeps_nobody_out(tmp_path):
    with other(tmp_path) as process:
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_was_made_for_it_and_is_empty_goes(tmp_path):
    with pytest.raises(KeyError), held(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_folder_that_another_run_takes_away_is_made_again(tmp_path, monkeypatch):
    acquire, folder, left = filelock.FileLock.acquire, tmp_path / "run", [2]

    def late(lock, **options):
        if left[0]:
            left[0] -= 1
            folder.rmdir()
            raise FileNotFoundError(2, "No such file or directory")
        return acquire(lock, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with held(folder):
        refused(folder)
    left[0] = 10**6  # forever: not held, as where nothing can be written
    with held(folder):
        assert not list(tmp_path.iterdir())


def test_a_run_that_changes_the_current_folder_lets_go_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with held("run"):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["elsewhere", "elsewhere/run"]


def test_where_nothing_can_be_written_nothing_is_held(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    with held(tmp_path):
        assert not list(tmp_path.iterdir())
    (tmp_path / LOCK).touch()  # not ours, so it stays
    with held(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
