/* A hook between nodes of a graph: it waits for the blocks of a layer, and starts reads for the next token.
 *
 * repkv_eval_hook is an eval callback of ggml's scheduler. It observes the nodes of a plan that select blocks, so ggml
 * computes the nodes between two of them at once, and no compute thread spins while the hook waits. If a token attends what
 * the last one selected, blocks are known before the step, and one point serves several layers. */
#ifndef REPKV_HOOKS_H
#define REPKV_HOOKS_H

#include "block_store.h"
#include "ggml_api.h"

struct repkv_hook_point {
    void *node; /* struct ggml_tensor *; I32 data as of repkv_block_topk: the blocks that `layer` attends next */
    int32_t layer;
    int32_t late;  /* the next token attends what this layer keeps: read it from now on */
    int32_t n_known; /* > 0: so many layers, from `layer` on, attend what the last token kept */
};

struct repkv_hooks {
    struct repkv_store *store;
    struct repkv_compute *compute; /* of the backend; stopped if a block cannot be read */
    const struct repkv_hook_point *points; /* in the order of the graph */
    int32_t n_points;
    void *const *kept;  /* struct ggml_tensor *[n_layer], kept-l of regions.h; NULL unless a point needs them */
    int32_t next;       /* the next point; n_points after a whole step */
    int32_t status;     /* of repkv_store_require, or REPKV_HOOK_CHANGED */
    int32_t asked, n_asked; /* layers that the last point asked for */
    int32_t half;           /* of kept-l, in which they keep blocks for the next token */
};

enum { REPKV_HOOK_CHANGED = -3 }; /* debug: an attended slot changed */

/* Call it before a step. */
void repkv_hooks_begin(struct repkv_hooks *hooks);

/* Call it after a whole step. Returns 0, or REPKV_HOOK_CHANGED. */
int repkv_hooks_end(struct repkv_hooks *hooks);

/* A ggml_backend_sched_eval_callback with a struct repkv_hooks. Stops the compute if a block cannot be read. */
bool repkv_eval_hook(struct ggml_tensor *node, bool ask, void *hooks);

/* Returns its address, for ggml_backend_sched_set_eval_callback. */
void *repkv_eval_hook_address(void);

#endif
