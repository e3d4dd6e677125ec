/* Whether a plan stays inside its memory: looked at once, before it runs, in time linear in its length.

   A plan may come from anybody. Nothing in it is code, and every number of it is checked here that a kernel would
   compute an address from, so that the worst a hostile plan can do is to compute nonsense in its own arena.
*/
#include "layout.h"

struct check {
  const word *plan, *a;
  word words; /* of the call that is looked at */
  const char *error;
};

#define MOST ((word)1 << 40)

static word times(struct check *c, word x, word y) { /* sizes; an error where it is too much */
  word z;
  if (x < 0 || y < 0 || __builtin_mul_overflow(x, y, &z) || z > MOST) return c->error = "a size is out of range", 0;
  return z;
}
static word times3(struct check *c, word x, word y, word z) { return times(c, times(c, x, y), z); }
static word times4(struct check *c, word x, word y, word z, word w) { return times(c, times3(c, x, y, z), w); }

/* bytes up to the end of the last element */
static word extent(struct check *c, const word *sizes, const word *strides, int rank, word item) {
  word last = 0;
  for (int i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > MOST || strides[i] < 0 || strides[i] > MOST) return c->error = "a size or stride is out of range", 0;
    last += times(c, sizes[i] - 1, strides[i]);
    if (c->error || last > MOST) return c->error = "a size is out of range", 0;
  }
  return times(c, last + 1, 1) - 1 + item;
}

static void operand(struct check *c, const word *at, word bytes, word item, int written) {
  const word *sizes = c->plan + sizeof(struct plan) / sizeof(word);
  if (c->error) return;
  if (at[0] < 0 || at[0] >= c->plan[2]) c->error = "an operand names no memory";
  else if (at[1] < 0 || at[1] % item || bytes < 0 || at[1] > sizes[2 * at[0]] || bytes > sizes[2 * at[0]] - at[1]) c->error = "an operand reaches beyond its memory";
  else if (written && !sizes[2 * at[0] + 1]) c->error = "a result lies in memory that is only read";
}

static int in(word x, word low, word high) { return x >= low && x <= high; }

static void length(struct check *c, word words) {
  if (c->words != words && !c->error) c->error = "a call has another number of words than its kernel takes";
}

static void check_copy(struct check *c) {
  const word *a = c->a;
  length(c, COPY_WORDS);
  if (c->error) return;
  word item = a[COPY_ITEM];
  if (item != 1 && item != 4 && item != 8) { c->error = "a copy moves items of 1, 4 or 8 bytes"; return; }
  word from = extent(c, a + COPY_SIZES, a + COPY_FROM, RANK, item), to = extent(c, a + COPY_SIZES, a + COPY_TO, RANK, item);
  for (int i = 0; i < RANK; i++)
    if (a[COPY_FROM + i] % item || a[COPY_TO + i] % item) c->error = "a stride is no multiple of its items";
  operand(c, a, from, item, 0);
  operand(c, a + 2, to, item, 1);
  operand(c, a + 2, times(c, a[COPY_FILLED], item), item, 1);
  const word *n = a + COPY_SIZES; /* not of memory, but of time: strides of 0 would make it any */
  if (!c->error && times4(c, times3(c, n[0], n[1], n[2]), n[3], n[4], n[5]) > to / item) c->error = "a copy moves more than its result holds";
}

