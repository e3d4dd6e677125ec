/* What a caller sees of libedgestill. No libc, no allocation, no threads, no state of its own. */
#include "plan.h"

#define PUBLIC __attribute__((visibility("default")))

const char *check_plan(const word *plan, word bytes, word *call);

void *memcpy(void *to, const void *from, unsigned long n) {
  char *t = to;
  const char *f = from;
  for (unsigned long i = 0; i < n; i++) t[i] = f[i];
  return to;
}
void *memset(void *to, int value, unsigned long n) {
  char *t = to;
  for (unsigned long i = 0; i < n; i++) t[i] = (char)value;
  return to;
}

#ifdef __x86_64__
#include <cpuid.h>
void run_v3(struct run *, word);
void run_v4(struct run *, word);

static int level(void) {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 12 & 1) || !(c >> 27 & 1) || !(c >> 28 & 1)) return 0; /* FMA, XSAVE, AVX */
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0; /* AVX2 */
  int wide = (low & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 28 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
  return wide ? 4 : 3;
}

/* 0 where this processor is too old, else what it has. */
PUBLIC int edgestill_level(void) { return level(); }

/* On instructions of a level, at most the processor's: asking again takes longer than a small plan. */
PUBLIC void edgestill_run(struct run *run, word thread, int at) {
  if (at >= 4) run_v4(run, thread);
  else run_v3(run, thread);
}
#else
void run_neon(struct run *, word);
PUBLIC int edgestill_level(void) { return 1; }
PUBLIC void edgestill_run(struct run *run, word thread, int at) { run_neon(run, thread); }
#endif

PUBLIC const char *edgestill_check(const word *plan, word bytes, word *call) { return check_plan(plan, bytes, call); }
