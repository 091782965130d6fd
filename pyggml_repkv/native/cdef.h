/* The declarations that Python sees (cffi API mode). The .h of each .c file documents them. */

struct repkv_ggml_api {
    void *get_type_traits_cpu;
    void *get_type_traits;
    void *graph_compute;
    void *set_abort_callback;
    void *sched_graph_compute;
    void *log_set;
};

struct repkv_compute {
    ...;
};
struct repkv_order {
    const float *keys, *query;
};
struct repkv_key_centre {
    const float *bias, *tables;
};
struct ggml_tensor;
typedef void (*ggml_custom_op_t)(struct ggml_tensor *dst, int ith, int nth, void *userdata);

struct repkv_op_params {
    float eps;
    float scale;
    int32_t n_matrices;
    int32_t n_biases;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    int32_t pairs;
    float sticky;
    int32_t late;
    int32_t n_score;
    int32_t n_repr;
    int32_t n_top;
    int32_t relevance;
    int32_t n_rows, n_lines, n_padded, by_size;
    int32_t bits, group, stride;
    int32_t n_threads;
    char *scratch;
    size_t scratch_stride;
    const struct repkv_compute *compute;
    const struct repkv_key_centre *centre;
    const struct repkv_order *order;
    float sign;
    ggml_custom_op_t traced;
    int64_t begin_ns, end_ns;
};

int repkv_bind(const struct repkv_ggml_api *api);
const char *repkv_last_log(void);
void repkv_clear_log(void);

struct repkv_node_time {
    int64_t begin_ns, end_ns;
};
struct repkv_node_trace {
    struct repkv_hooks *hooks;
    struct repkv_node_time *times;
    int32_t n_max;
    int32_t n;
    ...;
};
int repkv_compute(struct repkv_compute *compute, void *backend, void *graph, struct repkv_node_trace *trace);
int repkv_compute_scheduled(struct repkv_compute *compute, void *backend, void *scheduler, void *graph,
                            struct repkv_node_trace *trace);
void repkv_request_abort(struct repkv_compute *compute);
bool repkv_was_interrupted(const struct repkv_compute *compute);

enum repkv_source_use { REPKV_MAYBE, REPKV_MANY, REPKV_ROWS, REPKV_WRITES, ... };
struct repkv_op_source {
    const char *name;
    int32_t use;
};
struct repkv_op_info {
    const char *name, *cost;
    ggml_custom_op_t function;
    struct repkv_op_source sources[...];
};
extern const struct repkv_op_info repkv_ops[...];
void repkv_traced_op(struct ggml_tensor *dst, int ith, int nth, void *userdata);
size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);
int repkv_has_fast_prefill(void);
void repkv_repr_topk(int32_t *out, const float *score, int64_t begin, int64_t end, int n_head_kv, int n_repr);
size_t repkv_code_row_bytes(int n_head_kv, int head_dim, int bits);
size_t code_bytes(int head_dim, int bits);
void repkv_encode_keys(char *codes, const float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits,
                       const float *centre, const float *turn);
void repkv_decode_codes(const char *codes, float *keys, int64_t first, int64_t n, int n_head_kv, int head_dim, int bits);
void repkv_rotate_rows(char *rows, int type, size_t row_bytes, int64_t n_rows, int n_heads, int head_dim, const float *table,
                       int rope_dim, float *scratch);

struct repkv_regions {
    int32_t first, n_tokens, sink_end, remainder, local, local_base, n_units, far, budget, store_base, kept;
};

int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset);
int repkv_watch_map(const void *begin, size_t n_bytes, const char *line);
void repkv_unwatch_map(int slot);

enum { CENTRE_STEP, ... };
enum repkv_relevance_kind { REPKV_LSE, REPKV_MEAN, REPKV_MAX, ... };

enum repkv_io_error { REPKV_IO_OK, REPKV_IO_READ, REPKV_IO_SHORT, REPKV_IO_CHECKSUM, REPKV_IO_WRITE, REPKV_IO_SLOTS, ... };

struct repkv_record_layout {
    int32_t n_layer, n_lanes, n_head_kv, head_dim, rope_dim;
    int32_t max_tokens, max_units;
    int32_t max_unit_tokens;
    int32_t type_k, type_v;
    int32_t file_type_k, file_type_v;
    size_t k_row_bytes, v_row_bytes, file_k_row_bytes, file_v_row_bytes;
    size_t header_bytes;
};

