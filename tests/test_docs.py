"""What the documents show is run: README's python blocks, and every docstring's examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, python block {number + 1}", "exec"), {"__name__": "__main__"})


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
