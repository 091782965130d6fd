#include "hooks.h"

#include <string.h>

#include "compute.h"
#include "regions.h"

void repkv_hooks_begin(struct repkv_hooks *h) {
    h->next = h->status = h->n_asked = 0;
}

/* Starts to read the units of one half of kept-l. */
static void fetch_kept(const struct repkv_hooks *h, const struct ggml_tensor *kept, int half, int32_t layer) {
    repkv_store_fetch(h->store, layer, kept_row(kept, half, 0), (int32_t)kept->ne[1], kept->ne[0]);
}

static int last_half(const struct ggml_tensor *node) {
    return regions_of(SOURCES(node, block_topk)->regions)->kept;
}

static int check_asked(const struct repkv_hooks *h) {
    for (int32_t i = 0; i < h->n_asked; i++) {
        if (repkv_store_audit(h->store, h->asked + i) != 0) return REPKV_HOOK_CHANGED;
    }
    return 0;
}

/* Reads ahead for the layers of the last point: by now they have kept what the next token attends. */
static void fetch_asked(const struct repkv_hooks *h) {
    for (int32_t i = h->asked; i < h->asked + h->n_asked; i++) fetch_kept(h, h->kept[i], h->half, i);
}

static int on_selected(struct repkv_hooks *h, const struct ggml_tensor *node, struct repkv_hook_point point) {
    const int32_t n_rows = (int32_t)node->ne[1];
    const int status = repkv_store_require(h->store, point.layer, node->data, n_rows, node->ne[0], h->compute);
    if (point.late) fetch_kept(h, SOURCES(node, block_topk)->kept, kept_half(last_half(node)), point.layer);
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
        status = repkv_store_require(h->store, i, kept_row(kept, half, 0), n_rows, kept->ne[0], h->compute);
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
    h->status = check_asked(h);
    if (h->status == 0) h->status = point.n_known > 0 ? on_known(h, node, point) : on_selected(h, node, point);
    h->asked = point.layer;
    h->n_asked = point.n_known > 0 ? point.n_known : 1;
    if (h->status == 0) return true;
    repkv_request_abort(h->compute);
    return false;
}

void *repkv_eval_hook_address(void) {
    ggml_backend_sched_eval_callback callback = repkv_eval_hook;
    void *address = NULL;
    memcpy(&address, &callback, sizeof address);
    return address;
}
