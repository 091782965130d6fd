/* What this machine can do at most, as ops: the same threads as those of a model. See ops.h for common rules. */
#ifndef REPKV_PEAK_OPS_H
#define REPKV_PEAK_OPS_H

#include "ops.h"

/* src: x [n] -> the sum of each thread's share [n_threads]. Bound by reading memory where x is larger than all caches. */
void repkv_peak_read(struct ggml_tensor *dst, int ith, int nth, void *userdata);

/* src: repetitions I32 [1] -> something of all of them [n_threads]. Multiply-adds of vectors in registers: each repetition is
 * REPKV_PEAK_FLOPS operations a thread. */
void repkv_peak_fma(struct ggml_tensor *dst, int ith, int nth, void *userdata);

enum { REPKV_PEAK_CHAINS = 12, REPKV_PEAK_FLOPS = REPKV_PEAK_CHAINS * 16 * 2 };

#endif
