"""The machine that runs PTX: single instructions against what they are defined to be, and the faults it must see."""

import contextlib
import re
import struct

import gpu
import pytest
import torch

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
	.param .u64 probe_param_0,
	.param .u64 probe_param_1
)
{
	.reg .pred %p<4>;
	.reg .b16 %rs<10>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<10>;
	ld.param.b64 %rd1, [probe_param_0];
	ld.param.b64 %rd2, [probe_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 8;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
"""


def run(body, x, out, threads=32, shared=4096, **options):
    gpu.Program(f"{HEAD}{body}\nret;\n}}\n").launch((1, 1, 1), threads, shared, [x.data_ptr(), out.data_ptr()], **options)
    return out


def one(instruction, *operands):
    """The 64 bits that an instruction gives for operands' bits (hexadecimal or decimal literals)."""
    out = torch.zeros(32, dtype=torch.int64)
    args = ", ".join(map(str, operands))
    run(f"mov.b64 %rd9, 0;\n{instruction} %rd9, {args};\nst.global.b64 [%rd5], %rd9;", torch.zeros(32, dtype=torch.int64), out)
    return int(out[0]) & (2**64 - 1)


def f32(x):
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


@pytest.mark.parametrize("instruction, operands, want", [
    ("add.s32", (2**31 - 1, 1), 2**31),
    ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.wide.s32", (-3, 7), 2**64 - 21),
    ("mad.lo.s32", (-3, 7, 22), 1),
    ("div.s32", (-7, 2), 2**32 - 3), ("rem.s32", (-7, 2), 2**32 - 1), ("div.u32", (-1, 2), 2**31 - 1),
    ("shl.b32", (1, 32), 0), ("shr.s32", (-8, 40), 2**32 - 1), ("shr.u32", (-8, 29), 7),
    ("shf.l.wrap.b32", (0x80000001, 0x12345678, 4), 0x23456788), ("shf.r.wrap.b32", (0x80000001, 0x12345678, 4), 0x88000000),
    ("bfe.u32", (0xABCD1234, 8, 12), 0xD12), ("bfe.s32", (0xABCD1234, 8, 12), 0xFFFFFD12), ("bfi.b32", (0xF, 0, 4, 8), 0xF0),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7531), 0x77553311), ("prmt.b32", (0x80, 0, 0x0008), 0x808080FF),
    ("lop3.b32", (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xE8), 0xE8E8E8E8),
    ("popc.b32", (0xF00F,), 8), ("clz.b32", (1,), 31), ("clz.b64", (1,), 63),
    ("setp.ltu.f32", (f32(float("nan")), f32(1)), 1), ("setp.ne.f32", (f32(float("nan")), f32(1)), 0),
    ("min.f32", (f32(float("nan")), f32(1)), 0x3F800000), ("max.f32", (f32(-0.0), f32(0.0)), 0),
    ("setp.num.bf16", (0x7FC0, 0x3F80), 0), ("setp.num.f16", (0x7C00, 0xFC00), 1), ("setp.lt.f16", (0xFC00, 0x8000), 1),
    ("cvt.rzi.s32.f32", (f32(-2.7),), 2**64 - 2), ("cvt.rni.s32.f32", (f32(2.5),), 2), ("cvt.rzi.s32.f32", (f32(1e20),), 2**31 - 1),
    ("cvt.rn.bf16.f32", (f32(1 + 2**-8),), 0x3F80), ("cvt.rn.bf16.f32", (f32(1 + 3 * 2**-8),), 0x3F82),
    ("cvt.rn.bf16x2.f32", (f32(1), f32(2)), 0x3F804000), ("cvt.rn.f16.f32", (f32(65520),), 0x7C00),
    ("cvt.rna.tf32.f32", (0x3F801000,), 0x3F802000), ("cvt.rn.bf16.f64", ("0d3FF0100000000001",), 0x3F81),
    ("cvt.s64.s32", (-5,), 2**64 - 5), ("cvt.u64.u32", (-5,), 2**32 - 5), ("cvt.rn.f32.s32", (16777217,), 0x4B800000),
    ("fma.rn.f32", (f32(1 + 2**-23), f32(1 + 2**-23), f32(-1 - 2**-22)), 0x28800000),
    ("mul.rn.ftz.f32", (f32(1e-30), f32(1e-10)), 0), ("mul.f32", (f32(2**-100), f32(2**-40)), 0x200),
    ("mul.f32", (f32(float("inf")), f32(0.0)), 0x7FFFFFFF), ("max.f32", (0xFFC00000, 0xFFC00000), 0x7FFFFFFF),
    ("cvt.rn.f16.f32", (0xFFC00000,), 0x7FFF), ("div.full.f32", (f32(-(2.0**127)), f32(2.0**127)), 0xBF800000),
    ("cvt.s8.s32", (0x180,), 2**64 - 128), ("cvt.u8.s32", (0x180,), 128), ("cvt.s16.s32", (0x8000,), 2**64 - 2**15),
    ("cvt.rzi.s32.f32", (f32(float("nan")),), 0), ("cvt.rzi.s64.f32", (f32(float("nan")),), 2**63),
    ("cvt.rni.s32.f64", ("0d7FF8000000000000",), 2**64 - 2**31), ("cvt.rzi.s64.f32", (f32(-(2.0**70)),), 2**63),
    ("lg2.approx.f32", (0x400,), 0xC30B0000), ("lg2.approx.ftz.f32", (0x400,), 0xFF800000),
    ("ex2.approx.f32", (f32(-130.0),), 0x80000), ("ex2.approx.ftz.f32", (f32(-130.0),), 0),
    ("rcp.approx.f32", (f32(2.0**127),), 0x400000), ("rcp.approx.ftz.f32", (f32(2.0**127),), 0),
    ("rcp.approx.ftz.f32", (0x80400000,), 0xFF800000), ("sqrt.approx.ftz.f32", (0x400000,), 0),
    ("bfi.b32", (5, 9, 40, 8), 9), ("bfi.b32", (5, 9, 0, 200), 5), ("bfi.b32", (5, 9, 200, 200), 9),
    ("bfi.b32", (0xFF, 0, 28, 8), 0xF0000000),
    ("bfe.s32", (0x80000000, 24, 16), 2**32 - 128), ("bfe.s32", (0x80000000, 40, 8), 2**32 - 1), ("bfe.u32", (0x80000000, 40, 8), 0),
    ("shl.b16", (1, 16), 0), ("shr.s16", (0x8000, 300), 0xFFFF), ("shr.u64", (-1, 64), 0), ("shl.b64", (1, 0xFFFFFFFF), 0),
    ("min.s64", (-1, 1), 2**64 - 1), ("max.u64", (-1, 1), 2**64 - 1), ("setp.lt.s16", (0xFFFF, 0), 1), ("setp.gt.u16", (0xFFFF, 0), 1),
    ("setp.equ.f64", ("0d7FF8000000000000", "0d0000000000000000"), 1), ("setp.eq.f32", (f32(-0.0), f32(0.0)), 1),
    ("min.f32", (f32(0.0), f32(-0.0)), 0x80000000), ("div.s32", (-(2**31), -1), 2**31), ("neg.f32", (f32(0.0),), 0x80000000),
    ("selp.b32", (7, 9, 1), 7),
])  # fmt: skip
def test_instructions(instruction, operands, want):
    assert one(instruction, *operands) == want


