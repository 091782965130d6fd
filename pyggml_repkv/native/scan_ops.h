/* Scans the codes of all evicted keys (codes.h) for what the queries of a step ask for. */
#ifndef REPKV_SCAN_OPS_H
#define REPKV_SCAN_OPS_H

#include "ops.h"

enum {
    SCAN_ROWS = 16, /* most query rows of one key head that share each load of codes */
    MAX_UNIT = 128, /* tokens of a unit, if keys have codes; Python checks it */
};

/* Bytes of scratch per thread. */
size_t repkv_scan_scratch(int n_head, int n_head_kv, int head_dim);

#endif
