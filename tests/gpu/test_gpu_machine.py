"""What only a machine with a GPU shows: capture into a graph, large offsets, the other device, the sanitizer, alignment."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import entangle_fast as ef
from entangle_fast import dispatch, reference

pytest.importorskip("triton")


def test_a_whole_step_captures_into_a_graph_and_replays(backend):
    params = [torch.randn(300, 128, device="cuda"), torch.randn(129, device="cuda")]
    momentum = [torch.zeros_like(p) for p in params]
    forget, retain = ([torch.randn_like(p) for p in params] for _ in range(2))

    def step():
        k = ef.ops.step_gram([forget, retain])
        coef = (k[0, 1] / k[1, 1]).float().reshape(1)  # projection away from one direction, on the device
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


def captured(run):
    """What ``run`` gives from a replayed graph; run outside first, which compiles."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    return got


def test_grams_and_combine_capture_too():
    a, b = torch.randn(64, 16, 128, device="cuda"), torch.randn(64, 16, 64, device="cuda")
    w = torch.randn(1, 64, device="cuda")
    layers = [(torch.randn(64, 96, device="cuda"), torch.randn(64, 32, device="cuda")) for _ in range(20)]

    def run():
        grams = [ef.ops.gram(a, b, route="pairs"), ef.ops.gram(a, b, route="tiles"), ef.ops.gram(a[:, 0], b[:, 0], route="rows")]
        return [*grams, ef.ops.gram_layers(layers), ef.ops.combine(a, b, w)]

    want = run()
    assert all(torch.equal(x, y) for x, y in zip(captured(run), want))


def test_cuda_kernels_capture_too(served):
    a, b = torch.randn(64, 70, 64, device="cuda").bfloat16(), torch.randn(64, 70, 64, device="cuda").bfloat16()
    logits, target = torch.randn(33, 2049, device="cuda"), torch.zeros(33, dtype=torch.int64, device="cuda")
    losses = torch.randn(1000, device="cuda")
    c, d = (torch.randn(128, 40, 768, device="cuda").bfloat16() for _ in range(2))  # 5 chunks

    def run():
        both = ef.ops.w2_sorted(losses, losses[:77].contiguous())
        grams = [ef.ops.gram(a, b, route="tiles"), ef.ops.gram(c, d, route="tiles"), ef.ops.gram(c, d, c[:9], d[:9], route="tiles")]
        return [*grams, ef.ops.project_random(a, b, 9, seed=1), ef.ops.sample_loss(logits, target), *both]

    with served("cuda"):
        if dispatch._choose("gram", (a, b, None, None, "tiles")).backend is None:
            pytest.skip(dispatch._choose("gram", (a, b, None, None, "tiles")).reasons["cuda"])
        want = run()
        assert all(torch.equal(x, y) for x, y in zip(captured(run), want))


def test_kernels_that_start_early_give_the_same_bits_every_time(served):
    """Calls in turn, nothing waited for: a scratch that is read or overwritten too early would hold another call's gradients."""
    calls = [[torch.randn(n, 40, 768, device="cuda").bfloat16() for _ in range(2)] for n in (128, 64, 200)]
    with served("cuda"):
        if dispatch._choose("gram", (*calls[0], None, None, "tiles")).backend is None:
            pytest.skip(dispatch._choose("gram", (*calls[0], None, None, "tiles")).reasons["cuda"])
        runs = [[ef.ops.gram(*call, route="tiles") for call in calls] for _ in range(100)]
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0]))


def test_lookahead_with_a_capacity_captures_and_is_undone_to_the_bit(backend):
    params = [torch.randn(300, 128, device="cuda"), torch.randn(129, device="cuda").bfloat16(), torch.randn(7, device="cuda").double()]
    params[0][::7, 3] *= 1e-6
    grads, before = [torch.randn_like(p) for p in params], [p.clone() for p in params]

    def run(capacity=20):
        ulps, index, value = residue = ef.ops.step_lookahead(params, grads, 0.3, capacity)
        ahead = [p.clone() for p in params]
        ef.ops.step_lookahead_undo(params, grads, residue, 0.3)
        return [*ahead, *ulps, index, value]

    want = run()
    assert sum(int((u == -128).sum()) for u in want[3:6]) > 0 and not any(torch.equal(p, q) for p, q in zip(want, before))
    _, every, _ = residue = ef.ops.step_lookahead(params, grads, 0.3)
    ef.ops.step_lookahead_undo(params, grads, residue, 0.3)
    assert torch.equal(want[6], every[:20])
    assert all(torch.equal(x, y) for x, y in zip(captured(run), want))
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    with pytest.raises(RuntimeError, match="^capacity: got None under a CUDA graph capture"):
        captured(lambda: run(20 if not torch.cuda.is_current_stream_capturing() else None))


def test_rows_of_all_layers_on_two_streams_do_not_share_their_counter():
    layers = [(torch.randn(64, 96, device="cuda"), torch.randn(64, 32, device="cuda")) for _ in range(20)]
    want, streams, found = ef.ops.gram_layers(layers), [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ef.ops.gram_layers(layers))
    torch.cuda.synchronize()
    assert all(torch.equal(x, want) for x in found)


def test_no_host_synchronisation_in_a_step(backend):
    x = [torch.randn(4096, device="cuda") for _ in range(2)]
    a, b = torch.randn(64, 16, 128, device="cuda"), torch.randn(64, 16, 64, device="cuda")
    coef, w = torch.zeros(1, device="cuda"), torch.randn(1, 64, device="cuda")

    def once():
        ef.ops.step_gram([x[:1], x[1:]])
        ef.ops.step_update(x[:1], None, x[1:], [x[1:]], coef, lr=0.1)
        ef.ops.step_lookahead_undo(x[:1], x[1:], ef.ops.step_lookahead(x[:1], x[1:], 0.1, 9), 0.1)
        ef.ops.gram(a, b, route="tiles")
        if backend == "triton":
            ef.ops.combine(a, b, w)
            ef.ops.gram_layers([(a[:, 0], b[:, 0])] * 3)

    once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements(backend):
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


def test_warmup_runs():
    ef.warmup(dtypes=(torch.bfloat16,))


SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, backend, tmp_path):
    """small_calls.py in a process of its own; allocations of their own too, so that what lies beyond a tensor is nobody's."""
    if not Path(SANITIZER).exists():
        pytest.skip("compute-sanitizer is not installed")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end = float(os.environ.get("ENTANGLE_FAST_GPU_TESTS_END", "inf"))
    limit = int(min(300, max(10, end - time.time())))  # timeout ends the sanitizer's children too, which would keep a pipe open
    command = ["timeout", "-k", "5", str(limit), SANITIZER, "--tool", tool, "--error-exitcode", "7", sys.executable,
               str(Path(__file__).with_name("small_calls.py")), backend]  # fmt: skip
    with (tmp_path / "out.txt").open("w") as file:
        done = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    said = (tmp_path / "out.txt").read_text(errors="replace")
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this machine's GPU")
    found = "\n".join(x for x in said.splitlines() if x.startswith(("=========", "ran ")) or "Error" in x)
    assert done.returncode not in (124, 137), f"not done after {limit} s:\n{found[-4000:]}"
    assert done.returncode == 0, found[:4000] or said[-4000:]
