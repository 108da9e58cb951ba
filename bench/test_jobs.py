"""One row per job and provider. The times come from rounds in which all providers of the job take turns."""

import pytest
from jobs import BY_KEY
from measure import agreement, interleaved, peak_memory, quantile
from peers import NO_RESULT, there

ROWS = [(key, p) for key, job in BY_KEY.items() for p in job.providers]


@pytest.mark.parametrize("key,provider", ROWS, ids=[f"{k}:{p}" for k, p in ROWS])
def test_job(key, provider, measured, benchmark, request):
    job = BY_KEY[key]
    if job.slow and not request.config.getoption("--slow"):
        pytest.skip("slow: give --slow")
    if not there(provider):
        pytest.skip(f"{provider} is not installed")
    if key not in measured:
        calls = job.make()
        measured.clear()  # one job's tensors at a time
        measured[key] = interleaved(calls, job.dtype)
    times, results, limits = measured[key]
    if provider not in times:
        pytest.skip(f"{provider} has no form of this job")
    stats = benchmark._make_stats(1)  # rounds are interleaved, so they are handed over rather than timed here
    for t in times[provider]:
        stats.update(t)
    benchmark._mode, benchmark.group = "interleaved", key
    median = quantile(times[provider], 0.5)
    error = agreement(results).get(provider)
    agrees = provider in NO_RESULT or error is None or error <= job.tolerance
    benchmark.extra_info.update(
        op=job.op, shape=job.shape, dtype=str(job.dtype), provider=provider, median=median,
        p20=quantile(times[provider], 0.2), p80=quantile(times[provider], 0.8), rounds=len(times[provider]),
        flops=job.flops, bytes=job.bytes, gflops=job.flops / median / 1e9, gbytes=job.bytes / median / 1e9,
        gemm_limit=limits["gemm"] / 1e9, copy_limit=limits["copy"] / 1e9,
        fraction=job.flops / median / limits["gemm"] if job.flops else job.bytes / median / limits["copy"],
        plain=quantile(times["plain"], 0.5) if "plain" in times else None,
        error=error, agrees=agrees, ratio=median / quantile(times["ours"], 0.5) if agrees else None,
        peak_memory=peak_memory(key, provider) if request.config.getoption("--memory") else None,
    )  # fmt: skip
    assert agrees, f"{provider} differs from ours by {error:.1e}; no ratio is given"
