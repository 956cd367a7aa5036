// The statistics of one layer output in one pass, merged into a table of float64.
//
// Built by `build.py` with whatever compiler there is, for the vector width that torch found on this machine: code
// for 64-byte vectors that runs on 32-byte ones is many times slower than either. No headers but C's, no library.
//
// Numerics: values are shifted by K before they are squared. K is the mean of the rows before; where a chunk turns
// out to lie elsewhere, it is read again around its own mean while it is in the first cache ("corrected two-pass",
// Chan, Golub & LeVeque 1983, eq. 1.7). So cancellation never costs more than a factor 5 of fp32's rounding. Chunks
// are merged in float64 (eq. 2.1).

#include "vectors.h"

namespace {

INLINE F magnitude(F x) { U b; memcpy(&b, &x, sizeof b); return floats(b & 0x7fffffff); }
INLINE F smaller(F a, F b) { return a < b ? a : b; }
INLINE F larger(F a, F b) { return a > b ? a : b; }

const int PANEL = 64;     // columns that are reduced together
const int CHUNK = 64;     // rows that fp32 adds up; with a panel of fp32 they are 16 KiB
const int AHEAD = 16;     // rows fetched early: hardware does not follow steps of a page
const int EARLY = 1024;   // values of maps fetched early: they lie far apart
const int RUN = 4096;     // values of one map that fp32 adds up, in 2 * WIDTH lanes
const int SHORT_MAP = 32; // maps of fewer positions are reduced as columns and folded
const double LARGEST = __DBL_MAX__;
const double KEPT = 0.2;  // of a sum of squares must remain when the mean is taken out

// What fp32 found in a chunk of rows, column by column.
struct Sums {
    float shift[PANEL], sum[PANEL], square[PANEL], low[PANEL], high[PANEL];
    int32_t fired[PANEL], zeros[PANEL];
};

// What is known of a panel of columns, or of neurons, all of one count.
struct Moments {
    double mean[PANEL], m2[PANEL], fired[PANEL], zeros[PANEL], low[PANEL], high[PANEL];
};
const int FIELDS = 6;

template <class T, int N>
INLINE void sweep_vectors(const T* x, int64_t stride, int rows, float threshold, Sums& out, int at) {
    F shift[N], sum[N], square[N], low[N], high[N], limit = all(threshold);
    I fired[N], zeros[N];
    for (int v = 0; v < N; ++v) {
        shift[v] = load(out.shift + at + v * WIDTH);
        sum[v] = square[v] = F{};
        fired[v] = zeros[v] = I{};
        low[v] = all(__builtin_inff());
        high[v] = all(-__builtin_inff());
    }
    for (int r = 0; r < rows; ++r, x += stride)
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
            if (v * WIDTH * sizeof(T) % 64 == 0) __builtin_prefetch(x + AHEAD * stride + v * WIDTH);
            F a = load(x + v * WIDTH), d = a - shift[v];
            sum[v] += d;
            square[v] += d * d;
            low[v] = smaller(a, low[v]);
            high[v] = larger(a, high[v]);
            fired[v] -= magnitude(a) > limit;
            zeros[v] -= a == 0;
        }
    for (int v = 0; v < N; ++v) {
        int i = at + v * WIDTH;
        memcpy(out.sum + i, &sum[v], sizeof(F));
        memcpy(out.square + i, &square[v], sizeof(F));
        memcpy(out.low + i, &low[v], sizeof(F));
        memcpy(out.high + i, &high[v], sizeof(F));
        memcpy(out.fired + i, &fired[v], sizeof(F));
        memcpy(out.zeros + i, &zeros[v], sizeof(F));
    }
}

template <class T>
void sweep_columns(const T* x, int64_t stride, int rows, int width, float threshold, Sums& out) {
    const int N = WIDTH == 8 ? 2 : 4;
    int at = 0;
    for (; at + N * WIDTH <= width; at += N * WIDTH)
        sweep_vectors<T, N>(x + at, stride, rows, threshold, out, at);
    for (; at + WIDTH <= width; at += WIDTH)
        sweep_vectors<T, 1>(x + at, stride, rows, threshold, out, at);
    if (at < width) {  // the last columns, in a vector of their own
        T tail[CHUNK * WIDTH] = {};
        for (int r = 0; r < rows; ++r) memcpy(tail + r * WIDTH, x + r * stride + at, (width - at) * sizeof(T));
        sweep_vectors<T, 1>(tail, WIDTH, rows, threshold, out, at);
    }
}

