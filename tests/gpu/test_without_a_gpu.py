"""All of bench/gpu*.py and tests/gpu that a machine without a GPU can run, so that the first GPU session meets no slip of the pen."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import gpu_backends  # noqa: E402  conftest.py puts bench/ on the path
import gpu_job  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_matrix  # noqa: E402
import gpu_models  # noqa: E402
import gpu_profile  # noqa: E402

import entangle_fast as ef  # noqa: E402

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(gpu_job.GPU, reason="these sizes are for the CPU; here bench/gpu.sh itself runs")


@pytest.fixture(scope="module")
def timer():
    return gpu_job.Timer(3, 0.01)


@pytest.fixture(scope="module")
def top(timer):
    return gpu_job.ceilings(timer)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return gpu_jobs.small() | gpu_models.small()


NAMES = ["step", "lookahead", "rows", "tiles", "linear loss", "loss", "moments", "sorted", "project_random", "gram", "sqnorm",
         "combine", "project", "vit", "stage 2"]  # fmt: skip


@no_gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_job_is_right_and_says_whether_its_needs_hold(name, small, timer, top):
    assert list(small) == NAMES
    job = small[name]
    record = gpu_job.measure(job, timer, top)
    assert not gpu_job.failed(record), record
    for provider, row in record["providers"].items():
        assert row["ms"] > 0 and "failed" not in row, (provider, row)
    assert {(r["op"], r["backend"]) for r in record["ran"]} == {(o, b) for o in job.ops for b in job.backends if b != "ours"}
    assert all(holds in (True, False, None) for holds in record["needs"].values())
    assert "not measured" in gpu_job.table({"x": {**record, "needs": {"triton: nothing": None}}})
    for op in job.ops:
        assert op in ef.dispatch.ops()
        for backend in job.backends:
            assert backend == "triton" or backend == "ours" or op in ef.backends.CUDA, f"{op}: no CUDA C++ kernel"


def test_titles_of_the_matrix_and_every_row_that_must_be_shown():
    text = " ".join({**gpu_models.jobs(True), **gpu_jobs.jobs(True)})
    for row in ("step P=1e9", "n=1024, 50 layers of 4096²", "ViT-B/16 n=128", "V=128k, 8×2048", "w2 sorted n=1e6", "w2 moments n=1e6",
                "ResNet-18 at 224²", "gram tiles", "project_random"):  # fmt: skip
        assert row in text
    assert set(gpu_jobs.jobs(False)) < set(gpu_jobs.jobs(True))


@no_gpu
def test_a_wrong_result_gets_no_time_and_a_failing_peer_costs_nobody_else(timer, top):
    def broken():
        raise RuntimeError("out of memory")

    one, two = torch.ones(3), torch.full((3,), 2.0)
    job = gpu_job.Job(lambda: two, {"good": lambda: one, "broken": broken}, ("gram",), ("triton", "cuda"), tolerance=0.1,
                      needs={"triton: fast": lambda m, p: True})  # fmt: skip
    record = gpu_job.measure(job, timer, top)
    assert record["providers"]["triton"] == {"error": 1.0, "correct": False} and gpu_job.failed(record)
    assert record["ran"][0] == {"op": "gram", "backend": "triton", "correct": False} and record["needs"] == {"triton: fast": None}
    assert "out of memory" in record["providers"]["broken"]["failed"] and "WRONG 1.0e+00" in gpu_job.table({"job": record})
    alone = gpu_job.Job(lambda: two, {"broken": broken}, ("gram",), ("triton",))
    assert gpu_job.failed(gpu_job.measure(alone, timer, top))  # ours is not its own witness
    assert gpu_job.distance([one, one * float("nan")], [one, one]) != gpu_job.distance([one], [one])
    assert gpu_job.distance(one, torch.ones(4)) == float("inf")


def test_the_report_is_written_as_it_goes_and_doctor_reads_it(tmp_path, monkeypatch, timer, top):
    from entangle_fast import doctor

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_matrix, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    report = gpu_matrix.Report("abc", tmp_path / "results", commit="abc", **gpu_matrix.versions())
    report.content["ceilings"] = top
    seen = []

    def job():
        seen.append(report.paths[0].exists())
        x = torch.ones(3)
        return gpu_job.Job(lambda: x, {"torch": lambda: x * float("inf")}, ("gram",), exact=lambda: x)

    def fails():
        raise ValueError("no such job")

    gpu_matrix.run(report, {"one": job, "two": fails, "three": job}, timer, 1e9)
    assert seen == [False, True]
    for root in ("results", "out/results"):
        found = json.loads((tmp_path / root / "NVIDIA_H100_80GB_HBM3" / "abc.json").read_text())
        assert found["jobs"]["two"] == {"failed": "ValueError: no such job"} and found["jobs"]["three"]["providers"]["triton"]["correct"]
        assert found["jobs"]["one"]["providers"]["torch"]["error"] == "inf"  # JSON has no infinity
    lines = doctor.gpu_runs({"gram": {"triton": {"reason": "no GPU"}}}, tmp_path / "results")
    assert lines == {"gram/triton": "ran on NVIDIA_H100_80GB_HBM3"}
    gpu_matrix.run(report, {"four": job}, timer, -1)
    assert report.content["jobs"]["four"] == {"skipped": "no time left"}


def test_backends_are_pinned_on_a_gpu_the_reference_too(monkeypatch):
    monkeypatch.setattr(gpu_job, "GPU", True)
    for provider, want in (("triton", "triton"), ("cuda", "cuda"), ("reference", "reference"), ("ours", None), ("torch", None)):
        with gpu_job.chosen(provider):
            assert os.environ.get(ef.dispatch.ENV) == want
    assert ef.dispatch.ENV not in os.environ


@no_gpu
def test_after_a_fault_a_new_process_goes_on_where_the_old_one_stopped(tmp_path, monkeypatch, timer, top):
    def device(jobs, again, broken):
        report = gpu_matrix.Report("abc", tmp_path, again, commit="abc")
        report.content["ceilings"] = top
        monkeypatch.setattr(gpu_job, "release", lambda: not broken)
        monkeypatch.setattr(gpu_matrix, "release", lambda: not broken)
        return gpu_matrix.run(report, jobs, timer, 1e9), report.content["jobs"]

    x, begun = torch.ones(3), []

    def job(title):
        begun.append(title)
        return gpu_job.Job(lambda: x, {"torch": lambda: x}, ("gram",))

    jobs = {title: (lambda title=title: job(title)) for title in ("one", "two")}
    whole, done = device(jobs, False, True)
    assert not whole and begun == ["one"] and list(done) == ["one"] and "triton" not in done["one"]["providers"]
    whole, done = device(jobs, True, False)
    assert whole and begun == ["one", "two"] and gpu_job.failed({**done["one"], "failed": "x"}) and not gpu_job.failed(done["two"])


def test_a_kernel_that_hangs_ends_the_process_and_is_in_the_report(tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "bench")!r}, {str(ROOT)!r}]
import time, pathlib, gpu_job, gpu_matrix
report = gpu_matrix.Report("abc", pathlib.Path({str(tmp_path)!r}), commit="abc")
report.content["ceilings"] = {{}}
gpu_matrix.run(report, {{"hangs": lambda: time.sleep(100)}}, gpu_job.Timer(1, 0.1), 1e9, 0.2)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=90)
    (file,) = tmp_path.glob("*/abc.json")
    assert done.returncode == gpu_job.AGAIN and "no answer" in json.loads(file.read_text())["jobs"]["hangs"]["failed"]


def test_junit_files_say_what_ran(tmp_path):
    file = tmp_path / "tests.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"><properties><property name="ran" value="gram/triton"/>'
        '<property name="ran" value="step_gram/cuda"/></properties></testcase><testcase classname="a" name="y"><properties>'
        '<property name="ran" value="gram/triton"/></properties><failure/></testcase><testcase classname="a" name="z"><skipped/>'
        "</testcase></testsuite></testsuites>"
    )
    found = gpu_matrix.tests_of(str(file))
    assert (found["tests"], found["failures"], found["skipped"], found["failed"]) == (3, 1, 1, ["a::y"])
    assert found["ran"] == [{"op": "gram", "backend": "triton", "correct": False}, {"op": "step_gram", "backend": "cuda", "correct": True}]
    assert "missing" in gpu_matrix.tests_of(str(tmp_path / "none.xml"))


@no_gpu
@pytest.mark.parametrize("dtype", gpu_backends.DTYPES, ids=str)
@pytest.mark.parametrize("op", list(gpu_backends.CASES))
def test_every_case_of_the_backends(op, dtype, timer, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_backends, "lists", lambda total, kind, count: [[torch.randn(9).to(kind)] for _ in range(count)])
    monkeypatch.setattr(gpu_backends, "GRAM", (5, 6))
    monkeypatch.setattr(gpu_backends, "PROJECT", (3, 4, 2))
    monkeypatch.setattr(gpu_backends, "CASES", {op: gpu_backends.CASES[op]})
    report = gpu_matrix.Report("backends-abc", tmp_path, commit="abc")
    gpu_backends.run(report, [1000], timer, 1e9)
    assert not report.content["failed"] and len(report.content["backends"]) == 2
    for record in report.content["backends"]:
        assert record["op"] == op and record["correct"] and record["elements"] > 0 and record["ms"] > 0
    gpu_backends.run(report, [10], timer, -1)
    assert len(report.content["skipped"]) == 2


@no_gpu
def test_small_calls_run():
    import small_calls

    assert small_calls.main("reference", "cpu") == list(small_calls.calls("cpu"))
    gpu_profile.calls("triton")
    gpu_profile.calls("cuda")


NCU = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","h","_rows","1","7","(256, 1, 1)","(72, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","us","1,234.5"
"0","7","python","h","_rows","1","7","(256, 1, 1)","(72, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum.per_second","Tbyte/s","2.5"
"0","7","python","h","_rows","1","7","(256, 1, 1)","(72, 1, 1)","0","9.0","x","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.25"
"0","7","python","h","_rows","1","7","(256, 1, 1)","(72, 1, 1)","0","9.0","x","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","%","n/a"
"""  # noqa: E501


