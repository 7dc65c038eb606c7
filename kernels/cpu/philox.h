/* Philox4x32-10 as kernels/philox.py keys it, for 64 tokens at a time, and the arithmetic on floats that sampling
 * needs, written so that loops around it vectorise. */
#ifndef PAGODA_PHILOX_H
#define PAGODA_PHILOX_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* How many tokens the functions below do at a time. */
#define CHUNK 64
/* The largest uniform, 1 - 2^-24. */
#define MAX_UNIFORM 0x1.fffffep-1f

static inline float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Integers that compare like the floats, NaNs outside both infinities. */
static inline int32_t key_of(float value) {
    int32_t bits = bits_of(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float value_of(int32_t key) { return float_of(key ^ ((key >> 31) & 0x7fffffff)); }

/* Cephes logf for normal x > 0, within 2 units in the last place, and relative to x - 1 where x is close to 1. */
static inline float log_of(float x) {
    int32_t bits = bits_of(x);
    int32_t exponent = (bits - 0x3f3504f3) >> 23; /* the mantissa is then in [sqrt(1/2), sqrt(2)) */
    float f = float_of(bits - exponent * (1 << 23)) - 1.0f, e = (float)exponent;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    float square = f * f;
    float tail = f * square * p - 2.12194440e-4f * e - 0.5f * square;
    return f + tail + 0.693359375f * e;
}

/* Cephes expf for x < 88; below -87, where the result would be denormal, it stays at exp(-87). */
static inline float exp_of(float x) {
    x = x > -87.0f ? x : -87.0f;
    float rounded = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23 leaves the nearest integer in the low bits */
    int32_t n = bits_of(rounded) - bits_of(12582912.0f);
    float e = rounded - 12582912.0f;
    float f = x - 0.693359375f * e + 2.12194440e-4f * e;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * float_of((n + 127) * (1 << 23));
}

/* The words of 16 Philox calls, 4 each, for the 64 tokens of a chunk. */
static inline void chunk_words(uint64_t seed, uint32_t position, int chunk, uint32_t words[4][CHUNK / 4]) {
#ifdef __AVX512F__
    /* A call to each 64-bit lane, of which multiplication reads only the lower half: what the upper one gathers
     * need never be cleared. Compilers fall back to 64-bit products, at twice the time. */
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
    for (int half = 0; half < CHUNK / 4; half += 8) {
        __m512i c0 = _mm512_add_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0),
                                      _mm512_set1_epi64((int64_t)chunk * (CHUNK / 4) + half));
        __m512i c1 = _mm512_set1_epi64(position), c2 = _mm512_setzero_si512(), c3 = c2;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product1 = _mm512_mul_epu32(c2, multiplier1);
            c0 = _mm512_srli_epi64(product1, 32) ^ c1 ^ _mm512_set1_epi64(k0);
            c1 = product1;
            c2 = _mm512_srli_epi64(product0, 32) ^ c3 ^ _mm512_set1_epi64(k1);
            c3 = product0;
        }
        _mm256_storeu_si256((__m256i *)(words[0] + half), _mm512_cvtepi64_epi32(c0));
        _mm256_storeu_si256((__m256i *)(words[1] + half), _mm512_cvtepi64_epi32(c1));
        _mm256_storeu_si256((__m256i *)(words[2] + half), _mm512_cvtepi64_epi32(c2));
        _mm256_storeu_si256((__m256i *)(words[3] + half), _mm512_cvtepi64_epi32(c3));
    }
#else
    for (int lane = 0; lane < CHUNK / 4; lane++) {
        uint32_t c0 = (uint32_t)(chunk * (CHUNK / 4) + lane), c1 = position, c2 = 0, c3 = 0;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            uint64_t product0 = (uint64_t)c0 * 0xD2511F53u, product1 = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)product1;
            c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)product0;
        }
        words[0][lane] = c0;
        words[1][lane] = c1;
        words[2][lane] = c2;
        words[3][lane] = c3;
    }
#endif
}

/* The uniforms of a chunk's tokens; returns the greatest. */
static inline float chunk_uniforms(uint64_t seed, uint32_t position, int chunk, float uniforms[CHUNK]) {
    uint32_t words[4][CHUNK / 4];
    int32_t high = 0;
    chunk_words(seed, position, chunk, words);
    for (int lane = 0; lane < CHUNK / 4; lane++)
        for (int word = 0; word < 4; word++) {
            int32_t top_bits = (int32_t)(words[word][lane] >> 9);
            uniforms[4 * lane + word] = ((float)top_bits + 0.5f) * 0x1p-23f;
            high = top_bits > high ? top_bits : high;
        }
    return ((float)high + 0.5f) * 0x1p-23f;
}

#endif
