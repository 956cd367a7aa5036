// Sums of products of all pairs of a layer's neurons: rows are centred and staged, and multiplied out when the stage
// is full, the upper triangle only.
//
// Rows are centred on the mean of their own batch; one more row carries the distance between the batch's mean and the
// stream's (Chan, Golub & LeVeque 1983, for pairs). Of wide layers fp32 adds up a block of rows, and float64 the rest;
// narrow ones are staged and multiplied in float64, so that what depends exactly is seen to.

#include "vectors.h"

// The state of one stream; all memory belongs to the caller. A panel has two vectors of columns.
struct Stream {
    int64_t neurons, capacity, staged;
    int64_t precise;  // whether the stage is float64
    int64_t* count;   // (neurons,)
    double* mean;     // (neurons,)
    void* stage;      // (panels, capacity, columns of a panel), zeros beyond the last neuron
    double* total;    // (neurons, neurons), of which the upper triangle is kept
};

namespace {

typedef double D __attribute__((vector_size(4 * WIDTH)));
typedef float L __attribute__((vector_size(2 * WIDTH)));  // as many floats as D has doubles

template <class S> struct Staged;
template <> struct Staged<float> { typedef F Vector; static const int LANES = WIDTH; };
template <> struct Staged<double> { typedef D Vector; static const int LANES = WIDTH / 2; };

const int ROWS = WIDTH == 16 ? 8 : 4;  // of a tile (ROWS, two vectors) of the product: it stays in registers
const int BLOCK = 128;                 // rows that fp32 adds up: sums of one sign cost it a digit for each factor of 10
const int STEP = 64;                   // positions of maps that are turned into rows together

INLINE double one(const double* p) { return *p; }
template <class V, class S> INLINE V read(const S* p) { V x; memcpy(&x, p, sizeof x); return x; }

// One tile over `rows` staged rows, added to the total.
template <class S>
void multiply_tile(const Stream& s, int64_t rows, int64_t i, int64_t panel) {
    typedef typename Staged<S>::Vector V;
    const int lanes = Staged<S>::LANES, columns = 2 * lanes;
    const S* a = (const S*)s.stage + i / columns * s.capacity * columns + i % columns;
    const S* b = (const S*)s.stage + panel * s.capacity * columns;
    const int64_t block = sizeof(S) == 8 ? rows : BLOCK;
    double tile[ROWS][columns] = {};
    for (int64_t from = 0; from < rows; from += block) {
        int64_t n = rows - from < block ? rows - from : block;
        V sum[ROWS][2] = {};
        for (int64_t k = 0; k < n; ++k, a += columns, b += columns) {
            V low = read<V>(b), high = read<V>(b + lanes);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                V left = V{} + a[r];
                sum[r][0] += left * low;
                sum[r][1] += left * high;
            }
        }
        S plain[ROWS][columns];
        memcpy(plain, sum, sizeof plain);
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < columns; ++j) tile[r][j] += plain[r][j];
    }
    int64_t first = panel * columns, height = s.neurons - i, width = s.neurons - first;
    if (height > ROWS) height = ROWS;
    if (width > columns) width = columns;
    for (int64_t r = 0; r < height; ++r) {
        double* to = s.total + (i + r) * s.neurons + first;
        for (int64_t j = 0; j < width; ++j) to[j] += tile[r][j];
    }
}

struct Product {
    const Stream* stream;
    int64_t next;
};

template <class S>
void multiply_panels(void* data) {
    Product& product = *(Product*)data;
    const Stream& s = *product.stream;
    const int columns = 2 * Staged<S>::LANES;
    int64_t panels = (s.neurons + columns - 1) / columns;
    for (;;) {
        // The longest first, so that no thread is left with one at the end.
        int64_t panel = panels - 1 - __atomic_fetch_add(&product.next, 1, __ATOMIC_RELAXED);
        if (panel < 0) return;
        int64_t end = (panel + 1) * columns < s.neurons ? (panel + 1) * columns : s.neurons;
        for (int64_t i = 0; i < end; i += ROWS) multiply_tile<S>(s, s.staged, i, panel);
    }
}

void flush(Stream& s, int64_t threads, Fork fork) {
    if (!s.staged) return;
    Product product = {&s, 0};
    void (*work)(void*) = s.precise ? multiply_panels<double> : multiply_panels<float>;
    if (threads > 1 && fork) fork(work, &product, (unsigned)threads, 0);
    else work(&product);
    s.staged = 0;
}