// Chan's formula for `more` values with their mean and m2; written so that compilers make vectors of a loop of it.
INLINE void merge(double& mean, double& m2, double share, double weight, double mean_b, double m2_b) {
    double delta = mean_b - mean;
    mean += delta * share;
    m2 += m2_b + delta * delta * weight;
}

// A panel of columns over `rows` rows, shifted by their means before.
template <class T>
void reduce_panel(const T* x, int64_t stride, int64_t rows, int width, float threshold, const float* shift,
                  Moments& found) {
    const int lanes = (width + WIDTH - 1) / WIDTH * WIDTH;
    Sums s;
    for (int j = 0; j < lanes; ++j) {
        s.shift[j] = j < width ? shift[j] : 0;
        found.mean[j] = found.m2[j] = found.fired[j] = found.zeros[j] = 0;
        found.low[j] = __builtin_inf();
        found.high[j] = -__builtin_inf();
    }
    for (int64_t done = 0; done < rows;) {
        int n = rows - done < CHUNK ? (int)(rows - done) : CHUNK;
        double inverse = 1.0 / n, share = (double)n / (double)(done + n), weight = share * (double)done;
        double deviation[PANEL], own[PANEL];
        for (int attempt = 0;; ++attempt) {
            sweep_columns(x, stride, n, width, threshold, s);
            int64_t lost = 0;
            for (int j = 0; j < lanes; ++j) {
                double square = s.square[j];
                deviation[j] = s.sum[j] * inverse;
                own[j] = square - s.sum[j] * deviation[j];
                lost += !(own[j] >= KEPT * square);
            }
            if (!lost || attempt == 3) break;
            // Around its mean; if that was too far off to be exact, once around its first row.
            for (int j = 0; j < width; ++j)
                s.shift[j] = attempt == 1 ? one(x + j) : (float)(s.shift[j] + deviation[j]);
        }
        for (int j = 0; j < lanes; ++j) {
            double here = s.shift[j] + deviation[j];
            s.shift[j] = (float)here;  // for the next chunk
            merge(found.mean[j], found.m2[j], share, weight, here, own[j] < 0 ? 0 : own[j]);
            found.fired[j] += s.fired[j];
            found.zeros[j] += s.zeros[j];
            found.low[j] = s.low[j] < found.low[j] ? s.low[j] : found.low[j];
            found.high[j] = s.high[j] > found.high[j] ? s.high[j] : found.high[j];
        }
        x += n * stride;
        done += n;
    }
}

// The `size` columns from `at` on are the positions of one neuron's maps: into neuron `to`.
void fold(Moments& found, int at, int size, double rows, int to) {
    double sum = 0, square = 0, m2 = 0, fired = 0, zeros = 0, origin = found.mean[at];
    double low = __builtin_inf(), high = -__builtin_inf();
    for (int j = at; j < at + size; ++j) {
        double d = found.mean[j] - origin;
        sum += d;
        square += d * d;
        m2 += found.m2[j];
        fired += found.fired[j];
        zeros += found.zeros[j];
        low = found.low[j] < low ? found.low[j] : low;
        high = found.high[j] > high ? found.high[j] : high;
    }
    double between = square - sum * sum / size;
    found.mean[to] = origin + sum / size;
    found.m2[to] = m2 + (between < 0 ? 0 : between) * rows;
    found.fired[to] = fired;
    found.zeros[to] = zeros;
    found.low[to] = low;
    found.high[to] = high;
}

struct Run { double sum, square; float low, high; int64_t fired, zeros; };