static void check_map(struct check *c) {
  const word *a = c->a;
  if (c->words < MAP_BODY || !in(a[MAP_LOADS], 0, REGISTERS) || !in(a[MAP_STEPS], 0, 4096) || !in(a[MAP_STORES], 0, REGISTERS) || !in(a[MAP_SUMS], 0, REGISTERS) || !in(a[MAP_COLUMNS], 0, MOST)) { c->error = "a program is too long"; return; }
  length(c, MAP_BODY + a[MAP_LOADS] * LOAD_WORDS + a[MAP_STEPS] * STEP_WORDS + a[MAP_STORES] * STORE_WORDS + a[MAP_SUMS] * SUM_WORDS);
  if (!c->error && times4(c, a[1], a[2], a[3], a[4]) != a[MAP_COUNT]) c->error = "a program's elements are not its sizes";
  if (c->plan[4] < REGISTERS * BLOCK * 4) c->error = "too little scratch for a program";
  if (!c->error && !a[MAP_STORES] && !a[MAP_SUMS]) c->error = "a program makes nothing"; /* nothing else bounds its time */
  if (!c->error && a[MAP_SUMS] && (!in(a[MAP_COLUMNS], 1, MOST) || a[MAP_COUNT] % a[MAP_COLUMNS])) c->error = "a program's rows are not whole";
  if (c->error) return;
  const word *l = a + MAP_BODY, *s = l + a[MAP_LOADS] * LOAD_WORDS, *t = s + a[MAP_STEPS] * STEP_WORDS;
  for (word i = 0; i < a[MAP_LOADS]; i++, l += LOAD_WORDS) {
    static const word items[] = {4, 1, 8};
    if (!in(l[2], 0, UNPOOLED)) { c->error = "a program loads numbers of an unknown kind"; return; }
    if (l[2] == UNPOOLED) {
      for (int d = 3; d < 7; d++)
        if (!in(l[d], 1, 1 << 24)) { c->error = "windows do not lie side by side"; return; }
      word window = l[5] * l[6], area = times3(c, l[3], l[4], l[5]);
      if (c->error || window > 256 || l[4] % l[6] || a[MAP_COUNT] % area) { c->error = "windows do not lie side by side"; return; }
      operand(c, l, a[MAP_COUNT] / window * 4, 4, 0);
      operand(c, l + 7, a[MAP_COUNT] / window, 1, 0);
      continue;
    }
    word strides[4];
    for (int d = 0; d < 4; d++) strides[d] = times(c, l[3 + d], items[l[2]]);
    operand(c, l, extent(c, a + MAP_SIZES, strides, 4, items[l[2]]), items[l[2]], 0);
  }
  for (word i = 0; i < a[MAP_STEPS]; i++, s += STEP_WORDS) {
    if (!in(s[0], 0, OPERATORS - 1)) c->error = "a program has an unknown operator";
    for (int r = 1; r < 5; r++)
      if (!in(s[r], 0, REGISTERS - 1)) c->error = "a program names no register";
  }
  for (word i = 0; i < a[MAP_STORES]; i++, t += STORE_WORDS) {
    if (!in(t[2], 0, REGISTERS - 1)) c->error = "a program names no register";
    word runs[] = {t[3] > 0 ? a[MAP_COUNT] / t[3] : 0, t[3]}; /* that do not overlap: nothing else bounds a program's time */
    if (!in(t[3], 1, MOST) || a[MAP_COUNT] % t[3] || !in(t[4], 0, MOST) || !in(t[5], 1, MOST) || (runs[0] > 1 && t[4] < times(c, t[3] - 1, t[5]) + 1)) c->error = "a program's results overlap";
    if (c->error) return;
    operand(c, t, times(c, extent(c, runs, t + 4, 2, 1), 4), 4, 1);
  }
  for (word i = 0; i < a[MAP_SUMS]; i++, t += SUM_WORDS) {
    if (!in(t[0], 0, REGISTERS - 1)) c->error = "a program names no register";
    if (!in(t[1], SUM, SQUARES)) c->error = "a program sums in an unknown way";
    if (t[2] >= 0 || t[1] == SUM) operand(c, t + 2, times(c, a[MAP_COLUMNS], 4), 4, 1);
    if (t[1] == SQUARES) operand(c, t + 4, times(c, a[MAP_COLUMNS], 4), 4, 1);
    operand(c, t + 6, times4(c, map_parts(a), sum_rows(t), a[MAP_COLUMNS], 4), 4, 1);
  }
}

static void check_reduce(struct check *c) {
  const word *a = c->a;
  length(c, REDUCE_INNER + 1);
  if (c->error) return;
  word rows = times(c, a[REDUCE_OUTER], a[REDUCE_INNER]);
  if (!in(a[REDUCE_SIZE], 1, MOST) || !in(a[REDUCE_INNER], 1, MOST)) c->error = "nothing is reduced";
  if (c->error) return;
  operand(c, a, times3(c, rows, a[REDUCE_SIZE], 4), 4, 0);
  operand(c, a + 2, times(c, rows, 4), 4, 1);
  operand(c, a + 4, times3(c, rows, reduce_parts(a), 4), 4, 1);
}

