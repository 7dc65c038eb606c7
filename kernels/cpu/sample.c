/* Draws tokens on the CPU: kernels/sample.py says what is computed, kernels/philox.py which random numbers.
 *
 * A row is one task. A greedy row that needs no processing is one pass over its logits. Any other row is copied to
 * float32 scores with the best of every chunk of 64 noted, which spares most of the work: the filters gather their
 * few candidates from the chunks that can hold one, and noise is added only in chunks that can still win. Maxima
 * are taken over integers because compilers vectorise those without relaxed floating point rules. */
#include "philox.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define GREEDY_BELOW 1e-5f
#define KEY_INF 0x7f800000
#define KEY_NEG_INF ((int32_t)0x807fffff)
/* Both mirrored field by field in kernels/sample.py. Arrays of sample_columns are indexed by slot, and so are
 * tokens, num_tokens and num_prompt; strides count elements. */
typedef struct {
    const float *temperature;
    const int32_t *top_k;
    const float *top_p, *min_p, *presence, *frequency, *repetition;
    const int64_t *seed;
    const int32_t *min_tokens, *stop_ids, *bias_ids;
    const float *bias_values;
    const int32_t *num_logprobs;
    int32_t max_stop_ids, max_bias;
} sample_columns;

typedef struct {
    const void *logits;
    const int64_t *slots;
    const sample_columns *columns;
    const int32_t *tokens, *num_tokens, *num_prompt;
    int32_t *token_ids;
    uint8_t *finite;
    float *token_logprob;
    int32_t *rank, *top_ids;
    float *top_logprobs;
    int64_t logits_stride, tokens_stride;
    int32_t num_rows, vocab_size, is_bf16;
    int32_t any_random, any_filter, any_penalty, any_bias, any_min_tokens, max_logprobs;
    atomic_int out_of_memory;
} sample_args;

typedef struct {
    float *scores;     /* [num_chunks * CHUNK], -inf behind the vocabulary */
    float *chunk_best; /* [num_chunks] */
    float *values;     /* [num_chunks * CHUNK + 16], candidates of a filter */
    int vocab_size, num_chunks;
} row_scratch;

static inline float load(const void *row, int is_bf16, int64_t i) {
    return is_bf16 ? float_of((int32_t)((uint32_t)((const uint16_t *)row)[i] << 16)) : ((const float *)row)[i];
}

/* The first of the highest logits, or -1 when there is a NaN or +inf, or nothing above -inf. */
static inline __attribute__((always_inline)) int best_of_type(const void *row, int is_bf16, int size) {
    enum { BLOCK = 1024 };
    int32_t best = INT32_MIN, least = INT32_MAX;
    int start = 0;
    for (int first = 0; first < size; first += BLOCK) {
        int end = first + BLOCK < size ? first + BLOCK : size;
        int32_t high = INT32_MIN, low = INT32_MAX;
        for (int i = first; i < end; i++) {
            int32_t key = key_of(load(row, is_bf16, i));
            high = key > high ? key : high;
            low = key < low ? key : low;
        }
        least = low < least ? low : least;
        if (high > best) {
            best = high;
            start = first;
        }
    }
    if (best >= KEY_INF || best <= KEY_NEG_INF || least < KEY_NEG_INF)
        return -1;
    float value = value_of(best);
    /* As integers +0 beats -0, as floats the two tie: an earlier block may hold a -0. */
    int i = value == 0.0f ? 0 : start;
    while (load(row, is_bf16, i) != value)
        i++;
    return i;
}

static int best_of(const void *row, int is_bf16, int size) {
    return is_bf16 ? best_of_type(row, 1, size) : best_of_type(row, 0, size);
}

/* Sets scores to source * factor and notes each chunk's best. Returns the first chunk that has the best of all, or
 * -1 as best_of does. The source may be the scores themselves. */
