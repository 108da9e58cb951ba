import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from entangle_fast import doctor as D
from entangle_fast.backends import EXTENSION, ISAS

TABLE = {
    "gram": {"cpp": (True, ""), "cuda": (False, "no CUDA C++ kernel for this operation"), "triton": (False, "no GPU"),
             "reference": (True, "")},
    "w2_sorted": {"cpp": (False, "no C++ kernel"), "cuda": (False, "no GPU"), "triton": (False, "no Triton kernel yet"),
                  "reference": (True, "")},
}  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setitem(sys.modules, "entangle_fast.dispatch", SimpleNamespace(table=lambda: TABLE))


def printed(width=100, verbose=False):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    D.doctor(console, verbose)
    return console.export_text()


def test_report_is_plain_data(table, tmp_path):
    found = D.report(tmp_path)
    json.dumps(found)
    assert found["ops"]["gram"]["cpp"] == {"available": True, "reason": ""}
    assert found["gpu_runs"] == {"gram/triton": "not yet run on a GPU", "w2_sorted/cuda": "not yet run on a GPU"}
    assert found["versions"]["torch"] and found["isa"]
    assert set(found["extension"]) == {"file", "error", "isa"}


def test_results_of_a_gpu_count_and_those_of_a_cpu_do_not(table, tmp_path):
    for device, record in (
        ("H100", {"op": "gram", "backend": "triton", "correct": True}),
        ("A100", {"op": "gram", "backend": "triton", "correct": False}),
        ("cpu-epyc", {"op": "w2_sorted", "backend": "cuda"}),
    ):
        (tmp_path / device).mkdir()
        (tmp_path / device / "x.json").write_text(json.dumps({"benchmarks": [{"extra_info": record}, 3, None]}))
    (tmp_path / "H100" / "broken.json").write_text("{")
    (tmp_path / "H100" / "deep.json").write_text("[" * 100_000)
    runs = D.report(tmp_path)["gpu_runs"]
    assert runs == {"gram/triton": "WRONG on A100, ran on H100", "w2_sorted/cuda": "not yet run on a GPU"}


@pytest.mark.parametrize("width", [40, 100])
def test_doctor_prints_the_mends(table, monkeypatch, width):
    monkeypatch.setattr(D, "_extension", lambda: {"file": None, "error": "undefined symbol", "isa": None})
    monkeypatch.delenv(D.THP, raising=False)
    text = printed(width)
    words = " ".join(text.split())
    for part in (
        "torch",
        "undefined symbol",
        "pip install",
        f"export {D.THP}=1",
        "operation",
        "gram",
        "not yet run on a GPU",
    ):
        assert part in words
    monkeypatch.setenv(D.THP, "1")
    assert f"{D.THP} is on" in " ".join(printed().split())


@pytest.mark.skipif(EXTENSION is not None, reason="needs the compiled library")
@pytest.mark.parametrize("wish", [*ISAS, "avx1"])
def test_doctor_says_which_instruction_set_is_in_use(wish):
    """It is read once: in a process of its own. What the CPU has not is not used."""
    code = ("import os; from entangle_fast import _C, doctor; from rich.console import Console; doctor.doctor(Console(width=400)); "
            "del os.environ['ENTANGLE_FAST_ISA']; print('used:', _C.isa())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ENTANGLE_FAST_ISA": wish}, check=True, capture_output=True,
                          text=True)  # fmt: skip
    used = done.stdout.rpartition("used: ")[2].strip()
    order = [*ISAS, "avx512bf16"]
    assert order.index(used) <= (order.index(wish) if wish in order else 3) and (used == wish or wish != "plain")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("C++ kernels")]
    assert line.split(None, 2)[2].strip() == f"{used}; ENTANGLE_FAST_ISA={wish}"
    assert ("unknown instruction set 'avx1'; known: plain, avx2, avx512" in done.stdout) == (wish == "avx1")


def test_gpu_kernels_are_counted_unless_one_asks_for_names(monkeypatch):
    runs = {f"op{i}/{'cuda' if i % 3 else 'triton'}": "not yet run on a GPU" for i in range(12)}
    runs |= {"gram/triton": "ran on H100", "w2_sorted/cuda": "WRONG on H100"} | {f"bad{i}/cuda": "WRONG on A100" for i in range(5)}
    whole = {**D.report(), "gpu_runs": runs}
    monkeypatch.setattr(D, "report", lambda: whole)
    lines = printed().split("GPU kernels\n")[1].splitlines()
    assert lines == [
        "  4 triton and 8 cuda kernels (--verbose names them): not yet run on a GPU", "  gram/triton: ran on H100",
        "  w2_sorted/cuda: WRONG on H100", *(f"  bad{i}/cuda: WRONG on A100" for i in range(5)),
    ]  # fmt: skip
    lines = printed(verbose=True).split("GPU kernels\n")[1].splitlines()
    assert sorted(lines) == sorted(f"  {kernel}: {line}" for kernel, line in runs.items())


def test_a_broken_dispatch_is_reported_not_raised(monkeypatch):
    def broken():
        raise RuntimeError("no schema")

    monkeypatch.setitem(sys.modules, "entangle_fast.dispatch", SimpleNamespace(table=broken))
    assert "RuntimeError: no schema" in printed(200)


def test_the_real_one():
    pytest.importorskip("entangle_fast.dispatch")
    assert "gram" in printed(200)
