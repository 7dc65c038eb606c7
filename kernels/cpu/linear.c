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
/* Inputs that are summed up by themselves: shorter chains of additions lose less to rounding. */
#define SUM_BLOCK 256
/* How far ahead of its use a weight is asked for. */
#define PREFETCH_BYTES 2048

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

/* What to fetch while a tile is computed: two cache lines at `next` for each line of weights used, then `step` bytes
 * further. */
typedef struct {
    const char *next;
    int64_t step;
} prefetch;

/* sums[r * panels + p] = `k` inputs of row r of the x panel times panel p. */
INLINE void multiply(const int rows, const int panels, const int bf16, const float *x, const char *w, int64_t panel,
                     int64_t k, prefetch ahead, vf sums[][2]) {
    const int per_line = bf16 ? 2 : 1;
    for (int i = 0; i < rows * panels; i++)
        sums[i][0] = sums[i][1] = (vf){0};
    for (int64_t k0 = 0; k0 < k; k0 += X_GROUP, x += rows * X_GROUP) {
        int64_t end = k - k0 < X_GROUP ? k - k0 : X_GROUP;
        for (int64_t j = 0; j < end; j += per_line, w += 2 * sizeof(vf), ahead.next += ahead.step) {
            vf lines[2 * WIDE_PANELS];
#pragma GCC unroll 6
            for (int i = 0; i < 2 * panels; i++) {
                __builtin_prefetch(ahead.next + i / 2 * panel + i % 2 * sizeof(vf));
                vu words = vload_words(w + i / 2 * panel + i % 2 * sizeof(vf));
                lines[i] = bf16 ? even_bf16(words) : (vf)words;
            }
            step(rows, panels, sums, lines, x + j);
            if (!bf16)
                continue;
#pragma GCC unroll 6
            for (int i = 0; i < 2 * panels; i++)
                lines[i] = odd_bf16(vload_words(w + i / 2 * panel + i % 2 * sizeof(vf)));
            step(rows, panels, sums, lines, x + j + 1);
        }
    }
}

/* The same for all of k. Every sum adds the same products in the same order however many rows and panels there are:
 * a row's result does not depend on what else is in the batch. */
INLINE void multiply_all(const int rows, const int panels, const int bf16, const float *x, const char *w,
                         int64_t panel, int64_t k, prefetch ahead, vf totals[][2]) {
    const int64_t lines = SUM_BLOCK / (bf16 ? 2 : 1);
    multiply(rows, panels, bf16, x, w, panel, k < SUM_BLOCK ? k : SUM_BLOCK, ahead, totals);
    for (int64_t k0 = SUM_BLOCK; k0 < k; k0 += SUM_BLOCK) {
        vf sums[MAX_ROWS][2];
        x += rows * SUM_BLOCK;
        w += lines * 2 * sizeof(vf);
        ahead.next += lines * ahead.step;
        multiply(rows, panels, bf16, x, w, panel, k - k0 < SUM_BLOCK ? k - k0 : SUM_BLOCK, ahead, sums);
        for (int i = 0; i < rows * panels; i++) {
            totals[i][0] += sums[i][0];
            totals[i][1] += sums[i][1];
        }
    }
}

/* Writes a panel's sums for one row: `columns` of them are real. */
INLINE void write_row(const pagoda_linear *w, vf *sums, int64_t column, void *out_row) {
    int64_t columns = w->n - column < LINEAR_COLUMNS ? w->n - column : LINEAR_COLUMNS;
    if (columns == LINEAR_COLUMNS) {
        for (int i = 0; i < 2; i++) {
            vf sum = w->bias ? sums[i] + vload(w->bias + column + i * VL) : sums[i];
            if (w->out_bf16)
                put_vec(out_row, column + i * VL, sum, 1);
            else
                put_vec(out_row, column + i * VL, sum, 0);
        }
        return;
    }
    for (int64_t i = 0; i < columns; i++) {
        float sum = sums[i / VL][i % VL] + (w->bias ? w->bias[column + i] : 0.0f);
        if (w->out_bf16)
            put(out_row, column + i, sum, 1);
        else
            put(out_row, column + i, sum, 0);
    }
}

INLINE void tile(const int rows, const int panels, const pagoda_linear *w, const float *x, int64_t first_panel,
                 prefetch ahead, void *out, int64_t out_stride) {
    vf sums[MAX_ROWS][2];
    int64_t bytes = panel_bytes(w);
    const char *weights = (const char *)w->panels + first_panel * bytes;
    if (w->bf16)
        multiply_all(rows, panels, 1, x, weights, bytes, w->k, ahead, sums);
    else
        multiply_all(rows, panels, 0, x, weights, bytes, w->k, ahead, sums);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            write_row(w, sums[r * panels + p], (first_panel + p) * LINEAR_COLUMNS,
                      (char *)out + r * out_stride * (w->out_bf16 ? 2 : 4));
}

typedef void tile_fn(const pagoda_linear *, const float *, int64_t, prefetch, void *, int64_t);

#define TILE(rows, panels)                                                                                          \
    static void tile_##rows##_##panels(const pagoda_linear *w, const float *x, int64_t first_panel,                \
                                       prefetch ahead, void *out, int64_t out_stride) {                            \
        tile(rows, panels, w, x, first_panel, ahead, out, out_stride);                                             \
    }
TILE(1, 3)
TILE(2, 3)
TILE(1, 1)
TILE(2, 1)
TILE(3, 1)
TILE(4, 1)
TILE(5, 1)
TILE(6, 1)
TILE(7, 1)
TILE(8, 1)
TILE(9, 1)
TILE(10, 1)
TILE(11, 1)
TILE(12, 1)
TILE(13, 1)
TILE(14, 1)

static tile_fn *const wide_tiles[] = {tile_1_3, tile_2_3};
static tile_fn *const tiles[MAX_ROWS] = {tile_1_1, tile_2_1, tile_3_1,  tile_4_1,  tile_5_1,  tile_6_1,  tile_7_1,
                                         tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1, tile_13_1, tile_14_1};

/* All rows of consecutive x panels times the weight panels [first, last). While the row blocks are multiplied with
 * one panel, each fetches its share of the next one. */
static void run_tiles(const pagoda_linear *w, const float *x, int64_t rows, int64_t first, int64_t last, void *out,
                      int64_t out_stride) {
    split s = split_rows(rows);
    int64_t groups = groups_of(w->k), bytes = panel_bytes(w);
    for (int64_t p = first; p < last;) {
        int64_t width = rows <= 2 && p + WIDE_PANELS <= last ? WIDE_PANELS : 1;
        const char *panel = (const char *)w->panels + p * bytes;
        for (int64_t b = 0; b < s.blocks; b++) {
            int64_t row = block_start(s, b), count = block_start(s, b + 1) - row;
            tile_fn *fn = width > 1 ? wide_tiles[count - 1] : tiles[count - 1];
            prefetch ahead = {panel + (s.blocks == 1 ? PREFETCH_BYTES : bytes + bytes / s.blocks * b),
                              2 * sizeof(vf) / s.blocks};
            fn(w, x + row * groups * X_GROUP, p, ahead, at_mut(out, row * out_stride, w->out_bf16), out_stride);
        }
        p += width;
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
    run_tiles(j->w, j->panels, j->rows, first, last < end ? last : end, j->out, j->out_stride);
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
    run_tiles(j->w, panels, rows, 0, num_panels(j->w), at_mut(j->out, first * j->out_stride, j->w->out_bf16),
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
    int64_t task_bytes = j->rows <= 2 ? 96 * 1024 : 32 * 1024;
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
