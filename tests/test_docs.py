"""What the documents show is run or looked up: README's blocks, names and links, and every docstring's examples."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer

import entangle_fast as ef
from entangle_fast import cli
from entangle_fast.config import RunConfig
from entangle_fast.config_reading import from_toml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """(line, text) of the fenced blocks of a language."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield README[: found.start(1)].count("\n") + 1, found[1]


def test_every_block_is_of_a_kind_that_is_checked():
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"", "python", "console", "toml", "text"}


def test_readme_python(tmp_path, monkeypatch):
    """In one namespace: the blocks go on from one another, and say so."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, text in blocks("python"):
        exec(compile("\n" * (line - 1) + text, "README.md", "exec"), names)


def test_readme_toml(tmp_path):
    for line, text in blocks("toml"):
        path = tmp_path / f"{line}.toml"
        path.write_text(text)
        from_toml(path, RunConfig)


def test_readme_console():
    """Commands parse, with the options that are there; make knows its targets. None is run."""
    command, targets = typer.main.get_command(cli.app), (ROOT / "Makefile").read_text()
    seen = set()
    for _, text in blocks("console"):
        for line in text.splitlines():
            program, *words = shlex.split(line, comments=True) or [None]  # a comment
            seen.add(program)
            if program == "make":
                assert re.search(rf"^{words[0]}:", targets, re.MULTILINE), line
            elif program == "entangle-fast":
                command.commands[words[0]].make_context(words[0], words[1:])  # raises for what it does not know
    assert seen == {"make", "pip", "entangle-fast", None}


def test_readme_names():
    """Every ef.… that README writes exists."""
    names = set(re.findall(r"\bef\.((?:\w+\.)*\w+)", README))
    assert len(names) >= 20
    for name in names:
        found = ef
        for part in name.split("."):
            assert hasattr(found, part), f"ef.{name}"
            found = getattr(found, part)


def test_readme_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    headings = {h.lower().replace(" ", "-").replace(",", "") for h in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\(#([^)]+)\)", README):
        assert target in headings, target


def modules():
    """The package's own modules; kernels need triton and are tested in their room."""
    here = ROOT / "entangle_fast"
    for found in pkgutil.walk_packages([str(here)], "entangle_fast."):
        if found.name.rpartition(".")[2] not in ("__main__", "_C", "make_slice"):
            yield found.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
