/* Where a token's key and value lie in the paged cache.
 *
 * Keys:   [block][kv head][dim / pack][token of the block][pack], pack = 2 for bf16 and 1 for float: one 32-bit word
 *         a token, so that one load brings the same dims of many tokens.
 * Values: [block][kv head][token of the block][dim]. */
#ifndef PAGODA_CACHE_H
#define PAGODA_CACHE_H

#include "vec.h"

typedef struct {
    void *keys, *values;
    int32_t num_kv_heads, block_size, head_dim, bf16;
} pagoda_cache;

/* Bytes of one head's keys, or values, in one block. */
INLINE int64_t head_bytes(const pagoda_cache *c) {
    return (int64_t)c->block_size * c->head_dim * (c->bf16 ? 2 : 4);
}

INLINE char *head_keys(const pagoda_cache *c, int64_t block, int head) {
    return (char *)c->keys + (block * c->num_kv_heads + head) * head_bytes(c);
}

INLINE char *head_values(const pagoda_cache *c, int64_t block, int head) {
    return (char *)c->values + (block * c->num_kv_heads + head) * head_bytes(c);
}

#endif
