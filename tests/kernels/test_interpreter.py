"""Every kernel against the reference, in Triton's interpreter: see agreement/.

Kernels are interpreted only if TRITON_INTERPRET=1 was set before their import, and then cannot be compiled: each file of
agreement/ is interpreted in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "agreement").glob("test_*.py"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already: see agreement/")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_agreement_"))
def test_kernels_agree_with_the_reference_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