struct repkv_faults {
    int64_t read_at, write_at;
    int32_t keep;
    int32_t read_kind;
    int32_t error;
    int32_t delay_us;
    int32_t reorder;
    uint32_t seed;
};

struct repkv_store_config {
    struct repkv_record_layout layout;
    int32_t fd;
    int32_t n_slots;
    int32_t max_blocks, max_units;
    int32_t n_threads;
    int32_t n_staging;
    int32_t first_row;
    int32_t debug;
};

struct repkv_store_stats {
    int64_t required, hits;
    int64_t issued, used;
    int64_t late, missed;
    int64_t reads, read_bytes, written_bytes, retries, staged_reads;
    double wait_ms;
    double read_ms;
    double write_wait_ms;
};

struct repkv_store_error {
    int32_t kind;
    int32_t layer, block;
    int32_t error;
};

struct repkv_store;
struct repkv_store *repkv_store_open(const struct repkv_store_config *config, char **k_rows, char **v_rows, int32_t **places);
void repkv_store_close(struct repkv_store *s);
struct repkv_block_shape {
    int64_t first_position;
    const int32_t *unit_ends;
    int32_t n_units;
    int32_t rotated;
};
int repkv_store_put(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, char **k_rows, char **v_rows,
                    uint64_t *checksums);
void repkv_store_commit(struct repkv_store *s, const char *header, int64_t offset);
void repkv_store_add(struct repkv_store *s, int32_t block, const struct repkv_block_shape *shape, int64_t offset,
                     const uint64_t *checksums);
int repkv_store_flush(struct repkv_store *s);
int repkv_store_require(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride,
                        const struct repkv_compute *compute);
void repkv_store_prefetch(struct repkv_store *s, int32_t layer, const int32_t *selected, int32_t n_rows, int64_t stride);
int repkv_store_read(struct repkv_store *s, int32_t layer, int32_t block, char *k, char *v, struct repkv_store_error *error);
void repkv_store_unrotate(struct repkv_store *s, const float *table);
void repkv_store_resident(struct repkv_store *s, int32_t layer, int32_t *units);
int repkv_store_audit(struct repkv_store *s, int32_t layer);
void repkv_store_get_stats(struct repkv_store *s, struct repkv_store_stats *stats);
struct repkv_store_error repkv_store_last_error(struct repkv_store *s, int32_t of_writes);
void repkv_store_inject(struct repkv_store *s, const struct repkv_faults *faults);
enum repkv_event_kind {
    REPKV_EVENT_SELECTED, REPKV_EVENT_WAIT, REPKV_EVENT_READ, REPKV_EVENT_STAGED, REPKV_EVENT_WRITE, ...
};
struct repkv_event {
    int32_t kind, layer, lane, block, n_units, ahead;
    double begin_ms, end_ms;
};
int32_t repkv_store_trace(struct repkv_store *s, struct repkv_event *events, int32_t n);
int repkv_discard(int fd, int64_t offset, int64_t n_bytes);
uint64_t repkv_checksum(const char *data, size_t n_bytes);
size_t repkv_block_bytes(const struct repkv_record_layout *layout, const int32_t *unit_ends, int32_t n_units);

struct repkv_hook_point {
    void *node;
    int32_t layer;
    int32_t late;
    int32_t n_known;
};

struct repkv_hooks {
    struct repkv_store *store;
    struct repkv_compute *compute;
    const struct repkv_hook_point *points;
    int32_t n_points;
    void *const *kept;
    int32_t next;
    int32_t status;
    int32_t asked, n_asked;
    int32_t half;
};
void repkv_hooks_begin(struct repkv_hooks *hooks);
int repkv_hooks_end(struct repkv_hooks *hooks);
void *repkv_eval_hook_address(void);

void *repkv_node_trace_hook_address(void);
#define PANEL ...
#define LANES ...
#define MAX_SELECTED ...
#define SCAN_ROWS ...
#define CODE_LANES ...
#define MAX_CODE_DIM ...
#define REPKV_PEAK_FLOPS ...
#define REPKV_ALIGN ...
#define REPKV_PIECE_GAP ...
#define REPKV_HOOK_CHANGED ...
