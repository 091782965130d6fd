#ifndef REPKV_MEMORY_OPS_H
#define REPKV_MEMORY_OPS_H

#include "ops.h"

/* Not a graph op. Rotates the n_heads heads of n_rows rows in place; table [n_rows, rope_dim]: each row's cosines, then sines. */
void repkv_rotate_rows(char *rows, int type, size_t row_bytes, int64_t n_rows, int n_heads, int head_dim, const float *table,
                       int rope_dim, float *scratch);

#endif
