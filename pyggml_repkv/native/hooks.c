#include "hooks.h"

#include <string.h>

#include "compute.h"
#include "regions.h"

static int32_t *list_of(int32_t *lists, const struct repkv_hooks *h, int32_t layer) {
    return lists + (size_t)layer * (size_t)(1 + h->n_ahead);
}

/* Adds what a list does not have yet, as long as it has fewer than n_max. */
static void add_new(int32_t *list, int32_t n_max, const int32_t *blocks, int32_t n) {
    for (int32_t i = 0; i < n && list[0] < n_max; i++) {
        int32_t at = 1;
        while (at <= list[0] && list[at] != blocks[i]) at++;
        if (at > list[0]) list[++list[0]] = blocks[i];
    }
}

/* Rows of a node as of repkv_block_topk: first all selections, then all that ranked next. */
static void add_ranking(const struct repkv_hooks *h, int32_t *list, const struct ggml_tensor *node, int32_t n_top) {
    for (int64_t r = 0; r < node->ne[1]; r++) {
        const int32_t *row = (const int32_t *)node->data + r * node->ne[0];
        add_new(list, h->n_ahead, row + 1, row[0]);
    }
    for (int64_t r = 0; r < node->ne[1] && node->ne[0] > 1 + n_top; r++) {
        const int32_t *others = (const int32_t *)node->data + r * node->ne[0] + 1 + n_top;
        add_new(list, h->n_ahead, others + 1, others[0]);
    }
}

static void add_last_ranking(const struct repkv_hooks *h, int32_t *list, int32_t layer) {
    const int32_t *ranked = list_of(h->ranked, h, layer);
    if (h->predictors & REPKV_PREDICT_REUSE) add_new(list, h->n_ahead, ranked + 1, ranked[0]);
}

void repkv_hooks_begin(struct repkv_hooks *h) {
    h->next = 0;
    h->status = 0;
    int32_t list[1 + REPKV_MAX_AHEAD] = {0};
    add_last_ranking(h, list, 0);
    if (list[0] > 0) repkv_store_prefetch(h->store, 0, list + 1, list[0], 0);
}

/* What the layer's index says about the layer before it, then what the layer wanted last. */
static void on_speculated(struct repkv_hooks *h, const struct ggml_tensor *node, struct repkv_hook_point point) {
    int32_t list[1 + REPKV_MAX_AHEAD] = {0};
    add_ranking(h, list, node, point.n_top);
    const int32_t n_sure = list[0];
    add_last_ranking(h, list, point.layer);
    repkv_store_prefetch(h->store, point.layer, list + 1, list[0], n_sure);
}

/* The sources of a node that keeps what it selects are as of repkv_block_topk. What does not fit the list is read when it is
 * asked for. */
static void fetch_kept(const struct repkv_hooks *h, const struct ggml_tensor *node, int32_t layer) {
    const struct ggml_tensor *kept = node->src[3];
    const int half = kept_half(regions_of(node->src[1])[KEPT]);
    int32_t list[1 + REPKV_MAX_AHEAD] = {0};
    for (int64_t r = 0; r < node->ne[1]; r++) {
        const int32_t *row = kept_row(kept, half, r);
        add_new(list, REPKV_MAX_AHEAD, row + 1, row[0]);
    }
    if (list[0] > 0) repkv_store_fetch(h->store, layer, list + 1, list[0]);
}

static int on_selected(struct repkv_hooks *h, const struct ggml_tensor *node, struct repkv_hook_point point) {
    const int32_t *selected = node->data, layer = point.layer;
    int32_t list[1 + REPKV_MAX_AHEAD] = {0};
    const int32_t ahead = layer + 1 < h->n_layer && h->predictors == REPKV_PREDICT_REUSE ? layer + 1 : -1;
    if (ahead >= 0) add_last_ranking(h, list, ahead);
    if (layer > 0 && repkv_store_audit(h->store, layer - 1) != 0) return REPKV_HOOK_CHANGED;
    const int32_t n_rows = (int32_t)node->ne[1];
    const int status = repkv_store_require(h->store, layer, selected, n_rows, node->ne[0], ahead, list + 1, list[0]);
    int32_t *ranked = list_of(h->ranked, h, layer);
    ranked[0] = 0;
    add_ranking(h, ranked, node, point.n_top);
    if (point.late) fetch_kept(h, node, layer);
    return status;
}

bool repkv_eval_hook(struct ggml_tensor *node, bool ask, void *data) {
    struct repkv_hooks *h = data;
    if (h->next >= h->n_points || h->points[h->next].node != node) return !ask;
    if (ask) return true;
    const struct repkv_hook_point point = h->points[h->next++];
    if (point.kind == REPKV_HOOK_SPECULATED) {
        on_speculated(h, node, point);
        return true;
    }
    h->status = on_selected(h, node, point);
    if (h->status == 0) return true;
    repkv_request_abort();
    return false;
}

void *repkv_eval_hook_address(void) {
    ggml_backend_sched_eval_callback callback = repkv_eval_hook;
    void *address = NULL;
    memcpy(&address, &callback, sizeof address);
    return address;
}
