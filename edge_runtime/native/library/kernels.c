/* The kernels: each is a number of phases, each phase a number of tasks that write apart from one another.

   How work is cut into tasks depends on the plan alone, and what is summed over several tasks is summed in their order.
   So the bits are the same for any number of threads, any tile size and any width of the processor's vectors.
*/
#include "layout.h"

#ifdef __x86_64__
INLINE void pause_a_little(void) { __builtin_ia32_pause(); }
INLINE void give_way(void) { /* sched_yield */
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(24L) : "rcx", "r11", "memory");
}
#else
INLINE void pause_a_little(void) { __asm__ volatile("yield"); }
INLINE void give_way(void) {
  register long number __asm__("x8") = 124, result __asm__("x0");
  __asm__ volatile("svc 0" : "=r"(result) : "r"(number) : "memory");
}
#endif

#ifdef ROWS /* a test compiles others, which must not change a bit */
#define HALF_ROWS (2 * ROWS)
#elif defined(__AVX512F__)
#define ROWS 12
#define HALF_ROWS 12
#elif defined(__AVX2__)
#define ROWS 6
#define HALF_ROWS 8 /* more pointers than that do not stay in registers */
#else
#define ROWS 6
#define HALF_ROWS 12
#endif

struct call {
  const word *a;
  char **bases;
  char *scratch;
};

INLINE void *at(const struct call *c, int i) { return c->bases[c->a[i]] + c->a[i + 1]; }