// `maps` maps of `size` values each, `stride` apart, around one shift.
template <class T>
Run sweep_run(const T* x, int64_t stride, int maps, int size, float shift, float threshold) {
    const int N = 2;
    F k = all(shift), limit = all(threshold), sum[N] = {}, square[N] = {}, low[N], high[N];
    I fired[N] = {}, zeros[N] = {};
    for (int v = 0; v < N; ++v) low[v] = all(__builtin_inff()), high[v] = all(-__builtin_inff());
    auto add = [&](const T* p, int v) __attribute__((always_inline)) {
        F a = load(p), d = a - k;
        sum[v] += d;
        square[v] += d * d;
        low[v] = smaller(a, low[v]);
        high[v] = larger(a, high[v]);
        fired[v] -= magnitude(a) > limit;
        zeros[v] -= a == 0;
    };
    Run run = {0, 0, __builtin_inff(), -__builtin_inff(), 0, 0};
    const int REST = RUN / SHORT_MAP * WIDTH;
    T rest[REST];
    int free = REST;
    const int64_t ahead = (size < EARLY ? EARLY / size : 1) * stride;
    for (int m = 0; m < maps; ++m, x += stride) {
        int i = 0;
        for (; i + N * WIDTH <= size; i += N * WIDTH)
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) {
                if (v * WIDTH * sizeof(T) % 64 == 0) __builtin_prefetch(x + ahead + i + v * WIDTH);
                add(x + i + v * WIDTH, v);
            }
        if (i + WIDTH <= size) add(x + i, 0), i += WIDTH;
        // The last vector of the map is laid before what is there; all but its last values are overwritten next.
        memcpy(rest + free - WIDTH, x + size - WIDTH, sizeof(T) * WIDTH);
        free -= size - i;
    }
    for (; free + WIDTH <= REST; free += WIDTH) add(rest + free, 1);
    for (; free < REST; ++free) {
        float a = one(rest + free), d = a - shift;
        run.sum += d;
        run.square += (double)d * d;
        run.low = a < run.low ? a : run.low;
        run.high = a > run.high ? a : run.high;
        run.fired += __builtin_fabsf(a) > threshold;
        run.zeros += a == 0;
    }
    for (int v = 0; v < N; ++v)
        for (int j = 0; j < WIDTH; ++j) {
            run.sum += sum[v][j];
            run.square += square[v][j];
            run.fired += fired[v][j];
            run.zeros += zeros[v][j];
            run.low = low[v][j] < run.low ? low[v][j] : run.low;
            run.high = high[v][j] > run.high ? high[v][j] : run.high;
        }
    return run;
}

// One neuron's maps, `maps` of `size` values each, `stride` apart: into neuron `to`.
template <class T>
void reduce_maps(const T* x, int64_t stride, int64_t maps, int64_t size, float threshold, float shift, Moments& found,
                 int to) {
    double mean = 0, m2 = 0, done = 0;
    int64_t fired = 0, zeros = 0, together = size < RUN ? RUN / size : 1;
    float low = __builtin_inff(), high = -__builtin_inff();
    for (int64_t m = 0; m < maps; m += together, x += together * stride) {
        int count = (int)(maps - m < together ? maps - m : together);
        for (int64_t from = 0; from < size; from += RUN) {
            int take = (int)(size - from < RUN ? size - from : RUN);
            double n = (double)take * count, deviation, own;
            Run run;
            for (int attempt = 0;; ++attempt) {
                run = sweep_run(x + from, stride, count, take, shift, threshold);
                deviation = run.sum / n;
                own = run.square - run.sum * deviation;
                if (own >= KEPT * run.square || attempt == 3) break;
                shift = attempt == 1 ? one(x + from) : (float)(shift + deviation);
            }
            double here = shift + deviation, share = n / (done + n);
            shift = (float)here;
            merge(mean, m2, share, share * done, here, own < 0 ? 0 : own);
            done += n;
            fired += run.fired;
            zeros += run.zeros;
            low = run.low < low ? run.low : low;
            high = run.high > high ? run.high : high;
        }
    }
    found.mean[to] = mean;
    found.m2[to] = m2;
    found.fired[to] = (double)fired;
    found.zeros[to] = (double)zeros;
    found.low[to] = low;
    found.high[to] = high;
}

struct Job {
    const void* x;
    int64_t type, outer, neurons, inner, stride;
    float threshold;
    const double* before;  // mean of each neuron so far
    int64_t group, groups, parts;  // neurons of an item; items of a part of the rows
    double* found;  // (parts, FIELDS, neurons)
    int64_t next;
};

INLINE int64_t begin_of(const Job& job, int64_t part) { return job.outer * part / job.parts; }

template <class T>
void reduce_item(const Job& job, int64_t item) {
    int64_t part = item / job.groups, first = item % job.groups * job.group;
    int64_t begin = begin_of(job, part), rows = begin_of(job, part + 1) - begin, inner = job.inner;
    int count = (int)(job.neurons - first < job.group ? job.neurons - first : job.group);
    const T* x = (const T*)job.x + begin * job.stride + first * inner;
    float shift[PANEL];
    Moments found;
    for (int i = 0; i < count; ++i) shift[i] = (float)job.before[first + i];
    if (inner == 1) {
        reduce_panel(x, job.stride, rows, count, job.threshold, shift, found);
    } else if (inner < SHORT_MAP) {
        int size = (int)inner;
        float shifts[PANEL] = {};
        for (int i = 0, j = 0; i < count; ++i)
            for (int end = j + size; j < end; ++j) shifts[j] = shift[i];
        reduce_panel(x, job.stride, rows, count * size, job.threshold, shifts, found);
        for (int i = 0; i < count; ++i) fold(found, i * size, size, (double)rows, i);
    } else {
        for (int i = 0; i < count; ++i)
            reduce_maps(x + i * inner, job.stride, rows, inner, job.threshold, shift[i], found, i);
    }
    const double* fields[FIELDS] = {found.mean, found.m2, found.fired, found.zeros, found.low, found.high};
    double* to = job.found + part * FIELDS * job.neurons + first;
    for (int f = 0; f < FIELDS; ++f, to += job.neurons) memcpy(to, fields[f], count * sizeof(double));
}

