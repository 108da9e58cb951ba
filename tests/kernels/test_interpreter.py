"""Every kernel against the reference, in Triton's interpreter: see interpreted/."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already: see interpreted/")
def test_every_kernel_agrees_with_the_reference_in_the_interpreter():
    pytest.importorskip("triton")
    folder = Path(__file__).parent / "interpreted"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(folder)], env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])
