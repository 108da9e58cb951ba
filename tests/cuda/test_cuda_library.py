"""The CUDA kernels in the compiled library on a machine that may have neither GPU nor driver; and who may choose them."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import entangle_fast as ef
from entangle_fast import backends, dispatch

ROOT = Path(__file__).parents[2]
BUILT = torch._C._dispatch_has_kernel("entangle_fast_cuda::step_gram")
needs_cuda_build = pytest.mark.skipif(not BUILT, reason="built without CUDA: no nvcc then, or ENTANGLE_FAST_CUDA=0")


@needs_cuda_build
def test_every_named_operation_is_in_the_library():
    for op in backends.CUDA:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"entangle_fast_cuda::{op}", "CUDA"), op
        assert op in dispatch.ops()
    assert str(torch.ops.entangle_fast_cuda.step_gram.default._schema).partition("::")[2] == str(
        torch.ops.entangle_fast.step_gram.default._schema
    ).partition("::")[2]


@needs_cuda_build
def test_the_library_serves_the_cpu_beside_the_kernels():
    a, b = torch.randn(5, 3, 4), torch.randn(5, 3, 2)
    torch.testing.assert_close(torch.ops.entangle_fast.gram(a, b), ef.reference.gram(a, b))


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_an_error_in_words():
    library = ctypes.CDLL(backends._C.__file__)
    library.ef_cuda_error.restype = ctypes.c_char_p
    code = library.ef_cuda_processors(ctypes.byref(ctypes.c_int()))
    assert code in (35, 100)  # the driver is missing or too old; no device
    words = library.ef_cuda_error(code).decode()
    assert "driver" in words or "device" in words
    values = (ctypes.c_int64 * 1)(7)
    assert library.ef_cuda_fill(None, values, ctypes.c_int64(1), None) == code
    with pytest.raises((RuntimeError, NotImplementedError)):  # a CPU tensor has no kernel there
        torch.ops.entangle_fast_cuda.step_gram([torch.ones(3)], 1)


@needs_cuda_build
def test_the_stream_is_asked_of_the_library_that_torch_has_loaded():
    """A weak symbol of libtorch_cuda would stay null on every torch: no library that this one needs leads to it."""
    if (tool := shutil.which("nm")) is None:
        pytest.skip("nm is not installed")
    open_symbols = subprocess.run([tool, "-D", "--undefined-only", backends._C.__file__], text=True, capture_output=True, check=True).stdout
    assert "aoti_torch_call_dispatcher" in open_symbols or "torch_call_dispatcher" in open_symbols
    assert "cuda_stream" not in open_symbols
    assert ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # torch's own libraries are found by their bare names


def test_the_sources_use_no_name_that_torch_2_11_lacks():
    for file in (ROOT / "csrc").rglob("*.[ch]*"):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in file.read_text(), f"{file.name}: new in 2.13; TORCH_ERROR_CODE_CHECK is in both"


def test_cuda_is_never_the_default_on_the_cpu(monkeypatch):
    monkeypatch.delenv(dispatch.ENV, raising=False)
    found = ef.explain(ef.ops.sample_loss, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert found.backend != "cuda"
    assert "GPU" in found.reasons["cuda"] or "built without CUDA" in found.reasons["cuda"] or "not loaded" in found.reasons["cuda"]
    monkeypatch.setenv(dispatch.ENV, "cuda")
    with pytest.raises(ef.BackendError, match="nothing can serve this call"):
        ef.ops.sample_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


FAKE = ("step_gram", ([torch.empty(4, device="meta")], 1))


def test_a_kernel_that_was_never_measured_is_not_the_default(monkeypatch):
    op, args = FAKE
    monkeypatch.delenv(dispatch.ENV, raising=False)
    monkeypatch.setitem(backends.REFUSE, "cuda", lambda op, args: None)  # as on a GPU
    monkeypatch.setitem(backends.REFUSE, "triton", lambda op, args: None)
    monkeypatch.setattr(backends, "_measured", lambda: [])
    found = dispatch._choose(op, args)
    assert found.backend == "triton" and found.reasons["cuda"] == "compiled; not the default: never measured on a GPU"
    monkeypatch.setenv(dispatch.ENV, "cuda,triton")
    assert dispatch._choose(op, args).backend == "cuda"


def test_a_measured_range_makes_it_the_default(monkeypatch):
    op, args = FAKE
    monkeypatch.delenv(dispatch.ENV, raising=False)
    monkeypatch.setitem(backends.REFUSE, "cuda", lambda op, args: None)
    monkeypatch.setitem(backends.REFUSE, "triton", lambda op, args: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    row = {"op": op, "device": "NVIDIA H100", "dtype": "torch.float32", "least": 4, "most": 8, "speedup": 1.3}
    monkeypatch.setattr(backends, "_measured", lambda: [row])
    assert dispatch._choose(op, args).backend == "cuda"
    monkeypatch.setattr(backends, "_measured", lambda: [row | {"least": 5}])
    assert dispatch._choose(op, args).backend == "triton"
    monkeypatch.setattr(backends, "_measured", lambda: [row | {"device": "NVIDIA A100"}])
    found = dispatch._choose(op, args)
    assert found.backend == "triton" and "no measurement on NVIDIA H100" in found.reasons["cuda"]


def _generator():
    spec = importlib.util.spec_from_file_location("dispatch_table", ROOT / "bench" / "dispatch_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_committed_measurements_say():
    assert json.loads(backends._DEFAULTS.read_text()) == _generator().table(ROOT / "bench" / "results")


def test_the_table_takes_only_ranges_where_cuda_is_faster(tmp_path):
    def record(elements, ms, **more):
        return {"op": "step_gram", "backend": "cuda", "dtype": "torch.float32", "elements": elements, "ms": ms, "triton_ms": 1.0} | more

    (tmp_path / "gpu-h100").mkdir()
    points = [record(10, 0.95), record(100, 0.8), record(1000, 0.5), record(10**4, 0.99), record(10**5, 0.5, correct=False)]
    (tmp_path / "gpu-h100" / "a.json").write_text(json.dumps({"device": "NVIDIA H100", "backends": points}))
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "a.json").write_text(json.dumps({"device": "x", "backends": [record(1, 0.1)]}))
    row = {"op": "step_gram", "device": "NVIDIA H100", "dtype": "torch.float32", "least": 100, "most": 1000, "speedup": 1.25}
    assert _generator().table(tmp_path) == [row]


def _setup(code, **environment):
    text = (ROOT / "setup.py").read_text().partition("\nsetup(")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"__file__ = {str(ROOT / 'setup.py')!r}\n{text}\n{code}"], text=True, capture_output=True,
        env={**{k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}, **environment},
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


def test_setup_honours_the_environment(tmp_path):
    assert "code=sm_80" in _setup("print(gencode())")[0] and "code=sm_90a" in _setup("print(gencode())")[0]
    one = _setup("print(gencode())", TORCH_CUDA_ARCH_LIST="9.0a 12.0+PTX")[0]
    assert "sm_80" not in one and "code=sm_90a" in one and "code=sm_120" in one and "code=compute_120" in one
    assert "is too old" in _setup("gencode()", TORCH_CUDA_ARCH_LIST="7.0")[1]
    assert "not understood" in _setup("gencode()", TORCH_CUDA_ARCH_LIST="Hopper")[1]
    found, said = _setup("print(find_nvcc())", ENTANGLE_FAST_CUDA="0")
    assert found == "None" and "left out" in said
    nowhere = {"PATH": str(tmp_path)}
    hidden = "Path.exists = lambda self: False\n"
    found, said = _setup(hidden + "print(find_nvcc())", **nowhere)
    assert found == "None" and len([x for x in said.splitlines() if x]) == 1 and "no nvcc" in said
    assert "is not there" in _setup(hidden + "find_nvcc()", ENTANGLE_FAST_CUDA="1", **nowhere)[1]
    assert "needs 0" in _setup("find_nvcc()", ENTANGLE_FAST_CUDA="maybe")[1]
