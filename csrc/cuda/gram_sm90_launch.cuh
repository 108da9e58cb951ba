// How a call of gram_sm90.cuh is cut up and launched: tensor maps, the shape of units and chunks, clusters. Included by gram.cu.
#pragma once

#include "gram_sm90.cuh"

namespace ef::cuda::sm90 {

#ifdef EF_CUDA_HOST  // so that the scratch is filled again in a small test
constexpr int64_t kScratch = 600 << 10;
#else
constexpr int64_t kScratch = 32 << 20;  // bytes of both sides' gradients: of an H100's 50 MB of L2
#endif

// boxes of 64 columns × `lines`
inline int encode(TensorMap* map, const void* p, int64_t d, int64_t t, int64_t n, int64_t position, int64_t sample, int lines) {
  const uint64_t size[3] = {(uint64_t)d, (uint64_t)t, (uint64_t)n}, stride[2] = {2 * (uint64_t)position, 2 * (uint64_t)sample};
  const uint32_t box[3] = {64, (uint32_t)lines, 1};
#ifdef EF_CUDA_HOST
  return cuda_host::encode(map, p, 2, 3, size, stride, box, 128);
#else
  using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                          const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode* const function = [] {  // from the driver, without linking libcuda: the library loads where there is none
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto rc = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return rc == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode*)found : nullptr;
  }();
  if (!function) return kBadArgument;
  const uint32_t one[3] = {1, 1, 1};
  return (int)function(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), (const cuuint64_t*)size, (const cuuint64_t*)stride,
                       box, one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
#endif
}

// 0: served. Strides must be whole 16 bytes and not 0 (an expanded tensor), positions and sizes within 32 bits.
inline int refuses(int type, const Factors& left, const Factors* right, int64_t d_in, int64_t d_out) {
#ifndef EF_CUDA_HOST
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) || major != 9 || minor != 0)
    return 1;
#endif
  auto fine = [&](const Factors& f) {
    auto stride = [](int64_t s) { return s > 0 && s % 8 == 0; };
    return (uintptr_t)f.a % 16 == 0 && (uintptr_t)f.b % 16 == 0 && stride(f.a_sample) && stride(f.a_position) && stride(f.b_sample) &&
           stride(f.b_position) && f.t < 1 << 30 && f.n < 1 << 30;
  };
  return !(type == kBf16 && fine(left) && (!right || fine(*right)) && d_in < 1 << 30 && d_out < 1 << 30);
}

// How a call is cut up. n, m: samples of the two sides, the same ones where symmetric; t: the longer side's positions
struct Plan {
  int I = 64, blocks = 1, rows;          // columns of a tile; tiles of a unit, blocks of its cluster; samples of a block of accumulate
  int64_t high, units, each, runs, wide;  // units along d_out, in all, of a chunk; runs of a chunk; blocks of accumulate beside each other
  int64_t splits, partials;

  Plan(int64_t n, int64_t m, bool symmetric, int64_t t, int64_t d_in, int64_t d_out, int processors) {
    const int64_t samples = symmetric ? n : n + m;
    // bytes of L2 that a sample's factors and gradient take: in, out, in again
    auto traffic = [&](int columns, int many) {
      return cdiv<int64_t>(d_out, many * kO) * cdiv<int64_t>(d_in, columns) * ((many * kO + columns) * 2 * t + many * kO * columns * 4);
    };
    for (int many = 1; many <= 4; many *= 2)
      for (int columns = 64 * many; columns <= 256; columns *= 2)  // a box of 64 columns a block at least
        if (samples * many * kO * columns * 2 <= kScratch && traffic(columns, many) < traffic(I, blocks)) I = columns, blocks = many;
    high = cdiv<int64_t>(d_out, blocks * kO), units = high * cdiv<int64_t>(d_in, I);
    each = max((int64_t)1, min(units, kScratch / (samples * size() * 2)));
    runs = pitch() / kRun;
    rows = max(n, m) <= 64 ? 64 : symmetric && n > 128 && n <= 256 ? 256 : 128;
    const int64_t right = cdiv<int64_t>(m, rows);
    wide = rows == 256 ? 2 : symmetric ? right * (right + 1) / 2 : cdiv<int64_t>(n, rows) * right;
    splits = max((int64_t)1, min(runs, processors / wide));
    splits = cdiv(runs, cdiv(runs, splits));  // whole rounds only
    partials = rows == 64 ? 2 * splits : splits;
  }
  int64_t size() const { return (int64_t)blocks * kO * I; }  // elements of a unit
  int64_t pitch() const { return each * size(); }            // of a row of the scratch
};

