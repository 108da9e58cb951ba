"""Every launch the wrappers make, compiled for GPUs that are not there: no spills, shared memory that fits, wgmma."""

import os

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels were imported to be interpreted; nothing can be compiled"
)

import launches  # noqa: E402
import workloads  # noqa: E402

QUICK = "bf16"  # on every target; the rest takes minutes
# kernels whose inner step is a tensor-core product; the row norms and finishing kernels have none
MATRIX = {"_rows", "_pairs", "_form", "_accumulate", "_tile_norms", "_combine", "_random"}


def cases():
    for workload in workloads.NAMES:
        for target in launches.TARGETS:
            slow = () if workload.endswith(QUICK) else (pytest.mark.slow,)
            yield pytest.param(workload, target, marks=slow, id=f"{workload}-{target}")


@pytest.fixture(scope="module")
def recorded():
    found = {}

    def get(name, target):
        if (name, target) not in found:
            found[name, target] = launches.unique(launches.record(lambda: workloads.run(workloads.calls(name)), target))
        return found[name, target]

    return get


@pytest.mark.parametrize("workload, target", list(cases()))
def test_default_configurations_compile_without_spills(recorded, workload, target):
    assert recorded(workload, target)
    for launch in recorded(workload, target):
        built, found = launches.compile_for(target, launch)
        name = f"{launches.label(launch)} on {target}"
        assert found["spills"] == 0, f"{name}: {found['spills']} bytes of spills at {found['registers']} registers"
        assert found["shared"] <= launches.SHARED[target], f"{name}: {found['shared']} bytes of shared memory"
        if target == "sm_90" and launch[0].fn.__name__ in MATRIX and "fp32" not in workload:
            assert "wgmma.mma_async" in built.asm["ptx"], f"{name}: no wgmma"


def odd(launch) -> bool:
    """Of the workload whose rows begin anywhere."""
    return any(v in (51, 43, 51 * 43) for v in launch[1].values() if isinstance(v, int)) or launch[1].get("ALIGNED") is False


def test_contractions_load_sixteen_bytes_at_a_time(recorded):
    """The alignment hints of pointer tables and offset tables arrive: without them every load is of one element."""
    for launch in recorded("matrices-bf16", "sm_90") + recorded("steps-bf16", "sm_90"):
        if launch[0].fn.__name__ in MATRIX | {"_update", "_adamw", "_lookahead", "_gram"} and not odd(launch):
            ptx = launches.compile_for("sm_90", launch)[0].asm["ptx"]
            wide = "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx
            assert wide, f"{launches.label(launch)}: loads of single elements"


def test_more_samples_than_a_grids_second_axis_has():
    import torch
    from entangle_fast.kernels import project, project_random, sqnorm

    def calls():  # launches.record checks every grid
        for t in (2, 16):
            a, b = torch.zeros(70000, t, 8), torch.zeros(70000, t, 8)
            sqnorm.sqnorm(a, b)
            project.project(a, b, torch.zeros(3, 8, 8))
        project_random.project_random(a, b, 3, seed=1)

    found = {k.fn.__name__ for k, _, _ in launches.record(calls)}
    assert {"_pair_norms", "_tile_norms", "_form", "_accumulate", "_random"} <= found


def test_a_table_by_kernel_arguments_compiles():
    import torch
    from entangle_fast.kernels import table

    found = launches.record(lambda: table.write_by_arguments([2**40] * 3, torch.device("cpu")))
    assert launches.compile_for("sm_90", found[0])[1]["spills"] == 0


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("n", [30, 1024])
def test_rows_of_all_layers_are_one_launch(n, others):
    import torch
    from entangle_fast.kernels import gram

    a, b = ([torch.zeros(n, twice * d) for d in (8, 24, 64, 5, 16)] for twice in (1, 2))
    found = launches.record(lambda: gram.gram_layers(a, b, *((a, b) if others else ([], []))))
    assert [k.fn.__name__ for k, _, _ in found] == ["_rows"]
    assert found[0][1]["SPLIT"] == (n == 30)  # split over layers where the tiles leave the device empty


def test_warmup_launches_every_kernel():
    import inspect
    from importlib import import_module
    from pathlib import Path

    import torch
    from entangle_fast.kernels import warmup
    from triton.runtime.jit import JITFunction

    launched = {k.fn for k, _, _ in launches.record(lambda: warmup.warmup("cpu", (torch.bfloat16,)))}
    for path in Path(warmup.__file__).parent.glob("*.py"):
        module = import_module(f"entangle_fast.kernels.{path.stem}")
        for name, found in vars(module).items():
            if isinstance(found, JITFunction) and "program_id" in inspect.getsource(found.fn) and name != "_restore":
                assert found.fn in launched, f"{module.__name__}.{name} is not warmed up"
