#include "scratch.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

struct buffers {
    void *memory[SCRATCH_USES];
    size_t bytes[SCRATCH_USES];
};

static __thread struct buffers *mine;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *buffers) {
    struct buffers *b = buffers;
    for (int i = 0; i < SCRATCH_USES; i++)
        free(b->memory[i]);
    free(b);
}

static void make_key(void) { pthread_key_create(&key, release); }

static void *allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) {
        fprintf(stderr, "pagoda: no memory for %zu bytes of kernel scratch\n", bytes);
        abort();
    }
    return memory;
}

void *pagoda_scratch(enum scratch_use use, size_t bytes) {
    if (!mine) {
        mine = allocate(sizeof *mine);
        *mine = (struct buffers){{NULL}, {0}};
        pthread_once(&once, make_key);
        pthread_setspecific(key, mine);
    }
    if (mine->bytes[use] < bytes) {
        free(mine->memory[use]);
        bytes += bytes / 4;
        mine->memory[use] = allocate(bytes);
        mine->bytes[use] = bytes;
    }
    return mine->memory[use];
}
