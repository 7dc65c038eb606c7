/* Root mean square norm over the last dim of [rows][heads][dim]. */
#ifndef PAGODA_NORM_H
#define PAGODA_NORM_H

#include "vec.h"

typedef struct {
    const void *x;
    void *residual; /* NULL, or what x is added to first, in place */
    const void *weight; /* [dim] */
    void *out;
    int64_t x_stride, residual_stride, out_stride; /* elements from one row to the next */
    int64_t rows;
    int32_t heads, dim, bf16;
    float eps;
} pagoda_norm;

void pagoda_norm_run(const pagoda_norm *n);

#endif
