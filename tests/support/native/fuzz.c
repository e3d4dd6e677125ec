/* libFuzzer's harness for libedgestill: a plan that the check accepts runs in memory of exactly the sizes it names.

   Each memory is a block of its own, so AddressSanitizer sees a kernel that leaves it. The mutator knows the file's
   words (plan.h), not those of a kernel, so that kernels may change. A run ends after WORK branches of the kernels:
   a plan may ask for any amount of work in little memory.
*/
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "plan.h"

#define WORK 300000
#define MOST_BYTES (16 << 20)
#define MOST_BASES 256
#define HEAD (word)(sizeof(struct plan) / sizeof(word))

void edgestill_run(struct run *, word thread, int limit);
const char *edgestill_check(const word *plan, word bytes, word *call);
size_t LLVMFuzzerMutate(uint8_t *, size_t, size_t);
const char *__asan_default_options(void) { return "quarantine_size_mb=16:detect_leaks=0"; }

static jmp_buf enough;
static long work, ran, cut;
/* The linker gives this the calls that the compiler puts into every branch of the kernels. */
void __wrap___sanitizer_cov_trace_pc(void) {
  if (work && !--work) longjmp(enough, 1);
}

static uint64_t state;
static uint64_t random_word(void) { /* xorshift64* */
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d;
}
static word below(word n) { return n > 0 ? (word)(random_word() % (uint64_t)n) : 0; }

/* Small integers, floats of every kind, and words that are good indices. */
static void fill(char *to, word bytes, int kind) {
  static const uint32_t floats[] = {0x3f800000, 0xbf000000, 0, 0x80000000, 0x7fc00000, 0x7f800000, 0xff800000, 1, 0x7f7fffff, 0x4b000001};
  word words = (bytes < 16384 ? bytes : 16384) / 8;
  for (word i = 0; i < words; i++) {
    uint64_t value = random_word();
    if (kind == 0) value = value % 9;
    else if (kind == 1) value = floats[value % 10] | (uint64_t)floats[value / 10 % 10] << 32;
    else if (kind == 2) value = 0x3f8000003f800000 | (value & 0x807fffff807fffff);
    memcpy(to + 8 * i, &value, 8);
  }
}

static void *block(size_t bytes) { /* a byte at least, which the library must not touch: malloc(0) gives one too */
  void *memory = 0;
  if (posix_memalign(&memory, 64, bytes)) abort();
  return memory;
}

static word total_bytes(const word *plan) {
  word total = plan[4];
  if (plan[2] > MOST_BASES) return MOST_BYTES + 1;
  for (word i = 0; i < plan[2] && total <= MOST_BYTES; i++) total += i == 1 ? 0 : plan[HEAD + 2 * i];
  return total;
}

static void run(const word *plan) {
  char *bases[MOST_BASES];
  char **given = malloc(plan[2] * sizeof(char *)); /* of exact size too */
  for (word i = 0; i < plan[2]; i++) {
    if (i == 1) bases[i] = (char *)(plan + plan[7]);
    else fill(bases[i] = block(plan[HEAD + 2 * i]), plan[HEAD + 2 * i], (int)below(4));
    given[i] = bases[i];
  }
  struct run run = {plan, given, block(plan[4]), 1, 0, 0};
  if (!setjmp(enough)) {
    work = WORK;
    edgestill_run(&run, 0, 4);
    ran++;
  } else cut++;
  work = 0;
  for (word i = 0; i < plan[2]; i++)
    if (i != 1) free(bases[i]);
  free(run.scratch);
  free(given);
}

static void report(void) { fprintf(stderr, "plans that ran to their end: %ld, that were ended: %ld\n", ran, cut); }

int LLVMFuzzerInitialize(int *count, char ***words) {
  (void)count, (void)words;
  return atexit(report);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  word call, *plan = block(size);
  memcpy(plan, data, size);
  state = 0x9e3779b97f4a7c15 ^ size;
  for (size_t i = 0; i < size / 8; i++) state = state * 31 + (uint64_t)plan[i];
  state |= 1;
  if (!edgestill_check(plan, (word)size, &call) && total_bytes(plan) <= MOST_BYTES) run(plan);
  free(plan);
  return 0;
}

/* --- the mutator: words of the head, the memories and the calls --------------------------------------------------------- */

static word calls_of(const word *plan, word *starts, word most) { /* where each call begins */
  word next = HEAD + 2 * plan[2], count = 0;
  while (count < most && count < plan[5] && next + 2 <= plan[7] && plan[next + 1] >= 0 && plan[next + 1] <= plan[7] - next - 2) {
    starts[count++] = next;
    next += 2 + plan[next + 1];
  }
  return count;
}

static int whole(const word *plan, size_t size) { /* as far as the mutator relies on it */
  word words = (word)(size / 8);
  return words >= HEAD && plan[0] == MAGIC && plan[2] >= 2 && plan[2] <= MOST_BASES && plan[7] >= HEAD + 2 * plan[2] && plan[7] <= words && plan[5] >= 0 && plan[5] <= words;
}