def test_carries_go_from_one_word_to_the_next():
    out = torch.zeros(32, dtype=torch.int64)
    run("mad.lo.cc.u32 %r8, 0xFFFFFFFF, 2, 3;\nmadc.hi.u32 %r9, 0xFFFFFFFF, 2, 5;\nmov.b64 %rd9, {%r8, %r9};\nst.global.b64 [%rd5], %rd9;",
        torch.zeros(32, dtype=torch.int64), out)  # fmt: skip
    assert int(out[3]) == 0xFFFFFFFF * 2 + 3 + (5 << 32)


@pytest.mark.parametrize("instruction, exact, ulps", [
    ("ex2.approx.f32", lambda x: 2.0 ** x, 3), ("lg2.approx.f32", lambda x: torch.log2(x), 3), ("rcp.approx.ftz.f32", lambda x: 1 / x, 2),
    ("sqrt.approx.f32", lambda x: x.sqrt(), 2),
])  # fmt: skip
def test_approximations_err_but_not_by_much(instruction, exact, ulps):
    x, out = torch.linspace(2.5, 30, 32, dtype=torch.float64).float(), torch.zeros(32)
    run(f"""
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	ld.global.b32 %r5, [%rd4];
	{instruction} %r6, %r5;
	st.global.b32 [%rd5], %r6;
""", x, out)  # fmt: skip
    want = exact(x.double())
    off = ((out.double() - want) / want).abs() * 2**23
    assert off.max() <= ulps and off.max() > 0.6  # a wrong constant would show, and so would exactness


def test_tensors_without_a_storage_may_live_beside_it():
    beside = [torch.eye(3).to_sparse(), torch.eye(3).to_mkldnn()]
    assert one("add.s32", 1, 2) == 3 and len(beside) == 2


