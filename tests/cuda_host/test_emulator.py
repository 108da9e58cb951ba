"""The host header itself: layouts against plain matmul, every misuse an error, random orders."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import Factors, load, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def probe():
    return load(HERE / "probe.cu")


def test_warps(probe):
    out = torch.full((5, 64), float("nan"))
    run(probe.probe_warps, out, library=probe)
    t = torch.arange(64)
    base = t // 32 * 32
    want = torch.stack([t ^ 5, base + 3, torch.where(t % 32 >= 2, t - 2, t), torch.ones(64), torch.full((64,), 2016)])
    assert torch.equal(out, want.float())


@pytest.mark.parametrize("type, dtype", [(2, torch.bfloat16), (3, torch.float16)])
def test_ldmatrix_and_mma(probe, type, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = torch.full((16, 8), float("nan"))
    run(probe.probe_mma, type, a, b.T.contiguous(), out, library=probe)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("t", [32, 19])
def test_tma_and_wgmma(probe, eager, t):
    f = Factors(torch.randn(2, t, 128).bfloat16(), torch.randn(2, t, 64).bfloat16())
    first, second = torch.full((64, 128), float("nan")), torch.full((64, 64), float("nan"))
    run(probe.probe_wgmma, f, first, second, 0, library=probe, eager=eager)
    want = f.tensors[1][0].float().T @ f.tensors[0][0].float()
    torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-4)
    rounded = first[:, :64].bfloat16().float()
    torch.testing.assert_close(second, rounded @ rounded.T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("eager", [False, True])
def test_clusters(probe, eager):
    f = Factors(torch.randn(1, 40, 128).bfloat16(), torch.randn(1, 40, 64).bfloat16())
    for seed in range(1, 9):
        out = torch.full((6, 130), float("nan"))
        run(probe.probe_cluster, f, out, 0, library=probe, eager=eager, seed=seed)
        assert torch.equal(out[:, :2], torch.tensor([[0.0, 2.0], [1.0, 2.0]]).repeat(3, 1))
        assert torch.equal(out[:, 2:], f.tensors[0][0, :1].float().expand(6, -1))


def dependent(probe, before, early=1, **options):
    f = Factors(torch.randn(1, 32, 64).bfloat16(), torch.randn(1, 32, 8).bfloat16())
    x, out = torch.randn(64), torch.full((64,), float("nan"))
    run(probe.probe_dependent, f, x, out, before, early, library=probe, **options)
    return x, out


def test_an_early_launch_waits_first_and_others_need_not(probe):
    x, out = dependent(probe, 0)
    assert torch.equal(out, x + 1)
    for before in range(8):
        dependent(probe, before, early=0)


def wgmma(probe, wrong, **options):
    f = Factors(torch.randn(1, 32, 128).bfloat16(), torch.randn(1, 32, 64).bfloat16())
    run(probe.probe_wgmma, f, torch.empty(64, 128), torch.empty(64, 64), wrong, library=probe, **options)


def cluster(probe, wrong, **options):
    f = Factors(torch.randn(1, 32, 128).bfloat16(), torch.randn(1, 32, 64).bfloat16())
    run(probe.probe_cluster, f, torch.empty(6, 130), wrong, library=probe, **options)


def plain(probe, what, **options):
    run(probe.probe_wrong, torch.zeros(64 if what == 0 else 10), torch.zeros(1, dtype=torch.int32), what, library=probe, **options)


@pytest.mark.parametrize(
    "call, wrong, says",
    [
        (plain, 1, "deadlock.*32 wait at probe.cu"), (plain, 2, "outside of a tensor"), (plain, 3, "beyond the 256 B of dynamic shared"),
        (plain, 4, "without __threadfence"), (plain, 5, "deadlock.*32 wait"), (plain, 7, "deadlock.*63 wait.*1 have left"),
        (wgmma, 1, "fence.proxy.async"), (wgmma, 2, "not fenced"),
        (cluster, 1, "not initialised"), (cluster, 2, "an arrival reaches beyond the cluster"),
        (cluster, 3, "reaches a block that has left|wait at probe.cu"), (cluster, 4, "TMA reaches beyond the cluster"),
        (cluster, 5, "deadlock"), (cluster, 6, "not fenced"),
        (dependent, 1, "an access to memory before griddepcontrol.wait"), (dependent, 2, "an access to memory before"),
        (dependent, 3, "cp.async before"), (dependent, 4, "a TMA copy before"), (dependent, 5, "launch_dependents before"),
        (dependent, 6, "an access to memory before"), (dependent, 7, "no thread waits"),
    ],
)  # fmt: skip
def test_misuse_is_an_error(probe, call, wrong, says):
    found = []
    for seed in range(1, 17):
        try:
            call(probe, wrong, eager=seed % 2 > 0, seed=seed)
        except RuntimeError as error:
            found.append(str(error))
    assert found and all(re.search(says, x) for x in found), found
    assert len(found) == 16 or call is cluster  # whose misuse shows in some orders only
    assert (call, wrong) != (cluster, 3) or any("has left" in x for x in found), found
    call(probe, 0)  # and the next call is fine


def test_local_array_overrun_stops_the_process():
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch; from build import load, run\n"
        f"p = load({str(HERE / 'probe.cu')!r})\n"
        "run(p.probe_wrong, torch.zeros(64), torch.zeros(1, dtype=torch.int32), 6, library=p)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def test_orders_differ_by_seed_and_repeat(probe):
    def order(seed):
        out, count = torch.full((3, 70), float("nan")), torch.zeros(1)
        run(probe.probe_order, out, count, library=probe, seed=seed)
        assert sorted(out.flatten().tolist()) == list(range(210))
        return out

    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))
    assert any(order(s)[0].min() > order(s)[1].min() for s in range(8))  # blocks too