// Means of one panel. In fp32 they have two parts: x - high is exact where it matters, low takes the rest away.
template <class S> struct Centre;
template <> struct Centre<float> {
    float high[2 * WIDTH] = {}, low[2 * WIDTH] = {};
    void set(int j, double mean) { high[j] = (float)mean, low[j] = (float)(mean - high[j]); }
    INLINE float of(int j, float x) const { return x - high[j] - low[j]; }
    INLINE F of_all(int j, F x) const { return x - load(high + j) - load(low + j); }
};
template <> struct Centre<double> {
    double mean[WIDTH] = {};
    void set(int j, double m) { mean[j] = m; }
    INLINE double of(int j, double x) const { return x - mean[j]; }
};

// `rows` rows of one panel.
template <class T>
void stage_rows(const T* x, int64_t stride, int64_t rows, int count, const Centre<float>& centre, float* to) {
    const int columns = 2 * WIDTH;
    if (count == columns) {
        for (int64_t r = 0; r < rows; ++r, x += stride, to += columns)
            for (int v = 0; v < columns; v += WIDTH) {
                F d = centre.of_all(v, load(x + v));
                memcpy(to + v, &d, sizeof d);
            }
        return;
    }
    for (int64_t r = 0; r < rows; ++r, x += stride, to += columns)
        for (int j = 0; j < count; ++j) to[j] = centre.of(j, one(x + j));
}

template <class T>
void stage_rows(const T* x, int64_t stride, int64_t rows, int count, const Centre<double>& centre, double* to) {
    for (int64_t r = 0; r < rows; ++r, x += stride, to += WIDTH)
        for (int j = 0; j < count; ++j) to[j] = centre.of(j, one(x + j));
}

INLINE void stage_rows(const float* x, int64_t stride, int64_t rows, int count, const Centre<double>& centre,
                       double* to) {
    if (count < WIDTH) return stage_rows<float>(x, stride, rows, count, centre, to);
    for (int64_t r = 0; r < rows; ++r, x += stride, to += WIDTH)
        for (int v = 0; v < WIDTH; v += WIDTH / 2) {
            D d = __builtin_convertvector(read<L>(x + v), D) - read<D>(centre.mean + v);
            memcpy(to + v, &d, sizeof d);
        }
}

// The same for `positions` of `count` maps, which lie `inner` apart. In steps whose rows stay in the first cache.
template <class T, class S>
void stage_maps(const T* x, int64_t inner, int64_t positions, int count, const Centre<S>& centre, S* to) {
    const int columns = 2 * Staged<S>::LANES;
    for (int64_t from = 0; from < positions; from += STEP) {
        int n = (int)(positions - from < STEP ? positions - from : STEP);
        for (int j = 0; j < count; ++j) {
            const T* map = x + j * inner + from;
            S* column = to + from * columns + j;
            int i = 0;
            for (; i + WIDTH <= n; i += WIDTH) {
                __builtin_prefetch(map + STEP + i);
                F values = load(map + i);
#pragma GCC unroll 16
                for (int k = 0; k < WIDTH; ++k) column[(i + k) * columns] = centre.of(j, values[k]);
            }
            for (; i < n; ++i) column[i * columns] = centre.of(j, one(map + i));
        }
    }
}

INLINE void stage_maps(const double* x, int64_t inner, int64_t positions, int count, const Centre<double>& centre,
                       double* to) {
    for (int j = 0; j < count; ++j)
        for (int64_t i = 0; i < positions; ++i) to[i * WIDTH + j] = centre.of(j, x[j * inner + i]);
}

