#include "linear.h"

#include "activation.h"
#include "scratch.h"
#include "threads.h"

/* The inner kernel multiplies MAX_ROWS rows with one panel: 2 * MAX_ROWS sums, which with the weights and one
 * broadcast input fill the 32 vector registers. */
#define MAX_ROWS 14
/* Panels that a single row takes at once: the sums of one alone would wait for each other. */
#define WIDE_PANELS 3
/* From this many rows on, a task takes some rows and all columns; below, all rows and some columns. */
#define MANY_ROWS 256
/* Bytes of float inputs that a task of many rows keeps in its core's second-level cache. */
#define X_BLOCK_BYTES (768 * 1024)
/* The most inputs that are summed up by themselves: shorter chains of additions lose less to rounding, and cost more
 * calls of the inner kernel. */
#define SUM_BLOCK 640
/* How far ahead of its use a weight is asked for. */
#define PREFETCH_BYTES 4096

/* Bytes of a panel for one step: a k, or a pair of them. */
#define LINE ((int64_t)(2 * sizeof(vf)))

/* An x panel holds the float inputs of up to MAX_ROWS rows: groups of X_GROUP inputs, row after row inside a group,
 * zeros after the last input. The inner kernel then reaches every row at a constant offset from one pointer. */
INLINE int64_t groups_of(int64_t k) { return (k + X_GROUP - 1) / X_GROUP; }

static int64_t panel_bytes(const pagoda_linear *w) {
    return (w->bf16 ? (w->k + 1) / 2 : w->k) * LINEAR_COLUMNS * (int64_t)sizeof(float);
}

static int64_t num_panels(const pagoda_linear *w) { return (w->n + LINEAR_COLUMNS - 1) / LINEAR_COLUMNS; }

/* `rows` rows split into the fewest blocks of at most MAX_ROWS, as even as can be. */
typedef struct {
    int64_t blocks, small, larger; /* the first `larger` blocks have small + 1 rows, the others small */
} split;

static split split_rows(int64_t rows) {
    int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    return (split){blocks, rows / blocks, rows % blocks};
}

static int64_t block_start(split s, int64_t block) {
    return block * s.small + (block < s.larger ? block : s.larger);
}

/* One input step for every row: sums[r] += x[r] * (w0, w1, ...). */
INLINE void step(const int rows, const int panels, vf sums[][2], const vf *w, const float *x) {
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        float value = x[r * X_GROUP];
#pragma GCC unroll 3
        for (int p = 0; p < panels; p++) {
            sums[r * panels + p][0] += w[2 * p] * value;
            sums[r * panels + p][1] += w[2 * p + 1] * value;
        }
    }
}

/* Inputs that are summed up by themselves: k in even shares, of whole groups. */
static int64_t sum_block(int64_t k) {
    int64_t blocks = (k + SUM_BLOCK - 1) / SUM_BLOCK;
    return groups_of((k + blocks - 1) / blocks) * X_GROUP;
}

/* What to fetch during a multiplication: a line, or two with bf16, at `next` for each step through the weights, then
 * `step` bytes further. */
typedef struct {
    const char *next;
    int64_t step;
} prefetch;

enum weights { WEIGHTS_FLOAT, WEIGHTS_BF16, WEIGHTS_BF16_KEPT };

/* totals[r * panels + p] += `k` inputs of row r of the x panel times panel p. With WEIGHTS_BF16_KEPT the weights are
 * also written to `kept` as floats. Every sum adds the same products in the same order however many rows and panels
 * there are: a row's result does not depend on what else is in the batch. */
