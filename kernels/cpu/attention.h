/* Attention of new queries over the paged cache. */
#ifndef PAGODA_ATTENTION_H
#define PAGODA_ATTENTION_H

#include "cache.h"

typedef struct {
    pagoda_cache cache;
    const void *q; /* [tokens][heads][dim], tokens q_stride elements apart */
    int64_t q_stride;
    void *out; /* the same shape, tokens out_stride apart */
    int64_t out_stride;
    const int32_t *block_tables; /* [rows][table_stride] */
    int64_t table_stride;
    const int32_t *query_start; /* [rows + 1] */
    const int32_t *seq_lens;    /* [rows] */
    int32_t num_rows, num_heads;
    int32_t window; /* tokens that a query sees, itself included; 0: all */
    float scale;
} pagoda_attention;

void pagoda_attention_run(const pagoda_attention *a);

#endif
