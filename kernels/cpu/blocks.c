#include <stdint.h>
#include <string.h>

#include "threads.h"

typedef struct {
    char *const *from, *const *to;
    const int64_t *bytes, *src, *dst;
    int64_t copies;
} job;

static void task(void *arg, int cache) {
    const job *j = arg;
    for (int64_t i = 0; i < j->copies; i++)
        memcpy(j->to[cache] + j->dst[i] * j->bytes[cache], j->from[cache] + j->src[i] * j->bytes[cache],
               (size_t)j->bytes[cache]);
}

/* For each of `num_caches` tensors, whose blocks have bytes[i] bytes, copies block src[n] of from[i] to block
   dst[n] of to[i], which may be the same tensor. */
void pagoda_copy_blocks(char *const *from, char *const *to, const int64_t *bytes, int num_caches,
                        const int64_t *src, const int64_t *dst, int64_t copies) {
    job j = {from, to, bytes, src, dst, copies};
    pagoda_parallel(task, &j, num_caches);
}
