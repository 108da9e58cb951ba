"""pytest bench [-k gram] [--memory] [--slow] --benchmark-json=…: every provider of a job in the same interleaved rounds.

The JSON is fit to be committed: medians and quantiles, no single times, no host name, no path.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--memory", action="store_true", help="also measure peak memory, in a fresh process per provider")
    parser.addoption("--slow", action="store_true", help="also the jobs that take minutes or many GB")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    from measure import machine

    rows = [{"name": b["name"], "extra_info": b["extra_info"]} for b in output_json["benchmarks"]]
    moment = output_json["datetime"]
    output_json.clear()
    output_json.update(machine_info={"bench": machine()}, datetime=moment, benchmarks=rows)


@pytest.fixture(scope="session")
def measured():
    """Job key → what its interleaved rounds gave; measured when the first provider of the job asks."""
    return {}


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session and session.benchmarks:
        from report import table

        terminalreporter.write_line(table([dict(b.extra_info, name=b.name) for b in session.benchmarks if b.extra_info]))
