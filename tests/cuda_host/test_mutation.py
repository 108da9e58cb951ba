"""Every barrier, fence, commit, wait and arrival in csrc/cuda is left out, one at a time, and the results must show it.

Sites are found in the sources by their names; the host header skips the one at (file, line) when told to, so nothing is
recompiled. A mutant is noticed when a call fails, crashes, hangs or differs in any bit, in some order of threads and one
of the two copy modes. A site that no case reaches fails the test too.
"""

import os
import re
import signal
import time

import pytest
import torch
from bound import begin, control, ops
from build import CUDA, visited
from calls import MMA, WGMMA, gram, project_random

CALL = re.compile(
    r"(?:__syncthreads|__syncwarp|__threadfence|ptx::(?:cp_async_commit|cp_async_wait<\d>|cluster_sync|fence_mbarrier_init"
    r"|griddepcontrol_wait|mbarrier_arrive_at|mbarrier_arrive_expect|mbarrier_wait|wgmma_fence|wgmma_commit|wgmma_wait<\d>))\("
)
TRIES = [(seed, eager) for seed in range(1, 13) for eager in (False, True)]
SECONDS = 60
pytestmark = pytest.mark.usefixtures("poisoned_memory")  # else a result may be left from an earlier call, in freed memory


def sites():
    found = []
    for path in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]):
        if path.name == "ptx.cuh":  # the wrappers themselves
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            calls = CALL.findall(line.split("//")[0])
            assert len(calls) < 2, f"{path.name}:{number}: one synchronisation a line, so that it can be left out alone"
            if calls:
                found.append((path.name, number))
    return found


def _r(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _launchers(call):
    return lambda seed, eager, off: [call(seed=seed, eager=eager, off=off)]


def _operation(call):
    def run(seed, eager, off):
        begin(seed, eager, off)
        found = call(ops())
        return [x for y in (found if isinstance(found, (tuple, list)) else [found]) for x in (y if isinstance(y, (tuple, list)) else [y])]

    return run


def _lookahead(cuda, capacity=None):
    params, grads = [_r(9001), _r(300) * 1e-6], [_r(9001) * 1e3, _r(300)]
    before = [p.clone() for p in params]
    ulps, index, value = cuda.step_lookahead(params, grads, 0.3, capacity)
    after = [p.clone() for p in params]
    cuda.step_lookahead_undo(params, grads, ulps, index, value, 0.3)
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    return [*after, *ulps, index, value]


def _adamw(cuda):
    held = [_r(9001), _r(300)], [_r(9001), _r(300)], [_r(9001).abs(), _r(300).abs()]
    cuda.step_adamw(*held, [_r(9001), _r(300)], [], torch.zeros(0), torch.tensor(3), 0.1)
    return [x for xs in held for x in xs]


BF16 = torch.bfloat16
CASES = {
    "gram_mma": _launchers(lambda **o: gram(MMA, _r(10, 20, 24, dtype=BF16), _r(10, 20, 40, dtype=BF16), partials=1, **o)),
    "gram_float": _launchers(lambda **o: gram(MMA, _r(10, 20, 24), _r(10, 20, 20), partials=1, **o)),
    "gram_wgmma": _launchers(lambda **o: gram(WGMMA, _r(5, 70, 24, dtype=BF16), _r(5, 70, 72, dtype=BF16), **o)),
    "gram_clusters": _launchers(lambda **o: gram(WGMMA, _r(3, 70, 72, dtype=BF16), _r(3, 70, 136, dtype=BF16), **o)),
    "gram_two_sides": _launchers(
        lambda **o: gram(WGMMA, *(_r(n, 20, d, dtype=BF16) for n, d in ((2, 24), (2, 72), (3, 24), (3, 72))), **o)
    ),
    "project": _launchers(
        lambda seed, **o: project_random(_r(10, 20, 24, dtype=BF16), _r(10, 20, 40, dtype=BF16), 9, 3, partials=1, seed_order=seed, **o)
    ),
    "step_gram": _operation(lambda cuda: cuda.step_gram([_r(9000), _r(70), _r(9000) + 1, _r(70) - 1], 2)),
    "step_project": _operation(
        lambda cuda: cuda.step_project([_r(900).roll(i) for i in range(5)], [_r(900).square()], [_r(900).cos()], 0.9, 0.0, 1e-15)
    ),
    "step_adamw": _operation(_adamw),
    "lookahead": _operation(_lookahead),
    "lookahead_bounded": _operation(lambda cuda: _lookahead(cuda, 5000)),
    "sample_loss": _operation(lambda cuda: cuda.sample_loss(_r(6, 1500), torch.arange(6) * 9, 5.0, 0.1, -100, 0.05, "mean")),
    "w2_sorted": _operation(lambda cuda: cuda.w2_sorted(_r(2500), _r(777))),
}
OF = {  # the cases that can notice a site of this file; others: all
    "gram.cu": ["gram_mma", "gram_float"], "gradient_tile.cuh": ["gram_mma", "gram_float", "gram_wgmma"],
    "gram_sm90.cuh": ["gram_wgmma", "gram_clusters", "gram_two_sides"],
    "project.cu": ["project"], "lookahead.cu": ["lookahead", "lookahead_bounded"], "sample_loss.cu": ["sample_loss"],
    "w2.cu": ["w2_sorted"],
    "step.cu": ["step_gram", "step_project"], "solve.cuh": ["step_project"], "step_adamw.cu": ["step_adamw"],
    "reduce.cuh": ["step_gram", "w2_sorted", "sample_loss", "lookahead"],
}  # fmt: skip


def _same(xs, ys):
    return len(xs) == len(ys) and all(x.shape == y.shape and torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(xs, ys))


@pytest.fixture(scope="module")
def expected():
    """Results without a mutation; every case gives the same bits in every order."""
    wanted = {}
    for name, case in CASES.items():
        wanted[name] = case(1, False, ("", 0))
        assert all(bool(torch.isfinite(x).all()) for x in wanted[name]), name
        for seed, eager in TRIES[:4]:
            assert _same(case(seed, eager, ("", 0)), wanted[name]), f"{name} depends on the order of threads"
    return wanted


def _noticed(names, off, expected, tries=TRIES) -> bool:
    for seed, eager in tries:
        for name in names:
            try:
                if not _same(CASES[name](seed, eager, off), expected[name]):
                    return True
            except RuntimeError:
                return True
            except AssertionError:
                return True
    return False


def _in_child(work) -> bool:
    """work() in a child process: a crash or a hang of the mutant counts as noticed."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the threads of the parent's pool are not in the child: it would wait for them
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # the header reports every failure on stderr
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0 or os.WIFSIGNALED(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def test_every_site_is_reached(expected):
    missed = set(sites()) - visited(control())
    assert not missed, f"no case runs the synchronisation at {sorted(missed)}"


@pytest.mark.parametrize("site", sites(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_left_out(site, expected):
    names = OF.get(site[0], list(CASES))
    assert _in_child(lambda: _noticed(names, site, expected)), f"nothing shows that the synchronisation at {site[0]}:{site[1]} is missing"


def test_an_unmutated_kernel_is_not_noticed(expected):
    assert not _noticed(list(CASES), ("no_such_file", 1), expected, TRIES[-4:])