INLINE void multiply(const int rows, const int panels, const enum weights kind, const float *x, const char *w,
                     int64_t panel, int64_t k, prefetch ahead, float *kept, vf totals[][2]) {
    const int pack = kind == WEIGHTS_FLOAT ? 1 : 2;
    vf sums[MAX_ROWS][2];
    for (int i = 0; i < rows * panels; i++)
        sums[i][0] = sums[i][1] = (vf){0};
    for (int64_t k0 = 0; k0 < k; k0 += X_GROUP, x += rows * X_GROUP) {
        int64_t end = k - k0 < X_GROUP ? k - k0 : X_GROUP;
        for (int64_t j = 0; j < end; j += pack, w += LINE, ahead.next += ahead.step) {
            vf lines[2 * WIDE_PANELS];
#pragma GCC unroll 6
            for (int i = 0; i < 2 * panels; i++) {
                if (pack == 2 || i % 2 == 0)
                    __builtin_prefetch(ahead.next + i / 2 * panel + i % 2 * sizeof(vf));
                vu words = vload_words(w + i / 2 * panel + i % 2 * sizeof(vf));
                lines[i] = pack == 2 ? even_bf16(words) : (vf)words;
                if (kind == WEIGHTS_BF16_KEPT)
                    vstore(kept + i * VL, lines[i]);
            }
            step(rows, panels, sums, lines, x + j);
            if (pack == 1)
                continue;
#pragma GCC unroll 6
            for (int i = 0; i < 2 * panels; i++) {
                lines[i] = odd_bf16(vload_words(w + i / 2 * panel + i % 2 * sizeof(vf)));
                if (kind == WEIGHTS_BF16_KEPT)
                    vstore(kept + LINEAR_COLUMNS + i * VL, lines[i]);
            }
            step(rows, panels, sums, lines, x + j + 1);
            kept += 2 * LINEAR_COLUMNS;
        }
    }
    for (int i = 0; i < rows * panels; i++) {
        totals[i][0] += sums[i][0];
        totals[i][1] += sums[i][1];
    }
}

typedef void multiply_fn(const float *x, const char *w, int64_t panel, int64_t k, prefetch ahead, float *kept,
                         vf totals[][2]);

#define MULTIPLY(name, rows, panels, kind)                                                                         \
    static void name(const float *x, const char *w, int64_t panel, int64_t k, prefetch ahead, float *kept,         \
                     vf totals[][2]) {                                                                             \
        multiply(rows, panels, kind, x, w, panel, k, ahead, kept, totals);                                         \
    }
