/* The lookup of CCE tables of one width in plain C, for `benchmarks.lookup`: c codes of 64 / c bits in a word.
 * Of IDs of table t: words[2i] has the codebook codes of ID i, words[2i + 1] the helper codes, column 0 in the lowest bits.
 * Bags of one ID have offsets == 0. */
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef uint64_t word;
#define INLINE static inline __attribute__((always_inline))
#define AHEAD 64

INLINE word mix(word x) {
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDull;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ull;
    return x ^ (x >> 33);
}

INLINE void pack_table(const int64_t *ids, int64_t count, const word *pointers, const word *a, const word *b, word k,
                       word *out, const int c) {
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(pointers + ids[i + AHEAD], 0, 0);
        word x = mix(ids[i]), helper = 0;
        for (int j = 0; j < c; j++) helper |= (((x * a[j] + b[j]) >> 32) * k >> 32) << (64 / c * j);
        out[2 * i] = pointers[ids[i]];
        out[2 * i + 1] = helper;
    }
}

void pack(int tables, const int64_t *ids, int64_t count, const word *const *pointers, const word *a, const word *b,
          word k, int c, word *out) {
    for (int t = 0; t < tables; t++) {
        const int64_t *mine = ids + t * count;
        word *to = out + 2 * t * count;
        if (c == 4) pack_table(mine, count, pointers[t], a + t * c, b + t * c, k, to, 4);
        else pack_table(mine, count, pointers[t], a + t * c, b + t * c, k, to, 8);
    }
}

INLINE void pool_column(const float *book, word k, int j, const word *words, const int64_t *offsets, int64_t first,
                        int64_t batch, float *out, int64_t stride, const int w, const int bits) {
    const float *helper = book + k * w;
    const word mask = (1ull << bits) - 1;
    for (int64_t bag = 0; bag < batch; bag++) {
        float sum[w];
        for (int e = 0; e < w; e++) sum[e] = 0;
        int64_t begin = offsets ? offsets[bag] : first + bag, end = offsets ? offsets[bag + 1] : begin + 1;
        for (int64_t i = begin; i < end; i++) {
            const float *x = book + ((words[2 * i] >> (bits * j)) & mask) * w;
            const float *y = helper + ((words[2 * i + 1] >> (bits * j)) & mask) * w;
            for (int e = 0; e < w; e++) sum[e] += x[e] + y[e];
        }
        memcpy(out + bag * stride, sum, 4 * w);
    }
}

INLINE void train_column(float *book, float *state, float *gradient, word k, int j, const word *words,
                         const int64_t *offsets, int64_t first, int64_t batch, const float *out, int64_t stride,
                         float rate, float epsilon, const int w, const int bits) {
    const word mask = (1ull << bits) - 1;
    float *helper = gradient + k * w;
    memset(gradient, 0, 8 * k * w);
    for (int64_t bag = 0; bag < batch; bag++) {
        float g[w];
        memcpy(g, out + bag * stride, 4 * w);
        int64_t begin = offsets ? offsets[bag] : first + bag, end = offsets ? offsets[bag + 1] : begin + 1;
        for (int64_t i = begin; i < end; i++) {
            float *x = gradient + ((words[2 * i] >> (bits * j)) & mask) * w;
            for (int e = 0; e < w; e++) x[e] += g[e];
            float *y = helper + ((words[2 * i + 1] >> (bits * j)) & mask) * w;
            for (int e = 0; e < w; e++) y[e] += g[e];
        }
    }
    for (word r = 0; r < 2 * k; r++) {
        float squares = 0;
        for (int e = 0; e < w; e++) squares += gradient[r * w + e] * gradient[r * w + e];
        if (squares == 0) continue;
        state[r] += squares / w;
        float step = rate / (sqrtf(state[r]) + epsilon);
        for (int e = 0; e < w; e++) book[r * w + e] -= step * gradient[r * w + e];
    }
}

#define OF_WIDTH(CALL)                                                                                                 \
    if (c == 4 && w == 4) { CALL(4, 16); }                                                                             \
    if (c == 4 && w == 16) { CALL(16, 16); }                                                                           \
    if (c == 4 && w == 32) { CALL(32, 16); }                                                                           \
    if (c == 8 && w == 2) { CALL(2, 8); }                                                                              \
    if (c == 8 && w == 8) { CALL(8, 8); }

void pool(int tables, const float *const *books, word k, int c, int w, const word *words, const int64_t *offsets,
          int64_t batch, float *out) {
    const int64_t stride = (int64_t)tables * c * w;
    for (int t = 0; t < tables; t++)
        for (int j = 0; j < c; j++) {
#define POOL(W, BITS)                                                                                                  \
    pool_column(books[t] + 2 * j * k * W, k, j, words, offsets ? offsets + t * batch : 0, t * batch, batch,            \
                out + (int64_t)(t * c + j) * W, stride, W, BITS)
            OF_WIDTH(POOL)
        }
}

void train(int tables, float *const *books, float *const *states, float *gradient, word k, int c, int w,
           const word *words, const int64_t *offsets, int64_t batch, const float *out, float rate, float epsilon) {
    const int64_t stride = (int64_t)tables * c * w;
    for (int t = 0; t < tables; t++)
        for (int j = 0; j < c; j++) {
#define TRAIN(W, BITS)                                                                                                 \
    train_column(books[t] + 2 * j * k * W, states[t] + 2 * j * k, gradient, k, j, words,                               \
                 offsets ? offsets + t * batch : 0, t * batch, batch, out + (int64_t)(t * c + j) * W, stride, rate,    \
                 epsilon, W, BITS)
            OF_WIDTH(TRAIN)
        }
}
