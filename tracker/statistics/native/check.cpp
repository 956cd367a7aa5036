// Runs the kernel once over every layout and type, in a process of its own: what crashes here is not loaded.

#include <stdint.h>
#include <string.h>

extern "C" int tracker_activity(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, double, double*, double*,
                                int64_t, void (*)(void (*)(void*), void*, unsigned, unsigned));

struct Stream {
    int64_t neurons, capacity, staged, precise;
    int64_t* count;
    double* mean;
    void* stage;
    double* total;
};
extern "C" int tracker_width();
extern "C" void tracker_flush(Stream*, int64_t, void (*)(void (*)(void*), void*, unsigned, unsigned));
extern "C" void tracker_covariance(Stream*, const void*, int64_t, int64_t, int64_t, int64_t, const double*,
                                   const int64_t*, int64_t, void (*)(void (*)(void*), void*, unsigned, unsigned));

extern "C" int64_t tracker_pairs(const double*, int64_t, const double*, const double*, int64_t*, int64_t);

static float values[64 * 1024];  // as float64, half of them

int main() {
    const int64_t outers[] = {1, 3, 130}, neurons[] = {1, 7, 67}, inners[] = {1, 4, 49, 100};
    for (int64_t outer : outers)
        for (int64_t c : neurons)
            for (int64_t inner : inners)
                for (int64_t type = 0; type < 4; ++type) {
                    double table[9 * 67] = {}, mean[67];
                    if (outer * c * inner > 64 * 1024) continue;
                    if (type == 3 && outer * c * inner > 32 * 1024) continue;
                    // float64 is for precise products alone
                    if (tracker_activity(values, type % 3, outer, c, inner, c * inner, 0.01, table, mean, 1, 0)) return 1;
                    if (table[c - 1] != (double)(outer * inner) || table[3 * c - 1] != table[c - 1]) return 2;
                    static int64_t count[67];
                    static double means[67], total[67 * 67];
                    static double stage[128 * 64];
                    for (int64_t precise = type == 3; precise < 2; ++precise) {
                        Stream stream = {c, 64, 0, precise, count, means, stage, total};
                        memset(stage, 0, sizeof stage);
                        tracker_covariance(&stream, values, type, outer, inner, c * inner, mean, 0, 1, 0);
                        tracker_flush(&stream, 1, 0);
                        if (stream.staged || total[0] != 0) return 3;
                    }
                }
    static double products[67 * 67], ones[67];
    for (int i = 0; i < 67 * 67; ++i) products[i] = 1;
    for (int i = 0; i < 67; ++i) ones[i] = 1;
    int64_t found[2 * 5];
    if (tracker_pairs(products, 67, ones, ones, found, 5) != 67 * 33 || found[9] != 5) return 4;
    return tracker_width() > 16;
}