static void check_product(struct check *c) {
  const word *a = c->a;
  length(c, PRODUCT_READY + 1);
  if (c->error) return;
  word m = a[PRODUCT_M], n = a[PRODUCT_N], k = a[PRODUCT_K], batches = a[PRODUCT_BATCHES];
  if (m < 1 || n < 1 || k < 1 || batches < 1 || !in(a[PRODUCT_PANELS], 1, MOST) || n > MOST) { c->error = "a product has an empty side"; return; }
  if (a[PRODUCT_A + 2] != 1 && c->plan[4] < RUN * TASK_ROWS * 4) { c->error = "too little scratch for a product"; return; }
  word left[] = {batches, m, k}, right[] = {batches, k, n};
  operand(c, a, times(c, extent(c, left, a + PRODUCT_A, 3, 1), 4), 4, 0);
  operand(c, a + 2, times(c, extent(c, right, a + PRODUCT_B, 3, 1), 4), 4, 0);
  operand(c, a + 4, times4(c, batches, m, n, 4), 4, 1);
  operand(c, a + 6, times4(c, a[PRODUCT_B] ? batches : 1, panels_of(n), k, 4 * LANES), 4, !a[PRODUCT_READY]);
}

/* the words that convolutions and pooling share */
static void check_windows(struct check *c) {
  const word *a = c->a;
  for (int i = CONV_N; i <= CONV_O; i++)
    if (!in(a[i], 1, 1 << 24)) c->error = "an image has an impossible size";
  for (int i = CONV_KH; i <= CONV_DW; i++)
    if (!in(a[i], i == CONV_TOP || i == CONV_LEFT ? -(1 << 24) : 1, 1 << 24)) c->error = "a window has an impossible size";
  if (!c->error && times(c, a[CONV_KH], a[CONV_KW]) > 1 << 20) c->error = "a window has an impossible size";
  if (c->error || !in(a[CONV_GROUPS], 1, a[CONV_C]) || a[CONV_C] % a[CONV_GROUPS] || a[CONV_O] % a[CONV_GROUPS]) { c->error = c->error ? c->error : "channels do not fall into groups"; return; }
}
static word image_bytes(struct check *c, int height) { /* of x, or of the result */
  const word *a = c->a;
  return times(c, times4(c, a[CONV_N], a[height], a[height + 1], a[height + 2]), 4);
}
static word weight_bytes(struct check *c, word first, word second) {
  const word *a = c->a, sizes[] = {first, second, a[CONV_KH], a[CONV_KW]};
  return times(c, extent(c, sizes, a + CONV_WEIGHT, 4, 1), 4);
}

/* a task's scratch: `words`, and what is under a block */
static void check_block(struct check *c, word words) {
  const word *a = c->a;
  if (!c->error && c->plan[4] < 8 * words + times4(c, block_under(a, 0), block_under(a, 1), a[CONV_C], 4)) c->error = "too little scratch for a convolution";
}

static void check_conv(struct check *c) {
  const word *a = c->a;
  length(c, CONV_WORDS);
  if (!c->error) check_windows(c);
  if (c->error) return;
  word in = a[CONV_C] / a[CONV_GROUPS], out = a[CONV_O] / a[CONV_GROUPS], taps = times(c, a[CONV_KH], a[CONV_KW]), k = times(c, taps, in);
  operand(c, a, image_bytes(c, CONV_H), 4, 0);
  operand(c, a + 2, a[CONV_ADJOINT] ? weight_bytes(c, a[CONV_C], out) : weight_bytes(c, a[CONV_O], in), 4, 0);
  operand(c, a + 4, image_bytes(c, CONV_OH), 4, 1);
  if (a[6] >= 0) operand(c, a + 6, a[CONV_O] * 4, 4, 0);
  operand(c, a + 8, times4(c, a[CONV_GROUPS], panels_of(out), k, 4 * LANES), 4, 1);
  check_block(c, 2 * (a[CONV_KH] + a[CONV_KW]));
}

static void check_conv_grad(struct check *c) {
  const word *a = c->a;
  length(c, GRAD_IMAGES + 1);
  if (!c->error) check_windows(c);
  if (c->error || !in(a[GRAD_IMAGES], 1, 1 << 24) || a[CONV_ADJOINT]) { c->error = c->error ? c->error : "a part holds no image"; return; }
  word in = a[CONV_C] / a[CONV_GROUPS], taps = times(c, a[CONV_KH], a[CONV_KW]);
  operand(c, a, image_bytes(c, CONV_H), 4, 0);
  operand(c, a + 2, image_bytes(c, CONV_OH), 4, 0);
  operand(c, a + 4, weight_bytes(c, a[CONV_O], in), 4, 1);
  operand(c, a + 8, times(c, times4(c, grad_parts(a), taps, in, a[CONV_O]), 4), 4, 1);
  check_block(c, 0);
}

