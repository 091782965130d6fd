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
    h->next = h->status = h->n_asked = 0;
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

/* One half of kept-l as `list`, without repetitions. What does not fit is read when it is asked for. */
static void list_kept(int32_t *list, int32_t n_max, const struct ggml_tensor *kept, int half) {
    list[0] = 0;
    for (int64_t r = 0; r < kept->ne[1]; r++) {
        const int32_t *row = kept_row(kept, half, r);
        add_new(list, n_max, row + 1, row[0]);
    }
}

static void fetch_kept(const struct repkv_hooks *h, const struct ggml_tensor *kept, int half, int32_t layer) {
    int32_t list[1 + REPKV_MAX_AHEAD];
    list_kept(list, REPKV_MAX_AHEAD, kept, half);
    if (list[0] > 0) repkv_store_fetch(h->store, layer, list + 1, list[0]);
}

/* The sources of a node that keeps what it selects are as of repkv_block_topk. */
static int last_half(const struct ggml_tensor *node) {
    return regions_of(node->src[1])[KEPT];
}

static int check_asked(const struct repkv_hooks *h) {
    for (int32_t i = 0; i < h->n_asked; i++) {
        if (repkv_store_audit(h->store, h->asked + i) != 0) return REPKV_HOOK_CHANGED;
    }
    return 0;
}

/* Layers whose points were passed have kept by now what the next token attends. */
static void fetch_asked(const struct repkv_hooks *h) {
    for (int32_t i = h->asked; i < h->asked + h->n_asked; i++) fetch_kept(h, h->kept[i], h->half, i);
}

static int on_selected(struct repkv_hooks *h, const struct ggml_tensor *node, struct repkv_hook_point point) {
    const int32_t *selected = node->data, layer = point.layer;
    int32_t list[1 + REPKV_MAX_AHEAD] = {0};
    const int32_t ahead = layer + 1 < h->n_layer && h->predictors == REPKV_PREDICT_REUSE ? layer + 1 : -1;
    if (ahead >= 0) add_last_ranking(h, list, ahead);
    const int32_t n_rows = (int32_t)node->ne[1];
    const int status = repkv_store_require(h->store, layer, selected, n_rows, node->ne[0], ahead, list + 1, list[0]);
    int32_t *ranked = list_of(h->ranked, h, layer);
    ranked[0] = 0;
    add_ranking(h, ranked, node, point.n_top);
    if (point.late) fetch_kept(h, node->src[3], kept_half(last_half(node)), layer);
    return status;
}

static int on_known(struct repkv_hooks *h, const struct ggml_tensor *node, struct repkv_hook_point point) {
    const int half = last_half(node);
    int status = 0;
    h->half = kept_half(half);
    fetch_asked(h);
    for (int32_t i = point.layer; i < point.layer + point.n_known && status == 0; i++) {
        const struct ggml_tensor *kept = h->kept[i];
        const int32_t n_rows = (int32_t)kept->ne[1];
        status = repkv_store_require(h->store, i, kept_row(kept, half, 0), n_rows, kept->ne[0], -1, NULL, 0);
        list_kept(list_of(h->ranked, h, i), h->n_ahead, kept, half);
    }
    return status;
}

int repkv_hooks_end(struct repkv_hooks *h) {
    const int status = check_asked(h);
    if (status == 0 && h->n_points > 0 && h->points[h->n_points - 1].n_known > 0) fetch_asked(h);
    h->n_asked = 0;
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
    h->status = check_asked(h);
    if (h->status == 0) h->status = point.n_known > 0 ? on_known(h, node, point) : on_selected(h, node, point);
    h->asked = point.layer;
    h->n_asked = point.n_known > 0 ? point.n_known : 1;
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
