/* Representative scores: how strongly later queries attend each recent key. */
#ifndef REPKV_SCORE_OPS_H
#define REPKV_SCORE_OPS_H

#include "ops.h"

/* Bytes of scratch per thread; group: query heads that share a key head. */
size_t repkv_score_scratch(int group, int n_head_kv, int head_dim);

#endif
