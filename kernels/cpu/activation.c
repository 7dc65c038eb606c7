#include "activation.h"

#include "threads.h"

#define TASK_ELEMENTS 4096

typedef struct {
    const void *x; /* [rows][2 * dim]: gate, then up */
    void *out;     /* [rows][dim] */
    int64_t x_stride, out_stride, rows, dim;
    int bf16;
} job;

INLINE void row(const job *j, int64_t r, const int bf16) {
    const void *gate = at(j->x, r * j->x_stride, bf16);
    void *out = at_mut(j->out, r * j->out_stride, bf16);
    int64_t i = 0;
    for (; i + VL <= j->dim; i += VL)
        put_vec(out, i, silu_mul(get_vec(gate, i, bf16), get_vec(gate, j->dim + i, bf16)), bf16);
    for (; i < j->dim; i++)
        put(out, i, silu_mul_one(get(gate, i, bf16), get(gate, j->dim + i, bf16)), bf16);
}

static int64_t rows_a_task(const job *j) { return j->dim < TASK_ELEMENTS ? TASK_ELEMENTS / j->dim : 1; }

static void task(void *arg, int index) {
    const job *j = arg;
    int64_t first = index * rows_a_task(j), last = first + rows_a_task(j);
    for (int64_t r = first; r < last && r < j->rows; r++) {
        if (j->bf16)
            row(j, r, 1);
        else
            row(j, r, 0);
    }
}

void pagoda_silu_and_mul(const void *x, void *out, int64_t x_stride, int64_t out_stride, int64_t rows, int64_t dim,
                         int bf16) {
    job j = {x, out, x_stride, out_stride, rows, dim, bf16};
    pagoda_parallel(task, &j, (int)((rows + rows_a_task(&j) - 1) / rows_a_task(&j)));
}
