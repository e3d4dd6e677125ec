/* The words of each kernel's call, in order, and how its work is cut: what kernels.c runs and check.c checks. */
#pragma once
#include "plan.h"
#include "vectors.h"

#define TASK_ROWS 96 /* a multiple of every ROWS */
#define RUN 256      /* so many products are summed before they join the total: the error grows with RUN, not with K */
#define BLOCK 512    /* elements of an elementwise program at a time */
enum { COPY_ITEM = 4, COPY_FILL, COPY_FILLED, COPY_RANK, COPY_SIZES, COPY_FROM = COPY_SIZES + RANK, COPY_TO = COPY_FROM + RANK, COPY_WORDS = COPY_TO + RANK };
enum { MAP_COUNT, MAP_SIZES, MAP_LOADS = 5, MAP_STEPS, MAP_STORES, MAP_SUMS, MAP_COLUMNS, MAP_BODY, LOAD_WORDS = 9, STEP_WORDS = 6, STORE_WORDS = 6, SUM_WORDS = 8 };
enum { FLOAT32, UINT8, INT64, UNPOOLED };
enum { SUM, SQUARES }; /* of the distances from the mean */
enum { ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, MINIMUM, GREATER, GREATER_EQUAL, EQUAL, MASKED, WHERE, RELU, CLAMP_LOW, CLAMP_HIGH, ABS, EXP, LOG, SQRT, RSQRT, POWER, ERF, TANH, SIGMOID, SOFTPLUS, SIN, COS, ATAN, FLOOR, NUMBER, MULTIPLY_ADD, MASKED_ABOVE, OPERATORS };
#define REGISTERS 48
#define MAP_TASK (8 * BLOCK)
#define SUM_ROWS 128 /* at most so many rows are summed before they join the total; more of those that a vector holds several of */
enum { REDUCE_MAX = 6, REDUCE_OUTER, REDUCE_SIZE, REDUCE_INNER };
#define REDUCE_PART 128
enum { PRODUCT_BATCHES = 8, PRODUCT_M, PRODUCT_N, PRODUCT_K, PRODUCT_A, PRODUCT_B = PRODUCT_A + 3, PRODUCT_PANELS = PRODUCT_B + 3, PRODUCT_READY };
enum { CONV_N = 10, CONV_H, CONV_W, CONV_C, CONV_OH, CONV_OW, CONV_O, CONV_KH, CONV_KW, CONV_SH, CONV_SW, CONV_TOP, CONV_LEFT, CONV_DH, CONV_DW, CONV_GROUPS, CONV_WEIGHT, CONV_ADJOINT = CONV_WEIGHT + 4, CONV_WORDS };
enum { GRAD_IMAGES = CONV_WORDS };
enum { DEPTH_WHAT = CONV_WORDS, DEPTH_IMAGES };
enum { POOL_WHAT = CONV_WORDS, POOL_WIDE };
enum { WINOGRAD_TILES = CONV_WORDS }; /* of 4×4 pixels a task */
enum { WINOGRAD_PART = CONV_WORDS, GOES_ON = 1, GOES_FURTHER = 2 }; /* of a weight gradient in parts, some images each */
#define SPOTS 36 /* of a transformed tile */
enum { ROWS_WHAT = 6, ROWS_COUNT, ROWS_SIZE, ROWS_NUMBER };
enum { SOFTMAX, LOG_SOFTMAX, STANDARDIZE };
enum { INDEX_WHAT = 6, INDEX_OUTER, INDEX_SIZE, INDEX_COUNT, INDEX_INNER };
enum { GATHER, SCATTER_ADD, ARGMAX, ONE_HOT, TO_INTEGER, FROM_INTEGER };

INLINE word least(word a, word b) { return a < b ? a : b; }
INLINE word parts_of(word n, word size) { return (n + size - 1) / size; }
INLINE word reduce_parts(const word *a) { return a[REDUCE_INNER] == 1 ? parts_of(a[REDUCE_SIZE], 4096) : parts_of(a[REDUCE_SIZE], REDUCE_PART); }
INLINE word panels_of(word n) { return parts_of(n, LANES); }
INLINE word grad_parts(const word *a) { return parts_of(a[CONV_N], a[GRAD_IMAGES]); }
INLINE word tiles_of(const word *a) { return a[CONV_N] * parts_of(a[CONV_OH], 4) * parts_of(a[CONV_OW], 4); }
/* rows of partial results that a program's sum has */
INLINE word sum_rows(const word *sum) { return sum[1] == SQUARES ? 3 : 1; }
/* elements of a program that are a task: whole rows where columns are summed */
INLINE word map_task_of(const word *a) {
  if (!a[MAP_SUMS]) return MAP_TASK;
  word rows = MAP_TASK / a[MAP_COLUMNS];
  return a[MAP_COLUMNS] * (rows < 1 ? 1 : least(rows, a[MAP_COLUMNS] < LANES ? SUM_ROWS * (LANES / a[MAP_COLUMNS]) : SUM_ROWS));
}
/* A convolution's task is a block of pixels of the result (of an adjoint: of one phase, that is of those with the same
   remainder by the stride). */
INLINE word phases(const word *a, int axis) { return a[CONV_ADJOINT] ? least(a[CONV_SH + axis], a[CONV_OH + axis]) : 1; }
INLINE word conv_height(const word *a) { return a[CONV_ADJOINT] ? parts_of(a[CONV_OH], a[CONV_SH]) : a[CONV_OH]; }
INLINE word conv_width(const word *a) { return a[CONV_ADJOINT] ? parts_of(a[CONV_OW], a[CONV_SW]) : a[CONV_OW]; }
INLINE word block_width(const word *a) { return least(conv_width(a), TASK_ROWS); }
INLINE word block_height(const word *a) { return least(conv_height(a), TASK_ROWS / block_width(a)); }
/* how much of x is under a block, along an axis (0 rows, 1 columns) */
INLINE word block_under(const word *a, int axis) {
  word pixels = (axis ? block_width(a) : block_height(a)) - 1, reach = (a[CONV_KH + axis] - 1) * a[CONV_DH + axis];
  return a[CONV_ADJOINT] ? pixels + reach / a[CONV_SH + axis] + 1 : pixels * a[CONV_SH + axis] + reach + 1;
}
/* elements of a spot's tiles; not a multiple of 4096 bytes, of which a cache holds few at once */
INLINE word spot_size(word elements) { return elements + LANES; }
INLINE word map_parts(const word *a) { return parts_of(a[MAP_COUNT], map_task_of(a)); }
