// Sums of products of all pairs of a layer's neurons: rows are centred and staged, and multiplied out when the stage
// is full, the upper triangle only.
//
// Rows are centred on the mean of their own batch; one more row carries the distance between the batch's mean and the
// stream's (Chan, Golub & LeVeque 1983, for pairs). fp32 adds up a block of rows, float64 the rest.

#include "vectors.h"

// The state of one stream; all memory belongs to the caller. A panel has 2 * WIDTH columns.
struct Stream {
    int64_t neurons, capacity, staged;
    int64_t* count;  // (neurons,)
    double* mean;    // (neurons,)
    float* stage;    // (panels, capacity, columns of a panel), zeros beyond the last neuron
    double* total;   // (neurons, neurons), of which the upper triangle is kept
};

namespace {

const int COLUMNS = 2 * WIDTH;
const int ROWS = WIDTH == 16 ? 8 : 4;  // of a tile (ROWS, COLUMNS) of the product: it stays in registers
// Rows that fp32 adds up: sums of one sign cost it a digit for each factor of 10. Narrow layers can afford few.
const int NARROW = 128, NARROW_BLOCK = 32, BLOCK = 128;
const int STEP = 64;  // positions of maps that are turned into rows together

// One tile over `rows` staged rows, added to the total.
void multiply_tile(const Stream& s, int64_t rows, int64_t i, int64_t panel) {
    const float* a = s.stage + i / COLUMNS * s.capacity * COLUMNS + i % COLUMNS;
    const float* b = s.stage + panel * s.capacity * COLUMNS;
    const int64_t block = s.neurons <= NARROW ? NARROW_BLOCK : BLOCK;
    double tile[ROWS][COLUMNS] = {};
    for (int64_t from = 0; from < rows; from += block) {
        int64_t n = rows - from < block ? rows - from : block;
        F sum[ROWS][2] = {};
        for (int64_t k = 0; k < n; ++k, a += COLUMNS, b += COLUMNS) {
            F low = load(b), high = load(b + WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                F left = all(a[r]);
                sum[r][0] += left * low;
                sum[r][1] += left * high;
            }
        }
        float plain[ROWS][COLUMNS];
        memcpy(plain, sum, sizeof plain);
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < COLUMNS; ++j) tile[r][j] += plain[r][j];
    }
    int64_t first = panel * COLUMNS, height = s.neurons - i, width = s.neurons - first;
    if (height > ROWS) height = ROWS;
    if (width > COLUMNS) width = COLUMNS;
    for (int64_t r = 0; r < height; ++r) {
        double* to = s.total + (i + r) * s.neurons + first;
        for (int64_t j = 0; j < width; ++j) to[j] += tile[r][j];
    }
}

struct Product {
    const Stream* stream;
    int64_t next;
};

void multiply_panels(void* data) {
    Product& product = *(Product*)data;
    const Stream& s = *product.stream;
    int64_t panels = (s.neurons + COLUMNS - 1) / COLUMNS;
    for (;;) {
        // The longest first, so that no thread is left with one at the end.
        int64_t panel = panels - 1 - __atomic_fetch_add(&product.next, 1, __ATOMIC_RELAXED);
        if (panel < 0) return;
        int64_t end = (panel + 1) * COLUMNS < s.neurons ? (panel + 1) * COLUMNS : s.neurons;
        for (int64_t i = 0; i < end; i += ROWS) multiply_tile(s, s.staged, i, panel);
    }
}

void flush(Stream& s, int64_t threads, Fork fork) {
    if (!s.staged) return;
    Product product = {&s, 0};
    if (threads > 1 && fork) fork(multiply_panels, &product, (unsigned)threads, 0);
    else multiply_panels(&product);
    s.staged = 0;
}

// `rows` rows of one panel, centred by a mean in two parts: x - high is exact where it matters, low takes the rest away.
template <class T>
void stage_rows(const T* x, int64_t stride, int64_t rows, int count, const float* high, const float* low, float* to) {
    if (count == COLUMNS) {
        F h[2] = {load(high), load(high + WIDTH)}, l[2] = {load(low), load(low + WIDTH)};
        for (int64_t r = 0; r < rows; ++r, x += stride, to += COLUMNS)
            for (int v = 0; v < 2; ++v) {
                F d = load(x + v * WIDTH) - h[v] - l[v];
                memcpy(to + v * WIDTH, &d, sizeof d);
            }
        return;
    }
    for (int64_t r = 0; r < rows; ++r, x += stride, to += COLUMNS)
        for (int j = 0; j < count; ++j) to[j] = one(x + j) - high[j] - low[j];
}