static inline __attribute__((always_inline)) int prepare_type(const row_scratch *row, const void *source,
                                                              int is_bf16, float factor) {
    int best_chunk = 0;
    int32_t least = INT32_MAX;
    for (int chunk = 0; chunk < row->num_chunks; chunk++) {
        const int first = chunk * CHUNK, left = row->vocab_size - first;
        float block[CHUNK]; /* tells the compiler that source and scores do not overlap by halves */
        if (left >= CHUNK)
            for (int i = 0; i < CHUNK; i++)
                block[i] = load(source, is_bf16, first + i);
        else
            for (int i = 0; i < CHUNK; i++)
                block[i] = i < left ? load(source, is_bf16, first + i) : -INFINITY;
        int32_t high = INT32_MIN, low = INT32_MAX;
        for (int i = 0; i < CHUNK; i++) {
            int32_t key = key_of(block[i]);
            high = key > high ? key : high;
            low = key < low ? key : low;
            row->scores[first + i] = block[i] * factor;
        }
        if (high >= KEY_INF)
            return -1;
        least = low < least ? low : least;
        row->chunk_best[chunk] = value_of(high) * factor;
        if (row->chunk_best[chunk] > row->chunk_best[best_chunk])
            best_chunk = chunk;
    }
    return least < KEY_NEG_INF || row->chunk_best[best_chunk] == -INFINITY ? -1 : best_chunk;
}

static int prepare(const row_scratch *row, const void *source, int is_bf16, float factor) {
    return is_bf16 ? prepare_type(row, source, 1, factor) : prepare_type(row, source, 0, factor);
}

static void add_bias(const sample_args *args, int64_t slot, const row_scratch *row) {
    const int32_t *ids = args->columns->bias_ids + slot * args->columns->max_bias;
    const float *values = args->columns->bias_values + slot * args->columns->max_bias;
    for (int i = 0; i < args->columns->max_bias; i++)
        if (ids[i] >= 0 && ids[i] < row->vocab_size)
            row->scores[ids[i]] += values[i];
}

/* Applies the three penalties; returns 0 when there is no memory for the counts. */
static int penalise(const sample_args *args, int64_t slot, const row_scratch *row) {
    const int32_t prompt_mark = 1 << 30;
    const float repetition = args->columns->repetition[slot];
    const float frequency = args->columns->frequency[slot], presence = args->columns->presence[slot];
    if (repetition == 1.0f && frequency == 0.0f && presence == 0.0f)
        return 1;
    int32_t *counts = calloc((size_t)row->vocab_size, sizeof *counts);
    if (!counts)
        return 0;
    const int32_t *tokens = args->tokens + slot * args->tokens_stride;
    const int num_tokens = args->num_tokens[slot], num_prompt = args->num_prompt[slot];
    for (int i = 0; i < num_tokens; i++) {
        if (tokens[i] < 0 || tokens[i] >= row->vocab_size)
            continue;
        if (i < num_prompt)
            counts[tokens[i]] |= prompt_mark;
        else
            counts[tokens[i]]++;
    }
    for (int i = 0; i < num_tokens; i++) {
        if (tokens[i] < 0 || tokens[i] >= row->vocab_size || !counts[tokens[i]])
            continue;
        float score = row->scores[tokens[i]];
        int32_t count = counts[tokens[i]] & (prompt_mark - 1);
        score = score > 0.0f ? score / repetition : score * repetition;
        score -= frequency * (float)count;
        score -= count ? presence : 0.0f;
        row->scores[tokens[i]] = score;
        counts[tokens[i]] = 0; /* so that the token's other occurrences are passed over */
    }
    free(counts);
    return 1;
}

static void ban_stop_ids(const sample_args *args, int64_t slot, const row_scratch *row) {
    const int32_t *ids = args->columns->stop_ids + slot * args->columns->max_stop_ids;
    if (args->num_tokens[slot] - args->num_prompt[slot] >= args->columns->min_tokens[slot])
        return;
    for (int i = 0; i < args->columns->max_stop_ids; i++)
        if (ids[i] >= 0 && ids[i] < row->vocab_size)
            row->scores[ids[i]] = -INFINITY;
}

/* Copies the values that reach bound (or, with reach 0, those that do not) and returns how many there are. The
 * copy may begin where the values do or before, and writes up to 16 values past its end. */