/* n lanes, or all of them; the others are zero */
#ifdef __AVX2__
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
static const int32_t LANES_IN[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
INLINE v16 load_part(const float *from, word n) {
  if (n >= LANES) return load(from);
  typedef float whole __attribute__((vector_size(32))); /* the instructions below take any address */
  const i8 *in = (const i8 *)(LANES_IN + LANES - n);
  return join(__builtin_ia32_maskloadps256((const whole *)from, in[0]), __builtin_ia32_maskloadps256((const whole *)(from + 8), in[1]));
}
#else
INLINE v16 load_part(const float *from, word n) {
  if (n >= LANES) return load(from);
  v16 x = all(0.f);
  for (word i = 0; i < n; i++) x[i] = from[i];
  return x;
}
#endif

/* by eights, fours and so on: a store under a mask takes some processors 20 cycles */
INLINE void store_first(float *to, v16 x, word n) {
  v8 part = low(x);
  if (n & 8) store8(to, part), to += 8, part = high(x);
  v4 four = __builtin_shufflevector(part, part, 0, 1, 2, 3);
  if (n & 4) *(v4 *)to = four, to += 4, four = __builtin_shufflevector(part, part, 4, 5, 6, 7);
  if (n & 2) to[0] = four[0], to[1] = four[1], to += 2, four[0] = four[2];
  if (n & 1) to[0] = four[0];
}

INLINE void store_part(float *to, v16 x, word n, word stride) {
  if (stride != 1) for (word i = 0; i < least(n, LANES); i++) to[i * stride] = x[i];
  else if (n >= LANES) store(to, x);
  else store_first(to, x, n);
}

/* --- copy: [0,1] from, [2,3] to, item bytes, fill (bits), filled elements, rank, sizes, strides from, strides to ------
   First the destination's `filled` elements, which lie together, take the fill; then the items move. */

static word copy_tasks(const word *a, int phase) {
  if (phase == 0) return parts_of(a[COPY_FILLED], 16384);
  return a[COPY_SIZES];
}

INLINE void copy_items(char *to, const char *from, word n, word ts, word fs, word item) {
  if (item == 4 && ts == 4 && fs == 4) {
    word i = 0;
    for (; i + LANES <= n; i += LANES) store((float *)to + i, load((const float *)from + i));
    for (; i < n; i++) ((int32_t *)to)[i] = ((const int32_t *)from)[i];
  } else if (item == 4)
    for (word i = 0; i < n; i++) *(int32_t *)(to + i * ts) = *(const int32_t *)(from + i * fs);
  else if (item == 8)
    for (word i = 0; i < n; i++) *(int64_t *)(to + i * ts) = *(const int64_t *)(from + i * fs);
  else
    for (word i = 0; i < n; i++) to[i * ts] = from[i * fs];
}

INLINE void clear(float *to, word n) {
  for (word i = 0; i < n; i++) to[i] = 0;
}

static void copy_task(const struct call *c, int phase, word task) {
  const word *a = c->a, *n = a + COPY_SIZES, *fs = a + COPY_FROM, *ts = a + COPY_TO, item = a[COPY_ITEM];
  char *to = at(c, 2);
  if (phase == 0) {
    word stop = least((task + 1) * 16384, a[COPY_FILLED]);
    for (word i = task * 16384; i < stop; i++)
      if (item == 4) ((int32_t *)to)[i] = (int32_t)a[COPY_FILL];
      else if (item == 8) ((int64_t *)to)[i] = a[COPY_FILL];
      else to[i] = (char)a[COPY_FILL];
    return;
  }
  const char *from = (const char *)at(c, 0) + task * fs[0];
  to += task * ts[0];
  for (word i = 0; i < n[1]; i++)
    for (word j = 0; j < n[2]; j++) {
      const char *f = from + i * fs[1] + j * fs[2];
      char *t = to + i * ts[1] + j * ts[2];
      int turned = item == 4 && fs[5] != 4 && fs[4] == 4; /* in squares, that stay in the cache */
      for (word k = 0; k < n[3]; k++, f += fs[3], t += ts[3])
        for (word y = 0; y < n[4]; y += turned ? 16 : 1)
          if (!turned) copy_items(t + y * ts[4], f + y * fs[4], n[5], ts[5], fs[5], item);
          else if (n[5] < 16)
            for (word x = 0; x < n[5]; x++) copy_items(t + y * ts[4] + x * ts[5], f + y * fs[4] + x * fs[5], least(16, n[4] - y), ts[4], fs[4], 4);
          else
            for (word x = 0; x < n[5]; x += 16)
              for (word yy = y; yy < least(y + 16, n[4]); yy++)
                copy_items(t + yy * ts[4] + x * ts[5], f + yy * fs[4] + x * fs[5], least(16, n[5] - x), ts[5], fs[5], 4);
    }
}

/* --- elementwise program: elements, sizes of 4 axes, loads, instructions, stores, sums, columns; then each load (base, offset,
   kind, 4 strides in elements, 2 words of no use), instruction (operator, to, a, b, c, number's bits), store (base,
   offset, register, elements of a run, from one run to the next, from one element to the next) and sum of the rows of a register (register, kind, [2,3] sum, [4,5] squares, [6,7] partial results).
   An unpooled load is the gradient of a largest of windows that lie side by side: dy (base, offset), kind, channels, width,
   height and width of a window, the winners (base, offset). A sum of squares is of what is left of each number without
   its column's mean; partial results are then sums and squares, the latter around the part's own mean. --------------- */

static word map_tasks(const word *a, int phase) {
  if (phase == 0) return map_parts(a);
  return a[MAP_SUMS] * panels_of(a[MAP_COLUMNS]);
}

INLINE float as_float(const void *p, word i, word kind) {
  return kind == FLOAT32 ? ((const float *)p)[i] : kind == UINT8 ? (float)((const uint8_t *)p)[i] : (float)((const int64_t *)p)[i];
}

static void fill_block(float *to, const void *from, const word *load, const word *sizes, word start, word count) {
  const word *s = load + 3, kind = load[2];
  if (kind == FLOAT32 && !(s[0] | s[1] | s[2]) && s[3] == 1 && start % sizes[3] == 0) { /* the same again and again */
    word done = least(sizes[3], count);
    copy_items((char *)to, from, done, 4, 4, 4);
    for (word more; done < count; done += more) more = least(done, count - done), copy_items((char *)(to + done), (const char *)to, more, 4, 4, 4);
    return;
  }
  word index[4], rest = start;
  for (int d = 3; d >= 0; d--) index[d] = rest % sizes[d], rest /= sizes[d];
  for (word done = 0; done < count;) {
    word n = least(sizes[3] - index[3], count - done);
    word p = index[0] * s[0] + index[1] * s[1] + index[2] * s[2] + index[3] * s[3];
    if (kind == FLOAT32 && s[3] == 1) copy_items((char *)(to + done), (const char *)((const float *)from + p), n, 4, 4, 4);
    else if (kind == FLOAT32 && s[3] == 0) for (word i = 0; i < n; i++) to[done + i] = ((const float *)from)[p];
    else if (kind == UINT8 && s[3] == 1) for (word i = 0; i < n; i++) to[done + i] = (float)((const uint8_t *)from)[p + i];
    else for (word i = 0; i < n; i++) to[done + i] = as_float(from, p + i * s[3], kind);
    done += n;
    index[3] += n;
    for (int d = 3; d > 0 && index[d] == sizes[d]; d--) index[d] = 0, index[d - 1]++;
  }
}

typedef uint8_t bytes8 __attribute__((vector_size(8), aligned(1)));
INLINE v8 where_won(const uint8_t *winners, word tap, v8 x) {
  typedef int32_t i8 __attribute__((vector_size(32)));
  return (v8)((i8)x & (__builtin_convertvector(*(const bytes8 *)winners, i8) == (int32_t)tap));
}

static void fill_unpooled(float *to, const float *dy, const uint8_t *winners, const word *load_, word start, word count) {
  const word channels = load_[3], width = load_[4], high = load_[5], wide = load_[6];
  word k = start % channels, column = start / channels % width, row = start / channels / width;
  while (count) { /* the rest of a row */
    const word line = row / high * (width / wide), across = row % high * wide;
    for (word window = column / wide, place = column % wide; column < width && count; column++) {
      word n = least(channels - k, count), tap = across + place, from = (line + window) * channels + k, i = 0;
      for (; i + 8 <= n; i += 8) store8(to + i, where_won(winners + from + i, tap, load8(dy + from + i)));
      for (; i < n; i++) to[i] = winners[from + i] == tap ? dy[from + i] : 0;
      to += n, count -= n, k = 0;
      if (++place == wide) place = 0, window++;
    }
    column = 0, row++;
  }
}

#define EACH(expression) for (word i = 0; i < n; i += LANES) { v16 x = load(a + i); (void)x; store(to + i, expression); } break
#define PAIR(expression) for (word i = 0; i < n; i += LANES) { v16 x = load(a + i), y = load(b + i); store(to + i, expression); } break
#define LANEWISE(function) for (word i = 0; i < n; i++) to[i] = function; break

static void map_step(word operator, float *to, const float *a, const float *b, const float *c, float number, word n) {
  const v16 one = all(1.f), zero = all(0.f);
  switch (operator) {
    case ADD: PAIR(x + y);
    case SUBTRACT: PAIR(x - y);
    case MULTIPLY: PAIR(x * y);
    case DIVIDE: PAIR(x / y);
    case MAXIMUM: PAIR(larger(x, y));
    case MINIMUM: PAIR(smaller(x, y));
    case GREATER: PAIR(choose(x > y, one, zero));
    case GREATER_EQUAL: PAIR(choose(x >= y, one, zero));
    case EQUAL: PAIR(choose(x == y, one, zero));
    case MASKED_ABOVE: PAIR(choose(y > all(number), x, zero));
    case MASKED: PAIR(choose(y != zero, x, zero));
    case WHERE: for (word i = 0; i < n; i += LANES) store(to + i, choose(load(a + i) != zero, load(b + i), load(c + i))); break;
    case MULTIPLY_ADD: for (word i = 0; i < n; i += LANES) store(to + i, fma(load(a + i), load(b + i), load(c + i))); break;
    case RELU: EACH(choose((x > zero) | (x != x), x, zero));
    case CLAMP_LOW: EACH(larger(x, all(number)));
    case CLAMP_HIGH: EACH(smaller(x, all(number)));
    case ABS: EACH(absolute(x));
    case EXP: EACH(exponential(x));
    case LOG: EACH(logarithm(x));
    case SQRT: EACH(square_root(x));
    case RSQRT: EACH(one / square_root(x));
    case ERF: EACH(error_function(x));
    case TANH: EACH(hyperbolic_tangent(x));
    case SIGMOID: EACH(sigmoid(x));
    case SOFTPLUS: EACH(softplus(x));
    case FLOOR: EACH(__builtin_elementwise_floor(x));
    case NUMBER: EACH(all(number));
    case POWER: LANEWISE(power(a[i], number));
    case SIN: LANEWISE(turned(a[i], 0));
    case COS: LANEWISE(turned(a[i], 1));
    case ATAN: LANEWISE(arc_tangent(a[i]));
  }
}

/* Partial results of a task: the sums of its columns, or of the distances from a row, their squares, and that row. */
INLINE float *partial_of(const struct call *c, const word *sum, word task, word columns) {
  return (float *)(c->bases[sum[6]] + sum[7]) + task * sum_rows(sum) * columns;
}

/* What distances are taken from: the mean of the first rows that are there at once. One row may be far from all others, as
   at an image's edge; of distances from it little would be left. */
static void start_squares(float *shift, const float *x, word n, word rows, word columns) {
  for (word k = 0; k < n; k++) shift[k] = x[k];
  if (rows < 2) return;
  for (word r = 1; r < rows; r++)
    for (word k = 0; k < n; k++) shift[k] += x[r * columns + k];
  for (word k = 0; k < n; k++) {
    float mean = shift[k] / (float)rows;
    shift[k] = mean - mean == 0 ? mean : x[k]; /* not of infinite ones */
  }
}

/* Where a block holds a row or less: distances from the first row, of four rows, become those from these rows' mean. */
#define FIRST_ROWS 4
static void start_again(float *sum, float *squared, float *shift, word n) {
  for (word k = 0; k < n; k++) {
    float away = sum[k] / FIRST_ROWS, start = shift[k] + away, moved = start - shift[k];
    if (!(start - start == 0)) continue;
    float left = __builtin_fmaf(-away, sum[k], squared[k]);
    squared[k] = left > 0 ? left : 0, sum[k] = __builtin_fmaf(-FIRST_ROWS, moved, sum[k]), shift[k] = start;
  }
}

/* Adds as many rows at a time as fill whole vectors, where a row does not; how many rows that were. */
static word sum_together(float *partial, const float *x, word rows, word columns, int squares) {
  float *squared = partial + columns, *shift = squared + columns;
  word period = columns;
  while (period % LANES) period += columns;
  word done = rows / (period / columns) * (period / columns);
  if (period == columns || done * columns < 2 * period) return 0;
  for (word k = 0; k < period; k += LANES) {
    float start[LANES], sums[LANES], squares_of[LANES];
    word first = k % columns;
    for (word i = 0, j = first; i < LANES; i++, j = j + 1 == columns ? 0 : j + 1) start[i] = squares ? shift[j] : 0;
    v16 total = all(0.f), square = all(0.f), from = load(start);
    for (word j = k; j < done * columns; j += period) {
      v16 d = load(x + j);
      if (squares) d = d - from, square = fma(d, d, square);
      total += d;
    }
    store(sums, total), store(squares_of, square);
    for (word i = 0, j = first; i < LANES; i++, j = j + 1 == columns ? 0 : j + 1) {
      partial[j] += sums[i];
      if (squares) squared[j] += squares_of[i];
    }
  }
  return done;
}

/* Adds the rows of x, which begin with the element `position` of their task. */
static void sum_columns(float *partial, const float *x, word n, word position, word columns, int squares) {
  float *squared = partial + columns, *shift = squared + columns;
  word column = position % columns, row = position / columns;
  for (word some, rows; n; x += rows * some, n -= rows * some, row += rows, column = 0) {
    some = least(columns - column, n), rows = some < columns ? 1 : n / columns; /* whole rows, or what is here of one */
    if (squares && row == 0) start_squares(shift + column, x, some, rows, columns);
    if (squares && row == FIRST_ROWS && 2 * columns > BLOCK) start_again(partial + column, squared + column, shift + column, some);
    word done = some == columns ? sum_together(partial, x, rows, columns, squares) : 0;
    for (word k = 0; k < some && done < rows; k += LANES) {
      word m = least(LANES, some - k), at = column + k;
      v16 total = load_part(partial + at, m);
      if (!squares) {
        for (word r = done; r < rows; r++) total += load_part(x + r * columns + k, m);
      } else {
        v16 square = load_part(squared + at, m), start = load_part(shift + at, m);
        for (word r = done; r < rows; r++) {
          v16 d = load_part(x + r * columns + k, m) - start;
          total += d, square = fma(d, d, square);
        }
        store_part(squared + at, square, m, 1);
      }
      store_part(partial + at, total, m, 1);
    }
  }
}

/* the sums, and the squares of the distances from the task's own mean */
static void finish_squares(float *partial, word columns, word rows) {
  float *squared = partial + columns, *shift = squared + columns, n = (float)rows;
  for (word k = 0; k < columns; k++) {
    float d = partial[k], left = __builtin_fmaf(-d / n, d, squared[k]);
    partial[k] = __builtin_fmaf(n, shift[k], d);
    squared[k] = left < 0 ? 0 : left;
  }
}

static void map_task(const struct call *c, int phase, word task) {
  const word *a = c->a, *loads = a + MAP_BODY, *steps = loads + a[MAP_LOADS] * LOAD_WORDS;
  const word *stores = steps + a[MAP_STEPS] * STEP_WORDS, *sums = stores + a[MAP_STORES] * STORE_WORDS;
  const word columns = a[MAP_COLUMNS];
  float *buffers = (float *)c->scratch, *result[REGISTERS]; /* where a step leaves its result: where it is wanted, unless something is read there */
  const float *registers[REGISTERS];
  for (word i = 0; i < REGISTERS; i++) registers[i] = buffers + i * BLOCK;
  if (phase == 1) { /* partial sums, 64 at a time, in their order */
    word column = task % panels_of(columns) * LANES, n = least(LANES, columns - column), parts = map_parts(a);
    const word *s = sums + task / panels_of(columns) * SUM_WORDS, apart = columns * sum_rows(s);
    const float *from = (const float *)(c->bases[s[6]] + s[7]) + column;
    v16 total = all(0.f), part = all(0.f);
    for (word i = 0; i < parts; i++) {
      part += load_part(from + i * apart, n);
      if (i % 64 == 63) total += part, part = all(0.f);
    }
    total += part;
    if (s[2] >= 0) store_part((float *)(c->bases[s[2]] + s[3]) + column, total, n, 1);
    if (s[1] != SQUARES) return;
    v16 mean = total / all((float)(a[MAP_COUNT] / columns)), squares = all(0.f);
    part = all(0.f);
    for (word i = 0; i < parts; i++) {
      float rows = (float)(least(map_task_of(a), a[MAP_COUNT] - i * map_task_of(a)) / columns);
      v16 away = load_part(from + i * apart, n) / all(rows) - mean;
      part += fma(away * away, all(rows), load_part(from + i * apart + columns, n));
      if (i % 64 == 63) squares += part, part = all(0.f);
    }
    store_part((float *)(c->bases[s[4]] + s[5]) + column, squares + part, n, 1);
    return;
  }
  word first = task * map_task_of(a), stop = least(first + map_task_of(a), a[MAP_COUNT]);
  for (word i = 0; i < a[MAP_SUMS]; i++) clear(partial_of(c, sums + i * SUM_WORDS, task, columns), sum_rows(sums + i * SUM_WORDS) * columns);
  word row = a[MAP_SUMS] ? columns : a[MAP_SIZES + 3], unit = row, block = BLOCK; /* whole rows at a time, so that what repeats along them stays */
  while (unit % LANES && unit <= BLOCK) unit += row;
  if (unit <= BLOCK) block = BLOCK / unit * unit;
  enum { FILLED, DENSE, SAME } how[REGISTERS]; /* a block of a load is put together, lies end to end, or is the first one again */
  for (word i = 0; i < a[MAP_LOADS]; i++) {
    const word *l = loads + i * LOAD_WORDS, *z = a + MAP_SIZES;
    int dense = l[2] == FLOAT32;
    for (word d = 3, apart = 1; d >= 0; apart *= z[d--]) dense &= z[d] == 1 || l[3 + d] == apart;
    how[i] = dense ? DENSE : l[2] != UNPOOLED && !(l[3] | l[4] | l[5]) && (!l[6] || (l[6] == 1 && block % z[3] == 0)) ? SAME : FILLED;
  }
  for (word start = first; start < stop; start += block) {
    word n = least(block, stop - start), whole = (n + LANES - 1) / LANES * LANES;
    for (word i = 0; i < a[MAP_LOADS]; i++) {
      const word *l = loads + i * LOAD_WORDS;
      const char *from = c->bases[l[0]] + l[1];
      registers[i] = buffers + i * BLOCK;
      if (how[i] == DENSE && n == whole) registers[i] = (const float *)from + start;
      else if (l[2] == UNPOOLED) fill_unpooled(buffers + i * BLOCK, (const float *)from, (const uint8_t *)(c->bases[l[7]] + l[8]), l, start, n);
      else if (how[i] != SAME || start == first) fill_block(buffers + i * BLOCK, from, l, a + MAP_SIZES, start, n);
    }
    for (word i = 0; i < a[MAP_STEPS]; i++) result[steps[i * STEP_WORDS + 1]] = buffers + steps[i * STEP_WORDS + 1] * BLOCK;
    for (word i = 0; i < a[MAP_STORES]; i++) {
      const word *s = stores + i * STORE_WORDS;
      float *to = (float *)(c->bases[s[0]] + s[1]) + start;
      int alone = n == whole && s[2] >= a[MAP_LOADS] && s[3] == a[MAP_COUNT] && s[5] == 1;
      for (word j = 0; j < a[MAP_LOADS]; j++) alone &= registers[j] != to;
      if (alone) result[s[2]] = to;
    }
    for (word i = 0; i < a[MAP_STEPS]; i++) {
      const word *s = steps + i * STEP_WORDS;
      union { int32_t i; float f; } number = {(int32_t)s[5]};
      registers[s[1]] = result[s[1]];
      map_step(s[0], result[s[1]], registers[s[2]], registers[s[3]], registers[s[4]], number.f, whole);
    }
    for (word i = 0; i < a[MAP_SUMS]; i++) { /* before a store may write over what it is of */
      const word *s = sums + i * SUM_WORDS;
      sum_columns(partial_of(c, s, task, columns), registers[s[0]], n, start - first, columns, s[1] == SQUARES);
    }
    for (word i = 0; i < a[MAP_STORES]; i++) {
      const word *s = stores + i * STORE_WORDS;
      float *to = (float *)(c->bases[s[0]] + s[1]);
      for (word done = 0, at = start % s[3], run = start / s[3], some; done < n; done += some, at = 0, run++) {
        some = least(s[3] - at, n - done);
        float *there = to + run * s[4] + at * s[5];
        if (there != registers[s[2]] + done) copy_items((char *)there, (const char *)(registers[s[2]] + done), some, 4 * s[5], 4, 4);
      }
    }
  }
  for (word i = 0; i < a[MAP_SUMS]; i++)
    if (sums[i * SUM_WORDS + 1] == SQUARES) finish_squares(partial_of(c, sums + i * SUM_WORDS, task, columns), columns, (stop - first) / columns);
}

/* --- reduce: [0,1] from, [2,3] to, [4,5] partial results, maximum?, outer, reduced, inner ---------------------------- */


static word reduce_tasks(const word *a, int phase) {
  if (phase == 0) return a[REDUCE_OUTER] * reduce_parts(a);
  return parts_of(a[REDUCE_OUTER] * a[REDUCE_INNER], 1024);
}

INLINE float joined(float x, float y, word maximum) { return !maximum ? x + y : y > x || y != y ? y : x; }

static void reduce_task(const struct call *c, int phase, word task) {
  const word *a = c->a, maximum = a[REDUCE_MAX], size = a[REDUCE_SIZE], inner = a[REDUCE_INNER], parts = reduce_parts(a);
  float *partial = at(c, 4);
  if (phase == 0) {
    word outer = task / parts, part = task % parts;
    const float *from = (const float *)at(c, 0) + outer * size * inner;
    float *to = partial + task * inner;
    if (inner == 1) {
      word i = part * 4096, stop = least(i + 4096, size);
      v16 total = maximum ? all(from[i]) : all(0.f);
      for (; i + LANES <= stop; i += LANES) total = maximum ? larger(total, load(from + i)) : total + load(from + i);
      for (int lane = 0; i < stop; i++, lane++) total[lane] = joined(total[lane], from[i], maximum);
      *to = maximum ? max_of(total) : sum_of(total);
      return;
    }
    word i = part * REDUCE_PART, stop = least(i + REDUCE_PART, size), j = 0;
    for (; j + LANES <= inner; j += LANES) {
      v16 total = load(from + i * inner + j);
      for (word k = i + 1; k < stop; k++) {
        v16 x = load(from + k * inner + j);
        total = maximum ? larger(total, x) : total + x;
      }
      store(to + j, total);
    }
    for (; j < inner; j++) {
      float total = from[i * inner + j];
      for (word k = i + 1; k < stop; k++) total = joined(total, from[k * inner + j], maximum);
      to[j] = total;
    }
    return;
  }
  float *to = at(c, 2);
  for (word i = task * 1024; i < least((task + 1) * 1024, a[REDUCE_OUTER] * inner); i++) {
    const float *p = partial + i / inner * parts * inner + i % inner;
    float total = p[0];
    for (word k = 1; k < parts; k++) total = joined(total, p[k * inner], maximum);
    to[i] = total;
  }
}

/* --- products: panels of the right side, 16 columns wide, are packed first; then each task makes a piece of the result */
/* Adds products of `n` elements, `stride` apart, of some rows and of a panel's vectors, `apart` from one another; and so
   on `height` times, each `down` further in the rows and `next` further in the panel. Not inlined: the sums stay in
   registers. */
#define MULTIPLY(name, vector, count, load, all)                                                                          \
  static __attribute__((noinline)) void name(vector *sums, const float *const *rows, word stride, word down, const float *panel, word apart, word next, word n, word height) { \
    vector sum[count];                                                                                                    \
    const float *row[count];                                                                                              \
    for (int m = 0; m < count; m++) sum[m] = sums[m], row[m] = rows[m];                                                   \
    for (word i = 0; i < height; i++) {                                                                                   \
      const float *p = panel;                                                                                             \
      for (word k = 0; k < n; k++, p += apart) {                                                                          \
        vector b = load(p);                                                                                               \
        for (int m = 0; m < count; m++) sum[m] = __builtin_elementwise_fma(all(row[m][k * stride]), b, sum[m]);           \
      }                                                                                                                   \
      for (int m = 0; m < count; m++) row[m] += down;                                                                     \
      panel += next;                                                                                                      \
    }                                                                                                                     \
    for (int m = 0; m < count; m++) sums[m] = sum[m];                                                                     \
  }
MULTIPLY(multiply_whole, v16, ROWS, load, all)
MULTIPLY(multiply_half, v8, HALF_ROWS, load8, all8)

/* A tile: ROWS rows of a panel, or HALF_ROWS of half a panel where it has no more than eight columns. */
#define MOST_ROWS HALF_ROWS
_Static_assert(ROWS <= HALF_ROWS && HALF_ROWS <= 2 * ROWS, "a tile of halves is no larger");
typedef union {
  v16 whole[ROWS];
  v8 half[HALF_ROWS];
} tile;
INLINE int half_of(word columns) { return columns <= LANES / 2; }
INLINE int rows_of(int half) { return half ? HALF_ROWS : ROWS; }

INLINE void multiply(tile *sums, int half, const float *const *rows, word stride, word down, const float *panel, word apart, word next, word n, word height) {
  if (half) multiply_half(sums->half, rows, stride, down, panel, apart, next, n, height);
  else multiply_whole(sums->whole, rows, stride, down, panel, apart, next, n, height);
}
INLINE v16 row_of(const tile *t, int half, int row) { return half ? join(t->half[row], t->half[row]) : t->whole[row]; }
INLINE void fill_tile(tile *t, int half, v16 with) {
  if (half) with = join(low(with), low(with));
  for (int m = 0; m < ROWS; m++) t->whole[m] = with;
}

/* Of a tile: a chain of at most RUN products, and the total of those before. */
struct sum {
  tile chain, total;
  word length, more;
  int half;
};

INLINE void start_sum(struct sum *sum, int half, v16 start) {
  fill_tile(&sum->chain, half, start);
  sum->length = sum->more = 0, sum->half = half;
}

INLINE void join_chain(struct sum *sum) {
  v16 *total = sum->total.whole, *chain = sum->chain.whole;
  for (int m = 0; m < ROWS; m++) total[m] = sum->more ? total[m] + chain[m] : chain[m], chain[m] = all(0.f);
  sum->more = 1, sum->length = 0;
}

/* adds n products of each row, from `offset` on, and the panel */
INLINE void add_products(struct sum *sum, const float *const *rows, word offset, word stride, const float *panel, word n) {
  const float *p[MOST_ROWS];
  int count = rows_of(sum->half);
  for (int m = 0; m < count; m++) p[m] = rows[m] + offset;
  while (n) {
    if (sum->length == RUN) join_chain(sum);
    word some = least(n, RUN - sum->length);
    multiply(&sum->chain, sum->half, p, stride, 0, panel, LANES, 0, some, 1);
    n -= some, sum->length += some;
    if (!n) return;
    for (int m = 0; m < count; m++) p[m] += some * stride;
    panel += some * LANES;
  }
}

/* the sums, in `chain` */
INLINE void finish_sum(struct sum *sum) {
  if (!sum->more) return;
  for (int m = 0; m < ROWS; m++) sum->chain.whole[m] += sum->total.whole[m];
}

/* the numbers of x[i] and x[i + 8] in turn */
INLINE void interleave(v16 *to, const v16 *x) {
  for (int i = 0; i < 8; i++) {
    to[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    to[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

/* 16 rows of 16 numbers, as columns */
INLINE void turn_square(float *to, const float *from, word apart) {
  v16 x[LANES], y[LANES];
  for (int i = 0; i < LANES; i++) x[i] = load(from + i * apart);
  interleave(y, x), interleave(x, y), interleave(y, x), interleave(x, y);
  for (int i = 0; i < LANES; i++) store(to + i * LANES, x[i]);
}

/* matrix product: [0,1] a, [2,3] b, [4,5] to, [6,7] packed, batches, m, n, k; strides of a (batch, row, k), of b (batch,
   k, column) in elements; panels a task; whether an earlier product has packed the right side */


static word product_tasks(const word *a, int phase) {
  word panels = panels_of(a[PRODUCT_N]), batches = a[PRODUCT_B] ? a[PRODUCT_BATCHES] : 1;
  if (phase == 0) return a[PRODUCT_READY] ? 0 : batches * panels;
  return a[PRODUCT_BATCHES] * parts_of(a[PRODUCT_M], TASK_ROWS) * parts_of(panels, a[PRODUCT_PANELS]);
}

static void product_task(const struct call *c, int phase, word task) {
  const word *a = c->a, m = a[PRODUCT_M], n = a[PRODUCT_N], k = a[PRODUCT_K], panels = panels_of(n);
  float *packed = at(c, 6);
  if (phase == 0) {
    word batch = task / panels, column = task % panels * LANES, width = least(LANES, n - column);
    const float *b = (const float *)at(c, 2) + batch * a[PRODUCT_B] + column * a[PRODUCT_B + 2];
    word ks = a[PRODUCT_B + 1], cs = a[PRODUCT_B + 2];
    float *to = packed + task * k * LANES;
    for (word i = 0; i < k; i++, to += LANES)
      if (cs == 1) store(to, load_part(b + i * ks, width));
      else if (ks != 1 || i % LANES || k - i < LANES || width < LANES)
        for (word j = 0; j < LANES; j++) to[j] = j < width ? b[i * ks + j * cs] : 0;
      else turn_square(to, b + i, cs), i += LANES - 1, to += (LANES - 1) * LANES;
    return;
  }
  word groups = parts_of(panels, a[PRODUCT_PANELS]), pieces = parts_of(m, TASK_ROWS);
  word group = task % groups, piece = task / groups % pieces, batch = task / groups / pieces;
  const float *left = (const float *)at(c, 0) + batch * a[PRODUCT_A];
  const float *right = packed + (a[PRODUCT_B] ? batch : 0) * panels * k * LANES;
  float *to = (float *)at(c, 4) + batch * m * n, *turned = (float *)c->scratch;
  word first = piece * TASK_ROWS, stop = least(first + TASK_ROWS, m), rs = a[PRODUCT_A + 1], ks = a[PRODUCT_A + 2];
  for (word start = 0; start < k; start += RUN) { /* as much at a time as stays in the cache */
    word some = least(RUN, k - start), stride = ks == 1 ? 1 : TASK_ROWS;
    if (ks != 1)
      for (word j = 0; j < some; j++) copy_items((char *)(turned + j * TASK_ROWS), (const char *)(left + first * rs + (start + j) * ks), stop - first, 4, 4 * rs, 4);
    for (word p = group * a[PRODUCT_PANELS]; p < least((group + 1) * a[PRODUCT_PANELS], panels); p++) {
      int half = half_of(n - p * LANES), count = rows_of(half);
      for (word i = first; i < stop; i += count) {
        const float *rows[MOST_ROWS];
        tile sum;
        for (int r = 0; r < count; r++) {
          word row = least(i + r, stop - 1);
          rows[r] = ks == 1 ? left + row * rs + start : turned + row - first;
        }
        /* the lines that will be written come from memory while the products are taken; of no other use is a prefetch */
        for (int r = 0; r < count; r++) __builtin_prefetch(to + least(i + r, stop - 1) * n + p * LANES, 1);
        fill_tile(&sum, half, all(0.f));
        multiply(&sum, half, rows, stride, 0, right + (p * k + start) * LANES, LANES, 0, some, 1);
        for (int r = 0; r < least(count, stop - i); r++) {
          float *place = to + (i + r) * n + p * LANES;
          v16 row = row_of(&sum, half, r);
          store_part(place, start ? load_part(place, n - p * LANES) + row : row, n - p * LANES, 1);
        }
      }
    }
  }
}

/* --- convolution of images [N, H, W, C], and its adjoints -------------------------------------------------------------
   [0,1] x, [2,3] weight, [4,5] to, [6,7] bias (base −1: none), [8,9] packed; then N, H, W, C of x, height, width and
   channels of the result; kernel h, w; stride h, w; padding top, left; dilation h, w; groups; strides of the weight by
   output channel, input channel, row, column. For the adjoint x is dy, and a result's pixel takes those pixels of dy
   whose windows hold it. */

/* Which places of the kernel reach a result's pixel along an axis (0 rows, 1 columns): their number, and of each, nearest
   pixel of x first, the place and the pixel's distance from `pixel × step`. Of an adjoint, pixels of the same remainder by
   the stride (`phase`) are reached by the same places. */
static word reach(const word *a, int axis, word phase, word *place, word *distance) {
  word size = a[CONV_KH + axis], stride = a[CONV_SH + axis], padding = a[CONV_TOP + axis], dilation = a[CONV_DH + axis], count = 0;
  for (word k = 0; k < size; k++)
    if (!a[CONV_ADJOINT]) place[k] = k, distance[k] = k * dilation - padding, count++;
    else {
      word far = phase + padding - (size - 1 - k) * dilation;
      if (far % stride == 0) place[count] = size - 1 - k, distance[count++] = far / stride;
    }
  return count;
}

static word blocks(const word *a) {
  return a[CONV_N] * phases(a, 0) * phases(a, 1) * parts_of(conv_height(a), block_height(a)) * parts_of(conv_width(a), block_width(a));
}

static word conv_tasks(const word *a, int phase) { return phase == 0 ? a[CONV_GROUPS] * panels_of(a[CONV_O] / a[CONV_GROUPS]) : blocks(a); }

/* Rows y to y + height of an image from column z on, with zeros around it, `pitch` elements a row: in place where they lie
   inside, else copied. */
static const float *window(const word *a, const float *image, word y, word z, word height, word width, float *copy, word *pitch) {
  word channels = a[CONV_C];
  *pitch = a[CONV_W] * channels;
  if (y >= 0 && z >= 0 && y + height <= a[CONV_H] && z + width <= a[CONV_W]) return image + y * *pitch + z * channels;
  word left = z < 0 ? least(-z, width) : 0, right = z + width > a[CONV_W] ? (a[CONV_W] > z ? a[CONV_W] - z : 0) : width;
  *pitch = width * channels;
  for (word row = 0; row < height; row++) {
    float *to = copy + row * *pitch;
    if (y + row < 0 || y + row >= a[CONV_H] || right <= left) {
      clear(to, *pitch);
      continue;
    }
    clear(to, left * channels);
    copy_items((char *)(to + left * channels), (const char *)(image + ((y + row) * a[CONV_W] + z + left) * channels), (right - left) * channels, 4, 4, 4);
    clear(to + right * channels, (width - right) * channels);
  }
  return copy;
}

/* A block of pixels of a convolution's result, and what of x is under it. */
struct block {
  word image, row, column, height, width; /* of the first pixel, in the result; in pixels of the phase */
  word down, across;                      /* from one pixel of the phase to the next, in the result */
  word high, broad, *rows, *columns, *far, *wide; /* the kernel's places that reach it (see `reach`) */
  word before;                            /* places of earlier phases */
  const float *x;                         /* the pixel under the block's first one, at the first place */
  word pitch, sh, sw;                     /* elements a row of x; pixels of x from one pixel of the phase to the next */
};

static int block_of(const struct call *c, word task, struct block *b) {
  const word *a = c->a, kh = a[CONV_KH], kw = a[CONV_KW], adjoint = a[CONV_ADJOINT];
  b->rows = (word *)c->scratch, b->columns = b->rows + kh, b->far = b->columns + kw, b->wide = b->far + kh;
  b->down = adjoint ? a[CONV_SH] : 1, b->across = adjoint ? a[CONV_SW] : 1;
  b->sh = adjoint ? 1 : a[CONV_SH], b->sw = adjoint ? 1 : a[CONV_SW];
  word blocks_across = parts_of(conv_width(a), block_width(a)), blocks_down = parts_of(conv_height(a), block_height(a));
  word v = task % blocks_across * block_width(a), u = task / blocks_across % blocks_down * block_height(a);
  word turn = task / blocks_across / blocks_down, above = turn / phases(a, 1) % phases(a, 0), beside = turn % phases(a, 1);
  b->image = turn / phases(a, 1) / phases(a, 0);
  b->height = least(block_height(a), parts_of(a[CONV_OH] - above, b->down) - u);
  b->width = least(block_width(a), parts_of(a[CONV_OW] - beside, b->across) - v);
  if (b->height <= 0 || b->width <= 0) return 0;
  b->row = u * b->down + above, b->column = v * b->across + beside;
  b->before = 0;
  for (word t = 0; t < above * phases(a, 1) + beside; t++) b->before += reach(a, 0, t / phases(a, 1), b->rows, b->far) * reach(a, 1, t % phases(a, 1), b->columns, b->wide);
  b->high = reach(a, 0, above, b->rows, b->far), b->broad = reach(a, 1, beside, b->columns, b->wide);
  b->x = at(c, 0), b->pitch = 0;
  if (b->high && b->broad) {
    word y = u * b->sh + b->far[0], z = v * b->sw + b->wide[0];
    word height = (b->height - 1) * b->sh + b->far[b->high - 1] - b->far[0] + 1, width = (b->width - 1) * b->sw + b->wide[b->broad - 1] - b->wide[0] + 1;
    b->x = window(a, b->x + b->image * a[CONV_H] * a[CONV_W] * a[CONV_C], y, z, height, width, (float *)(b->wide + kw), &b->pitch);
  }
  return 1;
}
/* where the block's first pixel goes */
INLINE float *result_of(const struct call *c, const struct block *b) {
  const word *a = c->a;
  return (float *)at(c, 4) + ((b->image * a[CONV_OH] + b->row) * a[CONV_OW] + b->column) * a[CONV_O];
}

static void conv_task(const struct call *c, int phase, word task) {
  const word *a = c->a, groups = a[CONV_GROUPS], in = a[CONV_C] / groups, out = a[CONV_O] / groups, panels = panels_of(out), k = a[CONV_KH] * a[CONV_KW] * in;
  float *packed = at(c, 8);
  if (phase == 0) { /* a panel: phases × the places that reach them × input channels × 16 output channels */
    const word *s = a + CONV_WEIGHT, is = a[CONV_ADJOINT] ? s[0] : s[1], os = a[CONV_ADJOINT] ? s[1] : s[0];
    word *rows = (word *)c->scratch, *columns = rows + a[CONV_KH], *away = columns + a[CONV_KW];
    word group = task / panels, first = task % panels * LANES, width = least(LANES, out - first);
    const float *w = (const float *)at(c, 2) + (a[CONV_ADJOINT] ? group * in * is + first * os : (group * out + first) * os);
    float *to = packed + task * k * LANES;
    for (word turn = 0; turn < phases(a, 0) * phases(a, 1); turn++) {
      word high = reach(a, 0, turn / phases(a, 1), rows, away), broad = reach(a, 1, turn % phases(a, 1), columns, away);
      for (word t = 0; t < high * broad; t++)
        for (word i = 0; i < in; i++, to += LANES) {
          const float *from = w + i * is + rows[t / broad] * s[2] + columns[t % broad] * s[3];
          for (word o = 0; o < LANES; o++) to[o] = o < width ? from[o * os] : 0;
        }
    }
    return;
  }
  struct block b;
  if (!block_of(c, task, &b)) return;
  const float *bias = a[6] < 0 ? 0 : at(c, 6);
  int joined = groups == 1 && (b.broad < 2 || b.wide[1] - b.wide[0] == 1); /* a row of the kernel lies end to end in x */
  word pixels = b.height * b.width;
  for (word group = 0; group < groups; group++)
    for (word p = 0; p < panels; p++) {
      const float *panel = packed + ((group * panels + p) * k + b.before * in) * LANES;
      word channel = group * out + p * LANES, some = least(LANES, out - p * LANES), column = 0;
      v16 offset = bias ? load_part(bias + channel, some) : all(0.f);
      int half = half_of(some), count = rows_of(half);
      const float *line = b.x + group * in, *from = line;
      float *line_to = result_of(c, &b) + channel, *next = line_to;
      for (word q = 0; q < pixels; q += count) {
        const float *under[MOST_ROWS];
        float *to[MOST_ROWS];
        struct sum sum;
        start_sum(&sum, half, offset);
        for (int m = 0; m < count; m++) {
          under[m] = from, to[m] = next;
          __builtin_prefetch(next, 1);
          if (q + m + 1 >= pixels) continue; /* the last pixel again where there are no more */
          if (++column < b.width) from += b.sw * a[CONV_C], next += b.across * a[CONV_O];
          else column = 0, from = line += b.sh * b.pitch, next = line_to += b.down * a[CONV_OW] * a[CONV_O];
        }
        const float *weight = panel;
        if (joined && b.high && b.high * b.broad * in <= RUN)
          multiply(&sum.chain, half, under, 1, b.high > 1 ? (b.far[1] - b.far[0]) * b.pitch : 0, weight, LANES, b.broad * in * LANES, b.broad * in, b.high);
        else for (word i = 0; i < b.high; i++)
          for (word j = 0; j < (joined ? 1 : b.broad); j++) {
            word n = joined ? b.broad * in : in;
            add_products(&sum, under, (b.far[i] - b.far[0]) * b.pitch + (b.wide[j] - b.wide[0]) * a[CONV_C], 1, weight, n);
            weight += n * LANES;
          }
        finish_sum(&sum);
        for (int m = 0; m < least(count, pixels - q); m++) store_part(to[m], row_of(&sum.chain, half, m), some, 1);
      }
    }
}

/* weight gradient: [0,1] x, [2,3] dy, [4,5] to, [6,7] unused, [8,9] partial results; the words of the convolution, whose
   result is dy; then images a part. Partial results are [part, tap, input channel of the group, output channel]. */
static word conv_grad_tasks(const word *a, int phase) {
  word taps = a[CONV_KH] * a[CONV_KW], in = a[CONV_C] / a[CONV_GROUPS];
  if (phase == 0) return grad_parts(a) * parts_of(taps * in, TASK_ROWS);
  return taps * in;
}

static void conv_grad_task(const struct call *c, int phase, word task) {
  const word *a = c->a, groups = a[CONV_GROUPS], in = a[CONV_C] / groups, out = a[CONV_O] / groups, outputs = a[CONV_O];
  const word all_rows = a[CONV_KH] * a[CONV_KW] * in, each = all_rows * outputs, kw = a[CONV_KW];
  float *partial = at(c, 8);
  if (phase == 1) {
    word t = task / in, i = task % in;
    const word *s = a + CONV_WEIGHT;
    const float *from = partial + task * outputs;
    float *to = (float *)at(c, 4) + i * s[1] + t / kw * s[2] + t % kw * s[3];
    for (word o = 0; o < outputs; o += LANES) {
      word width = least(LANES, outputs - o);
      v16 total = load_part(from + o, width);
      for (word p = 1; p < grad_parts(a); p++) total += load_part(from + p * each + o, width);
      store_part(to + o * s[0], total, width, s[0]);
    }
    return;
  }
  word pieces = parts_of(all_rows, TASK_ROWS), piece = task % pieces, part = task / pieces;
  word first = part * a[GRAD_IMAGES], last = least(first + a[GRAD_IMAGES], a[CONV_N]);
  word start = piece * TASK_ROWS, stop = least(start + TASK_ROWS, all_rows);
  word down[TASK_ROWS], aside[TASK_ROWS]; /* from a window's first pixel to what a row of the result multiplies */
  for (word r = start; r < stop; r++)
    down[r - start] = r / in / kw * a[CONV_DH], aside[r - start] = r / in % kw * a[CONV_DW] * a[CONV_C] + r % in;
  float *to = partial + part * each;
  clear(to + start * outputs, (stop - start) * outputs);
  for (word n = first; n < last; n++)
    for (word u = 0; u < a[CONV_OH]; u += block_height(a))
      for (word v = 0; v < a[CONV_OW]; v += block_width(a)) {
        word height = least(block_height(a), a[CONV_OH] - u), width = least(block_width(a), a[CONV_OW] - v), pitch;
        const float *x = window(a, (const float *)at(c, 0) + n * a[CONV_H] * a[CONV_W] * a[CONV_C], u * a[CONV_SH] - a[CONV_TOP], v * a[CONV_SW] - a[CONV_LEFT],
                                (height - 1) * a[CONV_SH] + (a[CONV_KH] - 1) * a[CONV_DH] + 1, (width - 1) * a[CONV_SW] + (kw - 1) * a[CONV_DW] + 1, (float *)c->scratch, &pitch);
        const float *dy = (const float *)at(c, 2) + ((n * a[CONV_OH] + u) * a[CONV_OW] + v) * outputs;
        const word step = a[CONV_SW] * a[CONV_C];
        float whole[TASK_ROWS * LANES];
        for (word group = 0; group < groups; group++)
          for (word some_rows = start; some_rows < stop; some_rows += 24) /* a multiple of any tile's; they stay in the cache */
          for (word o = 0; o < out; o += LANES) {
            word some = least(LANES, out - o), last = least(some_rows + 24, stop);
            int half = half_of(some), rows = rows_of(half);
            const float *slope = dy + group * out + o;
            word apart = outputs, next = a[CONV_OW] * outputs;
            if (some % (LANES / 2)) { /* a vector would reach beyond the last pixel's channels */
              for (word q = 0; q < height * width && some_rows == start; q++) store(whole + q * LANES, load_part(slope + q / width * next + q % width * outputs, some));
              slope = whole, apart = LANES, next = width * LANES;
            }
            for (word r = some_rows; r < last; r += rows) {
              word count = least(rows, last - r); /* rows beyond the last one repeat it */
              const float *under[MOST_ROWS];
              tile sum;
              for (int m = 0; m < rows; m++) {
                word row = r - start + least(m, count - 1);
                under[m] = x + down[row] * pitch + aside[row] + group * in;
              }
              fill_tile(&sum, half, all(0.f));
              multiply(&sum, half, under, step, a[CONV_SH] * pitch, slope, apart, next, width, height);
              float *sums = to + r * outputs + group * out + o;
              for (int m = 0; m < count; m++)
                store_part(sums + m * outputs, load_part(sums + m * outputs, some) + row_of(&sum, half, m), some, 1);
            }
          }
      }
}

/* --- 3×3 convolutions of stride 1 by Winograd's F(4×4, 3×3) (Lavin and Gray 2016): the words of the convolution, tiles a
   task. Packed: [spot, panel, input channel, 16]. The adjoint is the same with the kernel turned and swapped. ---------- */
INLINE void transform_in(const v16 *d, v16 *o) { /* Bᵀ */
  o[0] = fma(all(4.f), d[0], fma(all(-5.f), d[2], d[4]));
  v16 p = fma(all(-4.f), d[2], d[4]), q = fma(all(-4.f), d[1], d[3]);
  o[1] = p + q, o[2] = p - q;
  v16 r = d[4] - d[2], t = all(2.f) * (d[3] - d[1]);
  o[3] = r + t, o[4] = r - t;
  o[5] = fma(all(4.f), d[1], fma(all(-5.f), d[3], d[5]));
}
INLINE void transform_out(const v16 *m, v16 *y) { /* Aᵀ */
  v16 s = m[1] + m[2], d = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s + s2, y[1] = fma(all(2.f), d2, d), y[2] = fma(all(4.f), s2, s), y[3] = fma(all(8.f), d2, d) + m[5];
}
INLINE void transform_back(const v16 *y, v16 *m) { /* A */
  v16 e = y[0] + y[2], o = y[1] + y[3];
  m[0] = y[0], m[1] = e + o, m[2] = e - o;
  v16 e2 = fma(all(4.f), y[2], y[0]), o2 = fma(all(8.f), y[3], all(2.f) * y[1]);
  m[3] = e2 + o2, m[4] = e2 - o2, m[5] = y[3];
}
static const float G[6][3] = {{.25f, 0, 0}, {-1 / 6.f, -1 / 6.f, -1 / 6.f}, {-1 / 6.f, 1 / 6.f, -1 / 6.f}, {1 / 24.f, 1 / 12.f, 1 / 6.f}, {1 / 24.f, -1 / 12.f, 1 / 6.f}, {0, 0, 1}};

/* image, row and column of a tile's first pixel in the result */
INLINE void place_of(const word *a, word tile, word *at) {
  word across = parts_of(a[CONV_OW], 4), down = parts_of(a[CONV_OH], 4);
  at[2] = tile % across * 4, at[1] = tile / across % down * 4, at[0] = tile / across / down;
}

/* Where the size × size pixels from (row, column) on lie, or none; whether all of them are there. */
INLINE int pixels_of(const float *x, word image, word row, word column, word height, word width, word channels, int size, const float **pixels) {
  int whole = row >= 0 && column >= 0 && row + size <= height && column + size <= width;
  const float *first = x + ((image * height + row) * width + column) * channels;
  for (int i = 0; i < size; i++)
    for (int j = 0; j < size; j++) {
      int there = whole || (row + i >= 0 && column + j >= 0 && row + i < height && column + j < width);
      pixels[i * size + j] = there ? first + (i * width + j) * channels : 0;
    }
  return whole;
}
INLINE v16 pixel(const float *from, word k, word n, int whole) {
  if (n == LANES) return whole || from ? load(from + k) : all(0.f);
  return from ? load_part(from + k, n) : all(0.f);
}

/* 16 channels of 6×6 pixels of x, transformed, to spots that lie `apart` */
INLINE void transform_x(const float **pixels, word k, word n, int whole, float *to, word apart) {
  v16 q[6][6], u[6], r[6];
  for (int j = 0; j < 6; j++) {
    for (int i = 0; i < 6; i++) u[i] = pixel(pixels[i * 6 + j], k, n, whole);
    transform_in(u, r);
    for (int i = 0; i < 6; i++) q[i][j] = r[i];
  }
  for (int i = 0; i < 6; i++) {
    transform_in(q[i], r);
    for (int j = 0; j < 6; j++) store_part(to + (i * 6 + j) * apart, r[j], n, 1);
  }
}
/* 16 channels of 4×4 pixels of dy */
INLINE void transform_dy(const float **pixels, word k, word n, int whole, float *to, word apart) {
  v16 q[6][4], u[4], r[6];
  for (int j = 0; j < 4; j++) {
    for (int i = 0; i < 4; i++) u[i] = pixel(pixels[i * 4 + j], k, n, whole);
    transform_back(u, r);
    for (int i = 0; i < 6; i++) q[i][j] = r[i];
  }
  for (int i = 0; i < 6; i++) {
    transform_back(q[i], r);
    for (int j = 0; j < 6; j++) store(to + (i * 6 + j) * apart, r[j]);
  }
}
static void tile_in(const word *a, const float *x, word tile, float *to, word apart, word top, word left) {
  const float *pixels[36];
  word at[3], k = 0, in = a[CONV_C];
  place_of(a, tile, at);
  if (pixels_of(x, at[0], at[1] - top, at[2] - left, a[CONV_H], a[CONV_W], in, 6, pixels))
    for (; k + LANES <= in; k += LANES) transform_x(pixels, k, LANES, 1, to + k, apart);
  for (; k + LANES <= in; k += LANES) transform_x(pixels, k, LANES, 0, to + k, apart);
  if (k < in) transform_x(pixels, k, in - k, 0, to + k, apart);
}

static word winograd_tasks(const word *a, int phase) {
  return phase == 0 ? panels_of(a[CONV_O]) : parts_of(tiles_of(a), a[WINOGRAD_TILES]);
}

static void winograd_task(const struct call *c, int phase, word task) {
  const word *a = c->a, in = a[CONV_C], out = a[CONV_O], panels = panels_of(out), adjoint = a[CONV_ADJOINT];
  float *packed = at(c, 8);
  if (phase == 0) {
    const word *s = a + CONV_WEIGHT;
    const float *w = (const float *)at(c, 2);
    for (word i = 0; i < in; i++) {
      v16 t[6][3], taps[9];
      for (int tap = 0; tap < 9; tap++) {
        word row = adjoint ? 2 - tap / 3 : tap / 3, column = adjoint ? 2 - tap % 3 : tap % 3;
        taps[tap] = all(0.f);
        for (word o = 0; o < least(LANES, out - task * LANES); o++) {
          word channel = task * LANES + o;
          taps[tap][o] = w[(adjoint ? i * s[0] + channel * s[1] : channel * s[0] + i * s[1]) + row * s[2] + column * s[3]];
        }
      }
      for (int r = 0; r < 6; r++)
        for (int x = 0; x < 3; x++) t[r][x] = fma(all(G[r][2]), taps[6 + x], fma(all(G[r][1]), taps[3 + x], all(G[r][0]) * taps[x]));
      for (int r = 0; r < 6; r++)
        for (int q = 0; q < 6; q++)
          store(packed + (((r * 6 + q) * panels + task) * in + i) * LANES, fma(all(G[q][2]), t[r][2], fma(all(G[q][1]), t[r][1], all(G[q][0]) * t[r][0])));
    }
    return;
  }
  word tiles = a[WINOGRAD_TILES], first = task * tiles, count = least(tiles, tiles_of(a) - first);
  word vs = spot_size(tiles * in), ms = spot_size(tiles * panels * LANES);
  float *v = (float *)c->scratch, *m = v + SPOTS * vs; /* [spot, tile, channel] and [spot, tile, panel, 16] */
  word top = adjoint ? 2 - a[CONV_TOP] : a[CONV_TOP], left = adjoint ? 2 - a[CONV_LEFT] : a[CONV_LEFT];
  for (word t = 0; t < count; t++) tile_in(a, at(c, 0), first + t, v + t * in, vs, top, left);
  for (word spot = 0; spot < SPOTS; spot++)
    for (word p = 0; p < panels; p++)
      for (word t = 0; t < count; t += ROWS) {
        const float *rows[ROWS];
        struct sum sum;
        start_sum(&sum, 0, all(0.f));
        for (int r = 0; r < ROWS; r++) rows[r] = v + spot * vs + least(t + r, count - 1) * in;
        add_products(&sum, rows, 0, 1, packed + (spot * panels + p) * in * LANES, in);
        finish_sum(&sum);
        for (int r = 0; r < ROWS; r++)
          if (t + r < count) store(m + spot * ms + ((t + r) * panels + p) * LANES, sum.chain.whole[r]);
      }
  const float *bias = a[6] < 0 ? 0 : at(c, 6);
  for (word t = 0; t < count; t++)
    for (word p = 0; p < panels; p++) {
      word n = least(LANES, out - p * LANES), at_[3];
      v16 q[4][6], u[6], r[4], offset = bias ? load_part(bias + p * LANES, n) : all(0.f);
      place_of(a, first + t + 1, at_);
      for (int i = 0; i < 16; i++) __builtin_prefetch((float *)at(c, 4) + ((at_[0] * a[CONV_OH] + at_[1] + i / 4) * a[CONV_OW] + at_[2] + i % 4) * out + p * LANES, 1);
      place_of(a, first + t, at_);
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++) u[i] = load(m + (i * 6 + j) * ms + (t * panels + p) * LANES);
        transform_out(u, r);
        for (int i = 0; i < 4; i++) q[i][j] = r[i];
      }
      for (int i = 0; i < 4 && at_[1] + i < a[CONV_OH]; i++) {
        transform_out(q[i], r);
        float *to = (float *)at(c, 4) + ((at_[0] * a[CONV_OH] + at_[1] + i) * a[CONV_OW] + at_[2]) * out + p * LANES;
        for (int j = 0; j < 4 && at_[2] + j < a[CONV_OW]; j++) store_part(to + j * out, r[j] + offset, n, 1);
      }
    }
}

/* its weight gradient: [8,9] holds the gradient of the transformed weight [spot, channel, panel, 16], x's tiles [spot, tile,
   channel] and those of dy [spot, panel, tile, 16], one after the other. Where it comes in parts, the first of these three
   goes from call to call. */
static word winograd_grad_tasks(const word *a, int phase) {
  if (phase == 0) return parts_of(tiles_of(a), 8);
  if (phase == 1) return SPOTS * parts_of(a[CONV_C], TASK_ROWS);
  return a[WINOGRAD_PART] & GOES_FURTHER ? 0 : a[CONV_C];
}

static void winograd_grad_task(const struct call *c, int phase, word task) {
  const word *a = c->a, in = a[CONV_C], out = a[CONV_O], panels = panels_of(out), tiles = tiles_of(a);
  word vs = spot_size(tiles * in), ms = spot_size(tiles * panels * LANES);
  float *g = at(c, 8), *v = g + SPOTS * in * panels * LANES, *m = v + SPOTS * vs;
  if (phase == 0) {
    for (word t = task * 8; t < least(task * 8 + 8, tiles); t++) {
      const float *pixels[16];
      word where[3];
      tile_in(a, at(c, 0), t, v + t * in, vs, a[CONV_TOP], a[CONV_LEFT]);
      place_of(a, t, where);
      for (word spot = 0; spot < SPOTS; spot++) {
        for (word i = 0; i < in; i += LANES) __builtin_prefetch(v + (t + 1) * in + spot * vs + i, 1);
        for (word p = 0; p < panels; p++) __builtin_prefetch(m + (p * tiles + t + 1) * LANES + spot * ms, 1);
      }
      int whole = pixels_of(at(c, 2), where[0], where[1], where[2], a[CONV_OH], a[CONV_OW], out, 4, pixels);
      for (word p = 0; p < panels; p++) {
        float *to = m + (p * tiles + t) * LANES;
        word n = least(LANES, out - p * LANES);
        if (whole && n == LANES) transform_dy(pixels, p * LANES, LANES, 1, to, ms);
        else transform_dy(pixels, p * LANES, n, 0, to, ms);
      }
    }
  } else if (phase == 1) {
    word pieces = parts_of(in, TASK_ROWS), spot = task / pieces, channel = task % pieces * TASK_ROWS, stop = least(channel + TASK_ROWS, in);
    for (word p = 0; p < panels; p++)
      for (word i = channel; i < stop; i += ROWS) {
        const float *rows[ROWS];
        struct sum sum;
        start_sum(&sum, 0, all(0.f));
        for (int r = 0; r < ROWS; r++) rows[r] = v + spot * vs + least(i + r, stop - 1);
        float *to = g + ((spot * in + i) * panels + p) * LANES;
        if (a[WINOGRAD_PART] & GOES_ON) {
          for (int r = 0; r < ROWS; r++) sum.total.whole[r] = i + r < stop ? load(to + r * panels * LANES) : all(0.f);
          sum.more = 1;
        }
        add_products(&sum, rows, 0, in, m + spot * ms + p * tiles * LANES, tiles);
        finish_sum(&sum);
        for (int r = 0; r < ROWS; r++)
          if (i + r < stop) store(to + r * panels * LANES, sum.chain.whole[r]);
      }
  } else {
    const word *s = a + CONV_WEIGHT;
    for (word p = 0; p < panels; p++) {
      v16 t[3][6];
      for (int y = 0; y < 3; y++)
        for (int j = 0; j < 6; j++) {
          t[y][j] = all(0.f);
          for (int i = 0; i < 6; i++) t[y][j] = fma(all(G[i][y]), load(g + (((i * 6 + j) * in + task) * panels + p) * LANES), t[y][j]);
        }
      for (int y = 0; y < 3; y++)
        for (int x = 0; x < 3; x++) {
          v16 z = all(0.f);
          for (int j = 0; j < 6; j++) z = fma(all(G[j][x]), t[y][j], z);
          store_part((float *)at(c, 4) + p * LANES * s[0] + task * s[1] + y * s[2] + x * s[3], z, out - p * LANES, s[0]);
        }
    }
  }
}

/* the pixel of x under tap (i, j) of the result's pixel, or none */
INLINE const float *tap(const word *a, const float *x, word image, word row, word column, word i, word j) {
  word y, z;
  if (!a[CONV_ADJOINT]) {
    y = row * a[CONV_SH] + i * a[CONV_DH] - a[CONV_TOP];
    z = column * a[CONV_SW] + j * a[CONV_DW] - a[CONV_LEFT];
  } else {
    y = row + a[CONV_TOP] - i * a[CONV_DH];
    z = column + a[CONV_LEFT] - j * a[CONV_DW];
    if (y < 0 || z < 0 || y % a[CONV_SH] || z % a[CONV_SW]) return 0;
    y /= a[CONV_SH], z /= a[CONV_SW];
  }
  if (y < 0 || z < 0 || y >= a[CONV_H] || z >= a[CONV_W]) return 0;
  return x + ((image * a[CONV_H] + y) * a[CONV_W] + z) * a[CONV_C];
}

/* --- depthwise convolution (groups = channels): the words of the convolution; what = 0 forward, 1 adjoint, 2 weight ---- */

static word depthwise_tasks(const word *a, int phase) {
  if (a[DEPTH_WHAT] == 2) return phase == 0 ? parts_of(a[CONV_N], a[DEPTH_IMAGES]) * a[CONV_KH] * a[CONV_KW] : a[CONV_KH] * a[CONV_KW];
  return phase == 0 ? 1 : blocks(a);
}

/* 16 channels, or `n` fewer, of four pixels of a block's row, or of `count` fewer */
INLINE void depthwise_pixels(const struct call *c, const struct block *b, const float *packed, v16 bias, word row, word column, word k, word n, int count) {
  const word *a = c->a, channels = a[CONV_C];
  const float *under = b->x + row * b->sh * b->pitch + column * b->sw * channels + k;
  v16 total[4] = {bias, bias, bias, bias};
  for (word i = 0; i < b->high; i++)
    for (word j = 0; j < b->broad; j++) {
      const float *from = under + (b->far[i] - b->far[0]) * b->pitch + (b->wide[j] - b->wide[0]) * channels;
      v16 weight = load_part(packed + (b->before + i * b->broad + j) * channels + k, n);
      for (int m = 0; m < count; m++) total[m] = fma(load_part(from + m * b->sw * channels, n), weight, total[m]);
    }
  float *to = result_of(c, b) + (row * b->down * a[CONV_OW] + column * b->across) * channels + k;
  for (int m = 0; m < count; m++) store_part(to + m * b->across * channels, total[m], n, 1);
}

static void depthwise_task(const struct call *c, int phase, word task) {
  const word *a = c->a, taps = a[CONV_KH] * a[CONV_KW], channels = a[CONV_C], *s = a + CONV_WEIGHT;
  float *packed = at(c, 8); /* [taps in the order of the phases, channels]; of the weight gradient [parts, taps, channels] */
  if (a[DEPTH_WHAT] == 2) {
    if (phase == 1) {
      float *to = (float *)at(c, 4) + task / a[CONV_KW] * s[2] + task % a[CONV_KW] * s[3];
      for (word k = 0; k < channels; k++) {
        float total = packed[task * channels + k];
        for (word p = 1; p < parts_of(a[CONV_N], a[DEPTH_IMAGES]); p++) total += packed[(p * taps + task) * channels + k];
        to[k * s[0]] = total;
      }
      return;
    }
    word t = task % taps, part = task / taps, i = t / a[CONV_KW], j = t % a[CONV_KW];
    word first = part * a[DEPTH_IMAGES], last = least(first + a[DEPTH_IMAGES], a[CONV_N]);
    word shift = j * a[CONV_DW] - a[CONV_LEFT], left = shift < 0 ? parts_of(-shift, a[CONV_SW]) : 0;
    word right = a[CONV_W] - 1 - shift < 0 ? 0 : least(a[CONV_OW], (a[CONV_W] - 1 - shift) / a[CONV_SW] + 1);
    for (word k = 0; k < channels; k += LANES) {
      word width = least(LANES, channels - k);
      v16 total = all(0.f);
      for (word n = first; n < last; n++)
        for (word row = 0; row < a[CONV_OH]; row++) {
          word y = row * a[CONV_SH] + i * a[CONV_DH] - a[CONV_TOP];
          if (y < 0 || y >= a[CONV_H] || left >= right) continue;
          const float *x = (const float *)at(c, 0) + ((n * a[CONV_H] + y) * a[CONV_W] + left * a[CONV_SW] + shift) * channels + k;
          const float *dy = (const float *)at(c, 2) + ((n * a[CONV_OH] + row) * a[CONV_OW] + left) * channels + k;
          v16 sum = all(0.f);
          for (word q = left; q < right; q++, x += a[CONV_SW] * channels, dy += channels)
            sum = fma(load_part(x, width), load_part(dy, width), sum);
          total += sum;
        }
      store_part(packed + task * channels + k, total, width, 1);
    }
    return;
  }
  if (phase == 0) {
    word *rows = (word *)c->scratch, *columns = rows + a[CONV_KH], *away = columns + a[CONV_KW];
    for (word turn = 0; turn < phases(a, 0) * phases(a, 1); turn++) {
      word high = reach(a, 0, turn / phases(a, 1), rows, away), broad = reach(a, 1, turn % phases(a, 1), columns, away);
      for (word t = 0; t < high * broad; t++, packed += channels) {
        const float *w = (const float *)at(c, 2) + rows[t / broad] * s[2] + columns[t % broad] * s[3];
        for (word k = 0; k < channels; k++) packed[k] = w[k * s[0]];
      }
    }
    return;
  }
  struct block b;
  if (!block_of(c, task, &b)) return;
  const float *bias = a[6] < 0 ? 0 : at(c, 6);
  for (word row = 0; row < b.height; row++)
    for (word column = 0; column < b.width; column += 4) {
      word count = least(4, b.width - column);
      for (word k = 0; k < channels; k += LANES) {
        word n = least(LANES, channels - k);
        v16 start = bias ? load_part(bias + k, n) : all(0.f);
        if (count == 4 && n == LANES) depthwise_pixels(c, &b, packed, start, row, column, k, LANES, 4);
        else depthwise_pixels(c, &b, packed, start, row, column, k, n, (int)count);
      }
    }
}

/* --- pooling of images [N, H, W, C]: [0,1] x, or dy, [2,3] a factor a channel of what is pooled (base −1: none), [4,5] to,
   [6,7] winners (base −1: none), the number of each window's first largest pixel; then the words of the convolution; what
   = 0 largest, 1 its gradient, 2 mean, 3 its gradient; bytes of a winner, 1 or 4 ---------------------------------------- */

static word pool_tasks(const word *a, int phase) { return a[POOL_WHAT] & 1 ? a[CONV_N] * panels_of(a[CONV_C]) : a[CONV_N] * a[CONV_OH]; }

INLINE void keep_winners(void *to, word i, i16 winners, word n, word wide) {
  if (wide == 4) {
    store_first((float *)to + i, floats(winners), n);
    return;
  }
  typedef uint8_t u8 __attribute__((vector_size(16), aligned(1)));
  u8 small = __builtin_convertvector(winners, u8);
  uint8_t *bytes = (uint8_t *)to + i;
  if (n == LANES) *(u8 *)bytes = small;
  else if (n == LANES / 2) *(bytes8 *)bytes = __builtin_shufflevector(small, small, 0, 1, 2, 3, 4, 5, 6, 7);
  else for (word l = 0; l < n; l++) bytes[l] = small[l];
}

static void pool_row(const struct call *c, word task) {
  const word *a = c->a, channels = a[CONV_C], taps = a[CONV_KH] * a[CONV_KW], mean = a[POOL_WHAT] & 2;
  word image = task / a[CONV_OH], row = task % a[CONV_OH];
  const float *x = at(c, 0), *factor = a[2] < 0 ? 0 : at(c, 2);
  void *winners = a[6] < 0 ? 0 : at(c, 6);
  float *to = (float *)at(c, 4) + task * a[CONV_OW] * channels;
  const float **under = (const float **)c->scratch; /* of one pixel */
  word *number = (word *)(under + taps), some = 0;
  for (word column = 0; column < a[CONV_OW]; column++, to += channels) {
    word z = column * a[CONV_SW] - a[CONV_LEFT];
    if (some == taps && z > 0 && z + (a[CONV_KW] - 1) * a[CONV_DW] < a[CONV_W]) /* beside the last one, which was whole */
      for (word t = 0; t < taps; t++) under[t] += a[CONV_SW] * channels;
    else {
      some = 0;
      for (word t = 0; t < taps; t++) {
        const float *from = tap(a, x, image, row, column, t / a[CONV_KW], t % a[CONV_KW]);
        if (from) under[some] = from, number[some++] = t;
      }
    }
    for (word k = 0; k < channels; k += LANES) {
      word width = least(LANES, channels - k);
      v16 best = all(mean ? 0.f : -__builtin_inff()), scale = factor ? load_part(factor + k, width) : all(1.f);
      i16 where = (i16){} - 1;
      for (word t = 0; t < some; t++) {
        v16 value = load_part(under[t] + k, width);
        if (mean) { best += value; continue; }
        if (factor) value = value * scale;
        i16 above = (value > best) | (value != value) | (where < 0);
        best = choose(above, value, best);
        where = (where & ~above) | (((i16){} + (int32_t)number[t]) & above);
      }
      store_part(to + k, mean ? best * all(1.f / (float)taps) : best, width, 1);
      if (winners) keep_winners(winners, (task * a[CONV_OW] + column) * channels + k, where, width, a[POOL_WIDE]);
    }
  }
}

static void pool_task(const struct call *c, int phase, word task) {
  const word *a = c->a, channels = a[CONV_C], taps = a[CONV_KH] * a[CONV_KW], mean = a[POOL_WHAT] & 2;
  if (!(a[POOL_WHAT] & 1)) { pool_row(c, task); return; }
  const word pixels = a[CONV_H] * a[CONV_W], image = task / panels_of(channels), k = task % panels_of(channels) * LANES, width = least(LANES, channels - k);
  const float share = 1.f / (float)taps;
  float *to = (float *)at(c, 4) + image * pixels * channels + k;
  for (word p = 0; p < pixels; p++) store_part(to + p * channels, all(0.f), width, 1);
  for (word row = 0; row < a[CONV_OH]; row++)
    for (word column = 0; column < a[CONV_OW]; column++) {
      word i = ((image * a[CONV_OH] + row) * a[CONV_OW] + column) * channels + k;
      v16 dy = load_part((const float *)at(c, 0) + i, width), d = mean ? dy * all(share) : dy;
      i16 where = {};
      if (!mean)
        for (word l = 0; l < width; l++) where[l] = a[POOL_WIDE] == 1 ? ((const uint8_t *)at(c, 6))[i + l] : ((const int32_t *)at(c, 6))[i + l];
      for (word t = 0; t < taps; t++) {
        float *p = (float *)tap(a, at(c, 4), image, row, column, t / a[CONV_KW], t % a[CONV_KW]);
        if (!p) continue;
        p += k;
        store_part(p, load_part(p, width) + (mean ? d : choose(where == (int32_t)t, d, all(0.f))), width, 1);
      }
    }
}

/* --- rows [n, size]: [0,1] from, [2,3] to, [4,5] second result, what, rows, size, number -------------------------------- */

static word rows_tasks(const word *a, int phase) { return parts_of(a[ROWS_COUNT], 8); }

static float row_sum(const float *x, word n) {
  v16 total = all(0.f);
  word i = 0;
  for (; i + LANES <= n; i += LANES) total += load(x + i);
  for (int lane = 0; i < n; i++, lane++) total[lane] += x[i];
  return sum_of(total);
}

static void rows_task(const struct call *c, int phase, word task) {
  const word *a = c->a, n = a[ROWS_SIZE], what = a[ROWS_WHAT];
  union { int32_t i; float f; } number = {(int32_t)a[ROWS_NUMBER]};
  for (word row = task * 8; row < least((task + 1) * 8, a[ROWS_COUNT]); row++) {
    const float *x = (const float *)at(c, 0) + row * n;
    float *y = (float *)at(c, 2) + row * n;
    if (what == STANDARDIZE) {
      float mean = row_sum(x, n) / (float)n;
      v16 squares = all(0.f);
      word i = 0;
      for (; i + LANES <= n; i += LANES) { v16 d = load(x + i) - all(mean); squares = fma(d, d, squares); }
      for (int lane = 0; i < n; i++, lane++) { float d = x[i] - mean; squares[lane] = __builtin_fmaf(d, d, squares[lane]); }
      float inverse = 1.f / __builtin_elementwise_sqrt(sum_of(squares) / (float)n + number.f);
      for (i = 0; i < n; i++) y[i] = (x[i] - mean) * inverse;
      ((float *)at(c, 4))[row] = inverse;
      continue;
    }
    float top = x[0];
    for (word i = 1; i < n; i++) top = x[i] > top || x[i] != x[i] ? x[i] : top;
    v16 total = all(0.f);
    for (word i = 0; i < n; i += LANES) {
      v16 v = all(-__builtin_inff());
      word width = least(LANES, n - i);
      if (width == LANES) v = load(x + i);
      else for (word l = 0; l < width; l++) v[l] = x[i + l];
      v16 shifted = v - all(top), e = exponential(shifted);
      total += e;
      store_part(y + i, what == SOFTMAX ? e : shifted, width, 1);
    }
    float sum = sum_of(total), share = 1.f / sum;
    if (what == LOG_SOFTMAX) share = logarithm(all(sum))[0];
    for (word i = 0; i < n; i++) y[i] = what == SOFTMAX ? y[i] * share : y[i] - share;
  }
}

/* --- indexed: [0,1] x, [2,3] index (int64), [4,5] to, what, outer, size along the axis, indices, inner ------------------ */

static word index_tasks(const word *a, int phase) {
  switch (a[INDEX_WHAT]) {
    case GATHER: return a[INDEX_OUTER] * a[INDEX_COUNT];
    case SCATTER_ADD: return a[INDEX_OUTER] * parts_of(a[INDEX_INNER], 64);
    case ARGMAX: return a[INDEX_OUTER];
    default: return parts_of(a[INDEX_COUNT], 1024);
  }
}

static void index_task(const struct call *c, int phase, word task) {
  const word *a = c->a, size = a[INDEX_SIZE], count = a[INDEX_COUNT], inner = a[INDEX_INNER];
  const float *x = a[INDEX_WHAT] == ONE_HOT ? 0 : at(c, 0);
  const int64_t *index = a[INDEX_WHAT] == ARGMAX || a[INDEX_WHAT] == TO_INTEGER ? 0 : at(c, 2);
  switch (a[INDEX_WHAT]) {
    case GATHER: {
      word i = index[task % count];
      i += i < 0 ? size : 0;
      float *to = (float *)at(c, 4) + task * inner;
      if (i < 0 || i >= size) for (word k = 0; k < inner; k++) to[k] = __builtin_nanf("");
      else copy_items((char *)to, (const char *)(x + (task / count * size + i) * inner), inner, 4, 4, 4);
      return;
    }
    case SCATTER_ADD: {
      word parts = parts_of(inner, 64), outer = task / parts, k0 = task % parts * 64, k1 = least(k0 + 64, inner);
      float *to = (float *)at(c, 4) + outer * size * inner;
      for (word i = 0; i < size; i++) for (word k = k0; k < k1; k++) to[i * inner + k] = 0;
      for (word j = 0; j < count; j++) {
        word i = index[j]; /* read once: other threads of a hostile plan may write there */
        i += i < 0 ? size : 0;
        if (i >= 0 && i < size) for (word k = k0; k < k1; k++) to[i * inner + k] += x[(outer * count + j) * inner + k];
      }
      return;
    }
    case ARGMAX: {
      int64_t *to = (int64_t *)at(c, 4) + task * inner;
      for (word k = 0; k < inner; k++) {
        const float *p = x + task * size * inner + k;
        word best = 0;
        for (word i = 1; i < size; i++)
          if (p[i * inner] > p[best * inner] || (p[i * inner] != p[i * inner] && p[best * inner] == p[best * inner])) best = i;
        to[k] = best;
      }
      return;
    }
    case ONE_HOT:
      for (word i = task * 1024; i < least((task + 1) * 1024, count); i++)
        for (word k = 0; k < size; k++) ((float *)at(c, 4))[i * size + k] = index[i] == k ? 1 : 0;
      return;
    case TO_INTEGER:
      for (word i = task * 1024; i < least((task + 1) * 1024, count); i++)
        ((int64_t *)at(c, 4))[i] = x[i] > -9e18f && x[i] < 9e18f ? (int64_t)x[i] : 0;
      return;
  }
}

/* --- all kernels ------------------------------------------------------------------------------------------------------ */
struct kernel {
  int phases;
  word (*tasks)(const word *, int);
  void (*task)(const struct call *, int, word);
};

static const struct kernel KERNELS[] = { /* the order of export/targets/native */
  {2, copy_tasks, copy_task}, {2, map_tasks, map_task}, {2, reduce_tasks, reduce_task},
  {2, product_tasks, product_task}, {2, conv_tasks, conv_task}, {2, conv_grad_tasks, conv_grad_task},
  {2, depthwise_tasks, depthwise_task}, {1, pool_tasks, pool_task}, {1, rows_tasks, rows_task},
  {1, index_tasks, index_task}, {2, winograd_tasks, winograd_task}, {3, winograd_grad_tasks, winograd_grad_task},
};

/* All threads of a run meet here; the last one to arrive lets the others go. */
static void meet(struct run *run) {
  if (run->threads == 1) {
    run->taken = 0;
    return;
  }
  word generation = __atomic_load_n(&run->generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&run->arrived, 1, __ATOMIC_ACQ_REL) == run->threads) {
    __atomic_store_n(&run->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&run->taken, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&run->generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (word tries = 0; __atomic_load_n(&run->generation, __ATOMIC_ACQUIRE) == generation; tries++)
    if (tries > 1024) give_way();
    else pause_a_little();
}

/* The next tasks that are for this thread, `*stop` behind the last one. Who is quicker takes more: cores differ, and others
   use them too. It is the same to the result who does which. */
static word take(struct run *run, word tasks, word *stop) {
  word some = parts_of(tasks, 8 * run->threads), first = __atomic_fetch_add(&run->taken, some, __ATOMIC_RELAXED);
  *stop = least(first + some, tasks);
  return first;
}

void RUN_PLAN(struct run *run, word thread) {
  const word *plan = run->plan, *next = plan + sizeof(struct plan) / sizeof(word) + 2 * plan[2];
  for (word i = 0; i < plan[5]; i++, next += 2 + next[1]) {
    const struct kernel *kernel = KERNELS + next[0];
    const struct call call = {next + 2, run->bases, run->scratch + thread * plan[4]};
    for (int phase = 0; phase < kernel->phases; phase++) {
      word tasks = kernel->tasks(call.a, phase);
      if (!tasks) continue;
      for (word stop, task = take(run, tasks, &stop); task < stop; task = take(run, tasks, &stop))
        for (; task < stop; task++) kernel->task(&call, phase, task);
      meet(run);
    }
  }
}