void reduce_items(void* data) {
    Job& job = *(Job*)data;
    for (;;) {
        int64_t item = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (item >= job.groups * job.parts) return;
        if (job.type == 0) reduce_item<float>(job, item);
        else if (job.type == 1) reduce_item<Bf16>(job, item);
        else reduce_item<Fp16>(job, item);
    }
}

// Rows of one part, merged into `into`, which has counted `before` (common to all, or each its own in `counts`).
struct Fields { double *mean, *m2, *fired, *zeros, *low, *high; };

INLINE Fields fields_at(double* p, int64_t n) { return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n}; }

INLINE void merge_neuron(const Fields& a, const Fields& b, int64_t c, double share, double weight) {
    merge(a.mean[c], a.m2[c], share, weight, b.mean[c], b.m2[c]);
    a.fired[c] += b.fired[c];
    a.zeros[c] += b.zeros[c];
    a.low[c] = b.low[c] < a.low[c] ? b.low[c] : a.low[c];
    a.high[c] = b.high[c] > a.high[c] ? b.high[c] : a.high[c];
}

}  // namespace

// Merge x (outer, neurons, inner) into table (9, neurons), rows as in activity.py. x[o][c][i] lies at
// o * stride + c * inner + i; type: 0 float32, 1 bfloat16, 2 float16. `mean`, if given, receives the means of x.
// Returns 0; or 1, having written nothing, if x holds NaN, infinity, or values too large to be squared; or 2 for
// want of memory.
EXPORT int tracker_activity(const void* x, int64_t type, int64_t outer, int64_t neurons, int64_t inner, int64_t stride,
                            double threshold, double* table, double* mean, int64_t threads, Fork fork) {
    Job job = {x, type, outer, neurons, inner, stride, (float)threshold, table + 5 * neurons, 0, 0, 1, 0, 0};
    job.group = inner == 1 ? PANEL : inner < SHORT_MAP ? PANEL / inner : threads > 1 ? 1 : PANEL;
    job.groups = (neurons + job.group - 1) / job.group;
    if (threads > 1 && job.groups < 4 * threads) {
        int64_t most = outer / (inner < SHORT_MAP ? CHUNK : 1);
        job.parts = (4 * threads + job.groups - 1) / job.groups;
        if (job.parts > most) job.parts = most < 1 ? 1 : most;
    }
    job.found = (double*)malloc((size_t)(job.parts * FIELDS * neurons) * sizeof(double));
    if (!job.found) return 2;
    if (threads > 1 && fork) fork(reduce_items, &job, (unsigned)threads, 0);
    else reduce_items(&job);

    const Fields found = fields_at(job.found, neurons);
    for (int64_t p = 1; p < job.parts; ++p) {
        double before = (double)begin_of(job, p), total = (double)begin_of(job, p + 1), share = (total - before) / total;
        Fields part = fields_at(job.found + p * FIELDS * neurons, neurons);
        for (int64_t c = 0; c < neurons; ++c) merge_neuron(found, part, c, share, share * before * (double)inner);
    }
    int64_t broken = 0;
    for (int64_t c = 0; c < neurons; ++c) broken += !(found.m2[c] <= LARGEST) | !(__builtin_fabs(found.mean[c]) <= LARGEST);
    if (!broken) {
        double n = (double)outer * (double)inner, *counts = table, *batches = table + 4 * neurons;
        const Fields all = {table + 5 * neurons, table + 6 * neurons, table + neurons,
                            table + 2 * neurons, table + 7 * neurons, table + 8 * neurons};
        for (int64_t c = 0; c < neurons; ++c) {
            double before = counts[c], share = n / (before + n);
            merge_neuron(all, found, c, share, share * before);
            counts[c] = before + n;
            batches[c] += 1;
        }
        if (mean) memcpy(mean, found.mean, (size_t)neurons * sizeof(double));
    }
    free(job.found);
    return broken ? 1 : 0;
}
