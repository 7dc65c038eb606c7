#include "attention.h"

#include <math.h>

#include "scratch.h"
#include "threads.h"

/* Queries times the query heads of one kv head are the rows of a tile; a tile shares every load of K and V. With two
 * vectors of sums a row, MAX_ROWS rows fill the registers. */
#define MAX_ROWS 12
/* A tile's context is cut at multiples of PART tokens. Each part is a softmax of its own and the parts are merged in
 * order, on one thread or on many: so a query's result depends on neither the batch nor the number of threads. */
#define PART 256

/* Rows [first, first + count) of sequence `row`, counted query by query and head by head of the group. */
typedef struct {
    int32_t row, first, count;
} item;

/* What one part of the context adds to a tile: for each row the maximum, the sum of the exponentials, and the
 * values weighted by them. */
typedef struct {
    float max[MAX_ROWS], sum[MAX_ROWS];
    float out[]; /* [count][dim] */
} partial;

typedef struct {
    const pagoda_attention *a;
    const item *items;
    int32_t group, heads_a_task;
    int32_t parts; /* tasks of one item and head when the context is shared out, else 0 */
    char *partials;
    int64_t partial_bytes;
} job;

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

/* The words of tokens [token, token + VL). Where a block is no multiple of VL they are copied to `copy`. */
static const uint32_t *key_words(const tile *t, int32_t token, int32_t end, uint32_t *copy, int64_t *stride) {
    const pagoda_cache *c = &t->a->cache;
    int size = c->block_size;
    if (size % VL == 0) {
        *stride = size;
        return (const uint32_t *)head_keys(c, t->blocks[token / size], t->head) + token % size;
    }
    *stride = VL;
    int words = c->head_dim / (c->bf16 ? 2 : 1);
    for (int32_t i = 0; i < VL && token + i < end; i++) {
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
            words[p] = key_words(t, first, to, copies[p], &stride);
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

typedef void part_fn(tile *, int32_t, partial *);

#define PART_FN(rows)                                                                                             \
    static void part_f32_##rows(tile *t, int32_t part, partial *result) { run_part(rows, 0, t, part, result); }   \
    static void part_bf16_##rows(tile *t, int32_t part, partial *result) { run_part(rows, 1, t, part, result); }
PART_FN(1)
PART_FN(2)
PART_FN(3)
PART_FN(4)
PART_FN(5)
PART_FN(6)
PART_FN(7)
PART_FN(8)
PART_FN(9)
PART_FN(10)
PART_FN(11)
PART_FN(12)

static part_fn *const part_fns[2][MAX_ROWS] = {
    {part_f32_1, part_f32_2, part_f32_3, part_f32_4, part_f32_5, part_f32_6, part_f32_7, part_f32_8, part_f32_9,
     part_f32_10, part_f32_11, part_f32_12},
    {part_bf16_1, part_bf16_2, part_bf16_3, part_bf16_4, part_bf16_5, part_bf16_6, part_bf16_7, part_bf16_8,
     part_bf16_9, part_bf16_10, part_bf16_11, part_bf16_12}};

/* Adds a later part's result to that of the parts before it. */
static void merge(partial *total, const partial *part, int count, int dim) {
    for (int r = 0; r < count; r++) {
        if (part->sum[r] == 0.0f)
            continue;
        float max = total->sum[r] == 0.0f || part->max[r] > total->max[r] ? part->max[r] : total->max[r];
        float keep = total->sum[r] == 0.0f ? 0.0f : expf(total->max[r] - max), add = expf(part->max[r] - max);
        for (int d = 0; d < dim; d++)
            total->out[r * dim + d] = total->out[r * dim + d] * keep + part->out[r * dim + d] * add;
        total->sum[r] = total->sum[r] * keep + part->sum[r] * add;
        total->max[r] = max;
    }
}

INLINE void write_rows(const job *j, const item *it, int head, const partial *total, const int bf16) {
    const pagoda_attention *a = j->a;
    int dim = a->cache.head_dim;
    const int lines = 2 * VL;
    for (int r = 0; r < it->count; r++) {
        int query = (it->first + r) / j->group, h = head * j->group + (it->first + r) % j->group;
        int64_t token = a->query_start[it->row] + query;
        void *out = at_mut(a->out, token * a->out_stride + (int64_t)h * dim, bf16);
        const float *sums = total->out + r * dim;
        float inverse = total->sum[r] == 0.0f ? 0.0f : 1.0f / total->sum[r];
        int d = 0;
        for (; d + lines <= dim; d += lines) {
            vf first = vload(sums + d) * inverse, second = vload(sums + d + VL) * inverse;
            if (bf16) {
                vu words = pair_bf16(first, second);
                memcpy((uint16_t *)out + d, &words, sizeof words);
            } else {
                put_vec(out, d, first, 0);
                put_vec(out, d + VL, second, 0);
            }
        }
        for (; d < dim; d++)
            put(out, d, sums[d] * inverse, bf16);
    }
}

/* Writes a tile's result. */
static void write_out(const job *j, const item *it, int head, const partial *total) {
    if (j->a->cache.bf16)
        write_rows(j, it, head, total, 1);
    else
        write_rows(j, it, head, total, 0);
}

/* Fills in `t` for an item and a head. */
static void load_tile(const job *j, const item *it, int head, tile *t) {
    const pagoda_attention *a = j->a;
    int32_t start = a->query_start[it->row], queries = a->query_start[it->row + 1] - start;
    int dim = a->cache.head_dim;
    t->a = a;
    t->blocks = a->block_tables + it->row * a->table_stride;
    t->head = t->last_head = head;
    t->count = it->count;
    for (int r = 0; r < it->count; r++) {
        int query = (it->first + r) / j->group, h = head * j->group + (it->first + r) % j->group;
        t->high[r] = a->seq_lens[it->row] - queries + query + 1;
        t->low[r] = a->window && t->high[r] > a->window ? t->high[r] - a->window : 0;
        const void *q = at(a->q, (start + query) * a->q_stride + (int64_t)h * dim, a->cache.bf16);
        for (int d = 0; d < dim; d++)
            t->q[d * it->count + r] = get(q, d, a->cache.bf16) * a->scale;
    }
    t->begin = t->low[0];
    t->end = t->high[it->count - 1];
}

static int32_t first_part(const tile *t) { return t->begin / PART * PART; }

/* One item and head, over all of its context. */
static void run_item(const job *j, const item *it, int head, int last_head) {
    int dim = j->a->cache.head_dim;
    float q[MAX_ROWS * dim], scores[MAX_ROWS * PART];
    _Alignas(8) char memory[2][sizeof(partial) + sizeof(float) * MAX_ROWS * dim];
    tile t = {.q = q, .scores = scores};
    load_tile(j, it, head, &t);
    t.last_head = last_head;
    part_fn *fn = part_fns[j->a->cache.bf16][it->count - 1];
    partial *total = (partial *)memory[0], *next = (partial *)memory[1];
    fn(&t, first_part(&t), total);
    for (int32_t part = first_part(&t) + PART; part < t.end; part += PART) {
        fn(&t, part, next);
        merge(total, next, it->count, dim);
    }
    write_out(j, it, head, total);
}

static void items_task(void *arg, int task) {
    const job *j = arg;
    int shares = j->a->cache.num_kv_heads / j->heads_a_task, head = task % shares * j->heads_a_task;
    for (int h = head; h < head + j->heads_a_task; h++)
        run_item(j, &j->items[task / shares], h, head + j->heads_a_task - 1);
}

/* One part of the context of one item and head. */
static void parts_task(void *arg, int task) {
    const job *j = arg;
    int heads = j->a->cache.num_kv_heads, unit = task / j->parts;
    const item *it = &j->items[unit / heads];
    float q[MAX_ROWS * j->a->cache.head_dim], scores[MAX_ROWS * PART];
    tile t = {.q = q, .scores = scores};
    load_tile(j, it, unit % heads, &t);
    int32_t part = first_part(&t) + task % j->parts * PART;
    if (part < t.end)
        part_fns[j->a->cache.bf16][it->count - 1](&t, part, (partial *)(j->partials + task * j->partial_bytes));
}

/* Puts the parts of one item and head together. */
static void merge_task(void *arg, int unit) {
    const job *j = arg;
    int heads = j->a->cache.num_kv_heads;
    const item *it = &j->items[unit / heads];
    float q[MAX_ROWS * j->a->cache.head_dim];
    tile t = {.q = q};
    load_tile(j, it, unit % heads, &t);
    char *parts = j->partials + (int64_t)unit * j->parts * j->partial_bytes;
    partial *total = (partial *)parts;
    for (int32_t part = first_part(&t) + PART; part < t.end; part += PART) {
        parts += j->partial_bytes;
        merge(total, (const partial *)parts, it->count, j->a->cache.head_dim);
    }
    write_out(j, it, unit % heads, total);
}

static int tiles_of(int32_t rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS; }

static int32_t rows_of(const pagoda_attention *a, int32_t row, int group) {
    return (a->query_start[row + 1] - a->query_start[row]) * group;
}

/* Parts that the widest view of any tile reaches into. */
static int most_parts(const pagoda_attention *a, int32_t longest) {
    int all = (longest + PART - 1) / PART, windowed = (a->window + MAX_ROWS) / PART + 2;
    return a->window && windowed < all ? windowed : all;
}

void pagoda_attention_run(const pagoda_attention *a) {
    job j = {.a = a, .group = a->num_heads / a->cache.num_kv_heads};
    int32_t longest = 0;
    int num_items = 0;
    for (int32_t row = 0; row < a->num_rows; row++) {
        num_items += tiles_of(rows_of(a, row, j.group));
        longest = a->seq_lens[row] > longest ? a->seq_lens[row] : longest;
    }
    /* With few tiles, the context is shared out so that every thread has something to do. */
    int units = num_items * a->cache.num_kv_heads, parts = most_parts(a, longest);
    if (parts > 1 && units < 4 * pagoda_threads())
        j.parts = parts;
    j.partial_bytes = (sizeof(partial) + sizeof(float) * MAX_ROWS * a->cache.head_dim + 63) / 64 * 64;
    int64_t item_bytes = (num_items * (int64_t)sizeof(item) + 63) / 64 * 64;
    char *memory = pagoda_scratch(SCRATCH_ATTENTION_CALL, item_bytes + j.partial_bytes * units * j.parts);
    item *items = (item *)memory;
    for (int32_t row = 0, n = 0; row < a->num_rows; row++) {
        int32_t count = rows_of(a, row, j.group);
        for (int32_t first = 0; first < count; first += MAX_ROWS)
            items[n++] = (item){row, first, count - first < MAX_ROWS ? count - first : MAX_ROWS};
    }
    j.items = items;
    j.partials = memory + item_bytes;
    if (j.parts) {
        pagoda_parallel(parts_task, &j, units * j.parts);
        pagoda_parallel(merge_task, &j, units);
        return;
    }
    /* One after the other, the heads of an item hide each other's waits for memory. */
    j.heads_a_task = num_items >= 8 * pagoda_threads() ? a->cache.num_kv_heads : 1;
    pagoda_parallel(items_task, &j, units / j.heads_a_task);
}

void pagoda_paged_attention(void *keys, void *values, const void *q, void *out, const int32_t *block_tables,
                            const int32_t *query_start, const int32_t *seq_lens, int64_t q_stride,
                            int64_t out_stride, int64_t table_stride, int num_rows, int num_heads, int num_kv_heads,
                            int block_size, int head_dim, int bf16, int window, float scale) {
    pagoda_attention a = {{keys, values, num_kv_heads, block_size, head_dim, bf16},
                          q,
                          q_stride,
                          out,
                          out_stride,
                          block_tables,
                          table_stride,
                          query_start,
                          seq_lens,
                          num_rows,
                          num_heads,
                          window,
                          scale};
    pagoda_attention_run(&a);
}
