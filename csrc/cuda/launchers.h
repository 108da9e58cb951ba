// The extern "C" launchers of step, w2 and sample_loss, for the .cu files that define them and for the binding. No CUDA and no
// torch here. Every launcher: stream last; 0 or a cudaError returned. Pointers are device memory unless said otherwise.
#pragma once

#include <stdint.h>

namespace ef::cuda {
enum Type : int { kFloat = 0, kDouble = 1, kBf16 = 2, kHalf = 3 };

constexpr int64_t kChunk = 4096;  // elements of one tensor that a block works on at a time
constexpr int kHead = 4;          // columns of a table row before its pointers: first chunk, elements, place in the
                                  // Philox stream, 2 * index of the tensor + whether all its pointers are 16-byte aligned

// A table of tensors on the device: `count` rows of `columns` int64 and one row more, whose first chunk is `chunks`.
struct Table {
  const int64_t* rows;
  int64_t count, chunks;
  int columns, programs;  // programs: blocks that share the chunks
};

constexpr int kMostMixed = 4;  // of step_gram's directions: as many may have a type of their own, but for float64
constexpr int kMostDirections = 32;  // of step_project: its matrices stand in one block's shared memory

struct StepProject {  // the solve after the Gram of k directions, momentum where there is one, and the gradient
  double* coef;       // null: no solve
  int k, momentum;
  double beta, ridge, rcond;
};

struct StepUpdate {
  double lr, beta, keep, noise;  // keep = 1 - lr * weight_decay
  uint64_t seed, offset;
  const int64_t* counter;  // on the device, added to offset; or null
};

struct StepAdamw {
  double lr, beta1, beta2, log1, log2, eps, keep, noise;  // log1, log2: of the betas
  uint64_t seed, offset;
  const int64_t* counter;
  const double* step;  // on the device: the count of this step
};

struct LossOptions {
  int64_t n, t, classes, stride;  // stride: elements between rows of logits
  int64_t ignore;
  double clip, penalty, smoothing;
  int mean;  // over the positions of a sample
};
}  // namespace ef::cuda

extern "C" {
const char* ef_cuda_error(int code);  // a cudaError in words
int ef_cuda_processors(int* count);   // host memory
// values (host memory, read before the return) -> out, as kernel arguments: no pinned buffer, and a graph keeps them
int ef_cuda_fill(int64_t* out, const int64_t* values, int64_t count, void* stream);
// one value, waiting for the stream
int ef_cuda_fetch(const int64_t* from, int64_t* to, void* stream);

// out (k, k) double, added to where `add`; partial (programs, k, k) double; counter: one zeroed cell. Columns: k directions, of `types`
// (host memory).
int ef_cuda_step_gram(ef::cuda::Table table, const int* types, int k, double* partial, unsigned* counter, double* out, int add,
                      ef::cuda::StepProject project, void* stream);
// Columns: theta, gradient, momentum (0: none), k directions. read: type of gradients and directions. coef: k of the compute type.
int ef_cuda_step_update(ef::cuda::Table table, int param, int momentum, int read, int k, const void* coef,
                        ef::cuda::StepUpdate update, void* stream);
// Columns: theta, gradient, m, u (both of the compute type), k directions.
int ef_cuda_step_adamw(ef::cuda::Table table, int param, int read, int k, const void* coef, ef::cuda::StepAdamw adamw, void* stream);
// Columns: theta, gradient, ulps. found (programs): far elements of each block; places (programs + 1): their running sum from
// *before on (device memory; null: 0), the total last; counter: one zeroed cell.
int ef_cuda_step_lookahead_count(ef::cuda::Table table, int type, double alpha, const int64_t* before, int64_t* found, int64_t* places,
                                 unsigned* counter, void* stream);
// index (slots, 2), value (slots); far elements whose place is not below slots are not moved, their ulps is -128
int ef_cuda_step_lookahead(ef::cuda::Table table, int type, double alpha, const int64_t* found, const int64_t* places, int64_t slots,
                           int64_t* index, double* value, void* stream);
int ef_cuda_step_undo(ef::cuda::Table table, int type, double alpha, void* stream);
// where (tensors): index of a tensor -> its row in the table, or -1
int ef_cuda_step_restore(ef::cuda::Table table, int type, const int64_t* where, int64_t tensors, const int64_t* index,
                         const double* value, int64_t count, void* stream);

int ef_cuda_w2_temporary(int64_t count, int64_t* bytes);  // host memory; what sorting `count` keys needs
// keys (2, n) and other_keys (2, m) uint64, temporary: scratch. partial (ef_cuda_w2_blocks(n)) double; counter: one cell.
int64_t ef_cuda_w2_blocks(int64_t n);
int ef_cuda_w2_sorted(int type, const void* losses, int64_t n, const void* reference, int64_t m, uint64_t* keys,
                      uint64_t* other_keys, void* temporary, int64_t bytes, double* partial, unsigned* counter, float* value,
                      float* weights, void* stream);

// lse (2, n*t), position (n*t), loss, ce (n) of the compute type; position is scratch
int ef_cuda_sample_loss(int type, ef::cuda::LossOptions options, const void* logits, const int64_t* target, void* lse,
                        void* position, void* loss, void* ce, void* stream);
// scale (n): scratch; out (n*t, classes) contiguous
int ef_cuda_sample_loss_backward(int type, ef::cuda::LossOptions options, const void* grad, const void* logits,
                                 const int64_t* target, const void* ce, const void* lse, void* scale, void* out, void* stream);
}
