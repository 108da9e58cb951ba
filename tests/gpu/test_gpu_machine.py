"""What only a machine with a GPU shows: capture into a graph, large offsets, the other device, the sanitizer, alignment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import entangle_fast as ef
from entangle_fast import reference

pytest.importorskip("triton")


def test_a_whole_step_captures_into_a_graph_and_replays():
    params = [torch.randn(300, 128, device="cuda"), torch.randn(129, device="cuda")]
    momentum = [torch.zeros_like(p) for p in params]
    forget, retain = ([torch.randn_like(p) for p in params] for _ in range(2))

    def step():
        gram = ef.ops.step_gram([forget, retain])
        coef = (gram[0, 1] / gram[1, 1]).float().reshape(1)  # projection away from one direction, on the device
        ef.ops.step_update(params, momentum, forget, [retain], coef, lr=0.1, beta=0.9)

    start = [x.clone() for x in params + momentum]

    def reset():
        for x, y in zip(params + momentum, start):
            x.copy_(y)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compile outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    reset()
    graph.replay()
    graph.replay()
    captured = [x.clone() for x in params + momentum]
    reset()
    step()
    step()
    assert all(torch.equal(x, y) for x, y in zip(captured, params + momentum))


def test_gram_and_combine_capture_too():
    a, b = torch.randn(64, 16, 128, device="cuda"), torch.randn(64, 16, 64, device="cuda")
    w = torch.randn(1, 64, device="cuda")
    want = ef.ops.gram(a, b, route="pairs"), ef.ops.gram(a, b, route="tiles"), ef.ops.combine(a, b, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ef.ops.gram(a, b, route="pairs"), ef.ops.gram(a, b, route="tiles"), ef.ops.combine(a, b, w)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_no_host_synchronisation_in_a_step():
    x = [torch.randn(4096, device="cuda") for _ in range(2)]
    a, b = torch.randn(64, 16, 128, device="cuda"), torch.randn(64, 16, 64, device="cuda")
    coef, w = torch.zeros(1, device="cuda"), torch.randn(1, 64, device="cuda")

    def once():
        ef.ops.step_gram([x[:1], x[1:]])
        ef.ops.step_update(x[:1], None, x[1:], [x[1:]], coef, lr=0.1)
        ef.ops.gram(a, b, route="tiles")
        ef.ops.combine(a, b, w)

    once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements():
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * count + (4 << 30):
        pytest.skip("needs about 13 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # no need to fill gigabytes with NaN
    p, g = torch.zeros(count, dtype=torch.bfloat16, device="cuda"), torch.ones(1, device="cuda").bfloat16().expand(count)
    g = g.contiguous()
    ef.ops.step_update([p], None, [g], [], torch.zeros(0, device="cuda"), lr=1.0)
    assert bool((p == -1).all())
    assert ef.ops.step_gram([[g]]).item() == count
    del g
    logits, target = p.view(-1, 4096)[: 2**19 + 1], torch.zeros(2**19 + 1, dtype=torch.int64, device="cuda")
    loss = ef.ops.sample_loss(logits, target)
    torch.testing.assert_close(loss[-1].item(), torch.tensor(4096.0).log().item(), rtol=1e-5, atol=0)


def test_tensors_on_two_devices_get_a_clear_error():
    a, b = torch.randn(4, 3, device="cuda"), torch.randn(4, 2)
    with pytest.raises(ValueError, match="one device"):
        ef.ops.gram(a, b)
    with pytest.raises(ValueError, match="one device"):
        torch.ops.entangle_fast.gram(a, b.cuda(), a, b, "rows")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_tensor_that_is_not_on_the_current_device():
    a, b = torch.randn(9, 33, device="cuda:1"), torch.randn(9, 17, device="cuda:1")
    torch.testing.assert_close(ef.ops.gram(a, b, route="rows"), reference.gram(a, b, route="rows"))


def test_explain_names_triton():
    a, b = torch.randn(4, 3, device="cuda"), torch.randn(4, 2, device="cuda")
    assert ef.explain(ef.ops.gram, a, b).backend == "triton"


SMALL = """
import torch, entangle_fast as ef
a, b = torch.randn(33, 5, 40, device="cuda"), torch.randn(33, 5, 24, device="cuda")
for route in ("pairs", "tiles"):
    ef.ops.gram(a, b, route=route)
ef.ops.gram(a[:, 0], b[:, 0], route="rows")
ef.ops.sqnorm(a, b); ef.ops.combine(a, b, torch.randn(2, 33, device="cuda"))
ef.ops.project(a, b, torch.randn(3, 24, 40, device="cuda")); ef.ops.project_random(a, b, 3, seed=1)
x = [torch.randn(129, device="cuda"), torch.randn(64, 3, device="cuda")]
ef.ops.step_gram([x, x]); ef.ops.step_update(x, None, x, [x], torch.zeros(1, device="cuda"), lr=0.1, noise=0.1)
ef.ops.step_lookahead_undo(x, x, ef.ops.step_lookahead(x, x, 0.1), 0.1)
ef.ops.sample_loss(torch.randn(5, 151, device="cuda"), torch.zeros(5, dtype=torch.int64, device="cuda"))
ef.ops.w2_sorted(a[:, 0, 0].contiguous(), b[:20, 0, 0].contiguous()); ef.ops.w2_moments(a[:, 0, 0], b[:, 0, 0])
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(binary).exists():
        pytest.skip("compute-sanitizer is not installed")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [binary, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", SMALL]
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
