"""The `entangle-fast` command. Commands import what they need when they run."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from entangle_fast.doctor import THP
from entangle_fast.methods import METHODS
from entangle_fast.tasks.fashion_mnist import CLASSES, SUPERCLASS_OF

TRAINING = {"demo", "unlearn", "compare"}

app = typer.Typer(
    name="entangle-fast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Make a trained model forget some data while keeping what is entangled with it.",
)  # fmt: skip

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
METHOD_NAMES = f"Names with commas, of {', '.join(METHODS)}. Default: all; retrain, and the original model, are always among them."
FORGETTABLE = ", ".join(name for name, group in zip(CLASSES, SUPERCLASS_OF) if SUPERCLASS_OF.count(group) > 1)
ANEW = "the same command starts anew"
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar or lines.")]


def main() -> None:
    """Entry point. Training starts anew once with huge pages on, which torch reads when it is imported."""
    # importing this module imported torch, so setting the variable here would come too late
    if TRAINING & set(sys.argv[1:]) and THP not in os.environ:
        os.environ[THP] = "1"  # also what keeps this from happening twice
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    app()


@contextmanager
def _plainly(debug: bool, out: Path | None = None, again: Callable[[str], str] = lambda found: ANEW) -> Iterator[None]:
    """User errors become one red line and exit 2; ctrl-C says what is kept in `out` and how to go on, exit 130.

    again: how, of what `report.run_in` finds there.
    """
    from entangle_fast.dispatch import BackendError
    from entangle_fast.storage import CheckpointError

    errors = Console(stderr=True)
    try:
        yield
    except KeyboardInterrupt:
        errors.print(Text(f"\ninterrupted{f'; {_kept(out, again)}' if out else ''}", style="yellow"), soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, CheckpointError, BackendError) as error:
        if debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        errors.print(Text("error: ", style="bold red").append(line), soft_wrap=True, style="red")
        raise typer.Exit(2) from None


def _kept(out: Path, again: Callable[[str], str]) -> str:
    from entangle_fast.lock import LOCK
    from entangle_fast.report import FINISHED, run_in

    there = sorted(path for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    if not there:
        return f"nothing was written to {out}; {ANEW}"
    names = [f"{path.name}/ ({len(list(path.iterdir()))})" if path.is_dir() else path.name for path in there]
    found = run_in(out)
    shows = f"entangle-fast report {out} shows what is finished" if found == FINISHED else ""
    return "; ".join(filter(None, (f"kept in {out}: {', '.join(names)}", shows, again(found))))


def _version(wanted: bool) -> None:
    if wanted:
        import torch

        from entangle_fast import __version__

        typer.echo(f"entangle-fast {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    forget: Annotated[str, typer.Option(help=f"Class of Fashion-MNIST to forget, of {FORGETTABLE}.")] = "Sneaker",
    seeds: Annotated[int, typer.Option(min=1, help="Runs to average.")] = 3,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and coarser, to see it work.")] = False,
    no_progress: NoProgress = False,
    debug: Debug = False,
) -> None:
    """Forget a class of Fashion-MNIST, compare with the baselines, draw the figures."""
    with _plainly(debug, out):
        from entangle_fast.demo import run

        run(forget=forget, seeds=seeds, out=out, quick=quick, progress=not no_progress)
        _show(out)
        if quick:
            Console(stderr=True).print("quick: a fifth of the passes; numbers to look around with, not to report", soft_wrap=True)


@app.command()
def unlearn(
    config: Annotated[Path, typer.Argument(help="TOML file with the tables task, model, method and run.")],
    out: Annotated[Path | None, typer.Option(help="Run folder, instead of run.out in the file.")] = None,
    no_progress: NoProgress = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder; show it if it is finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    debug: Debug = False,
) -> None:
    """Run the job that a TOML file describes."""
    from entangle_fast.config import RunConfig
    from entangle_fast.config_reading import from_toml
    from entangle_fast.report import FINISHED, UNFINISHED

    with _plainly(debug):
        job = from_toml(config, RunConfig)
    job.run = dataclasses.replace(job.run, out=str(out or job.run.out), progress=job.run.progress and not no_progress)
    folder = Path(job.run.out)
    words = ["entangle-fast", "unlearn", str(config), *(["--out", str(out)] if out else []), "--resume"]
    again = {UNFINISHED: f"go on with: {shlex.join(words)}", FINISHED: ""}
    with _plainly(debug, folder, lambda found: again.get(found, ANEW)):
        from entangle_fast.job_config import unlearn_from_config

        unlearn_from_config(job, beside=config.parent, resume=resume, overwrite=overwrite)
        _show(folder)


@app.command()
def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file with the tables task, compare and method.NAME, the options of a method, which is then run too. "
                            "Options given here go before what the file says."),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(help="Class to forget, or several with commas; another one of the same superclass must be left, as what is entangled "
                          f"with it. Without a config file one of Fashion-MNIST: {FORGETTABLE}. Default: Sneaker."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="What models are trained to tell apart: super, superclasses; fine, classes. Default: super.")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help=METHOD_NAMES)] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Models to train, each retrained as gold and unlearned by every method. Default: 3.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells, a method on a seed each, to run at once; 1 to compare seconds. Default: 2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; a comparison in it is gone on with, others are refused. Default: runs/compare-CLASS.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the passes, to see it work.")] = False,
    attack_seeds: Annotated[
        int | None, typer.Option(min=1, help="Times that each attacker, SGD and Adam, relearns what a model forgot. Default: 3.")
    ] = None,
    attack_steps: Annotated[int | None, typer.Option(min=1, help="Steps that an attacker has. Default: 200.")] = None,
    no_progress: NoProgress = False,
    debug: Debug = False,
) -> None:
    """Run methods on several seeds; one table, figures and a page."""
    with _plainly(debug):
        from entangle_fast.compare import read_config

        chosen = read_config(
            config, forget=_names("forget", forget), labels=labels, methods=_names("methods", methods), seeds=seeds, jobs=jobs,
            out=out and str(out), quick=quick or None, attack_seeds=attack_seeds, attack_steps=attack_steps,
            progress=False if no_progress else None,
        )  # fmt: skip
    folder = Path(chosen.compare.out)
    with _plainly(debug, folder, lambda found: "the same command goes on"):
        from entangle_fast.compare import run

        run(chosen)
        _show(folder)


def _names(option: str, given: list[str] | None) -> list[str] | None:
    """The names of an option that takes them with commas or is given several times; None where it is not given."""
    if not given:
        return None
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{option}: got no name in {', '.join(map(repr, given))}; give one or more with commas between, or leave it out")
    return names


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    debug: Debug = False,
) -> None:
    """Print the tables of a run again and redraw its figures, from its files alone."""
    with _plainly(debug):
        _show(run)


def _show(run: Path) -> None:
    if (run / "cells").is_dir():
        from entangle_fast.compare_report import rebuild
    else:
        from entangle_fast.report_table import rebuild

    rebuild(run, Console())


@app.command()
def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", help="Every GPU kernel by name.")] = False,
) -> None:
    """Say what is installed, which backend serves what, and how to mend what is missing."""
    from entangle_fast.doctor import doctor as examine

    examine(Console(), verbose)