def test_lanes_of_two_paths_meet_again():
    out = torch.zeros(32, dtype=torch.int64)
    run("""
	setp.lt.u32 %p1, %r1, 7;
	mov.b32 %r5, 1;
	@%p1 bra $L_far;
$L_back:
	bar.sync 0;
	redux.sync.add.s32 %r6, %r5, 0xffffffff;
	cvt.s64.s32 %rd9, %r6;
	st.global.b64 [%rd5], %rd9;
	ret;
$L_far:
	mov.b32 %r5, 10;
	bra.uni $L_back;
""", torch.zeros(32, dtype=torch.int64), out)  # fmt: skip
    assert out.tolist() == [25 + 70] * 32


@pytest.mark.parametrize("body, message", [
    ("ld.global.b64 %rd9, [%rd4+8];", "outside of every tensor: 8 bytes behind"),
    ("st.global.b64 [%rd4+-8], %rd9;", "outside of every tensor"),
    ("ld.global.v2.b64 {%rd8, %rd9}, [%rd1+8];", "not a multiple of 16"),
    ("st.shared.b32 [global_smem+4096], %r1;", "shared memory at 4096 of 4096 bytes"),
    ("ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [global_smem+4];", "not aligned to 16 bytes"),
    ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_out;\nbar.sync 0;\n$L_out:\nret;", "a barrier in a warp"),
    ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_b;\nbar.sync 0;\nret;\n$L_b:\nbar.sync 1;", "lanes wait for each other"),
    ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L_out;\nbar.sync 0;\n$L_out:\nret;", "for warps that do not come"),
    ("tanh.approx.f32 %r5, %r6;", "tanh.approx.f32 %r5, %r6: not known"),
    ("bra $L_nowhere;", "no label"),
    ("mov.b64 %rd9, -1;\nld.global.b8 %rs1, [%rd9];", "outside of every tensor"),
    (".local .align 4 .b8 depot[8];\nst.local.b32 [depot+8], %r1;", "local memory at 8 of 8 bytes"),
    (".local .align 4 .b8 depot[8];\nst.local.b32 [depot+-4], %r1;", "local memory"),
    ("ld.param.b64 %rd9, [probe_param_1+8];", "parameters at 16 of 16 bytes"),
    ("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 15;", "shfl.sync names other lanes"),
    ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_out;\ncp.async.commit_group;\n$L_out:\nret;", "cp.async.commit_group in a warp"),
    ("mov.b32 %r5, -1;\nbar.sync %r5;", "barrier -1"),
])  # fmt: skip
def test_faults_are_seen(body, message):
    x = torch.zeros(32, dtype=torch.int64)
    room = torch.zeros(64, dtype=torch.int64)  # the only tensors near it are its own
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(body, x, room[:32], threads=64 if "do not come" in message else 32)


@pytest.mark.parametrize("body", [
    "add.sat.s32 %r5, %r6, %r7;", "add.cc.u32 %r5, %r6, %r7;", "cvt.rn.relu.bf16x2.f32 %r5, %r6, %r7;", "cvt.rz.f32.f64 %r5, %rd9;",
    "mul.rz.f32 %r5, %r6, %r7;", "setp.lt.and.s32 %p1, %r5, %r6, %p2;", "setp.lt.s32 %p1|%p2, %r5, %r6;",
    "min.xorsign.abs.f32 %r5, %r6, %r7;",
    "atom.global.add.f32 %r5, [%rd1], %r6;", "atom.global.gpu.acq_rel.cas.b32 %r5, [%rd1], %r6, %r7;", "red.global.add.u32 [%rd1], %r6;",
    "ld.global.b128 %rd9, [%rd1];", "ld.global.L2::cache_hint.b32 %r5, [%rd1], %rd9;", "ld.global.unified.b32 %r5, [%rd1];",
    "ld.v8.b32 %r5, [%rd1];", "mov.b64 {%r5, %r6}, {%r7, %r8};", "mov.u32 %r5, %smid;", "mov.u32 %r5, %clock;", "mov.u32 %r5, %r99;",
    "mov.b32 %r5, 1.5;", "mov.b32 %r5, 0b11;", "mov.b32 %r5, 0f3F80;", "add.s32 5, %r6, %r7;",
    "add.s32 %r5, %r6;", "add.s32 %r5, %r6, !%p1;",
    "ld.global.b32 %r5, [%rd1-4];", "shfl.sync.turn.b32 %r5, %r6, 1, 31, -1;", "shfl.sync.bfly.b32 %r5, %r6, 1, 31;",
    "redux.sync.min.f32 %r5, %r6, -1;", "redux.sync.add.b32 %r5, %r6, -1;", "vote.sync.uni.pred %p1, %p2, -1;",
    "bar.sync 0, 64;", "bar.red.popc.u32 %r5, 0, %p1;",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6}, [global_smem];",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r5, %r6}, [%r7];",
    "cp.async.ca.shared.global.L2::cache_hint [%r5], [%rd1], 16, %rd9;", "cp.async.ca.shared.global [%r5], [%rd1], 16, %p1;",
    "cp.async.cg.shared.global [%r5], [%rd1], 8;", "cp.async.mbarrier.arrive.shared.b64 [%r5];", "cp.async.wait_all;",
    "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4};",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4};",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r5, %r6}, {%r1, %r2, %r3, %r4};",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd8, %rd9, 1, -1, 1, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd8, %rd9, 1, 1, 1, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1, %r2, %r3, %r4}, %rd8, %rd9, 1, 1, 1, 0, 1;",
    "@%p1 bar.sync 0;", ".const .b8 more[16];",
])  # fmt: skip
def test_what_is_not_known_is_refused(body):
    name = re.escape(body.removeprefix("@%p1 ").split(";")[0])
    with pytest.raises(RuntimeError, match=name):
        gpu.Program(f"{HEAD}{body}\nret;\n}}\n")


