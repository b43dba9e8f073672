// The yardsticks of benchmarks/gather.py: the loop of torchrec_cce.kernels.packed.gather_words, and less than that.
#include <stdint.h>

enum { AHEAD = 96 };

int64_t gather(const uint64_t *words, int64_t n, const int64_t *ids, uint64_t *out, int64_t count) {
    int64_t bad = -1;
    int64_t i = 0;
    for (; i < count - AHEAD; i++) {
        __builtin_prefetch(words + ids[i + AHEAD], 0, 1);
        uint64_t x = (uint64_t)ids[i];
        if (__builtin_expect(x < (uint64_t)n, 1)) {
            out[i] = words[x];
        } else {
            out[i] = 0;
            if (bad < 0) bad = i;
        }
    }
    for (; i < count; i++) {
        uint64_t x = (uint64_t)ids[i];
        if (x < (uint64_t)n) {
            out[i] = words[x];
        } else {
            out[i] = 0;
            if (bad < 0) bad = i;
        }
    }
    return bad;
}

// How fast one core gets those cache lines at all: no bounds check, and only the sum is written.
int64_t read_only(const uint64_t *words, int64_t n, const int64_t *ids, uint64_t *out, int64_t count) {
    uint64_t sum = 0;
    int64_t i = 0;
    for (; i < count - AHEAD; i++) {
        __builtin_prefetch(words + ids[i + AHEAD], 0, 1);
        sum += words[ids[i]];
    }
    for (; i < count; i++) sum += words[ids[i]];
    out[0] = sum;
    (void)n;
    return -1;
}
