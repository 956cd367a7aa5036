// Vectors of WIDTH floats, and what lies in memory as float32, bfloat16 or float16.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WIDTH
#define WIDTH 4  // fp32 lanes of a vector
#endif

namespace {

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * WIDTH)));

#define INLINE inline __attribute__((always_inline))

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

INLINE F all(float x) { return F{} + x; }
INLINE float scalar(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE F floats(U bits) { F x; memcpy(&x, &bits, sizeof x); return x; }

INLINE F load(const float* p) { F x; memcpy(&x, p, sizeof x); return x; }
INLINE U words(const void* p) { H h; memcpy(&h, p, sizeof h); return __builtin_convertvector(h, U); }
INLINE F load(const Bf16* p) { return floats(words(p) << 16); }
INLINE F load(const Fp16* p) {
    U h = words(p), sign = (h & 0x8000) << 16;
    // The exponent is rebased by a product, which is exact for subnormal numbers too; infinity and NaN by hand.
    F x = floats((h & 0x7fff) << 13) * all(0x1p112f);
    U bits, special = (U)((h & 0x7c00) == 0x7c00) & 0x7f800000;
    memcpy(&bits, &x, sizeof bits);
    return floats(bits | special | sign);
}

INLINE float one(const float* p) { return *p; }
INLINE float one(const Bf16* p) { return scalar((uint32_t)p->bits << 16); }
INLINE float one(const Fp16* p) {
    uint32_t h = p->bits, bits;
    float x = scalar((h & 0x7fff) << 13) * 0x1p112f;
    memcpy(&bits, &x, 4);
    return scalar(bits | ((h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0) | (h & 0x8000) << 16);
}

typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);  // as GOMP_parallel

}  // namespace

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
