"""What nvcc makes of the CUDA sources, host code and PTX, run on the CPU (tests/ptx): the tests of tests/cuda_host in a process of
their own, where it takes the emulator's place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("host_step", "host_sample_loss", "host_w2", "project", "gram", "compiled_mutation", "compiled_counts")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
@pytest.mark.parametrize(
    "target, which",
    [
        ("sm_90a", "not test_large"),
        pytest.param("sm_90a", "test_large", marks=pytest.mark.slow),
        pytest.param("sm_80", "", marks=pytest.mark.slow),
        pytest.param("sm_100", "", marks=pytest.mark.slow),
    ],
)
def test_the_tests_of_the_emulator_pass(target, which):
    files = [str(ROOT / "tests" / "cuda_host" / f"test_{name}.py") for name in SOURCES]
    environment = {**os.environ, "EF_CUDA_COMPILED": target, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", which, *files], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
