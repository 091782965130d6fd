/* Scans the codes of all evicted keys (codes.h) for what the queries of a step ask for. */
#ifndef REPKV_SCAN_OPS_H
#define REPKV_SCAN_OPS_H

#include "ops.h"

enum {
    SCAN_ROWS = 8,       /* query rows of one key head that share each load of codes */
    MAX_UNIT = 128,      /* tokens of a unit, if keys have codes */
    MAX_CODE_DIM = 512,  /* values of a coded key; Python checks it, and MAX_UNIT */
};

/* Bytes of scratch per thread. */
size_t repkv_scan_scratch(int group, int head_dim);

#endif
