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
