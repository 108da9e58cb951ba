"""Every kernel against the reference, in Triton's interpreter: see agreement/."""

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already: see agreement/")
def test_every_kernel_agrees_with_the_reference_in_the_interpreter(interpreter_run):
    process, output = interpreter_run
    assert process.wait() == 0, output.read_text()
