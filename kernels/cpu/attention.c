#include "attention.h"

#include <math.h>

#include "attention_part.h"
#include "scratch.h"
#include "threads.h"

/* Rows [first, first + count) of sequence `row`, counted query by query and head by head of the group. */
typedef struct {
    int32_t row, first, count;
} item;

typedef struct {
    const pagoda_attention *a;
    const item *items;
    int32_t group, heads_a_task;
    int32_t parts; /* tasks of one item and head when the context is shared out, else 0 */
    char *partials;
    int64_t partial_bytes;
} job;

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
