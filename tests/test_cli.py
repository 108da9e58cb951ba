import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from entangle_fast import cli
from entangle_fast.config_reading import ConfigError
from entangle_fast.lock import LOCK
from entangle_fast.methods import METHODS
from entangle_fast.report import CHECKPOINT, REPORT, aggregate
from entangle_fast.storage import CheckpointError, save_json

ROOT = Path(__file__).resolve().parent.parent
JOB = """
[task]
forget = ["Sneaker"]
[model]
factory = "package.module:build"
[method]
name = "entangled"
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A config file, and stand-ins for the methods and for the job: job_config is what runs."""

    @dataclasses.dataclass
    class Method:
        alpha: float = 0.5

    monkeypatch.setitem(sys.modules, "entangle_fast.methods", SimpleNamespace(METHODS={"entangled": Method}))
    calls = []

    def unlearn_from_config(config, beside, resume, overwrite):
        assert beside == tmp_path
        calls.append((config, resume, overwrite))
        got.work(Path(config.run.out))

    monkeypatch.setitem(sys.modules, "entangle_fast.job_config", SimpleNamespace(unlearn_from_config=unlearn_from_config))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    got = SimpleNamespace(path=path, calls=calls, work=finish, out=tmp_path / "out")
    return got


def finish(out):
    row = {"seed": 0, "forget": 1.0, "adjacent": 95.0, "remote": 98.0}
    save_json(out / REPORT, {"methods": {"entangled": aggregate([row])}})


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_unlearn(job):
    done = call("unlearn", job.path, "--out", job.out, "--no-progress")
    assert done.exit_code == 0, done.output
    ((config, *how),) = job.calls
    assert how == [False, False] and config.run.out == str(job.out) and not config.run.progress and config.method.alpha == 0.5
    assert "95.0" in done.output and (job.out / "frontier.png").exists()
    assert call("unlearn", job.path, "--resume").exit_code == 0
    config, *how = job.calls[1]
    assert how == [True, False] and config.run.out == "runs/run" and config.run.progress
    assert call("unlearn", job.path, "--overwrite").exit_code == 0 and job.calls[2][1:] == (False, True)


def test_user_errors_are_one_line(job):
    job.path.write_text(JOB.replace("name", "nmae"))
    done = call("unlearn", job.path)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "job.toml" in done.stderr and "method.name: missing" in done.stderr
    assert not job.calls
    done = call("unlearn", "none.toml")
    assert done.exit_code == 2 and "none.toml: no such config file" in done.stderr
    assert isinstance(call("unlearn", job.path, "--debug").exception, ConfigError)


@pytest.mark.parametrize(
    "error", [ValueError("x: got 1,\n needs 2"), CheckpointError("x: full"), FileNotFoundError(2, "No", "x")]
)
def test_errors_of_the_job(job, error):
    def work(out):
        raise error

    job.work = work
    done = call("unlearn", job.path)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert call("unlearn", job.path, "--debug").exception is error


def test_bugs_keep_their_traceback(job):
    def work(out):
        raise KeyError("bug")

    job.work = work
    assert isinstance(call("unlearn", job.path).exception, KeyError)


def test_interrupt_says_what_was_kept(job):
    """In one line, with the way on that this folder has."""
    resume = f"go on with: entangle-fast unlearn {job.path} --out {job.out} --resume"
    for made, said in (
        ((), f"interrupted; nothing was written to {job.out}; the same command starts anew"),
        ((LOCK,), f"interrupted; nothing was written to {job.out}; the same command starts anew"),
        (("config.toml",), f"interrupted; kept in {job.out}: config.toml; the same command starts anew"),
        ((CHECKPOINT,), f"interrupted; kept in {job.out}: {CHECKPOINT}, config.toml; {resume}"),
        ((REPORT,), f"interrupted; kept in {job.out}: {CHECKPOINT}, config.toml, {REPORT}; {resume}"),
        ((), f"interrupted; kept in {job.out}: config.toml, {REPORT}; entangle-fast report {job.out} shows what is finished"),
    ):

        def work(out, made=made):
            for name in made:
                save_json(out / name, {})
            raise KeyboardInterrupt

        job.work = work
        done = call("unlearn", job.path, "--out", job.out)
        assert done.exit_code == 130 and done.stderr.strip() == said and not done.stdout
        if REPORT in made:
            (job.out / CHECKPOINT).unlink()


def test_an_interrupt_before_there_is_a_folder(job, monkeypatch):
    def reading(path, cls):
        raise KeyboardInterrupt

    monkeypatch.setattr("entangle_fast.config_reading.from_toml", reading)
    done = call("unlearn", job.path)
    assert done.exit_code == 130 and done.stderr.strip() == "interrupted"


def test_demo(tmp_path, monkeypatch):
    calls = []

    def run(**options):
        calls.append(options)
        finish(options["out"])

    monkeypatch.setitem(sys.modules, "entangle_fast.demo", SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    assert call("demo").exit_code == 0
    done = call("demo", "--forget", "Shirt", "--seeds", "1", "--out", "x", "--quick", "--no-progress")
    assert done.exit_code == 0 and "not to report" in done.stderr
    assert calls == [
        {"forget": "Sneaker", "seeds": 3, "out": Path("runs/demo"), "quick": False, "progress": True},
        {"forget": "Shirt", "seeds": 1, "out": Path("x"), "quick": True, "progress": False},
    ]
    assert call("demo", "--seeds", "0").exit_code == 2


def test_an_interrupted_demo_says_what_to_look_at(tmp_path, monkeypatch):
    def run(out, **options):
        finish(out)
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "entangle_fast.demo", SimpleNamespace(run=run))
    done = call("demo", "--out", tmp_path)
    said = f"kept in {tmp_path}: {REPORT}; entangle-fast report {tmp_path} shows what is finished; the same command starts anew"
    assert done.exit_code == 130 and done.stderr.strip() == f"interrupted; {said}"