static word other(word now) {
  static const word known[] = {0, 1, -1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 96, 255, 256, 257, 4096, 1 << 20, 1 << 24, (word)1 << 31, (word)1 << 40, INT64_MAX, INT64_MIN};
  switch (below(9)) {
    case 0: return known[below(sizeof(known) / sizeof(*known))];
    case 1: return (word)((uint64_t)now + 1);
    case 2: return (word)((uint64_t)now - 1);
    case 3: return (word)((uint64_t)now * 2);
    case 4: return now / 2;
    case 5: return (word)((uint64_t)now + (uint64_t)((below(64) - 32) * 4));
    case 6: return below(40);
    case 7: return (word)1 << below(63);
    default: return (word)(random_word() >> below(64));
  }
}

/* Puts `count` words of room at `place`; 0 where they do not fit. */
static int insert(word *plan, size_t *size, size_t most, word place, word count) {
  if (*size + 8 * count > most) return 0;
  memmove((char *)(plan + place + count), plan + place, *size - 8 * place);
  plan[7] += count, *size += 8 * count;
  return 1;
}

static int accepted(const word *plan, size_t size) {
  word call;
  return !edgestill_check(plan, (word)size, &call);
}

/* Gives one operand, if it is one, a memory of its own, the smallest that the check accepts. */
static void tighten(word *plan, size_t *size, size_t most, word place) {
  word base = plan[2], at = HEAD + 2 * base, low = -1, high = 1 << 22;
  if (base >= MOST_BASES || place + 2 > plan[7] || plan[place] < 0 || plan[place] >= base || !insert(plan, size, most, at, 2)) return;
  plan[2]++, place += 2;
  word before[2] = {plan[place], plan[place + 1]};
  plan[at] = high, plan[at + 1] = 1, plan[place] = base, plan[place + 1] = 0;
  if (!accepted(plan, *size)) { plan[place] = before[0], plan[place + 1] = before[1], plan[at] = 0; return; }
  while (high - low > 1) {
    word middle = low + (high - low) / 2;
    plan[at] = middle;
    if (accepted(plan, *size)) high = middle;
    else low = middle;
  }
  plan[at] = high;
}

/* The smallest value of a size in the head that the check accepts. */
static void shrink(word *plan, size_t size, word place, word twin) {
  word low = -1, high = plan[place];
  if (!accepted(plan, size)) return;
  while (high - low > 1) {
    word middle = low + (high - low) / 2;
    plan[place] = middle;
    if (twin) plan[twin] = middle;
    if (accepted(plan, size)) high = middle;
    else low = middle;
  }
  plan[place] = high;
  if (twin) plan[twin] = high;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
  static word starts[4096];
  word plan[131072];
  state = seed * 0x9e3779b97f4a7c15 | 1;
  if (most > sizeof(plan)) most = sizeof(plan);
  if (size > most || below(200) == 0) return LLVMFuzzerMutate(data, size, most);
  memcpy(plan, data, size);
  if (!whole(plan, size)) return LLVMFuzzerMutate(data, size, most);
  for (word times = 1 + below(4); times; times--) {
    word count = calls_of(plan, starts, 4096), call = count ? starts[below(count)] : 0, words = call ? plan[call + 1] : 0;
    switch (count ? below(16) : 0) {
      case 0: { /* anything in front of the constants */
        word place = below(plan[7]);
        plan[place] = other(plan[place]);
        break;
      }
      case 1: plan[HEAD + 2 * below(plan[2])] = other(below(4096) * 4); break;
      case 2: plan[4] = other(plan[4]); break;
      case 3: shrink(plan, size, 4, 0); break;
      case 4: { /* twice the same call, or one less */
        if (below(2)) {
          if (!insert(plan, &size, most, call, words + 2)) break;
          memcpy(plan + call, plan + call + words + 2, 8 * (words + 2));
          plan[5]++;
        } else if (plan[5] > 1) {
          memmove(plan + call, plan + call + words + 2, size - 8 * (call + words + 2));
          size -= 8 * (words + 2), plan[7] -= words + 2, plan[5]--;
        }
        break;
      }
      case 5: plan[call] = below(16); break;
      case 6: case 7: case 8: /* an operand, to the smallest memory */
        tighten(plan, &size, most, call + 2 + (below(4) ? 2 * below(words / 2 < 6 ? words / 2 : 6) : below(words)));
        break;
      case 9: { /* another of the call's own words, or of the plan's */
        if (words) plan[call + 2 + below(words)] = plan[below(3) ? call + 2 + below(words) : below(plan[7])];
        break;
      }
      default:
        if (words) {
          word place = call + 2 + below(words);
          plan[place] = other(plan[place]);
        }
    }
    if (!whole(plan, size)) break;
    /* what always has to agree */
    plan[HEAD] = plan[3], plan[HEAD + 2] = plan[6] = (word)size - 8 * plan[7], plan[HEAD + 3] = 0;
  }
  if (whole(plan, size) && !below(3)) shrink(plan, size, 3, HEAD);
  memcpy(data, plan, size);
  return size;
}
