/* y = x W^T + b over weights packed for streaming.
 *
 * Packed weights are panels of LINEAR_COLUMNS output columns. A bf16 panel holds, for each pair of inputs k and
 * k + 1, one 32-bit word a column with both (an odd K is padded with a zero); a float panel holds, for each k, one
 * float a column. So one load brings weights for many columns of one k, and a panel is read front to back. */
#ifndef PAGODA_LINEAR_H
#define PAGODA_LINEAR_H

#include "vec.h"

#define LINEAR_COLUMNS (2 * VL)
/* Inputs of a row that lie together in an x panel: see linear.c. */
#define X_GROUP 16

typedef struct {
    const void *panels; /* the packed weights */
    const float *bias;  /* [n] or NULL */
    int64_t n, k;
    int32_t bf16;     /* type of the weights and of x */
    int32_t out_bf16; /* type of the result */
} pagoda_linear;

/* How the input rows are read. */
enum input_kind { INPUT_PLAIN, INPUT_SILU_AND_MUL };

/* out[t, :n] = f(x[t]) W^T + b for t < rows. Strides are in elements; rows are contiguous. With INPUT_SILU_AND_MUL
 * x holds 2k values a row, gate then up, and f(x) = silu(gate) * up. */
void pagoda_linear_run(const pagoda_linear *w, const void *x, int64_t x_stride, enum input_kind kind, void *out,
                       int64_t out_stride, int64_t rows);

#endif
