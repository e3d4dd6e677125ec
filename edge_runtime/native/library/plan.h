/* A plan: kernel calls over named pieces of memory. Everything in it is data that `check` looks at before it runs.

   The file is 64-bit little-endian words: MAGIC, VERSION, bases, arena bytes, scratch bytes a thread, calls, constant
   bytes, then the size in bytes of each base but the arena, the calls (kernel, words, arguments …), the constants.
   Base 0 is the arena, base 1 the constants, the others are the graph's inputs and outputs in the manifest's order.
   An operand is two words: base, and offset in bytes.
*/
#pragma once
#include <stdint.h>

#define MAGIC 0x314e414c504c5345 /* "ESLPLAN1" */
#define VERSION 5
#define RANK 6

typedef int64_t word;

struct plan {
  word magic, version, bases, arena, scratch, calls, constants, words;
};

struct run {               /* what a caller gives for one run of a plan */
  const word *plan;        /* the whole file, 64-byte aligned */
  char **bases;            /* memory of each base; 0 and 1 included */
  char *scratch;           /* threads × scratch bytes */
  word threads;
  word arrived, generation; /* the barrier's; zero before the first run, as is what follows */
  word taken;               /* tasks that threads have taken of the phase that runs */
};