// The same for `positions` of `count` maps, which lie `inner` apart. In steps whose rows stay in the first cache.
template <class T>
void stage_maps(const T* x, int64_t inner, int64_t positions, int count, const float* high, const float* low,
                float* to) {
    for (int64_t from = 0; from < positions; from += STEP) {
        int n = (int)(positions - from < STEP ? positions - from : STEP);
        for (int j = 0; j < count; ++j) {
            const T* map = x + j * inner + from;
            float* column = to + from * COLUMNS + j;
            int i = 0;
            for (; i + WIDTH <= n; i += WIDTH) {
                __builtin_prefetch(map + STEP + i);
                F d = load(map + i) - all(high[j]) - all(low[j]);
#pragma GCC unroll 16
                for (int k = 0; k < WIDTH; ++k) column[(i + k) * COLUMNS] = d[k];
            }
            for (; i < n; ++i) column[i * COLUMNS] = one(map + i) - high[j] - low[j];
        }
    }
}

template <class T>
void stage(Stream& s, const T* x, int64_t outer, int64_t inner, int64_t stride, const double* mean, int64_t threads,
           Fork fork) {
    int64_t panels = (s.neurons + COLUMNS - 1) / COLUMNS;
    for (int64_t o = 0, i = 0; o < outer;) {
        if (s.staged == s.capacity) flush(s, threads, fork);
        int64_t free = s.capacity - s.staged, take = inner == 1 ? outer - o : inner - i;
        if (take > free) take = free;
        for (int64_t p = 0; p < panels; ++p) {
            int64_t first = p * COLUMNS;
            int count = (int)(s.neurons - first < COLUMNS ? s.neurons - first : COLUMNS);
            float high[COLUMNS] = {}, low[COLUMNS] = {};
            for (int j = 0; mean && j < count; ++j) {
                high[j] = (float)mean[first + j];
                low[j] = (float)(mean[first + j] - high[j]);
            }
            float* to = s.stage + (p * s.capacity + s.staged) * COLUMNS;
            const T* from = x + o * stride + first * inner + i;
            if (inner == 1) stage_rows(from, stride, take, count, high, low, to);
            else stage_maps(from, inner, take, count, high, low, to);
        }
        s.staged += take;
        if (inner == 1) o += take;
        else if ((i += take) == inner) i = 0, ++o;
    }
}

// Take n rows with their mean into the counts and means, and stage the row of the distance between the means.
void advance(Stream& s, const int64_t* each, int64_t common, const double* mean) {
    float* row = s.stage + s.staged * COLUMNS;
    for (int64_t c = 0; c < s.neurons; ++c) {
        int64_t n = each ? each[c] : common, before = s.count[c];
        double share = n ? (double)n / (double)(before + n) : 0, delta = n ? mean[c] - s.mean[c] : 0;
        s.count[c] = before + n;
        s.mean[c] += delta * share;
        row[c / COLUMNS * s.capacity * COLUMNS + c % COLUMNS] = (float)(delta * __builtin_sqrt((double)before * share));
    }
    s.staged += 1;
}

}  // namespace

// Lanes of a vector.
EXPORT int tracker_width() { return WIDTH; }

// Multiply out what is staged.
EXPORT void tracker_flush(Stream* stream, int64_t threads, Fork fork) { flush(*stream, threads, fork); }

// Take in x (outer, neurons, inner), as in tracker_activity, whose mean is `mean` (neurons,). With `counts` (neurons,)
// x is centred already, and only so many of its rows belong to each neuron.
EXPORT void tracker_covariance(Stream* stream, const void* x, int64_t type, int64_t outer, int64_t inner, int64_t stride,
                               const double* mean, const int64_t* counts, int64_t threads, Fork fork) {
    Stream& s = *stream;
    if (s.staged == s.capacity) flush(s, threads, fork);
    advance(s, counts, outer * inner, mean);
    const double* centre = counts ? 0 : mean;
    if (type == 0) stage(s, (const float*)x, outer, inner, stride, centre, threads, fork);
    else if (type == 1) stage(s, (const Bf16*)x, outer, inner, stride, centre, threads, fork);
    else stage(s, (const Fp16*)x, outer, inner, stride, centre, threads, fork);
}
