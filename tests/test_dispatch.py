"""Which backend serves a call: explain(), the environment variable, and an install without the compiled library."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import entangle_fast as ef
from entangle_fast import backends, dispatch

A, B = torch.ones(3, 4), torch.ones(3, 2)
needs_cpp = pytest.mark.skipif(dispatch.EXTENSION is not None, reason="the compiled library is not built")


def test_explain_names_every_backend_and_computes_nothing(monkeypatch):
    monkeypatch.delenv(dispatch.ENV, raising=False)
    found = ef.explain(ef.ops.gram, A, B)
    assert found.op == "gram" and found.backend in dispatch.BACKENDS
    assert set(found.reasons) | {found.backend} == set(dispatch.BACKENDS)
    assert all(found.reasons.values()) and str(found).startswith(f"gram: {found.backend}")


def test_explain_checks_the_call_first():
    with pytest.raises(ValueError, match="^b:"):
        ef.explain(ef.ops.gram, A, B[:2])
    called = []
    for fn in (called.append, lambda x: called.append(x), ef.ops.check.tensor, torch.ops.entangle_fast.gram):
        with pytest.raises(TypeError, match="^fn: .* is no function of entangle_fast.ops; give one"):
            ef.explain(fn, A)
    assert not called
    with pytest.raises(TypeError, match="fn: got 'gram'"):
        ef.explain("gram", A, B)
    assert ef.ops.gram(A, B).shape == (3, 3)  # and leaves no trace


def test_one_thread_explains_while_another_computes(monkeypatch):
    found = []

    def refuse(op, args):
        if threading.current_thread() is threading.main_thread():  # in the midst of explaining
            found.append(pool.submit(ef.ops.gram, A, B).result())

    monkeypatch.setitem(dispatch.REFUSE, "reference", refuse)
    monkeypatch.setenv(dispatch.ENV, "reference")
    with ThreadPoolExecutor(1) as pool:
        assert ef.explain(ef.ops.gram, A, B).backend == "reference"
    assert found and torch.equal(found[0], (A @ A.T) * (B @ B.T))


@needs_cpp
def test_the_compiled_library_comes_first_on_the_cpu(monkeypatch):
    monkeypatch.delenv(dispatch.ENV, raising=False)
    assert ef.explain(ef.ops.gram, A, B).backend == "cpp"
    assert ef.explain(ef.ops.gram, A.half(), B.half()).backend == "reference"


@needs_cpp
def test_a_kernel_that_is_newer_than_the_compiled_library(monkeypatch):
    assert dispatch.UNBUILT == set(dispatch.ops()) - set(backends.CPP)
    monkeypatch.delenv(dispatch.ENV, raising=False)
    monkeypatch.setattr(backends, "UNBUILT", {"gram"})
    found = ef.explain(ef.ops.gram, A, B)
    assert found.backend == "reference" and "build it again" in found.reasons["cpp"]


@needs_cpp
def test_torch_where_it_is_faster(monkeypatch):
    a, b = torch.ones(3, 8, 64), torch.ones(3, 8, 64)
    monkeypatch.delenv(dispatch.ENV, raising=False)
    found = ef.explain(ef.ops.sqnorm, a, b)
    assert found.backend == "reference" and "bmm" in found.reasons["cpp"]
    assert ef.explain(ef.ops.sqnorm, a.bfloat16(), b.bfloat16()).backend == "cpp"
    monkeypatch.setenv(dispatch.ENV, "cpp")
    assert ef.explain(ef.ops.sqnorm, a, b).backend == "cpp"


def test_a_cpu_call_imports_no_gpu_compiler():
    code = (
        "import sys, torch, entangle_fast as ef\n"
        "m = torch.nn.Linear(8, 3)\n"
        "with ef.capture(m) as tape:\n"
        "    tape.backward(m(torch.randn(4, 8)).square().sum(1), stream=('gram',))\n"
        "assert tape.gram().shape == (4, 4)\n"
        "print(*(k for k in ('triton', 'sympy') if k in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("value", ["reference", " reference ", "triton,reference"])
def test_a_named_backend_is_used(monkeypatch, value):
    monkeypatch.setenv(dispatch.ENV, value)
    found = ef.explain(ef.ops.gram, A, B)
    assert found.backend == "reference" and found.reasons["cpp"] == f"not named in {dispatch.ENV}"
    assert torch.equal(ef.ops.gram(A, B), (A @ A.T) * (B @ B.T))


@pytest.mark.parametrize("value", ["", "auto"])
def test_no_choice(monkeypatch, value):
    monkeypatch.setenv(dispatch.ENV, value)
    assert ef.explain(ef.ops.gram, A, B).backend is not None


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "cudnn")
    with pytest.raises(ef.BackendError, match="unknown backend 'cudnn'; known: cpp"):
        ef.ops.gram(A, B)


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("ENTANGLE_FAST_ISA", "avx1")
    with pytest.raises(ef.BackendError, match="ENTANGLE_FAST_ISA=avx1: unknown instruction set 'avx1'; known: plain, avx2, avx512"):
        ef.ops.gram(A, B)
    monkeypatch.setenv("ENTANGLE_FAST_ISA", "plain")
    assert ef.explain(ef.ops.gram, A, B).backend is not None


def test_a_named_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "triton")
    with pytest.raises(ef.BackendError, match="nothing can serve this call"):
        ef.ops.gram(A, B)


def test_backends_agree(monkeypatch, generator):
    a, b = torch.randn(17, 5, 9, generator=generator), torch.randn(17, 5, 3, generator=generator)
    auto = ef.ops.gram(a, b)
    monkeypatch.setenv(dispatch.ENV, "reference")
    torch.testing.assert_close(ef.ops.gram(a, b), auto)


def test_table_covers_every_operation():
    assert set(dispatch.table()) == set(dispatch.ops())


WITHOUT = """
import sys
sys.modules["entangle_fast._C"] = None  # its import fails, as where no compiler was
import torch, entangle_fast as ef
from entangle_fast import dispatch
assert dispatch.EXTENSION is not None
a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 2)
g = torch.einsum("nto,nti->noi", b, a).flatten(1)
torch.testing.assert_close(ef.ops.gram(a, b), g @ g.T)
torch.testing.assert_close(torch.ops.entangle_fast.gram(a, b), g @ g.T)
found = ef.explain(ef.ops.gram, a, b)
assert found.backend == "reference" and "not loaded" in found.reasons["cpp"], found
x = torch.randn(4, 3, requires_grad=True)
ef.ops.sample_loss(x, torch.arange(4) % 3).sum().backward()
torch.library.opcheck(torch.ops.entangle_fast.gram.default, (a, b))
model = torch.nn.Linear(5, 2)
with ef.capture(model) as tape:
    tape.backward(model(a).square().sum((1, 2)))
assert tape.gram().shape == (4, 4)
print("served")
"""


def test_an_install_without_the_compiled_library():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "served", done.stderr[-2000:]


@pytest.mark.parametrize("op", sorted(dispatch.ops()))
def test_the_triton_file_of_an_operation_holds_it(op):
    """step_gram once was looked for in gram.py, and every GPU would have fallen back to the reference."""
    pytest.importorskip("triton")
    from pathlib import Path

    import entangle_fast

    kernels = Path(entangle_fast.__file__).parent.parent / "kernels"
    assert f"def {op}(" in (kernels / f"{backends.kernel_module(op)}.py").read_text()