static int copy_if(float *to, const float *from, int size, float bound, int reach) {
    int copied = 0, i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= size; i += 16) {
        __m512 lanes = _mm512_loadu_ps(from + i);
        __mmask16 mask = _mm512_cmp_ps_mask(lanes, _mm512_set1_ps(bound), _CMP_GE_OQ);
        mask = reach ? mask : (__mmask16)~mask;
        _mm512_storeu_ps(to + copied, _mm512_maskz_compress_ps(mask, lanes));
        copied += __builtin_popcount(mask);
    }
#endif
    for (; i < size; i++) {
        float value = from[i];
        to[copied] = value;
        copied += (value >= bound) == reach;
    }
    return copied;
}

/* How much the values that reach bound weigh: exp(value - best) each, or 1 each when best is NaN. */
static double weigh(const float *values, int size, float bound, float best) {
    double lanes[16] = {0}, sum = 0.0;
    int count = 0, i = 0;
    if (best != best) {
        for (; i < size; i++)
            count += values[i] >= bound;
        return count;
    }
    for (; i + 16 <= size; i += 16)
        for (int lane = 0; lane < 16; lane++)
            lanes[lane] += values[i + lane] >= bound ? exp_of(values[i + lane] - best) : 0.0f;
    for (; i < size; i++)
        sum += values[i] >= bound ? exp_of(values[i] - best) : 0.0f;
    for (int lane = 0; lane < 16; lane++)
        sum += lanes[lane];
    return sum;
}

/* The greatest t for which the values >= t weigh at least target; -inf when all of them do not. All are finite.
 *
 * Halves the range of the values until all that are left tie, dropping those whose side is decided, so that the
 * work is a few times the number of values. The array is consumed. */
static float threshold_of(float *values, int size, double target, float best) {
    double decided = 0.0; /* weight of the values dropped because they reach any threshold still possible */
    if (weigh(values, size, -INFINITY, best) < target)
        return -INFINITY;
    for (;;) {
        int32_t low_key = INT32_MAX, high_key = INT32_MIN;
        for (int i = 0; i < size; i++) {
            int32_t key = key_of(values[i]);
            low_key = key < low_key ? key : low_key;
            high_key = key > high_key ? key : high_key;
        }
        const float low = value_of(low_key), high = value_of(high_key);
        if (low == high)
            return low;
        float middle = 0.5f * low + 0.5f * high;
        if (!(middle > low))
            middle = high; /* neighbouring floats */
        const double above = weigh(values, size, middle, best);
        const int reach = decided + above >= target;
        decided += reach ? 0.0 : above;
        size = copy_if(values, values, size, middle, reach);
    }
}

/* Collects the finite scores that reach bound, and returns how many there are. */
static int gather(const row_scratch *row, float bound) {
    int size = 0;
    bound = bound > -FLT_MAX ? bound : -FLT_MAX;
    for (int chunk = 0; chunk < row->num_chunks; chunk++)
        if (row->chunk_best[chunk] >= bound)
            size += copy_if(row->values + size, row->scores + chunk * CHUNK, CHUNK, bound, 1);
    return size;
}

static float top_k_threshold(const row_scratch *row, int top_k) {
    /* The k-th best of the chunks' bests is a lower bound: k scores at least reach it. */
    int size = copy_if(row->values, row->chunk_best, row->num_chunks, -FLT_MAX, 1);
    float bound = threshold_of(row->values, size, top_k, NAN);
    return threshold_of(row->values, gather(row, bound), top_k, NAN);
}

static double mass_of(const row_scratch *row, float best, float threshold) {
    double mass = 0.0;
    for (int chunk = 0; chunk < row->num_chunks; chunk++)
        if (row->chunk_best[chunk] >= threshold)
            mass += weigh(row->scores + chunk * CHUNK, CHUNK, threshold, best);
    return mass;
}

static float top_p_threshold(const row_scratch *row, float best, float threshold, float top_p) {
    const double mass = mass_of(row, best, threshold);
    /* Most of the mass lies close to the best: look further down only while it does not suffice. */
    for (float depth = 4.0f;; depth *= 2.0f) {
        const float bound = best - depth > threshold ? best - depth : threshold;
        const int size = gather(row, bound);
        if (bound == threshold || depth > 256.0f || weigh(row->values, size, bound, best) >= top_p * mass)
            return threshold_of(row->values, size, top_p * mass, best);
    }
}

