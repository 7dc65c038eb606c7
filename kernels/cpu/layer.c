#include "layer.h"

#include "attention.h"
#include "norm.h"
#include "rope.h"
#include "scratch.h"

/* Where a forward pass keeps its intermediate values. */
typedef struct {
    void *normed, *qkv, *attended, *gate_up;
} buffers;

static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static buffers take_buffers(const pagoda_layer *l, int64_t tokens) {
    int64_t size = l->qkv->bf16 ? 2 : 4;
    int64_t normed = rounded(tokens * l->qkv->k * size), qkv = rounded(tokens * l->qkv->n * size);
    int64_t attended = rounded(tokens * l->o->k * size), gate_up = rounded(tokens * l->gate_up->n * size);
    char *memory = pagoda_scratch(SCRATCH_LAYERS, normed + qkv + attended + gate_up);
    return (buffers){memory, memory + normed, memory + normed + qkv, memory + normed + qkv + attended};
}

static void norm(const pagoda_layer *l, const void *x, void *residual, const void *weight, void *out,
                 int64_t tokens) {
    int dim = (int)l->qkv->k;
    pagoda_norm n = {x, residual, weight, out, dim, dim, dim, tokens, 1, dim, l->qkv->bf16, l->eps};
    pagoda_norm_run(&n);
}

static void head_norm(const pagoda_layer *l, void *x, const void *weight, int heads, int64_t tokens) {
    if (!weight)
        return;
    int64_t stride = l->qkv->n;
    pagoda_norm n = {x, NULL, weight, x, stride, 0, stride, tokens, heads, l->head_dim, l->qkv->bf16, l->eps};
    pagoda_norm_run(&n);
}

static void attend(const pagoda_layer *l, const pagoda_step *s, const buffers *b) {
    int bf16 = l->qkv->bf16;
    int64_t stride = l->qkv->n, q_width = (int64_t)l->num_heads * l->head_dim;
    void *k = at_mut(b->qkv, q_width, bf16);
    const void *v = at(b->qkv, q_width + (int64_t)l->num_kv_heads * l->head_dim, bf16);
    head_norm(l, b->qkv, l->q_norm, l->num_heads, s->tokens);
    head_norm(l, k, l->k_norm, l->num_kv_heads, s->tokens);
    pagoda_cache cache = {l->keys, l->values, l->num_kv_heads, l->block_size, l->head_dim, bf16};
    pagoda_rope r = {cache,      b->qkv,       k,        v,         stride,      stride, stride,
                     s->cos_sin, s->positions, s->slots, s->tokens, l->num_heads};
    pagoda_rope_run(&r);
    pagoda_attention a = {.cache = cache,
                          .q = b->qkv,
                          .q_stride = stride,
                          .out = b->attended,
                          .out_stride = q_width,
                          .block_tables = s->block_tables,
                          .table_stride = s->table_stride,
                          .query_start = s->query_start,
                          .seq_lens = s->seq_lens,
                          .num_rows = (int32_t)s->num_rows,
                          .num_heads = l->num_heads,
                          .window = l->window,
                          .scale = l->scale};
    pagoda_attention_run(&a);
}

void pagoda_layers_run(const pagoda_layer *layers, int count, const pagoda_step *s, void *residual, void *delta) {
    for (const pagoda_layer *l = layers; l < layers + count; l++) {
        int64_t hidden = l->qkv->k, tokens = s->tokens;
        buffers b = take_buffers(l, tokens);
        if (l == layers)
            norm(l, residual, NULL, l->input_norm, b.normed, tokens);
        else
            norm(l, delta, residual, l->input_norm, b.normed, tokens);
        pagoda_linear_run(l->qkv, b.normed, hidden, INPUT_PLAIN, b.qkv, l->qkv->n, tokens);
        attend(l, s, &b);
        pagoda_linear_run(l->o, b.attended, l->o->k, INPUT_PLAIN, delta, hidden, tokens);
        norm(l, delta, residual, l->post_norm, b.normed, tokens);
        pagoda_linear_run(l->gate_up, b.normed, hidden, INPUT_PLAIN, b.gate_up, l->gate_up->n, tokens);
        pagoda_linear_run(l->down, b.gate_up, l->gate_up->n, INPUT_SILU_AND_MUL, delta, hidden, tokens);
    }
}
