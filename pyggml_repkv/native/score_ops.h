/* Representative scores: how strongly later queries ask for each recent key. */
#ifndef REPKV_SCORE_OPS_H
#define REPKV_SCORE_OPS_H

#include "ops.h"

/* Bytes of scratch per thread for one token; for a chunk these ops need less than attention does. */
size_t repkv_score_scratch(int n_head, int n_head_kv, int head_dim);

#endif
