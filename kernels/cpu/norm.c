#include "norm.h"

#include <math.h>

#include "threads.h"

/* Elements that are worth a task of their own. */
#define TASK_ELEMENTS 4096

/* One head of one token. As in transformers, the sum with the residual and the normed value are each rounded to the
 * type before they are used; the statistics are floats. */
INLINE void norm_one(const pagoda_norm *n, const void *x, void *residual, void *out, const int bf16) {
    int dim = n->dim, i = 0;
    vf squares = {0};
    float rest = 0.0f;
    for (; i + VL <= dim; i += VL) {
        vf v = get_vec(x, i, bf16);
        if (residual) {
            v = round_vec(v + get_vec(residual, i, bf16), bf16);
            put_vec(residual, i, v, bf16);
        }
        squares += v * v;
    }
    for (; i < dim; i++) {
        float v = get(x, i, bf16);
        if (residual) {
            v = round_one(v + get(residual, i, bf16), bf16);
            put(residual, i, v, bf16);
        }
        rest += v * v;
    }
    const void *sum = residual ? residual : x;
    float scale = 1.0f / sqrtf((vsum(squares) + rest) / dim + n->eps);
    for (i = 0; i + VL <= dim; i += VL)
        put_vec(out, i, round_vec(get_vec(sum, i, bf16) * scale, bf16) * get_vec(n->weight, i, bf16), bf16);
    for (; i < dim; i++)
        put(out, i, round_one(get(sum, i, bf16) * scale, bf16) * get(n->weight, i, bf16), bf16);
}

INLINE void norm_rows(const pagoda_norm *n, int64_t first, int64_t last, const int bf16) {
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < n->heads; h++) {
            void *residual = n->residual ? at_mut(n->residual, t * n->residual_stride + h * n->dim, bf16) : NULL;
            norm_one(n, at(n->x, t * n->x_stride + h * n->dim, bf16), residual,
                     at_mut(n->out, t * n->out_stride + h * n->dim, bf16), bf16);
        }
}

static int64_t rows_a_task(const pagoda_norm *n) {
    int64_t rows = TASK_ELEMENTS / ((int64_t)n->heads * n->dim);
    return rows < 1 ? 1 : rows;
}

static void norm_task(void *arg, int task) {
    const pagoda_norm *n = arg;
    int64_t first = task * rows_a_task(n), last = first + rows_a_task(n);
    last = last < n->rows ? last : n->rows;
    if (n->bf16)
        norm_rows(n, first, last, 1);
    else
        norm_rows(n, first, last, 0);
}

void pagoda_norm_run(const pagoda_norm *n) {
    pagoda_parallel(norm_task, (void *)n, (int)((n->rows + rows_a_task(n) - 1) / rows_a_task(n)));
}

void pagoda_rms_norm(const void *x, void *residual, const void *weight, void *out, int64_t x_stride,
                     int64_t residual_stride, int64_t out_stride, int64_t rows, int heads, int dim, int bf16,
                     float eps) {
    pagoda_norm n = {x, residual, weight, out, x_stride, residual_stride, out_stride, rows, heads, dim, bf16, eps};
    pagoda_norm_run(&n);
}