#define MULTIPLY_ROWS(rows)                                                                                        \
    MULTIPLY(float_##rows, rows, 1, WEIGHTS_FLOAT)                                                                 \
    MULTIPLY(bf16_##rows, rows, 1, WEIGHTS_BF16)                                                                   \
    MULTIPLY(kept_##rows, rows, 1, WEIGHTS_BF16_KEPT)
#define FOR_ROWS(f) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14)
#define ENTRY_FLOAT(rows) float_##rows,
#define ENTRY_BF16(rows) bf16_##rows,
#define ENTRY_KEPT(rows) kept_##rows,

FOR_ROWS(MULTIPLY_ROWS)
MULTIPLY(float_wide_1, 1, WIDE_PANELS, WEIGHTS_FLOAT)
MULTIPLY(float_wide_2, 2, WIDE_PANELS, WEIGHTS_FLOAT)
MULTIPLY(bf16_wide_1, 1, WIDE_PANELS, WEIGHTS_BF16)
MULTIPLY(bf16_wide_2, 2, WIDE_PANELS, WEIGHTS_BF16)

static multiply_fn *const by_rows[3][MAX_ROWS] = {
    {FOR_ROWS(ENTRY_FLOAT)}, {FOR_ROWS(ENTRY_BF16)}, {FOR_ROWS(ENTRY_KEPT)}};
static multiply_fn *const wide[2][2] = {{float_wide_1, float_wide_2}, {bf16_wide_1, bf16_wide_2}};

/* Writes a panel's sums for one row: the columns from `column` on. */
INLINE void write_row(const pagoda_linear *w, const vf *sums, int64_t column, void *out_row, const int out_bf16) {
    int64_t columns = w->n - column < LINEAR_COLUMNS ? w->n - column : LINEAR_COLUMNS;
    if (columns == LINEAR_COLUMNS) {
        for (int i = 0; i < 2; i++) {
            vf sum = w->bias ? sums[i] + vload(w->bias + column + i * VL) : sums[i];
            put_vec(out_row, column + i * VL, sum, out_bf16);
        }
        return;
    }
    for (int64_t i = 0; i < columns; i++)
        put(out_row, column + i, sums[i / VL][i % VL] + (w->bias ? w->bias[column + i] : 0.0f), out_bf16);
}

static void write_rows(const pagoda_linear *w, vf totals[][2], int64_t rows, int64_t first_panel, int64_t panels,
                       void *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < panels; p++) {
            int64_t column = (first_panel + p) * LINEAR_COLUMNS;
            if (w->out_bf16)
                write_row(w, totals[r * panels + p], column, at_mut(out, r * out_stride, 1), 1);
            else
                write_row(w, totals[r * panels + p], column, at_mut(out, r * out_stride, 0), 0);
        }
}

/* One or two rows times WIDE_PANELS panels, or one block of rows times one panel. */
static void run_block(const pagoda_linear *w, const float *x, int64_t rows, int64_t p, int64_t panels, void *out,
                      int64_t out_stride) {
    vf totals[MAX_ROWS][2] = {0};
    int64_t bytes = panel_bytes(w), block = sum_block(w->k);
    multiply_fn *fn = panels > 1 ? wide[w->bf16][rows - 1] : by_rows[w->bf16][rows - 1];
    for (int64_t k0 = 0; k0 < w->k; k0 += block) {
        int64_t k = w->k - k0 < block ? w->k - k0 : block;
        const char *weights = (const char *)w->panels + p * bytes + k0 / (w->bf16 ? 2 : 1) * LINE;
        fn(x + rows * k0, weights, bytes, k, (prefetch){weights + PREFETCH_BYTES, LINE}, NULL, totals);
    }
    write_rows(w, totals, rows, p, panels, out, out_stride);
}

/* Several blocks of rows times one panel. The first block widens the weights for the others, and each fetches its
 * share of the next panel. */
static void run_blocks(const pagoda_linear *w, const float *x, int64_t rows, int64_t p, int64_t next_panel,
                       void *out, int64_t out_stride) {
    split s = split_rows(rows);
    int64_t bytes = panel_bytes(w), row_floats = groups_of(w->k) * X_GROUP, block = sum_block(w->k);
    vf totals[MANY_ROWS][2];
    float kept[SUM_BLOCK * LINEAR_COLUMNS] __attribute__((aligned(64)));
    memset(totals, 0, rows * sizeof totals[0]);
    for (int64_t k0 = 0; k0 < w->k; k0 += block) {
        int64_t k = w->k - k0 < block ? w->k - k0 : block;
        const char *weights = (const char *)w->panels + p * bytes + k0 / (w->bf16 ? 2 : 1) * LINE;
        int64_t share = k / (w->bf16 ? 2 : 1) * LINE / s.blocks;
        for (int64_t b = 0; b < s.blocks; b++) {
            int64_t row = block_start(s, b), count = block_start(s, b + 1) - row;
            int is_kept = w->bf16 && b > 0;
            int64_t steps = is_kept || !w->bf16 ? k : (k + 1) / 2;
            prefetch ahead = {weights + (next_panel - p) * bytes + b * share, share / steps};
            multiply_fn *fn = by_rows[!w->bf16 || is_kept ? WEIGHTS_FLOAT : WEIGHTS_BF16_KEPT][count - 1];
            fn(x + row * row_floats + count * k0, is_kept ? (const char *)kept : weights, bytes, k, ahead, kept,
               totals + row);
        }
    }
    write_rows(w, totals, rows, p, 1, out, out_stride);
}

/* All rows of consecutive x panels times the weight panels [first, last); `next` is the panel that this thread is
 * likely to do after them. */
static void run_panels(const pagoda_linear *w, const float *x, int64_t rows, int64_t first, int64_t last,
                       int64_t next, void *out, int64_t out_stride) {
    for (int64_t p = first; p < last;) {
        int64_t panels = rows <= 2 && p + WIDE_PANELS <= last ? WIDE_PANELS : 1;
        if (rows <= MAX_ROWS)
            run_block(w, x, rows, p, panels, out, out_stride);
        else
            run_blocks(w, x, rows, p, p + 1 < last ? p + 1 : next, out, out_stride);
        p += panels;
    }
}

typedef struct {
    const pagoda_linear *w;
    const void *x;
    int64_t x_stride;
    enum input_kind kind;
    void *out;
    int64_t out_stride, rows;
    float *panels; /* the x panels, where the tasks share them */
    int64_t task_size;
} job;

/* Row `row` of the input as floats into its place, `dst`, in an x panel of `count` rows. */
INLINE void load_row(const job *j, int64_t row, float *dst, int64_t count, const int bf16) {
    int64_t k = j->w->k;
    const void *src = at(j->x, row * j->x_stride, bf16);
    for (int64_t k0 = 0; k0 < k; k0 += X_GROUP, dst += count * X_GROUP) {
        int64_t end = k - k0 < X_GROUP ? k - k0 : X_GROUP;
        for (int64_t i = 0; i < X_GROUP; i += VL) {
            if (i + VL <= end) {
                vf v = get_vec(src, k0 + i, bf16);
                if (j->kind == INPUT_SILU_AND_MUL)
                    v = round_vec(silu_mul(v, get_vec(src, k + k0 + i, bf16)), bf16);
                vstore(dst + i, v);
                continue;
            }
            for (int64_t e = i; e < i + VL; e++) {
                float v = e < end ? get(src, k0 + e, bf16) : 0.0f;
                if (j->kind == INPUT_SILU_AND_MUL && e < end)
                    v = round_one(silu_mul_one(v, get(src, k + k0 + e, bf16)), bf16);
                dst[e] = v;
            }
        }
    }
}

/* Rows [first, first + rows) of the input into x panels. */
static void load_block(const job *j, int64_t first, int64_t rows, float *panel) {
    for (int64_t r = 0; r < rows; r++) {
        if (j->w->bf16)
            load_row(j, first + r, panel + r * X_GROUP, rows, 1);
        else
            load_row(j, first + r, panel + r * X_GROUP, rows, 0);
    }
}

static void load_task(void *arg, int task) {
    const job *j = arg;
    split s = split_rows(j->rows);
    int64_t row = block_start(s, task);
    load_block(j, row, block_start(s, task + 1) - row, j->panels + row * groups_of(j->w->k) * X_GROUP);
}

static void columns_task(void *arg, int task) {
    const job *j = arg;
    int64_t first = task * j->task_size, last = first + j->task_size, end = num_panels(j->w);
    /* Threads that keep pace take turns. */
    int64_t next = last + (pagoda_threads() - 1) * j->task_size;
    run_panels(j->w, j->panels, j->rows, first, last < end ? last : end, next < end ? next : first, j->out,
               j->out_stride);
}

static void rows_task(void *arg, int task) {
    const job *j = arg;
    int64_t first = task * j->task_size, left = j->rows - first;
    int64_t rows = left < j->task_size ? left : j->task_size;
    int64_t row_floats = groups_of(j->w->k) * X_GROUP;
    float *panels = pagoda_scratch(SCRATCH_LINEAR_TASK, rows * row_floats * sizeof(float));
    split s = split_rows(rows);
    for (int64_t b = 0; b < s.blocks; b++) {
        int64_t row = block_start(s, b);
        load_block(j, first + row, block_start(s, b + 1) - row, panels + row * row_floats);
    }
    run_panels(j->w, panels, rows, 0, num_panels(j->w), 0, at_mut(j->out, first * j->out_stride, j->w->out_bf16),
              j->out_stride);
}

static void run_few_rows(job *j) {
    const pagoda_linear *w = j->w;
    int blocks = (int)split_rows(j->rows).blocks;
    j->panels = pagoda_scratch(SCRATCH_LINEAR_CALL, j->rows * groups_of(w->k) * X_GROUP * sizeof(float));
    if (blocks == 1)
        load_task(j, 0);
    else
        pagoda_parallel(load_task, j, blocks);
    /* Small enough that the last task of one thread is not long waited for, large enough to be worth a claim. */
    int64_t task_bytes = j->rows <= MAX_ROWS ? 96 * 1024 : 32 * 1024;
    j->task_size = (task_bytes + panel_bytes(w) - 1) / panel_bytes(w);
    if (j->rows <= 2)
        j->task_size = (j->task_size + WIDE_PANELS - 1) / WIDE_PANELS * WIDE_PANELS;
    pagoda_parallel(columns_task, j, (int)((num_panels(w) + j->task_size - 1) / j->task_size));
}

void pagoda_linear_run(const pagoda_linear *w, const void *x, int64_t x_stride, enum input_kind kind, void *out,
                       int64_t out_stride, int64_t rows) {
    job j = {w, x, x_stride, kind, out, out_stride, rows, NULL, 0};
    if (rows <= 0)
        return;
    if (rows < MANY_ROWS) {
        run_few_rows(&j);
        return;
    }
    j.task_size = X_BLOCK_BYTES / (groups_of(w->k) * X_GROUP * (int64_t)sizeof(float)) / MAX_ROWS * MAX_ROWS;
    j.task_size = j.task_size < MAX_ROWS ? MAX_ROWS : j.task_size > 4 * MAX_ROWS ? 4 * MAX_ROWS : j.task_size;
    pagoda_parallel(rows_task, &j, (int)((rows + j.task_size - 1) / j.task_size));
}

int pagoda_linear_columns(void) { return LINEAR_COLUMNS; }

typedef struct {
    const pagoda_linear *w;
    const void *src;
    int64_t stride;
} pack_job;

static void pack_task(void *arg, int task) {
    const pack_job *j = arg;
    const pagoda_linear *w = j->w;
    char *panel = (char *)w->panels + task * panel_bytes(w);
    for (int64_t c = 0; c < LINEAR_COLUMNS; c++) {
        int64_t n = (int64_t)task * LINEAR_COLUMNS + c;
        if (w->bf16) {
            const uint16_t *row = (const uint16_t *)j->src + n * j->stride;
            uint16_t *dst = (uint16_t *)panel + 2 * c;
            for (int64_t k = 0; k < (w->k + 1) / 2 * 2; k++)
                dst[k / 2 * 2 * LINEAR_COLUMNS + k % 2] = n < w->n && k < w->k ? row[k] : 0;
        } else {
            const float *row = (const float *)j->src + n * j->stride;
            for (int64_t k = 0; k < w->k; k++)
                ((float *)panel)[k * LINEAR_COLUMNS + c] = n < w->n ? row[k] : 0.0f;
        }
    }
}

/* Packs weight [n, k], whose rows are `stride` elements apart, into w->panels. */
void pagoda_linear_pack(const pagoda_linear *w, const void *weight, int64_t stride) {
    pack_job j = {w, weight, stride};
    pagoda_parallel(pack_task, &j, (int)num_panels(w));
}

/* out[t] = row ids[t] of the packed matrix, in its own type. Returns 1 if an id is not a row's, else 0. */
int pagoda_linear_gather(const pagoda_linear *w, const int64_t *ids, int64_t rows, void *out) {
    for (int64_t t = 0; t < rows; t++) {
        if (ids[t] < 0 || ids[t] >= w->n)
            return 1;
        const char *panel = (const char *)w->panels + ids[t] / LINEAR_COLUMNS * panel_bytes(w);
        int64_t c = ids[t] % LINEAR_COLUMNS;
        if (w->bf16) {
            const uint16_t *src = (const uint16_t *)panel + 2 * c;
            for (int64_t k = 0; k < w->k; k++)
                ((uint16_t *)out)[t * w->k + k] = src[k / 2 * 2 * LINEAR_COLUMNS + k % 2];
        } else {
            for (int64_t k = 0; k < w->k; k++)
                ((float *)out)[t * w->k + k] = ((const float *)panel)[k * LINEAR_COLUMNS + c];
        }
    }
    return 0;
}