def test_counters_are_read_and_their_absence_is_said(monkeypatch):
    (found,) = gpu_profile.parse(NCU)
    assert found == {"kernel": "_rows", "ms": 1.2345, "dram_bytes_per_s": 2.5e12, "dram_percent": 81.25}
    monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_profile.Path, "glob", lambda self, pattern: iter(()))
    assert gpu_profile.ncu("triton", 1) == {"missing": "ncu is not installed"}


def test_instructions_are_read_from_the_library():
    files = sorted((ROOT / "entangle_fast").glob("_C*.so"))
    if not files or not hasattr(torch.ops.entangle_fast_cuda, "step_gram"):
        pytest.skip("built without CUDA")
    found = gpu_profile.sass(files[0], "sm_90a")
    assert found["form_wgmma"]["HGMMA"] > 0 and found["gram_mma"]["HMMA"] > 0 and found["update"]["LDG.E.EF.128"] > 0
    assert "missing" in gpu_profile.sass(files[0], "sm_70")


@no_gpu
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path, capsys):
    for module in (gpu_matrix, gpu_profile, gpu_backends):
        assert module.main(["--commit", "x", "--results", str(tmp_path)]) == 3
        assert "no GPU" in capsys.readouterr().err
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh")], text=True, capture_output=True, env={"PATH": "/usr/bin:/bin",
                          "PYTHON": sys.executable, "OUT": str(tmp_path)})  # fmt: skip
    assert done.returncode == 3 and "nothing was run and nothing written" in done.stderr and not list(tmp_path.iterdir())
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh"), "--lnog"], text=True, capture_output=True)
    assert done.returncode == 2 and "--lnog is not one of" in done.stderr


def test_names_that_only_a_gpu_would_look_up():
    """Attributes of torch.cuda, torch.profiler and the kernels that the GPU-only lines name are there."""
    import importlib

    files = [*(ROOT / "bench").glob("gpu_*.py"), *(ROOT / "tests" / "gpu").glob("*.py"), ROOT / "entangle_fast" / "warmup.py",
             *(ROOT / "kernels").glob("*.py")]  # fmt: skip
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if name.startswith("torch.") and all(x.isidentifier() for x in name.split(".")):
                    found = torch
                    for part in name.split(".")[1:]:
                        assert hasattr(found, part), f"{file.name}: {name}"
                        found = getattr(found, part)
                        if not (isinstance(found, type) or type(found).__name__ == "module"):
                            break
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entangle_fast.kernels"):
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
