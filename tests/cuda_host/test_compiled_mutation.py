"""Is it the PTX that runs, and would a mistake in its inline assembly be seen? Each change to it here must be noticed.

Where nvcc's code runs in the emulator's place: see tests/cuda/test_nvcc_runs.py.
"""

import re

import pytest
import torch
from bound import COMPILED, begin, control
from calls import MMA, WGMMA, gram, project_random

from entangle_fast import reference

pytestmark = [pytest.mark.skipif(not COMPILED, reason="of what nvcc made: run by tests/cuda/test_nvcc_runs.py"),
              pytest.mark.usefixtures("poisoned_memory")]  # fmt: skip
A_WAIT = r"\{\s*\.reg \.pred done;\s*again:\s*mbarrier\.try_wait[^}]*\}"
# what: source, pattern, its replacement, the calls that must go wrong
CHANGES = {
    "mbarriers are not waited for": ("gram", A_WAIT, "", "wgmma"),
    "nor is the cluster": ("gram", r"barrier\.cluster\.wait\.acquire\.aligned;", "", "wgmma"),
    "nor are products": ("gram", r"wgmma\.wait_group\.sync\.aligned \d+;", "wgmma.wait_group.sync.aligned 7;", "wgmma"),
    "products without wgmma.fence": ("gram", r"wgmma\.fence\.sync\.aligned;", "", "wgmma"),
    "operands in the wrong order": ("gram", r"(m64n\d+k16\.f32\.bf16\.bf16 \{[^}]*\}), (%rd\d+), (%rd\d+)", r"\1, \3, \2", "wgmma"),
    "never added": ("gram", r"more, 1, 1, (\d), (\d);", r"0, 1, 1, \1, \2;", "wgmma"),
    "not transposed": ("gram", r"more, 1, 1, 1, 1;", "more, 1, 1, 0, 0;", "wgmma"),
    "another place of the tensor": ("gram", r"\{(%r\d+), (%r\d+), (%r\d+)\}\], \[", r"{\2, \1, \3}], [", "wgmma"),
    "a multicast to one block": ("gram", r"(multicast::cluster\.L2::cache_hint [^;]*), %rs\d+, ", r"\1, 1, ", "wgmma"),
    "fewer bytes announced": ("gram", r"(expect_tx\.shared::cta\.b64 _, \[%r\d+\]), %r\d+", r"\1, 512", "wgmma"),
    "copies are not waited for": ("gram", r"cp\.async\.wait_group (\d);", "cp.async.wait_group 9;", "mma"),
    "a barrier less": ("gram", r"bar\.sync\s+0;", "", "mma"),
    "fragments not transposed": ("gram", r"m8n8\.x4\.trans", "m8n8.x4", "mma"),
    "the other half": ("gram", r"(bf16\.bf16\.f32 \{[^}]*\}, \{[^}]*\}), \{(%r\d+),(%r\d+)\}", r"\1, {\3,\2}", "mma"),
    "another round of Philox": ("project", r"3528531795", "3528531797", "random"),
}  # fmt: skip


def calls(which: str) -> list:
    """Results beside what they should be; a launch that fails gives nothing."""
    torch.manual_seed(0)
    out = []
    for n, t, d_in, d_out in ((3, 97, 72, 200), (66, 40, 24, 72)) if which == "wgmma" else ((5, 17, 24, 40), (66, 40, 24, 40)):
        a, b = torch.randn(n, t, d_in).bfloat16(), torch.randn(n, t, d_out).bfloat16()
        want = reference.gram(a.double(), b.double())
        if which == "random":
            want = reference.project_random(a.double(), b.double(), 3, 1)
        for eager in (False, True):
            form = WGMMA if which == "wgmma" else MMA
            got = project_random(a, b, 3, 1, eager=eager) if which == "random" else gram(form, a, b, eager=eager)
            out.append((got.double(), want))
    return out


def noticed(which: str) -> bool:
    try:
        return any(not (got - want).norm() < 0.02 * want.norm() for got, want in calls(which))
    except RuntimeError:
        return True


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what):
    import nvcc

    source, pattern, new, which = CHANGES[what]
    count = 0

    def change(name, text):
        nonlocal count
        changed, many = re.subn(pattern, new, text) if name == source else (text, 0)
        count += many
        return changed

    begin()
    assert not noticed(which), "the unchanged code is noticed"
    try:
        nvcc.begin(control(), COMPILED, change)
        assert count, "the code has nothing of the kind"
        assert noticed(which)
    finally:
        nvcc.begin(control(), COMPILED)
