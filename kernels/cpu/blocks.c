#include <stdint.h>
#include <string.h>

#include "threads.h"

typedef struct {
    char *const *caches;
    const int64_t *bytes, *src, *dst;
    int64_t copies;
} job;

static void task(void *arg, int cache) {
    const job *j = arg;
    for (int64_t i = 0; i < j->copies; i++)
        memcpy(j->caches[cache] + j->dst[i] * j->bytes[cache], j->caches[cache] + j->src[i] * j->bytes[cache],
               (size_t)j->bytes[cache]);
}

/* In each of `num_caches` tensors, whose blocks have bytes[i] bytes, copies block src[n] to block dst[n]. */
void pagoda_copy_blocks(char *const *caches, const int64_t *bytes, int num_caches, const int64_t *src,
                        const int64_t *dst, int64_t copies) {
    job j = {caches, bytes, src, dst, copies};
    pagoda_parallel(task, &j, num_caches);
}
