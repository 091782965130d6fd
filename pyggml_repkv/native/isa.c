/* The CPU features that this file, and so every other one, was compiled for.
 *
 * ffi/cpu.py finds this text in the extension's file before it loads it: even loading may run instructions that another CPU
 * lacks. Features are named as in /proc/cpuinfo. `avx2=1` means in use: an undefined macro leaves its own name there instead
 * of 1. The list has the features that compilers use by themselves, and those that this project or ggml uses. */
#define TEXT(macro) #macro
#define FEATURE(name, macro) " " #name "=" TEXT(macro)

__attribute__((used)) static const char isa[] =
    "repkv_isa:"
    FEATURE(ssse3, __SSSE3__)
    FEATURE(sse4_1, __SSE4_1__)
    FEATURE(sse4_2, __SSE4_2__)
    FEATURE(popcnt, __POPCNT__)
    FEATURE(movbe, __MOVBE__)
    FEATURE(abm, __LZCNT__)
    FEATURE(bmi1, __BMI__)
    FEATURE(bmi2, __BMI2__)
    FEATURE(avx, __AVX__)
    FEATURE(avx2, __AVX2__)
    FEATURE(fma, __FMA__)
    FEATURE(f16c, __F16C__)
    FEATURE(gfni, __GFNI__)
    FEATURE(avx_vnni, __AVXVNNI__)
    FEATURE(avx512f, __AVX512F__)
    FEATURE(avx512cd, __AVX512CD__)
    FEATURE(avx512bw, __AVX512BW__)
    FEATURE(avx512dq, __AVX512DQ__)
    FEATURE(avx512vl, __AVX512VL__)
    FEATURE(avx512ifma, __AVX512IFMA__)
    FEATURE(avx512vbmi, __AVX512VBMI__)
    FEATURE(avx512_vbmi2, __AVX512VBMI2__)
    FEATURE(avx512_vnni, __AVX512VNNI__)
    FEATURE(avx512_bitalg, __AVX512BITALG__)
    FEATURE(avx512_vpopcntdq, __AVX512VPOPCNTDQ__)
    FEATURE(avx512_bf16, __AVX512BF16__)
    FEATURE(avx512_fp16, __AVX512FP16__)
    FEATURE(amx_tile, __AMX_TILE__)
    FEATURE(amx_int8, __AMX_INT8__)
    FEATURE(amx_bf16, __AMX_BF16__)
    FEATURE(atomics, __ARM_FEATURE_ATOMICS)
    FEATURE(asimdrdm, __ARM_FEATURE_QRDMX)
    FEATURE(asimdhp, __ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
    FEATURE(asimddp, __ARM_FEATURE_DOTPROD)
    FEATURE(i8mm, __ARM_FEATURE_MATMUL_INT8)
    FEATURE(bf16, __ARM_FEATURE_BF16)
    FEATURE(sve, __ARM_FEATURE_SVE)
    FEATURE(sve2, __ARM_FEATURE_SVE2);
