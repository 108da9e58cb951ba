// The CUDA runtime and driver of one GPU that is not there, as far as csrc/cuda asks: what nvcc compiled runs on the machine of
// tests/ptx. It takes libcudart's place beneath nvcc's objects (nvcc.py), and is given the kernels' PTX as text.
// It exports what tests/cuda_host/exports.cpp does, so that the same tests run on both.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../cuda_host/span.h"
#include "tensor_map.h"

extern "C" {
const char* ptx_error();
void* ptx_read(const char* text, const char* entry);
int ptx_launch(void* program, const uint32_t* grid, uint32_t cluster, uint32_t threads, uint32_t shared, const void* const* args,
               const uint64_t* allowed, int64_t ranges, uint32_t seed, int eager, int copies_fenced, uint64_t* counted);
}

namespace {

struct Kernel {
  std::string name;
  void* program = nullptr;
  int shared = 48 << 10;  // bytes that a launch may ask for
};
std::map<const void*, Kernel> kernels;  // by the host's function
std::vector<std::string> modules;       // PTX
std::string error, launches, counts;
int capability = 90, eager = 0, largest = 0;
std::mt19937 seeds{1};
constexpr int kProcessors = 4;

cudaError_t refuse(const std::string& what, cudaError_t code = cudaErrorInvalidValue) {
  if (error.empty()) error = what;
  return code;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, unsigned cluster, size_t shared, void** args) {
  const auto found = kernels.find(function);
  if (found == kernels.end()) return refuse("no such kernel", cudaErrorInvalidDeviceFunction);
  Kernel& kernel = found->second;
  for (auto text = modules.begin(); !kernel.program && text != modules.end(); ++text)
    if (text->find(".entry " + kernel.name + "(") != std::string::npos && !(kernel.program = ptx_read(text->c_str(), kernel.name.c_str())))
      return refuse(kernel.name + ": " + ptx_error());
  if (!kernel.program) return refuse(kernel.name + ": its PTX is not there", cudaErrorInvalidDeviceFunction);
  if (block.y != 1 || block.z != 1 || block.x > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
    return refuse(kernel.name + ": a grid or blocks that no GPU takes", cudaErrorInvalidConfiguration);
  if (shared > size_t(kernel.shared)) return refuse(kernel.name + ": more shared memory than it was allowed");
  if (cluster > 8 || (cluster > 1 && (capability < 90 || grid.x % cluster))) return refuse(kernel.name + ": a cluster that does not fit");
  std::vector<uint64_t> allowed;
  for (auto& [from, to] : ef::cuda::span_ranges()) allowed.push_back(from), allowed.push_back(to);
  const uint32_t size[3] = {grid.x, grid.y, grid.z};
  uint64_t counted[6];
  largest = std::max(largest, int(cluster));
  if (ptx_launch(kernel.program, size, cluster, block.x, uint32_t(shared), args, allowed.data(), int64_t(allowed.size() / 2), seeds(), eager, 0,
                 counted))
    return refuse(ptx_error(), cudaErrorIllegalAddress);
  counts += kernel.name;
  for (uint64_t x : counted) counts += " " + std::to_string(x);
  counts += "\n";
  return cudaSuccess;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size, const cuuint64_t* stride,
                const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  ptx::TensorMap map{ptx::kTensorMap, uint64_t(address), {}, {}, {}};
  bool fine = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 3 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && uint64_t(address) % 16 == 0 &&
              uint64_t(out) % 64 == 0 && box[0] * 2 <= 128;
  for (int k = 0; k < 3; ++k) fine &= size[k] > 0 && size[k] <= 1ull << 32 && box[k] > 0 && box[k] <= 256 && steps[k] == 1;
  for (int k = 0; k < 2; ++k) fine &= stride[k] % 16 == 0 && stride[k] > 0 && stride[k] < 1ull << 40;
  if (!fine) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map.size, size, sizeof map.size), std::memcpy(map.stride, stride, sizeof map.stride), std::memcpy(map.box, box, sizeof map.box);
  std::memset(out, 0xFF, sizeof *out), std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- for tests

void cuda_host_begin(unsigned seed, int eager_, const char*, int) {
  seeds.seed(seed), eager = eager_, error.clear(), launches.clear(), counts.clear(), largest = 0;
  ef::cuda::span_clear();
}
void cuda_host_allow(const void* p, int64_t bytes) { ef::cuda::span_allow(p, bytes); }
const char* cuda_host_error() { return error.c_str(); }
const char* cuda_host_visited() { return ""; }
const char* cuda_host_launches() { return launches.c_str(); }
const char* cuda_host_counts() { return counts.c_str(); }  // a line a launch: the kernel, and gpu.py's COUNTED
int cuda_host_largest_cluster() { return largest; }
// capability: 80, 90 or 100; kernels are looked for in the modules of PTX that come after this call
void cuda_host_device(int capability_) {
  capability = capability_, modules.clear();
  for (auto& [host, kernel] : kernels) kernel.program = nullptr;
}
void cuda_host_module(const char* text) { modules.push_back(text); }

// ---- what nvcc's objects call

void** __cudaRegisterFatBinary(void*) { return new void*; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[host] = {name};
}
namespace {
struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  launches += '-';
  return launch((const void*)kernel, grid, block, 1, shared, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  unsigned cluster = 1;
  char early = '-';
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const auto& a = config->attrs[k];
    if (a.id == cudaLaunchAttributeClusterDimension && a.val.clusterDim.y == 1 && a.val.clusterDim.z == 1) cluster = a.val.clusterDim.x;
    else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) early = a.val.programmaticStreamSerializationAllowed ? 'e' : '-';
    else return refuse("a launch attribute that is not known here");
  }
  launches += early;
  return launch(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, args);
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return std::memset(to, value, bytes), cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return error.empty() ? "an invalid argument" : error.c_str(); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kProcessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = capability == 80 ? 166912 : 232448; break;
    default: return refuse("device attribute " + std::to_string(attribute) + " is not known here");
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels.find(function);
  if (found == kernels.end() || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > (capability == 80 ? 166912 : 232448))
    return refuse("cudaFuncSetAttribute");
  found->second.shared = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  std::memset(out, 0, sizeof *out);
  out->ptxVersion = out->binaryVersion = capability, out->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = !std::strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? (void*)encode : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
#pragma GCC visibility pop
