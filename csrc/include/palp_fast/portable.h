// What differs between compilers. PALP_INLINE marks every function of a shared header: CPU kernels are compiled several
// times, and a linker that kept one AVX-512 copy of an inline function for all callers would break older processors.
#pragma once

#if defined(__CUDACC__)
#define PALP_HD __host__ __device__
#else
#define PALP_HD
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define PALP_INLINE PALP_HD __forceinline
#else
#define PALP_INLINE PALP_HD inline __attribute__((always_inline))
#endif

// The instruction set that a CPU kernel file is compiled for: base, v3 or v4 (x86-64-v3, x86-64-v4).
#ifndef PALP_LEVEL
#define PALP_LEVEL base
#endif
