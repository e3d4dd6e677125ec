// Runs one method of an ExecuTorch program (.pte) on buffers that the caller owns: a plain C interface over the
// runtime libraries of the `executorch` wheel, for ctypes, JNI or a program of one's own. It needs no Python.
//
// Functions that return int give 0 on success; functions that return a pointer give NULL on failure. The reason
// is then edgestill_error(), valid until the next call in the same thread. One program must not be used by two
// threads at once; two programs may.
#ifndef EDGESTILL_RUNNER_H
#define EDGESTILL_RUNNER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)  // all else in the library is hidden

#define EDGESTILL_RUNNER_VERSION 1
#define EDGESTILL_MAX_RANK 8

// ExecuTorch's (and PyTorch's) numbers of element types; others are refused when a program is opened.
enum edgestill_dtype { EDGESTILL_UINT8 = 0, EDGESTILL_INT64 = 4, EDGESTILL_FLOAT32 = 6 };

enum edgestill_side { EDGESTILL_INPUT = 0, EDGESTILL_OUTPUT = 1 };

// One input or output: dense, row-major, of a fixed shape. `in_arena` is 1 where the program's memory plan gives the
// tensor a place of its own, so that every run copies it; 0 where the caller's buffer is used as it is.
struct edgestill_tensor {
  int32_t dtype;
  int32_t rank;
  int64_t shape[EDGESTILL_MAX_RANK];
  int64_t size_bytes;
  int32_t in_arena;
};

typedef struct edgestill_program edgestill_program;

// EDGESTILL_RUNNER_VERSION of the library as it was built.
int edgestill_runner_version(void);

// Why the last call of this thread failed, with what the runtime logged meanwhile; UTF-8.
const char* edgestill_error(void);

// The number of threads that kernels and XNNPACK use, the caller's included; one setting a process. Fails
// while a program is open that was opened with another number: a delegate keeps a pointer into the old pool.
int edgestill_set_threads(uint32_t threads);
uint32_t edgestill_threads(void);

// Maps the file and loads a method; the file must stay as it is until edgestill_close.
edgestill_program* edgestill_open(const char* path, const char* method);
void edgestill_close(edgestill_program* program);

size_t edgestill_count(const edgestill_program* program, enum edgestill_side side);
int edgestill_describe(const edgestill_program* program, enum edgestill_side side, size_t index,
                       struct edgestill_tensor* description);

// Bytes of the memory-planned arenas. XNNPACK's own workspace comes on top and is shared by all open programs.
int64_t edgestill_arena_bytes(const edgestill_program* program);

// Executes once. inputs[i] and outputs[i] hold (at least) size_bytes of tensor i, 64-byte aligned, and stay valid
// during the call; 16 readable bytes must follow every input, which XNNPACK's vector loads may touch. No output
// may overlap an input or another output. After a failure the outputs hold anything.
int edgestill_run(edgestill_program* program, const void* const* inputs, void* const* outputs);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
