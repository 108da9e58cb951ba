// What the binding asks of the CUDA runtime.
#include "common.cuh"

using namespace ef::cuda;

extern "C" __attribute__((visibility("default"))) const char* ef_cuda_error(int code) {
#ifdef EF_CUDA_HOST
  return code == 700 ? "an illegal memory access (its place is on stderr)" : "an invalid argument";
#else
  return cudaGetErrorString((cudaError_t)code);
#endif
}

EF_LAUNCHER ef_cuda_processors(int* count) { return processors(count); }

EF_LAUNCHER ef_cuda_fetch(const int64_t* from, int64_t* to, void* stream) {
#ifdef EF_CUDA_HOST
  return *to = *from, 0;
#else
  EF_TRY((int)cudaMemcpyAsync(to, from, sizeof *to, cudaMemcpyDeviceToHost, (cudaStream_t)stream));
  return (int)cudaStreamSynchronize((cudaStream_t)stream);
#endif
}
