/* Whole decoder layers of Llama's shape: what saves some two hundred calls from Python a forward pass. */
#ifndef PAGODA_LAYER_H
#define PAGODA_LAYER_H

#include "linear.h"

typedef struct {
    const pagoda_linear *qkv, *o, *gate_up, *down;
    const void *input_norm, *post_norm; /* [hidden] */
    const void *q_norm, *k_norm;        /* [dim], or NULL */
    void *keys, *values;                /* this layer's cache */
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    int32_t window; /* 0: none */
    float eps, scale;
    int32_t padding;
} pagoda_layer;

/* One iteration's tokens and rows; see attention.h and rope.h. */
typedef struct {
    const float *cos_sin;
    const int32_t *positions;
    const int64_t *slots;
    const int32_t *block_tables, *query_start, *seq_lens;
    int64_t table_stride, tokens, num_rows;
} pagoda_step;

/* Runs `count` layers. residual [tokens][hidden] is the hidden state; delta, of the same shape, is written: what the
 * last layer's feed-forward block adds to it, which is left to the next norm. */
void pagoda_layers_run(const pagoda_layer *layers, int count, const pagoda_step *s, void *residual, void *delta);

#endif