template <int I> constexpr int kFormShared = form_stages(I) * form_stage(I) + kBeside;
// Shared memory that every block of form and accumulate has at least: no two fit a multiprocessor, which has 228 KiB and takes 1 KiB a
// block for itself. Where two did, blocks that come early would gather on the multiprocessors that are free first. As it is, one comes
// wherever one has left, and a kernel may let the next one start from its own beginning
constexpr int kAlone = 116 << 10;
#ifndef EF_CUDA_HOST
static_assert(kFormShared<64> >= kAlone && kFormShared<128> >= kAlone && kFormShared<256> >= kAlone);
#endif

// count: clusters of form that the device runs at once
template <int I> int prepare_form(const Plan& plan, int* count) {
  EF_TRY(allow_shared(form_wgmma<I>, kFormShared<I>));
  return plan.blocks == 1 ? processors(count) : resident_clusters(form_wgmma<I>, plan.blocks, kThreads, kFormShared<I>, count);
}

template <int I> int launch_form(const Maps& maps, const Plan& plan, int64_t n, int64_t t, int64_t first, int64_t units, void* scratch,
                                 int clusters, bool early, void* stream) {
  const auto blocks = (unsigned)(plan.blocks * min(n * units, (int64_t)clusters));
  return launch_clusters(form_wgmma<I>, plan.blocks, early, dim3(blocks), dim3(kThreads), kFormShared<I>, stream, maps, n, t, plan.high,
                         first, units, plan.pitch(), static_cast<uint32_t*>(scratch));
}

template <int ROWS> int launch_add(const Maps& maps, const Plan& plan, int64_t n, int64_t m, bool symmetric, int64_t units, bool set,
                                   float* partial, void* stream) {
  const int shared = max(kAddStages * add_stage(ROWS, symmetric && n <= ROWS) + kBeside, kAlone);
  EF_TRY(allow_shared(add_wgmma<ROWS>, shared));
  return launch_clusters(add_wgmma<ROWS>, ROWS == 256 ? 2 : 1, true, dim3((unsigned)plan.wide, (unsigned)plan.splits),
                         dim3(add_consumers(ROWS) + 32), shared, stream, maps, n, m, symmetric, units * plan.size() / kRun, set, partial);
}

// of b and a
inline int encode_factors(Maps* maps, const Factors& f, int64_t d_in, int64_t d_out) {
  EF_TRY(encode(&maps->left, f.b, d_out, f.t, f.n, f.b_position, f.b_sample, kT));
  return encode(&maps->right, f.a, d_in, f.t, f.n, f.a_position, f.a_sample, kT);
}

inline Plan plan_of(const Factors& left, const Factors* right, int64_t d_in, int64_t d_out, int processors) {
  const Factors& other = right ? *right : left;
  return {left.n, other.n, !right, max(left.t, other.t), d_in, d_out, processors};
}

// scratch: (n, pitch), and (m, pitch) behind it where there is a right side. A chain of kernels (ptx.cuh), which gram.cu's add_partials
// ends. The first is launched as any other: what is before it in the stream is torch's or another library's, which has written the
// factors, may still read what is now scratch, and need not have waited for what came before itself
inline int launch_wgmma(const Factors& left, const Factors* right, int64_t d_in, int64_t d_out, float* partial, void* scratch,
                        void* stream) {
  int count = 0, clusters = 0;
  EF_TRY(processors(&count));
  const Plan plan = plan_of(left, right, d_in, d_out, count);
  const int64_t n = left.n, m = right ? right->n : n, pitch = plan.pitch();
  void* const other = right ? static_cast<Bf16*>(scratch) + n * pitch : scratch;
  const auto prepare = plan.I == 64 ? prepare_form<64> : plan.I == 128 ? prepare_form<128> : prepare_form<256>;
  const auto form = plan.I == 64 ? launch_form<64> : plan.I == 128 ? launch_form<128> : launch_form<256>;
  const auto add = plan.rows == 64 ? launch_add<64> : plan.rows == 128 ? launch_add<128> : launch_add<256>;
  EF_TRY(prepare(plan, &clusters));
  Maps x, y, rows;
  EF_TRY(encode_factors(&x, left, d_in, d_out));
  if (right) EF_TRY(encode_factors(&y, *right, d_in, d_out));
  for (int64_t first = 0; first < plan.units; first += plan.each) {
    const int64_t units = min(plan.each, plan.units - first), width = units * plan.size();
    if (first == 0 || units < plan.each) {
      const int lines = min(plan.rows, 128);
      EF_TRY(encode(&rows.left, scratch, width, n, 1, pitch, pitch * n, lines));
      EF_TRY(encode(&rows.right, other, width, m, 1, pitch, pitch * m, lines));
    }
    EF_TRY(form(x, plan, n, left.t, first, units, scratch, clusters, first > 0, stream));
    if (right) EF_TRY(form(y, plan, m, right->t, first, units, other, clusters, true, stream));
    EF_TRY(add(rows, plan, n, m, !right, units, first == 0, partial, stream));
  }
  return 0;
}

}  // namespace ef::cuda::sm90
