/* Vectors of floats, in the compiler's portable vector types: 512 bits with AVX-512, else what the processor has.
 *
 * bfloat16 is the upper half of a float, so a 32-bit word that holds two of them widens with one shift (the even
 * element) and one mask (the odd one). That is cheaper than the processor's own bf16 dot product, which on Sapphire
 * Rapids runs at half the rate of a float multiply-add, and its sums are exact floats. */
#ifndef PAGODA_VEC_H
#define PAGODA_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf vload(const float *p) { return *(const vf_any *)p; }
INLINE void vstore(float *p, vf v) { *(vf_any *)p = v; }
INLINE vu vload_words(const void *p) { return *(const vu_any *)p; }

/* The even and the odd elements of words that hold two bf16 each. */
INLINE vf even_bf16(vu words) { return (vf)(words << 16); }
INLINE vf odd_bf16(vu words) { return (vf)(words & 0xffff0000u); }

/* Rounds to nearest even; the bf16 is in the lower half of each word. A NaN stays one. */
INLINE vu round_bf16(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu nan = (vu)(v != v);
    return (rounded & ~nan) | (nan & 0x7fc0u);
}

/* One word of each pair of elements: what even_bf16 and odd_bf16 take apart. */
INLINE vu pair_bf16(vf even, vf odd) { return round_bf16(even) | (round_bf16(odd) << 16); }

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Element i, and the VL elements from i, of an array of bf16 or float; `bf16` is a constant in every call. */
INLINE float get(const void *p, long i, const int bf16) {
    return bf16 ? bf16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void put(void *p, long i, float v, const int bf16) {
    if (bf16)
        ((uint16_t *)p)[i] = float_to_bf16(v);
    else
        ((float *)p)[i] = v;
}

INLINE vf get_vec(const void *p, long i, const int bf16) {
    if (bf16)
        return (vf)(__builtin_convertvector(*(const vh_any *)((const uint16_t *)p + i), vu) << 16);
    return vload((const float *)p + i);
}

INLINE void put_vec(void *p, long i, vf v, const int bf16) {
    if (bf16)
        *(vh_any *)((uint16_t *)p + i) = __builtin_convertvector(round_bf16(v), vh);
    else
        vstore((float *)p + i, v);
}

/* v rounded to the type and back. */
INLINE vf round_vec(vf v, const int bf16) { return bf16 ? (vf)(round_bf16(v) << 16) : v; }
INLINE float round_one(float v, const int bf16) { return bf16 ? bf16_to_float(float_to_bf16(v)) : v; }

INLINE const void *at(const void *p, long i, const int bf16) { return (const char *)p + i * (bf16 ? 2 : 4); }
INLINE void *at_mut(void *p, long i, const int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }

INLINE vf vsplat(float x) { return x - (vf){0}; }

/* Where `mask` has all bits set, a; elsewhere b. */
INLINE vf vselect(vu mask, vf a, vf b) { return (vf)(((vu)a & mask) | ((vu)b & ~mask)); }

/* A NaN in b is kept. */
INLINE vf vmax(vf a, vf b) { return vselect((vu)(a > b), a, b); }
INLINE vf vmin(vf a, vf b) { return vselect((vu)(a < b), a, b); }

INLINE float vsum(vf v) {
    float lanes[VL];
    memcpy(lanes, &v, sizeof lanes);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float vmax_lanes(vf v) {
    float lanes[VL];
    memcpy(lanes, &v, sizeof lanes);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

/* e^x within 2 ulp for x in [-87, 88]; clamped outside, so that -inf gives 1e-38 and never a denormal. */
INLINE vf vexp(vf x) {
    x = vmin(vsplat(88.0f), vmax(vsplat(-87.0f), x));
    vf shifter = vsplat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the lower bits */
    vf shifted = x * 1.44269504088896341f + shifter;
    vf n = shifted - shifter;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vf)((vi)p + (((vi)shifted - (vi)shifter) << 23));
}

#endif
