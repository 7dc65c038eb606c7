/* One part of the context of one tile of queries: scores, softmax, weighted values. */
#ifndef PAGODA_ATTENTION_PART_H
#define PAGODA_ATTENTION_PART_H

#include <math.h>

#include "attention.h"

/* Queries times the query heads of one kv head are the rows of a tile; a tile shares every load of K and V. With two
 * vectors of sums a row, MAX_ROWS rows fill the registers. */
#define MAX_ROWS 12
/* A tile's context is cut at multiples of PART tokens. Each part is a softmax of its own and the parts are merged in
 * order, on one thread or on many: so a query's result depends on neither the batch nor the number of threads. */
#define PART 256

/* What one part of the context adds to a tile: for each row the maximum, the sum of the exponentials, and the
 * values weighted by them. */
typedef struct {
    float max[MAX_ROWS], sum[MAX_ROWS];
    float out[]; /* [count][dim] */
} partial;

/* A tile at work. */
typedef struct {
    const pagoda_attention *a;
    const int32_t *blocks;
    int head, last_head, count; /* last_head: of those that the same task does, one after the other */
    int32_t low[MAX_ROWS], high[MAX_ROWS]; /* each row sees tokens [low, high) */
    int32_t begin, end;                    /* the union of these */
    int32_t part_begin, part_end;          /* the part of it at work */
    float *q;                              /* [dim][count], scaled */
    float *scores;                         /* [count][PART] */
} tile;

/* Blocks that are asked for ahead of their use: enough of them to be on their way to keep the memory busy. */
#define AHEAD 4

/* The memory that is read AHEAD blocks after block number `i` of the current part: the passes over its keys and
 * its values are followed by the next part's keys, or the next head's. NULL after the last. */
INLINE const char *ahead_of(const tile *t, int is_values, int i) {
    const pagoda_cache *c = &t->a->cache;
    int size = c->block_size, first = t->part_begin / size, last = (t->part_end - 1) / size, head = t->head;
    i += AHEAD;
    if (i > last) {
        i -= last + 1;
        if (is_values && t->part_end < t->end)
            first = t->part_end / size, last = (t->end - 1) / size;
        else if (is_values)
            first = t->begin / size, last = (t->end - 1) / size, head++;
        i = first + i < last ? first + i : last;
        is_values = !is_values;
    }
    if (head > t->last_head)
        return NULL;
    int64_t block = t->blocks[i];
    return is_values ? head_values(c, block, head) : head_keys(c, block, head);
}

/* scores[r][p * VL ...] = q[r] * the keys of panel p: `words` points to VL tokens' words, `stride` words a dim step.
 * `ahead` is memory that is read soon, as much as the keys themselves. */