template <class S, class T>
void stage(Stream& s, const T* x, int64_t outer, int64_t inner, int64_t stride, const double* mean, int64_t threads,
           Fork fork) {
    const int columns = 2 * Staged<S>::LANES;
    int64_t panels = (s.neurons + columns - 1) / columns;
    for (int64_t o = 0, i = 0; o < outer;) {
        if (s.staged == s.capacity) flush(s, threads, fork);
        int64_t free = s.capacity - s.staged, take = inner == 1 ? outer - o : inner - i;
        if (take > free) take = free;
        for (int64_t p = 0; p < panels; ++p) {
            int64_t first = p * columns;
            int count = (int)(s.neurons - first < columns ? s.neurons - first : columns);
            Centre<S> centre;
            for (int j = 0; mean && j < count; ++j) centre.set(j, mean[first + j]);
            S* to = (S*)s.stage + (p * s.capacity + s.staged) * columns;
            const T* from = x + o * stride + first * inner + i;
            if (inner == 1) stage_rows(from, stride, take, count, centre, to);
            else stage_maps(from, inner, take, count, centre, to);
        }
        s.staged += take;
        if (inner == 1) o += take;
        else if ((i += take) == inner) i = 0, ++o;
    }
}

// Take n rows with their mean into the counts and means, and stage the row of the distance between the means.
template <class S>
void advance(Stream& s, const int64_t* each, int64_t common, const double* mean) {
    const int columns = 2 * Staged<S>::LANES;
    S* row = (S*)s.stage + s.staged * columns;
    for (int64_t c = 0; c < s.neurons; ++c) {
        int64_t n = each ? each[c] : common, before = s.count[c];
        double share = n ? (double)n / (double)(before + n) : 0, delta = n ? mean[c] - s.mean[c] : 0;
        s.count[c] = before + n;
        s.mean[c] += delta * share;
        row[c / columns * s.capacity * columns + c % columns] = (S)(delta * __builtin_sqrt((double)before * share));
    }
    s.staged += 1;
}

template <class S>
void take(Stream& s, const void* x, int64_t type, int64_t outer, int64_t inner, int64_t stride, const double* mean,
          int64_t threads, Fork fork) {
    if (type == 0) stage<S>(s, (const float*)x, outer, inner, stride, mean, threads, fork);
    else if (type == 1) stage<S>(s, (const Bf16*)x, outer, inner, stride, mean, threads, fork);
    else if (type == 2) stage<S>(s, (const Fp16*)x, outer, inner, stride, mean, threads, fork);
}

}  // namespace

// Lanes of a vector.
EXPORT int tracker_width() { return WIDTH; }

// Multiply out what is staged.
EXPORT void tracker_flush(Stream* stream, int64_t threads, Fork fork) { flush(*stream, threads, fork); }

// Take in x (outer, neurons, inner), as in tracker_activity, whose mean is `mean` (neurons,); of a precise stream type 3
// is float64. With `counts` (neurons,) x is centred already, and only so many of its rows belong to each neuron.
EXPORT void tracker_covariance(Stream* stream, const void* x, int64_t type, int64_t outer, int64_t inner, int64_t stride,
                               const double* mean, const int64_t* counts, int64_t threads, Fork fork) {
    Stream& s = *stream;
    if (s.staged == s.capacity) flush(s, threads, fork);
    if (s.precise) advance<double>(s, counts, outer * inner, mean);
    else advance<float>(s, counts, outer * inner, mean);
    const double* centre = counts ? 0 : mean;
    if (s.precise && type == 3) stage<double>(s, (const double*)x, outer, inner, stride, centre, threads, fork);
    else if (s.precise) take<double>(s, x, type, outer, inner, stride, centre, threads, fork);
    else take<float>(s, x, type, outer, inner, stride, centre, threads, fork);
}

// Pairs i < j with |products(i, j)| * scale[j] >= bound[i], row by row: their number, of which `room` are written to
// `found` (room, 2). NaN finds nothing.
EXPORT int64_t tracker_pairs(const double* products, int64_t neurons, const double* scale, const double* bound,
                             int64_t* found, int64_t room) {
    const int CHUNK = 64;
    int64_t count = 0;
    for (int64_t i = 0; i < neurons; ++i) {
        const double* row = products + i * neurons;
        const double least = bound[i];
        for (int64_t from = i + 1; from < neurons; from += CHUNK) {
            int64_t end = from + CHUNK < neurons ? from + CHUNK : neurons;
            int any = 0;
            for (int64_t j = from; j < end; ++j) any |= __builtin_fabs(row[j]) * scale[j] >= least;
            for (int64_t j = from; any && j < end; ++j)
                if (__builtin_fabs(row[j]) * scale[j] >= least) {
                    if (count < room) found[2 * count] = i, found[2 * count + 1] = j;
                    ++count;
                }
        }
    }
    return count;
}