@pytest.mark.parametrize("text", ["", "ret;", HEAD, HEAD + "ret;", HEAD.replace(".u64 probe_param_1", "probe_param_1") + "ret;\n}"])
def test_a_text_that_ends_early_is_refused(text):
    with pytest.raises(RuntimeError):
        gpu.Program(text)


@pytest.mark.parametrize("eager, waits", [(True, False), (False, True), (False, False)])
def test_a_copy_lands_when_it_is_waited_for(eager, waits):
    x, out = torch.full((32,), 5), torch.zeros(32, dtype=torch.int64)
    wait = "cp.async.commit_group;\ncp.async.wait_group 0;" if waits else ""
    expected = contextlib.nullcontext() if eager or waits else pytest.raises(RuntimeError, match="which nothing has written")
    with expected:
        run(f"""
	shl.b32 %r5, %r1, 3;
	mov.b32 %r6, global_smem;
	add.s32 %r7, %r5, %r6;
	cp.async.ca.shared.global [%r7], [%rd4], 8;
	{wait}
	ld.shared.b64 %rd9, [%r7];
	st.global.b64 [%rd5], %rd9;
""", x, out, eager=eager)  # fmt: skip
    assert out.tolist() == [5 if eager or waits else 0] * 32


SHARE = "shl.b32 %r5, %r1, 2;\nadd.u32 %r5, %r5, global_smem;\nxor.b32 %r6, %r5, 128;\n"  # own word, and the other warp's


@pytest.mark.parametrize("body, message", [
    ("st.shared.b32 [%r5], %r1;\nld.shared.b32 %r7, [%r6];", "which nothing has written|wrote, and no barrier since"),
    ("st.shared.b32 [%r5], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nst.shared.b32 [%r5], %r7;", "(read|wrote), and no barrier since"),
    ("st.shared.b32 [global_smem], %r1;", "wrote another value, and no barrier since"),
    ("ld.shared.b32 %r7, [global_smem];", "which nothing has written"),
    ("st.shared.b32 [%r5], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r6];\nbar.sync 0;\nst.shared.b32 [%r5], %r7;", None),
    ("st.shared.b32 [global_smem], 7;\nbar.sync 0;\nld.shared.b32 %r7, [global_smem];", None),  # the same value
    ("st.shared.b8 [%r5], %r1;\nst.shared.b8 [%r5+1], %r1;\nld.shared.b16 %rs1, [%r5];", None),
])  # fmt: skip
def test_races_between_warps_are_seen(body, message):
    fails = pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext()
    with fails:
        run(SHARE + body, torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64), threads=64)


