"""One row per job and provider. The times come from rounds in which all providers of the job take turns.

Only a result of ours that differs from the trusted one fails; a peer that differs or cannot run is said so in its row.
"""

import pytest
from jobs import BY_KEY
from measure import measure, peak_memory
from report import record

ROWS = [(key, p) for key, job in BY_KEY.items() for p in job.providers]


@pytest.mark.parametrize("key,provider", ROWS, ids=[f"{k}:{p}" for k, p in ROWS])
def test_job(key, provider, measured, benchmark, request):
    job = BY_KEY[key]
    if job.slow and not request.config.getoption("--slow"):
        pytest.skip("slow: give --slow")
    if reason := job.why_not(provider):
        pytest.skip(reason)
    if key not in measured:
        measured.clear()  # one job at a time
        measured[key] = measure(job)
    found = measured[key]
    if provider in found.failed:
        pytest.skip(f"{provider} fails: {found.failed[provider]}")
    stats = benchmark._make_stats(1)  # rounds are interleaved, so they are handed over rather than timed here
    for t in found.times[provider]:
        stats.update(t)
    benchmark._mode, benchmark.group = "interleaved", key
    wanted = request.config.getoption("--memory") and provider != "compile"  # whose peak is the compiler's
    memory = peak_memory(key, provider) if wanted else None
    benchmark.extra_info.update(record(job, provider, found, memory))
    if provider == "ours":
        assert found.verdicts["ours"] != "differs", f"ours differs by {found.errors['ours']:.1e}, {job.tolerance:.0e} is allowed"