static float filter_threshold(const sample_args *args, int64_t slot, const row_scratch *row, float best) {
    const float min_p = args->columns->min_p[slot], top_p = args->columns->top_p[slot];
    const int top_k = args->columns->top_k[slot];
    float threshold = min_p > 0.0f ? best + logf(min_p) : -INFINITY;
    if (top_k > 0 && top_k < row->vocab_size) {
        float other = top_k_threshold(row, top_k);
        threshold = other > threshold ? other : threshold;
    }
    if (top_p < 1.0f) {
        float other = top_p > 0.0f ? top_p_threshold(row, best, threshold, top_p) : best;
        threshold = other > threshold ? other : threshold;
    }
    return threshold;
}

/* The token with the best sum of score and noise among those whose score reaches threshold. */
static int draw(const row_scratch *row, int best_chunk, uint64_t seed, uint32_t position, float threshold) {
    enum { GROUP = 16 };
    float noisy[CHUNK], needed[GROUP], best = -INFINITY;
    int token = 0;
    /* The chunk with the best score goes first, out of turn, since it sets a high mark for all others. */
    for (int turn = -1; turn < row->num_chunks; turn++) {
        const int chunk = turn < 0 ? best_chunk : turn;
        if (turn >= 0 && turn % GROUP == 0)
            for (int i = 0; i < GROUP; i++) {
                /* A chunk's best score needs noise of best - score, that is a uniform of exp(-exp(score - best)),
                 * to win. The slack is for rounding, in favour of looking once too often. */
                float score = turn + i < row->num_chunks ? row->chunk_best[turn + i] : -INFINITY;
                float slack = 1e-3f + 1e-6f * fabsf(best), lead = score - best + slack;
                needed[i] = exp_of(-exp_of(lead < 4.0f ? lead : 4.0f));
            }
        const float need = turn < 0 ? 0.0f : needed[turn % GROUP];
        if (row->chunk_best[chunk] < threshold || need > MAX_UNIFORM)
            continue;
        if (chunk_uniforms(seed, position, chunk, noisy) < need)
            continue;
        const float *scores = row->scores + chunk * CHUNK;
        int32_t high = INT32_MIN;
        for (int i = 0; i < CHUNK; i++) {
            float sum = scores[i] - log_of(-log_of(noisy[i]));
            noisy[i] = scores[i] >= threshold ? sum : -INFINITY;
            int32_t key = key_of(noisy[i]);
            high = key > high ? key : high;
        }
        const float chunk_high = value_of(high);
        /* Ties go to the lower id, though the first chunk came out of turn. */
        if (chunk_high < best || (chunk_high == best && token <= chunk * CHUNK))
            continue;
        best = chunk_high;
        token = chunk * CHUNK;
        for (int i = 0; noisy[i] != best; i++)
            token++;
    }
    return token;
}

/* One row the long way: its logits are copied, processed, filtered and drawn from. Returns -1 as best_of does. */
static int process_row(sample_args *args, int64_t slot, const void *logits, int is_random, const row_scratch *row) {
    const float factor = is_random ? 1.0f / args->columns->temperature[slot] : 1.0f;
    const int is_edited = args->any_bias || args->any_penalty || args->any_min_tokens;
    int best_chunk = prepare(row, logits, args->is_bf16, is_edited ? 1.0f : factor);
    if (best_chunk >= 0 && is_edited) {
        if (args->any_bias)
            add_bias(args, slot, row);
        if (args->any_penalty && !penalise(args, slot, row))
            args->out_of_memory = 1;
        if (args->any_min_tokens)
            ban_stop_ids(args, slot, row);
        best_chunk = prepare(row, row->scores, 0, factor);
    }
    if (best_chunk < 0)
        return -1;
    const float best = row->chunk_best[best_chunk];
    if (!is_random) {
        int token = best_chunk * CHUNK;
        while (row->scores[token] != best)
            token++;
        return token;
    }
    const float threshold = args->any_filter ? filter_threshold(args, slot, row, best) : -INFINITY;
    const uint32_t position = (uint32_t)(args->num_tokens[slot] - args->num_prompt[slot]);
    return draw(row, best_chunk, (uint64_t)args->columns->seed[slot], position, threshold);
}

