#ifndef PAGODA_ACTIVATION_H
#define PAGODA_ACTIVATION_H

#include "vec.h"

/* silu(gate) * up, where silu(g) = g / (1 + e^-g). */
INLINE vf silu_mul(vf gate, vf up) { return gate / (1.0f + vexp(-gate)) * up; }

INLINE float silu_mul_one(float gate, float up) { return silu_mul(vsplat(gate), vsplat(up))[0]; }

#endif