ONES = """
	mov.b32 %r6, 0x3F803F80;
	shl.b32 %r5, %r1, 4;
	add.u32 %r5, %r5, global_smem;
	st.shared.v4.b32 [%r5], {%r6, %r6, %r6, %r6};
	fence.proxy.async.shared::cta;
	bar.sync 0;
	mov.b64 %rd8, 0x0000000800080040;
	mov.b32 %r8, 0f40A00000;
	mov.b32 %r9, %r8;
	mov.b32 %r10, %r8;
	mov.b32 %r11, %r8;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r8, %r9, %r10, %r11}, {%r6, %r6, %r6, %r6}, %rd8, 1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	cvt.rzi.s64.f32 %rd9, %r11;
	st.global.b64 [%rd5], %rd9;
"""


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("old, new, message", [
    ("", "", None),
    ("fence.proxy.async.shared::cta;\n\tbar.sync 0;", "bar.sync 0;\n\tfence.proxy.async.shared::cta;", None),
    ("fence.proxy.async.shared::cta;", "", "no fence.proxy.async came between"),
    ("bar.sync 0;", "", "nothing has written|no barrier since"),
    ("wgmma.fence.sync.aligned;", "", "wgmma before any wgmma.fence"),
    ("mov.b32 %r11, %r8;\n\twgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\n\tmov.b32 %r11, 0f40A00000;", "was written after"),
    ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\n\tmov.b32 %r12, %r11;", "was read after wgmma.fence"),
    ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\n\tmov.b32 %r6, %r6;", "wgmma reads a register that was written"),
    ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "is read before wgmma.wait_group"),
    ("wgmma.wait_group.sync.aligned 0;", "", "is read before wgmma.wait_group"),
    ("wgmma.wait_group.sync.aligned 0;", "mov.b32 %r6, 0;\n\twgmma.wait_group.sync.aligned 0;", "is written before wgmma.wait_group"),
    ("wgmma.wait_group.sync.aligned 0;", "mov.b32 %r7, %r6;\n\twgmma.wait_group.sync.aligned 0;", None),
])  # fmt: skip
def test_products_without_their_fences_are_seen(old, new, message, eager):
    assert old in ONES
    x, out = torch.zeros(128, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
    fails = pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext()
    with fails:
        run(ONES.replace(old, new), x, out, threads=128, eager=eager)
        assert out.tolist() == [16 + 5] * 128


def test_copies_need_the_fence_too_unless_a_launch_is_told_otherwise():
    x, out = torch.full((256,), 0x3F803F803F803F80), torch.zeros(128, dtype=torch.int64)
    body = ONES.replace("fence.proxy.async.shared::cta;", "").replace("st.shared.v4.b32 [%r5], {%r6, %r6, %r6, %r6};", """
	mul.wide.u32 %rd3, %r1, 16;
	add.s64 %rd4, %rd1, %rd3;
	cp.async.cg.shared.global [%r5], [%rd4], 16;
	cp.async.commit_group;
	cp.async.wait_group 0;""")  # fmt: skip
    run(body, x, out, threads=128, copies_fenced=True)
    assert out.tolist() == [16 + 5] * 128
    with pytest.raises(RuntimeError, match="no fence.proxy.async came between"):
        run(body, x, out, threads=128)


def test_sectors_are_counted():
    def sectors(stride):
        x, out = torch.zeros(32 * 8, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
        body = f"mul.wide.u32 %rd3, %r1, {stride};\nadd.s64 %rd4, %rd1, %rd3;\nld.global.b64 %rd9, [%rd4];"
        return gpu.Program(f"{HEAD}{body}\nret;\n}}\n").launch((1, 1, 1), 32, 0, [x.data_ptr(), out.data_ptr()])

    start = sectors(8)
    assert start["requests"] == 1 and start["bytes"] == 256 and 8 <= start["sectors"] <= 9
    assert sectors(64)["sectors"] == 32


TARGETS = {"sm_80": ("copies", "barriers"), "sm_90": ("copies", "products", "barriers")}
SEEN = {"copies": "nothing has written", "products": "before wgmma.wait_group", "barriers": "nothing has written|no barrier since"}
WAITS = {"copies": r"cp\.async\.wait_group", "products": r"wgmma\.wait_group", "barriers": r"bar\.sync"}


@pytest.mark.parametrize("what, target", [(what, target) for target, all_of in TARGETS.items() for what in all_of])
def test_a_kernel_without_its_waits_is_noticed(what, target, monkeypatch):
    pytest.importorskip("triton")
    from entangle_fast.kernels import gram

    a, b = torch.randn(40, 1, 256).bfloat16(), torch.randn(40, 1, 256).bfloat16()
    with gpu.running(target):
        whole = gram.gram(a, b, route="rows")
    plain = (a[:, 0].float() @ a[:, 0].float().T) * (b[:, 0].float() @ b[:, 0].float().T)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=0.1)

    def without(ptx):
        assert re.search(WAITS[what], ptx)
        return gpu.Program(re.sub(rf"{WAITS[what]}[^;]*;", "", ptx))

    monkeypatch.setattr(gpu, "_program", without)
    with gpu.running(target), pytest.raises(RuntimeError, match=SEEN[what]):
        gram.gram(a, b, route="rows")
