/* Runs a plan step by step, on the very libedgestill of another architecture, under an emulator or on a board:
   `steps LIBRARY PLAN GIVEN THREADS LEVEL` writes the last state to stdout.

   GIVEN is 64-bit words: steps, inputs, outputs; of each input whether every step has one of its own; of each output
   the input that it becomes, or -1. Then the bytes of the inputs that stay, and of the others step by step.
*/
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "plan.h"

#define MOST 4096 /* memories */

static void stop(const char *why) {
  fprintf(stderr, "steps: %s\n", why);
  exit(1);
}

static char *read_file(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) stop(path);
  size_t size = (size_t)ftell(file);
  char *data = aligned_alloc(64, (size + 63) / 64 * 64);
  rewind(file);
  if (!data || fread(data, 1, size, file) != size) stop(path);
  fclose(file);
  return data;
}

/* --- a shared library without dependencies, for a program that has no dynamic linker ---------------------------------- */

struct library {
  char *start;
  const Elf64_Sym *symbols;
  const char *strings;
  Elf64_Word count;
};

static struct library load(const char *path) {
  const char *file = read_file(path);
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)file;
  const Elf64_Phdr *parts = (const Elf64_Phdr *)(file + head->e_phoff);
  struct library l = {0};
  size_t size = 0;
  Elf64_Xword values[DT_RELASZ + 1] = {0};
  for (int i = 0; i < head->e_phnum; i++)
    if (parts[i].p_type == PT_LOAD && parts[i].p_vaddr + parts[i].p_memsz > size) size = parts[i].p_vaddr + parts[i].p_memsz;
  l.start = mmap(0, size, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (l.start == MAP_FAILED) stop("no memory for the library");
  for (int i = 0; i < head->e_phnum; i++)
    if (parts[i].p_type == PT_LOAD) memcpy(l.start + parts[i].p_vaddr, file + parts[i].p_offset, parts[i].p_filesz);
  for (int i = 0; i < head->e_phnum; i++) {
    if (parts[i].p_type != PT_DYNAMIC) continue;
    for (const Elf64_Dyn *d = (const Elf64_Dyn *)(l.start + parts[i].p_vaddr); d->d_tag != DT_NULL; d++) {
      if (d->d_tag == DT_JMPREL) stop("the library calls another");
      if (d->d_tag <= DT_RELASZ) values[d->d_tag] = d->d_un.d_val;
    }
  }
  if (!values[DT_HASH] || !values[DT_SYMTAB]) stop("the library has no table of symbols");
  l.symbols = (const Elf64_Sym *)(l.start + values[DT_SYMTAB]), l.strings = l.start + values[DT_STRTAB];
  l.count = ((const Elf64_Word *)(l.start + values[DT_HASH]))[1];
  const Elf64_Rela *r = (const Elf64_Rela *)(l.start + values[DT_RELA]);
  for (const Elf64_Rela *end = r + values[DT_RELASZ] / sizeof(*r); r < end; r++) {
    if (ELF64_R_TYPE(r->r_info) != R_X86_64_RELATIVE && ELF64_R_TYPE(r->r_info) != R_AARCH64_RELATIVE) stop("the library has a relocation of another kind");
    *(Elf64_Addr *)(l.start + r->r_offset) = (Elf64_Addr)l.start + (Elf64_Addr)r->r_addend;
  }
  __builtin___clear_cache(l.start, l.start + size);
  return l;
}

static void *find(const struct library *l, const char *name) {
  for (Elf64_Word i = 0; i < l->count; i++)
    if (l->symbols[i].st_value && !strcmp(l->strings + l->symbols[i].st_name, name)) return l->start + l->symbols[i].st_value;
  stop("the library lacks a function");
  return 0;
}

/* --- steps -------------------------------------------------------------------------------------------------------------- */

static void (*edgestill_run)(struct run *, word, int);
static pthread_barrier_t all_here;
static struct run run;
static word steps, inputs, outputs, level;
static const word *own, *becomes;
static const char *given;

static word bytes_of(word base) { return run.plan[sizeof(struct plan) / sizeof(word) + 2 * base]; }
static void take(word each) {
  for (word i = 0; i < inputs; i++)
    if (own[i] == each) memcpy(run.bases[2 + i], given, bytes_of(2 + i)), given += bytes_of(2 + i);
}

static void *work(void *thread) {
  for (word step = 0; step < steps; step++) {
    if (!thread) {
      take(1);
      for (word i = 0; i < outputs && step; i++)
        if (becomes[i] >= 0) memcpy(run.bases[2 + becomes[i]], run.bases[2 + inputs + i], bytes_of(2 + inputs + i));
    }
    pthread_barrier_wait(&all_here);
    edgestill_run(&run, (word)thread, (int)level);
    pthread_barrier_wait(&all_here);
  }
  return 0;
}

int main(int count, char **words) {
  if (count != 6) stop("LIBRARY PLAN GIVEN THREADS LEVEL");
  struct library library = load(words[1]);
  const char *(*check)(const word *, word, word *) = find(&library, "edgestill_check");
  edgestill_run = find(&library, "edgestill_run");
  run.plan = (const word *)read_file(words[2]), run.threads = atoi(words[4]), level = atoi(words[5]);
  const word *head = (const word *)read_file(words[3]), *plan = run.plan;
  word call;
  const char *wrong = check(plan, 8 * plan[7] + plan[6], &call);
  if (wrong) stop(wrong);
  steps = head[0], inputs = head[1], outputs = head[2], own = head + 3, becomes = own + inputs;
  given = (const char *)(becomes + outputs);
  char *bases[MOST];
  if (plan[2] != 2 + inputs + outputs || plan[2] > MOST || run.threads < 1) stop("the plan takes other tensors");
  run.bases = bases, run.scratch = aligned_alloc(64, (plan[4] * run.threads + 127) / 64 * 64);
  for (word i = 0; i < plan[2]; i++) {
    bases[i] = i == 1 ? (char *)(plan + plan[7]) : aligned_alloc(64, (bytes_of(i) + 127) / 64 * 64);
    if (i != 1) memset(bases[i], 255, bytes_of(i)); /* so that what is read before it is written shows */
  }
  take(0);
  pthread_t threads[256];
  pthread_barrier_init(&all_here, 0, (unsigned)run.threads);
  for (word i = 1; i < run.threads && i < 256; i++) pthread_create(threads + i, 0, work, (void *)i);
  work(0);
  for (word i = 1; i < run.threads && i < 256; i++) pthread_join(threads[i], 0);
  for (word i = 0; i < inputs; i++) { /* what became of it, or what it was */
    const char *last = own[i] ? 0 : bases[2 + i];
    for (word o = 0; o < outputs; o++)
      if (becomes[o] == i) last = bases[2 + inputs + o];
    if (last && fwrite(last, 1, bytes_of(2 + i), stdout) != (size_t)bytes_of(2 + i)) stop("stdout");
  }
  return 0;
}