INLINE void score_panels(const int rows, const int panels, const int bf16, const float *q, int dim,
                         const uint32_t *const *words, int64_t stride, const char *const *ahead, float *scores) {
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            sums[r][p] = (vf){0};
    const int pack = bf16 ? 2 : 1;
    for (int d = 0; d < dim / pack; d++) {
        vf keys[4];
        for (int half = 0; half < pack; half++) {
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) {
                vu w = vload_words(words[p] + d * stride);
                keys[p] = !bf16 ? (vf)w : half ? odd_bf16(w) : even_bf16(w);
                if (!half)
                    __builtin_prefetch(ahead[p] + d * stride * 4, 0, 2);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int p = 0; p < panels; p++)
                    sums[r][p] += keys[p] * q[(d * pack + half) * rows + r];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            vstore(scores + r * PART + p * VL, sums[r][p]);
}

/* out[r][d ...] += weights[r][t] * the values of token t, for 2 * VL * lines dims from d on; tokens [t0, t1). */
INLINE void weigh_lines(const int rows, const int lines, const int bf16, const tile *t, int d, int32_t t0, int32_t t1,
                        int32_t part, float *out) {
    const pagoda_cache *c = &t->a->cache;
    vf sums[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2 * lines; i++)
            sums[r][i] = (vf){0};
    for (int32_t token = t0; token < t1;) {
        int32_t offset = token % c->block_size, n = c->block_size - offset;
        n = n < t1 - token ? n : t1 - token;
        int64_t start = ((int64_t)offset * c->head_dim + d) * (bf16 ? 2 : 4);
        const char *v = head_values(c, t->blocks[token / c->block_size], t->head) + start;
        const char *ahead = ahead_of(t, 1, token / c->block_size);
        int64_t distance = ahead ? ahead + start - v : 0;
        const float *weights = t->scores + (token - part);
        for (int32_t i = 0; i < n; i++, v += c->head_dim * (bf16 ? 2 : 4), weights++) {
            vf values[4];
            for (int l = 0; l < lines * (bf16 ? 1 : 2); l++)
                __builtin_prefetch(v + distance + l * 4 * VL, 0, 2);
#pragma GCC unroll 2
            for (int l = 0; l < lines; l++) {
                if (bf16) {
                    vu w = vload_words(v + l * 4 * VL);
                    values[2 * l] = even_bf16(w);
                    values[2 * l + 1] = odd_bf16(w);
                } else {
                    values[2 * l] = vload((const float *)v + 2 * l * VL);
                    values[2 * l + 1] = vload((const float *)v + (2 * l + 1) * VL);
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int l = 0; l < 2 * lines; l++)
                    sums[r][l] += values[l] * weights[r * PART];
        }
        token += n;
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2 * lines; i++)
            vstore(out + r * c->head_dim + d + i * VL, sums[r][i]);
}

/* The dims that fill no pair of vectors. */
INLINE void weigh_rest(const int rows, const int bf16, const tile *t, int d, int32_t t0, int32_t t1, int32_t part,
                       float *out) {
    const pagoda_cache *c = &t->a->cache;
    for (int r = 0; r < rows; r++) {
        float *row = out + r * c->head_dim;
        for (int i = d; i < c->head_dim; i++)
            row[i] = 0.0f;
        for (int32_t token = t0; token < t1; token++) {
            const char *v = head_values(c, t->blocks[token / c->block_size], t->head);
            v = at(v, (int64_t)(token % c->block_size) * c->head_dim, bf16);
            float weight = t->scores[r * PART + token - part];
            for (int i = d; i < c->head_dim; i++)
                row[i] += weight * get(v, i, bf16);
        }
    }
}

INLINE void weigh(const int rows, const int bf16, const tile *t, int32_t t0, int32_t t1, int32_t part, float *out) {
    const int lines = rows <= 4 ? 2 : 1;
    int d = 0, dim = t->a->cache.head_dim;
    for (; d + 2 * VL * lines <= dim; d += 2 * VL * lines)
        weigh_lines(rows, lines, bf16, t, d, t0, t1, part, out);
    for (; d + 2 * VL <= dim; d += 2 * VL)
        weigh_lines(rows, 1, bf16, t, d, t0, t1, part, out);
    if (d < dim)
        weigh_rest(rows, bf16, t, d, t0, t1, part, out);
}

/* The words of tokens [token, token + VL). Where a block is no multiple of VL, those in sight are copied to `copy`:
 * the others may be in no block of the table. */
static const uint32_t *key_words(const tile *t, int32_t token, uint32_t *copy, int64_t *stride) {
    const pagoda_cache *c = &t->a->cache;
    int size = c->block_size;
    if (size % VL == 0) {
        *stride = size;
        return (const uint32_t *)head_keys(c, t->blocks[token / size], t->head) + token % size;
    }
    *stride = VL;
    int words = c->head_dim / (c->bf16 ? 2 : 1);
    for (int32_t i = token < t->part_begin ? t->part_begin - token : 0; i < VL && token + i < t->part_end; i++) {
        const uint32_t *keys = (const uint32_t *)head_keys(c, t->blocks[(token + i) / size], t->head);
        for (int d = 0; d < words; d++)
            copy[d * VL + i] = keys[d * size + (token + i) % size];
    }
    return copy;
}

/* Scores of tokens [from, to) of the part that begins at `part`; `from` is a multiple of VL. */
INLINE void score(const int rows, const int bf16, const tile *t, int32_t from, int32_t to, int32_t part) {
    const pagoda_cache *c = &t->a->cache;
    const int panels = rows <= 4 ? 4 : 2;
    uint32_t copies[4][c->block_size % VL ? c->head_dim * VL : 1];
    for (int32_t token = from; token < to;) {
        const uint32_t *words[4];
        const char *ahead[4];
        int64_t stride = VL;
        int n = token + panels * VL <= to ? panels : 1;
        for (int p = 0; p < n; p++) {
            int32_t first = token + p * VL;
            words[p] = key_words(t, first, copies[p], &stride);
            ahead[p] = ahead_of(t, 0, first / c->block_size);
            ahead[p] = ahead[p] ? ahead[p] + first % c->block_size * 4 : (const char *)words[p];
        }
        float *scores = t->scores + (token - part);
        if (n == panels)
            score_panels(rows, panels, bf16, t->q, c->head_dim, words, stride, ahead, scores);
        else
            score_panels(rows, 1, bf16, t->q, c->head_dim, words, stride, ahead, scores);
        token += n * VL;
    }
}

/* Turns a row's scores of tokens [from, to) into weights: 0 for tokens that the row does not see. */
static void softmax_row(float *scores, int32_t from, int32_t to, int32_t low, int32_t high, float *max, float *sum) {
    for (int32_t i = from; i < to && i < low; i++)
        scores[i] = -INFINITY;
    for (int32_t i = high > from ? high : from; i < to; i++)
        scores[i] = -INFINITY;
    vf greatest = vsplat(-INFINITY), total = {0};
    for (int32_t i = from; i < to; i += VL)
        greatest = vmax(vload(scores + i), greatest);
    *max = vmax_lanes(greatest);
    for (int32_t i = from; i < to; i += VL) {
        vf s = vload(scores + i);
        vf weight = vselect((vu)(s == vsplat(-INFINITY)), (vf){0}, vexp(s - *max));
        total += weight;
        vstore(scores + i, weight);
    }
    *sum = vsum(total);
}

/* The part of the context that begins at token `part`, which the tile sees some of. */
INLINE void run_part(const int rows, const int bf16, tile *t, int32_t part, partial *result) {
    t->part_begin = t->begin > part ? t->begin : part;
    t->part_end = t->end < part + PART ? t->end : part + PART;
    int32_t from = t->part_begin / VL * VL, to = (t->part_end + VL - 1) / VL * VL;
    score(rows, bf16, t, from, to, part);
    for (int r = 0; r < rows; r++)
        softmax_row(t->scores + r * PART, from - part, to - part, t->low[r] - part, t->high[r] - part,
                    &result->max[r], &result->sum[r]);
    weigh(rows, bf16, t, t->part_begin, t->part_end, part, result->out);
}

#endif
