/* Rotary position embedding of new tokens, and their way into the cache. */
#ifndef PAGODA_ROPE_H
#define PAGODA_ROPE_H

#include "cache.h"

typedef struct {
    pagoda_cache cache;
    void *q; /* [tokens][heads][dim], rotated in place */
    const void *k, *v; /* [tokens][kv heads][dim] */
    int64_t q_stride, k_stride, v_stride; /* elements from one token to the next */
    const float *cos_sin; /* [position][dim]: cosines, then sines */
    const int32_t *positions;
    const int64_t *slots; /* token's place in the cache, or -1: not written */
    int64_t tokens;
    int32_t num_heads;
} pagoda_rope;

void pagoda_rope_run(const pagoda_rope *r);

#endif