def test_compare(tmp_path, monkeypatch):
    from entangle_fast import compare, compare_report

    runs, shown = [], []
    monkeypatch.setattr(compare, "run", runs.append)
    monkeypatch.setattr(compare_report, "rebuild", lambda folder, console: shown.append(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "compare-bag-boot" / "cells").mkdir(parents=True)
    assert call("compare", "--forget", "Bag, Boot", "--methods", "scrub,neggrad", "--seeds", 2, "--quick", "--no-progress").exit_code == 0
    (config,) = runs
    assert config.task.forget == ["Bag", "Boot"] and config.compare.methods == ["scrub", "neggrad"] and config.compare.seeds == 2
    assert config.compare.quick and not config.compare.progress and config.compare.jobs == 2
    assert shown == [Path("runs/compare-bag-boot")]
    (tmp_path / "runs" / "compare-sneaker-bag-boot" / "cells").mkdir(parents=True)
    assert call("compare", "--forget", "Sneaker", "--forget", "Bag, Boot", "--methods", "scrub", "--methods", "ssd").exit_code == 0
    config = runs.pop()  # what is given twice is not lost
    assert config.task.forget == ["Sneaker", "Bag", "Boot"] and config.compare.methods == ["scrub", "ssd"]
    for option in ("methods", "forget"):
        done = call("compare", f"--{option}", " , ")
        assert done.exit_code == 2 and done.stderr.startswith(f"error: {option}: got no name in ' , '; give one or more")
    done = call("compare", "--labels", "finer")
    assert done.exit_code == 2 and "task.labels: got 'finer'" in done.stderr
    assert call("compare", "--jobs", "0").exit_code == 2 and len(runs) == 1


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, monkeypatch):
    from entangle_fast import compare

    def run(config):
        save_json(Path(config.compare.out) / "cells" / "scrub-0.json", {})
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", run)
    done = call("compare", "--out", tmp_path / "x")
    said = f"interrupted; kept in {tmp_path / 'x'}: cells/ (1); the same command goes on"
    assert done.exit_code == 130 and done.stderr.strip() == said


def test_report(tmp_path):
    finish(tmp_path)
    done = call("report", tmp_path)
    assert done.exit_code == 0 and "98.0" in done.output and (tmp_path / "frontier.png").exists()
    done = call("report", tmp_path / "none")
    assert done.exit_code == 2 and "give the folder of a finished run" in done.stderr


def test_report_of_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "checkpoint.safetensors").touch()
    done = call("report", tmp_path)
    assert done.exit_code == 2 and f"{tmp_path}: the run is not finished; go on with ef.unlearn(" in done.stderr
    (tmp_path / "config.toml").write_text(JOB)
    mend = f"entangle-fast unlearn {tmp_path}/config.toml --resume"
    assert f"not finished; go on with {mend}" in call("report", tmp_path).stderr
    finish(tmp_path)  # of a run before that
    done = call("report", tmp_path)
    assert done.exit_code == 0 and "98.0" in done.output
    assert f"A later run into this folder is not finished; go on with {mend}" in done.output


def test_doctor_verbose(monkeypatch):
    from entangle_fast import doctor

    asked = []
    monkeypatch.setattr(doctor, "doctor", lambda console, verbose: asked.append(verbose))
    assert call("doctor").exit_code == call("doctor", "--verbose").exit_code == 0 and asked == [False, True]


def test_help_and_version(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = " ".join(call("compare", "--help").output.replace("│", " ").split())
    assert f"Names with commas, of {', '.join(METHODS)}. Default: all" in words and "Default: 3." in words
    demo = " ".join(call("demo", "--help").output.replace("│", " ").split())
    assert all("T-shirt, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Boot." in said for said in (words, demo))  # the others are alone
    assert all(name in call("--help").output for name in ("demo", "unlearn", "compare", "report", "doctor"))
    assert "entangle-fast" in call("--version").output


@pytest.mark.parametrize(
    "arguments, given, again",
    [
        (["demo"], None, True),
        (["unlearn", "x"], None, True),
        (["compare"], None, True),
        (["doctor"], None, False),
        (["demo"], "0", False),
        (["demo"], "1", False),
    ],
)
def test_training_starts_anew_with_huge_pages(monkeypatch, arguments, given, again):
    monkeypatch.setattr(sys, "argv", ["entangle-fast", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "bin/entangle-fast", *arguments])
    monkeypatch.setenv(cli.THP, "")  # so that whatever main sets is undone
    monkeypatch.delenv(cli.THP)
    if given:
        monkeypatch.setenv(cli.THP, given)
    starts = []
    monkeypatch.setattr(os, "execv", lambda *a: starts.append(a))
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    expected = (sys.executable, [sys.executable, "-X", "dev", "bin/entangle-fast", *arguments])
    assert starts == ([expected] if again else [])
    assert os.environ.get(cli.THP) == ("1" if again else given)


def test_as_a_module(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != cli.THP}
    done = subprocess.run([sys.executable, "-m", "entangle_fast", "unlearn", str(tmp_path / "none.toml")], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and "no such config file" in done.stderr