static void check_depthwise(struct check *c) {
  const word *a = c->a;
  length(c, DEPTH_IMAGES + 1);
  if (!c->error) check_windows(c);
  if (c->error || !in(a[DEPTH_WHAT], 0, 2) || !in(a[DEPTH_IMAGES], 1, 1 << 24) || a[CONV_GROUPS] != a[CONV_C] || a[CONV_O] != a[CONV_C] || (a[CONV_ADJOINT] != 0) != (a[DEPTH_WHAT] == 1)) { c->error = c->error ? c->error : "a depthwise convolution is none"; return; }
  word taps = times(c, a[CONV_KH], a[CONV_KW]), weight = weight_bytes(c, a[CONV_C], 1), grad = a[DEPTH_WHAT] == 2;
  operand(c, a, image_bytes(c, CONV_H), 4, 0);
  operand(c, a + 2, grad ? image_bytes(c, CONV_OH) : weight, 4, 0);
  operand(c, a + 4, grad ? weight : image_bytes(c, CONV_OH), 4, 1);
  if (a[6] >= 0) operand(c, a + 6, a[CONV_O] * 4, 4, 0);
  if (!grad) check_block(c, 2 * (a[CONV_KH] + a[CONV_KW]));
  operand(c, a + 8, times4(c, grad ? parts_of(a[CONV_N], a[DEPTH_IMAGES]) : 1, taps, a[CONV_C], 4), 4, 1);
}

static void check_pool(struct check *c) {
  const word *a = c->a;
  length(c, POOL_WIDE + 1);
  if (!c->error) check_windows(c);
  if (c->error || !in(a[POOL_WHAT], 0, 3) || a[CONV_ADJOINT] || a[CONV_O] != a[CONV_C]) { c->error = c->error ? c->error : "a pooling is none"; return; }
  word taps = a[CONV_KH] * a[CONV_KW], backward = a[POOL_WHAT] & 1;
  if (a[POOL_WIDE] != 4 && (a[POOL_WIDE] != 1 || taps > 256)) { c->error = "a window's pixels are too many to be numbered"; return; }
  operand(c, a, image_bytes(c, backward ? CONV_OH : CONV_H), 4, 0);
  if (a[2] >= 0) operand(c, a + 2, a[CONV_C] * 4, 4, 0);
  operand(c, a + 4, image_bytes(c, backward ? CONV_H : CONV_OH), 4, 1);
  if (a[6] >= 0 || a[POOL_WHAT] == 1) operand(c, a + 6, image_bytes(c, CONV_OH) / 4 * a[POOL_WIDE], a[POOL_WIDE], !backward);
  if (!backward && c->plan[4] < times(c, taps, 16)) c->error = "too little scratch for a pooling";
}

static void check_rows(struct check *c) {
  const word *a = c->a;
  length(c, ROWS_NUMBER + 1);
  if (c->error || !in(a[ROWS_WHAT], 0, 2) || a[ROWS_SIZE] < 1) { c->error = c->error ? c->error : "rows are none"; return; }
  operand(c, a, times3(c, a[ROWS_COUNT], a[ROWS_SIZE], 4), 4, 0);
  operand(c, a + 2, times3(c, a[ROWS_COUNT], a[ROWS_SIZE], 4), 4, 1);
  if (a[ROWS_WHAT] == STANDARDIZE) operand(c, a + 4, times(c, a[ROWS_COUNT], 4), 4, 1);
}

static void check_index(struct check *c) {
  const word *a = c->a;
  length(c, INDEX_INNER + 1);
  if (c->error || !in(a[INDEX_WHAT], 0, TO_INTEGER) || !in(a[INDEX_SIZE], 1, MOST) || !in(a[INDEX_INNER], 1, MOST) || !in(a[INDEX_COUNT], 0, MOST) || !in(a[INDEX_OUTER], 0, MOST)) { c->error = c->error ? c->error : "an index is none"; return; }
  word what = a[INDEX_WHAT], all = times4(c, a[INDEX_OUTER], a[INDEX_SIZE], a[INDEX_INNER], 4), some = times4(c, a[INDEX_OUTER], a[INDEX_COUNT], a[INDEX_INNER], 4);
  if (what == GATHER || what == SCATTER_ADD) {
    operand(c, a, what == GATHER ? all : some, 4, 0);
    operand(c, a + 2, times(c, a[INDEX_COUNT], 8), 8, 0);
    operand(c, a + 4, what == GATHER ? some : all, 4, 1);
  } else if (what == ARGMAX) {
    operand(c, a, all, 4, 0);
    operand(c, a + 4, times3(c, a[INDEX_OUTER], a[INDEX_INNER], 8), 8, 1);
  } else if (what == ONE_HOT) {
    operand(c, a + 2, times(c, a[INDEX_COUNT], 8), 8, 0);
    operand(c, a + 4, times3(c, a[INDEX_COUNT], a[INDEX_SIZE], 4), 4, 1);
  } else {
    operand(c, a, times(c, a[INDEX_COUNT], 4), 4, 0);
    operand(c, a + 4, times(c, a[INDEX_COUNT], 8), 8, 1);
  }
}

