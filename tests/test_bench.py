"""bench/: every job at a tiny size with all providers that are installed, the verdicts, the records, the figures."""

import importlib.util
import json
import math
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))
pytest.importorskip("authors", reason="bench/ is not in this checkout")

import job as job_module  # noqa: E402
import measure as M  # noqa: E402
from job import Job  # noqa: E402
from jobs import BY_KEY, JOBS, MINI  # noqa: E402
from report import record, table  # noqa: E402

F32 = torch.float32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(M, "_SIDE", 16)
    monkeypatch.setattr(M, "_COPIED", 1 << 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch.set_num_threads(threads)


def without(job, *names):
    return Job(**{**vars(job), "providers": tuple(p for p in job.providers if p not in names)})


@pytest.mark.parametrize("job", MINI, ids=lambda job: job.key)
def test_all_providers_agree(job):
    job = without(job, "compile")
    found = M.measure(job, rounds=1)
    assert found.verdicts["ours"] == "agrees", found.errors
    assert not found.failed
    assert set(found.times) == {p for p in job.providers if not job.why_not(p)}
    assert {p: v for p, v in found.verdicts.items() if v not in ("agrees", "floor")} == {}
    for provider in found.times:
        kept = record(job, provider, found)
        json.dumps(kept, allow_nan=False)
        assert kept["ratio"] > 0 and kept["verdict"] == ("floor" if provider in ("plain", "capture_only") else "agrees")
    if not job.whole_model:
        assert 0 < record(job, "ours", found)["fraction"] < math.inf


@pytest.mark.slow
@pytest.mark.skipif(not job_module.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("job", [j for j in MINI if "compile" in j.providers], ids=lambda job: job.key)
def test_compiled_providers_agree(job):
    found = M.measure(without(job, "opacus", "backpack", "torchjd", "geomloss"), rounds=1)
    assert found.verdicts["compile"] == "agrees"


def test_every_kind_of_job_is_tested_and_every_provider_of_it():
    providers = lambda jobs: {(j.op, p) for j in jobs for p in j.providers}  # noqa: E731
    assert providers(JOBS) <= providers(MINI)
    assert len(BY_KEY) == len(JOBS)  # no two jobs share a key


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.key)
def test_what_is_claimed_is_positive(job):
    assert job.flops >= 0 and job.bytes >= 0 and job.providers[0] == "ours"
    if not job.whole_model:
        assert job.bytes > 0
    elif job.op != "stage2_step":  # which claims nothing
        assert job.flops > 0


@pytest.mark.parametrize("op,provider", [("combine", "torch"), ("combine_conv", "torch"), ("linear_sample_loss", "torch")])
def test_flops_are_those_that_torch_counts(op, provider):
    from torch.utils.flop_counter import FlopCounterMode

    job = next(j for j in MINI if j.op == op)
    call = job.calls((provider,))[provider]
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == job.flops


def made(**results):
    return Job("op", {"n": 1}, F32, lambda wanted: {p: results[p] for p in wanted}, tuple(results), 1.0)


RIGHT, WRONG = torch.ones(3), torch.ones(3) * 2


@pytest.mark.parametrize("other", [WRONG, torch.ones(4), torch.full((3,), math.nan)])
def test_no_ratio_for_a_peer_that_differs(other):
    found = M.measure(made(ours=lambda: RIGHT, torch=lambda: RIGHT, other=lambda: other, plain=lambda: None), rounds=1)
    assert found.verdicts == {"ours": "agrees", "torch": "agrees", "other": "differs", "plain": "floor"}
    assert found.ratio("other") is None and found.ratio("torch") and found.ratio("plain")
    job = made(ours=None)
    lines = table([record(job, p, found) for p in found.times]).splitlines()
    assert next(x for x in lines if " other " in x).split()[-1] == "differs"


def test_no_ratio_for_anybody_where_ours_differs_or_nobody_knows():
    found = M.measure(made(ours=lambda: WRONG, torch=lambda: RIGHT, plain=lambda: None), rounds=1)
    assert found.verdicts["ours"] == "differs"
    assert [found.ratio(p) for p in found.times] == [None] * 3
    alone = M.measure(made(ours=lambda: RIGHT, plain=lambda: None), rounds=1)
    assert alone.verdicts["ours"] == "unchecked" and [alone.ratio(p) for p in alone.times] == [None] * 2
    silent = M.measure(made(ours=lambda: RIGHT, torch=lambda: RIGHT, foreach=lambda: None), rounds=1)
    assert silent.verdicts["foreach"] == "unchecked" and silent.ratio("foreach") is None


def test_a_peer_may_fail_and_ours_may_not():
    def broken():
        raise NotImplementedError("no rule for this layer")

    found = M.measure(made(ours=lambda: RIGHT, torch=lambda: RIGHT, opacus_like=broken), rounds=1)
    assert found.failed == {"opacus_like": "NotImplementedError: no rule for this layer"} and "opacus_like" not in found.times
    with pytest.raises(NotImplementedError):
        M.measure(made(ours=broken, torch=lambda: RIGHT), rounds=1)


def test_why_a_provider_is_left_out(monkeypatch):
    job = made(ours=lambda: RIGHT, torchjd=lambda: RIGHT, compile=lambda: RIGHT, vmap=lambda: RIGHT)
    job.memory = {"vmap": 1e9, "": 1e9}
    monkeypatch.setattr(job_module, "available", lambda: 2e9)
    monkeypatch.setattr(job_module, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert job.why_not("ours") == ""
    assert job.why_not("torchjd") == "torchjd is not installed"
    assert "g++" in job.why_not("compile")
    assert job.why_not("vmap") == "needs 2.0 GiB, 1.9 GiB are available"
    assert list(job.calls()) == ["ours"]


@pytest.mark.parametrize(
    "info,cores,name",
    [
        ({"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "cpu family": "25", "model": "17"}, 2, "cpu-amd-epyc-zen4-2c"),
        ({"vendor_id": "AuthenticAMD", "model name": "AMD EPYC 9R14 96-Core Processor", "cpu family": "26", "model": "2"}, 8,
         "cpu-amd-epyc-9r14-zen5-8c"),
        ({"vendor_id": "AuthenticAMD", "model name": "AMD EPYC 7763 64-Core Processor", "cpu family": "25", "model": "1"}, 4,
         "cpu-amd-epyc-7763-zen3-4c"),
        ({"vendor_id": "GenuineIntel", "model name": "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz"}, 16,
         "cpu-intel-xeon-platinum-8480c-16c"),
    ],
)  # fmt: skip
def test_cpu_name(info, cores, name):
    assert M.cpu_name(info, cores) == name


def test_a_machine_without_cpuinfo_has_a_name():
    assert M.cpu_name({}, 4).startswith("cpu-") and M.cpu_name({}, 4).endswith("-4c")


def test_json_of_a_run_is_fit_to_be_committed():
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    run = {"machine_info": {"node": platform.node()}, "commit_info": {"author": "who"}, "datetime": "now", "version": "5",
           "benchmarks": [{"name": "a", "fullname": "x", "stats": {"data": [1, 2]}, "extra_info": {"op": "gram"}}]}  # fmt: skip
    conftest.pytest_benchmark_update_json(SimpleNamespace(), [], run)
    assert set(run) == {"machine_info", "datetime", "benchmarks"}
    assert run["benchmarks"] == [{"name": "a", "extra_info": {"op": "gram"}}]
    text = json.dumps(run)
    assert str(BENCH.parent) not in text and str(Path.home()) not in text
    assert platform.node() not in run["machine_info"]["bench"].values()


def test_figures_from_the_files_alone(tmp_path, monkeypatch):
    import bench_routes
    import figures
    import slopes

    chosen = [without(j, "compile", "geomloss") for j in MINI if j.op in ("model_sqnorms", "combine", "step_gram", "gram_tiles")]
    rows = []
    for j in chosen:
        found = M.measure(j, rounds=1)
        rows += [record(j, p, found) for p in found.times]
    rows[-1] |= {"ratio": None, "verdict": "differs"}
    run = {"machine_info": {"bench": M.machine()}, "datetime": "", "benchmarks": [{"name": "", "extra_info": r} for r in rows]}
    (tmp_path / "huge_pages.json").write_text(json.dumps(run))
    monkeypatch.setattr(slopes, "SECONDS", 0.0)
    lines = [*slopes.over_samples("mini_mlp", (2, 4, 8, 16)), *slopes.over_samples("mini_cnn", (2, 4, 8)),
             *slopes.over_parameters((800, 8000, 80000), n=2, t=2)]  # fmt: skip
    (tmp_path / "slopes.json").write_text(json.dumps({"machine_info": run["machine_info"], "slopes": lines}))
    grid = bench_routes.points([(4, 1, (8, 8)), (4, 2, (8, 8)), (64, 4, (8, 16)), (10**5, 64, (1024, 1024))])
    assert [p["n"] for p in grid] == [4, 4, 64] and grid[0]["chosen"] == "rows"
    (tmp_path / "routes.json").write_text(json.dumps({"machine_info": run["machine_info"], "routes": grid}))
    (tmp_path / "models_default.png").write_text("from an earlier run")
    written = figures.write_figures(tmp_path)
    assert {p.name for p in written} == {"models_huge_pages.png", "operations_huge_pages.png", "slopes.png", "routes.png"}
    assert not (tmp_path / "models_default.png").exists()
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_slopes_are_those_of_power_laws():
    import slopes

    sizes = (10, 100, 1000, 10000)
    assert slopes.slope(sizes, [7, 7, 3e-9 * 1000**2, 3e-9 * 10000**2]) == pytest.approx(2)  # the lower half does not count
    work = {s["name"]: s for s in [slopes.series("p", "a", "n", sizes, [1.0] * 4, [float(x) for x in sizes])]}
    assert work["a"]["slope"] == pytest.approx(0) and work["a"]["theory"] == pytest.approx(1)


def test_counted_work_of_a_gram():
    import slopes

    rows, forming = slopes._contraction("mini_mlp")
    assert (rows, forming) == (12 + 16 + 16 + 16 + 16 + 10, 0)
    quadratic, forming = slopes._contraction("mini_cnn")
    weights = [(3 * 8 * 9, 64), (8 * 8 * 9, 64), (8 * 16 * 9, 16), (16 * 16 * 9, 16)]
    assert quadratic == sum(w for w, _ in weights) + 26 and forming == sum(2 * w * t for w, t in weights)
