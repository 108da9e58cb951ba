"""Kernels are interpreted only if TRITON_INTERPRET=1 was set before their import, and then cannot be compiled.

So ``agreement/`` is interpreted in a process of its own, beside the compilations; here (slow) it is compiled and run by tests/ptx.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "agreement"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))  # gpu.py


@pytest.fixture(scope="session", autouse=True)
def interpreter_run(request, tmp_path_factory):
    """The process and its output's file, started with the first test of this folder; None where it is not asked for."""
    if INTERPRETED or not any("test_interpreter.py" in item.nodeid for item in request.session.items):
        yield None
        return
    output = tmp_path_factory.mktemp("interpreted") / "output.txt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", str(FOLDER)], env=environment, cwd=FOLDER.parents[2], stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    yield process, output
    process.kill()
    process.wait()
