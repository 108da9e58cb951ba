// What build.py calls in every library that it makes.
#include "cuda_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_host_begin(unsigned seed, int eager, const char* off_file, int off_line) {
  cuda_host::options = {seed, eager != 0, off_line, off_file};
  cuda_host::random_bits.seed(seed);
  cuda_host::error.clear();
  cuda_host::largest_cluster = 0, cuda_host::launches.clear();
  ef::cuda::span_clear();
}
EXPORT void cuda_host_allow(const void* p, int64_t bytes) { ef::cuda::span_allow(p, bytes); }
// since cuda_host_begin
EXPORT int cuda_host_largest_cluster() { return cuda_host::largest_cluster; }
EXPORT const char* cuda_host_launches() { return cuda_host::launches.c_str(); }  // "-e": one, and one that may start early
EXPORT const char* cuda_host_error() { return cuda_host::error.c_str(); }
EXPORT const char* cuda_host_visited() {  // "file:line ..." of every synchronisation that ran so far
  static std::string text;
  text.clear();
  for (auto& site : cuda_host::visited) text += site.file + ":" + std::to_string(site.line) + " ";
  return text.c_str();
}
