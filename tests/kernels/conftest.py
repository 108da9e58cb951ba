"""agreement/ imports what tests/ptx has: here (slow) it is compiled and its PTX run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))  # gpu.py


def pytest_collection_modifyitems(items):
    """The longest tests first, so that processes which share the tests end together."""
    items.sort(key=lambda item: "test_interpreter.py" not in item.nodeid)