/* Logprobs of the logits as they came, which prepare has read without finding fault. */
static void report_logprobs(const sample_args *args, int index, int token, float best, const row_scratch *row) {
    const int num_top = args->max_logprobs;
    const float normaliser = best + (float)log(mass_of(row, best, -FLT_MAX)), chosen = row->scores[token];
    const float bound = num_top < row->vocab_size && num_top ? top_k_threshold(row, num_top) : -INFINITY;
    int32_t *ids = args->top_ids + (int64_t)index * num_top;
    float *logprobs = args->top_logprobs + (int64_t)index * num_top;
    int rank = 1, size = 0;
    for (int i = 0; i < row->vocab_size; i++)
        rank += row->scores[i] > chosen;
    for (int i = 0; i < row->vocab_size && num_top; i++) {
        const float score = row->scores[i];
        if (row->chunk_best[i / CHUNK] < bound) {
            i += CHUNK - 1;
            continue;
        }
        if (score < bound || (size == num_top && score <= logprobs[size - 1]))
            continue;
        int place = size < num_top ? size++ : num_top - 1;
        for (; place && score > logprobs[place - 1]; place--) {
            logprobs[place] = logprobs[place - 1];
            ids[place] = ids[place - 1];
        }
        logprobs[place] = score;
        ids[place] = i;
    }
    for (int i = 0; i < size; i++)
        logprobs[i] -= normaliser;
    args->token_logprob[index] = chosen - normaliser;
    args->rank[index] = rank;
}

static void sample_row(void *arg, int index) {
    sample_args *args = arg;
    const int64_t slot = args->slots[index];
    const void *logits = (const char *)args->logits + index * args->logits_stride * (args->is_bf16 ? 2 : 4);
    const int is_random = args->any_random && args->columns->temperature[slot] >= GREEDY_BELOW;
    const int is_edited = args->any_bias || args->any_penalty || args->any_min_tokens;
    const int is_reported = args->max_logprobs >= 0 && args->columns->num_logprobs[slot] >= 0;
    int token = is_random || is_edited ? 0 : best_of(logits, args->is_bf16, args->vocab_size);
    if (token >= 0 && (is_random || is_edited || is_reported)) {
        const size_t num_chunks = ((size_t)args->vocab_size + CHUNK - 1) / CHUNK, padded = num_chunks * CHUNK;
        float *memory = malloc((2 * padded + 16 + num_chunks) * sizeof *memory);
        if (!memory) {
            args->out_of_memory = 1;
            return;
        }
        const row_scratch row = {.scores = memory,
                                 .values = memory + padded,
                                 .chunk_best = memory + 2 * padded + 16,
                                 .vocab_size = args->vocab_size,
                                 .num_chunks = (int)num_chunks};
        if (is_random || is_edited)
            token = process_row(args, slot, logits, is_random, &row);
        if (token >= 0 && is_reported) {
            int best_chunk = prepare(&row, logits, args->is_bf16, 1.0f);
            report_logprobs(args, index, token, row.chunk_best[best_chunk], &row);
        }
        free(memory);
    }
    args->token_ids[index] = token < 0 ? 0 : token;
    args->finite[index] = token >= 0;
}

/* Samples every row; returns 0, or 1 when memory ran out and the results are void. */
int pagoda_sample(sample_args *args) {
    args->out_of_memory = 0;
    pagoda_parallel(sample_row, args, args->num_rows);
    return args->out_of_memory;
}

/* The uniforms of a row's whole vocabulary, which must equal kernels.philox.token_uniforms bit for bit. */
void pagoda_token_uniforms(int64_t seed, int32_t position, int32_t vocab_size, float *uniforms) {
    float block[CHUNK];
    for (int first = 0; first < vocab_size; first += CHUNK) {
        int size = vocab_size - first < CHUNK ? vocab_size - first : CHUNK;
        chunk_uniforms((uint64_t)seed, (uint32_t)position, first / CHUNK, block);
        memcpy(uniforms + first, block, (size_t)size * sizeof *block);
    }
}