static void check_winograd(struct check *c, int gradient) {
  const word *a = c->a;
  length(c, WINOGRAD_TILES + 1);
  if (!c->error) check_windows(c);
  if (c->error) return;
  word dy = gradient || !a[CONV_ADJOINT];
  if (a[CONV_GROUPS] != 1 || a[CONV_KH] != 3 || a[CONV_KW] != 3 || a[CONV_SH] != 1 || a[CONV_SW] != 1 || a[CONV_DH] != 1 || a[CONV_DW] != 1 || !in(a[WINOGRAD_TILES], gradient ? 0 : 1, gradient ? GOES_ON | GOES_FURTHER : 1 << 16) || (gradient && a[CONV_ADJOINT])) { c->error = "this convolution has no such form"; return; }
  word in = a[CONV_C], panels = panels_of(a[CONV_O]), tiles = tiles_of(a);
  word weight = dy ? weight_bytes(c, a[CONV_O], in) : weight_bytes(c, in, a[CONV_O]);
  operand(c, a, image_bytes(c, CONV_H), 4, 0);
  operand(c, a + 2, gradient ? image_bytes(c, CONV_OH) : weight, 4, 0);
  operand(c, a + 4, gradient ? weight : image_bytes(c, CONV_OH), 4, 1);
  if (!gradient && a[6] >= 0) operand(c, a + 6, a[CONV_O] * 4, 4, 0);
  if (gradient) {
    word each = spot_size(times(c, tiles, in)) + spot_size(times3(c, tiles, panels, LANES)) + times3(c, in, panels, LANES);
    operand(c, a + 8, times(c, each, SPOTS * 4), 4, 1);
  } else {
    operand(c, a + 8, times4(c, SPOTS, panels, in, 4 * LANES), 4, 1);
    if (c->plan[4] < times(c, times(c, a[WINOGRAD_TILES], in + panels * LANES) + 2 * spot_size(0), SPOTS * 4)) c->error = "too little scratch for a convolution";
  }
}
static void check_winograd_conv(struct check *c) { check_winograd(c, 0); }
static void check_winograd_grad(struct check *c) { check_winograd(c, 1); }

static void (*const CHECKS[])(struct check *) = {check_copy, check_map, check_reduce, check_product, check_conv, check_conv_grad, check_depthwise, check_pool, check_rows, check_index, check_winograd_conv, check_winograd_grad};

/* What is wrong with a plan of `bytes`, or null. `*call` is the number of the call that is wrong, or −1. */
const char *check_plan(const word *plan, word bytes, word *call) {
  struct check c = {plan, 0, 0, 0};
  word head = sizeof(struct plan) / sizeof(word), words = bytes / 8;
  *call = -1;
  if (bytes < (word)sizeof(struct plan) || plan[0] != MAGIC) return "this is no plan";
  if (plan[1] != VERSION) return "the plan is of another version";
  if (!in(plan[2], 2, 1 << 20) || !in(plan[3], 0, MOST) || !in(plan[4], 0, 1 << 30) || plan[4] % 64 || !in(plan[5], 0, 1 << 24) || !in(plan[6], 0, MOST)) return "the plan's head is out of range";
  if (!in(plan[7], head + 2 * plan[2], words) || bytes - 8 * plan[7] != plan[6]) return "the plan is cut off";
  for (word i = 0; i < plan[2]; i++)
    if (!in(plan[head + 2 * i], 0, MOST)) return "a memory's size is out of range";
  if (plan[head] != plan[3] || plan[head + 2] != plan[6] || plan[head + 3]) return "arena and constants are not the first memories";
  word next = head + 2 * plan[2];
  for (*call = 0; *call < plan[5]; ++*call) {
    if (next + 2 > plan[7]) return "the plan is cut off";
    word kernel = plan[next];
    if (!in(kernel, 0, sizeof(CHECKS) / sizeof(*CHECKS) - 1)) return "a kernel is unknown";
    c.a = plan + next + 2, c.words = plan[next + 1];
    if (!in(c.words, 0, plan[7] - next - 2)) return "a call is cut off";
    CHECKS[kernel](&c);
    if (c.error) return c.error;
    next += 2 + c.words;
  }
  *call = -1;
  return next == plan[7] ? 0 : "words are left over after the last call";
}
