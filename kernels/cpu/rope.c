#include "rope.h"

#include "threads.h"

#define TASK_ELEMENTS 4096

/* src rotated into dst: halves (a, b) become (a cos - b sin, b cos + a sin). */
INLINE void rotate(const void *src, void *dst, const float *cos_sin, int dim, const int bf16) {
    int half = dim / 2, i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = get_vec(src, i, bf16), b = get_vec(src, half + i, bf16);
        vf cosine = vload(cos_sin + i), sine = vload(cos_sin + half + i);
        put_vec(dst, i, a * cosine - b * sine, bf16);
        put_vec(dst, half + i, b * cosine + a * sine, bf16);
    }
    for (; i < half; i++) {
        float a = get(src, i, bf16), b = get(src, half + i, bf16);
        put(dst, i, a * cos_sin[i] - b * cos_sin[half + i], bf16);
        put(dst, half + i, b * cos_sin[i] + a * cos_sin[half + i], bf16);
    }
}

INLINE void run_token(const pagoda_rope *r, int64_t t, const int bf16) {
    const pagoda_cache *c = &r->cache;
    int dim = c->head_dim, size = c->block_size, words = dim / (bf16 ? 2 : 1);
    const float *cos_sin = r->cos_sin + (int64_t)r->positions[t] * dim;
    int64_t block = r->slots[t] / size, offset = r->slots[t] % size;
    /* A key is spread over many cache lines: they come while the queries are rotated. */
    for (int h = 0; r->slots[t] >= 0 && h < c->num_kv_heads; h++)
        for (int d = 0; d < words; d++)
            __builtin_prefetch(head_keys(c, block, h) + ((int64_t)d * size + offset) * 4, 1);
    for (int h = 0; h < r->num_heads; h++) {
        void *q = at_mut(r->q, t * r->q_stride + (int64_t)h * dim, bf16);
        rotate(q, q, cos_sin, dim, bf16);
    }
    if (r->slots[t] < 0)
        return;
    uint32_t key[words];
    for (int h = 0; h < c->num_kv_heads; h++) {
        rotate(at(r->k, t * r->k_stride + (int64_t)h * dim, bf16), key, cos_sin, dim, bf16);
        uint32_t *keys = (uint32_t *)head_keys(c, block, h) + offset;
        for (int d = 0; d < words; d++)
            keys[(int64_t)d * size] = key[d];
        memcpy(at_mut(head_values(c, block, h), offset * dim, bf16),
               at(r->v, t * r->v_stride + (int64_t)h * dim, bf16), (size_t)dim * (bf16 ? 2 : 4));
    }
}

static int64_t tokens_a_task(const pagoda_rope *r) {
    int64_t n = TASK_ELEMENTS / ((int64_t)(r->num_heads + 2 * r->cache.num_kv_heads) * r->cache.head_dim);
    return n < 1 ? 1 : n;
}

static void rope_task(void *arg, int task) {
    const pagoda_rope *r = arg;
    int64_t first = task * tokens_a_task(r), last = first + tokens_a_task(r);
    for (int64_t t = first; t < last && t < r->tokens; t++) {
        if (r->cache.bf16)
            run_token(r, t, 1);
        else
            run_token(r, t, 0);
    }
}

void pagoda_rope_run(const pagoda_rope *r) {
    pagoda_parallel(rope_task, (void *)r, (int)((r->tokens + tokens_a_task(r) - 1) / tokens_a_task(r)));
}

void pagoda_rope_and_cache(void *q, const void *k, const void *v, const float *cos_sin, const int32_t *positions,
                           const int64_t *slots, void *keys, void *values, int64_t q_stride, int64_t k_stride,
                           int64_t v_stride, int64_t tokens, int num_heads, int num_kv_heads, int block_size,
                           int head_dim, int bf16) {
    pagoda_rope r = {{keys, values, num_kv_heads, block_size, head_dim, bf16},
                     q, k, v, q_stride, k_stride, v_stride, cos_sin, positions, slots, tokens, num_heads};
    pagoda_rope_run(&r);
}
