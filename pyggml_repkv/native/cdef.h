/* What Python sees of the extension (cffi API mode). The meaning of each entry stands in the .h beside its .c file. */

struct repkv_ggml_api {
    void *get_type_traits_cpu;
    void *get_type_traits;
    void *graph_compute;
    void *set_abort_callback;
    void *log_set;
};

struct repkv_op_params {
    float eps;
    float scale;
    int32_t n_matrices;
    int32_t n_biases;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t rope_dim;
    int32_t n_score;
    int32_t n_repr;
    int32_t n_top;
    int32_t relevance;
    int32_t per_head;
    int32_t n_threads;
    char *scratch;
    size_t scratch_stride;
};

int repkv_bind(const struct repkv_ggml_api *api);
const char *repkv_last_log(void);
void repkv_clear_log(void);

int repkv_compute(void *backend, void *graph);
void repkv_request_abort(void);
bool repkv_was_interrupted(void);

enum repkv_op {
    REPKV_NORM_LINEAR, REPKV_ATTEND, REPKV_ATTN_OUT, REPKV_GATE_UP, REPKV_LINEAR_ADD, REPKV_PACK, REPKV_NORM_PACKED,
    REPKV_MATMUL, REPKV_MATMUL_ADD, REPKV_MATMUL_GATE_UP, REPKV_STORE_KV, REPKV_ATTEND_CHUNK,
    REPKV_STORE_FAR, REPKV_SCORE_ACC, REPKV_SCORE_ACC_ONE, REPKV_SCORE_ATTENTION, REPKV_SCORE_ATTENTION_ONE,
    REPKV_RELEVANCE, REPKV_RELEVANCE_ONE, REPKV_BLOCK_TOPK,
    REPKV_ATTEND_MEMORY, REPKV_ATTEND_MEMORY_ONE, ...
};
void *repkv_op_address(enum repkv_op op);
size_t repkv_scratch_size(int n_embd, int n_ff, int n_head, int n_head_kv, int head_dim);
int repkv_panel(void);
int repkv_has_fast_prefill(void);
void repkv_repr_topk(int32_t *out, const float *score, int64_t begin, int64_t end, int n_head_kv, int n_repr);
void repkv_rotate_rows(char *rows, int type, size_t row_bytes, int64_t n_rows, int n_heads, int head_dim, const float *table,
                       int rope_dim, float *scratch);

enum repkv_relevance_kind { REPKV_LSE, REPKV_MEAN, REPKV_MAX, ... };
