#include "map.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_WATCHED 1024

/* `begin` is written last and read first: NULL in a free slot. */
struct watched {
    _Atomic(const char *) begin;
    const char *end, *line;
};

static struct watched watched[MAX_WATCHED];
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static atomic_bool ending;

int repkv_map_private(char *at, size_t n_bytes, int fd, int64_t offset) {
    void *found = mmap(at, n_bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_NORESERVE | MAP_PRIVATE, fd, offset);
    return found == MAP_FAILED ? -1 : 0;
}

/* Only what is safe in a signal handler. */
static void on_bus_error(int number, siginfo_t *info, void *context) {
    (void) context;
    const char *at = info->si_addr;
    for (int i = 0; info->si_code > 0 && i < MAX_WATCHED; i++) {
        const char *begin = atomic_load(&watched[i].begin);
        if (begin == NULL || at < begin || at >= watched[i].end) {
            continue;
        }
        if (atomic_exchange(&ending, true)) {
            for (;;) {
                pause(); /* another thread has met it too, and ends the process */
            }
        }
        ssize_t done = write(STDERR_FILENO, watched[i].line, strlen(watched[i].line));
        (void) done;
        _exit(1);
    }
    /* Delivered when this handler returns, to whoever was there before. */
    sigaction(number, &before, NULL);
    raise(number);
}

static void handle_bus_errors(void) {
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    struct sigaction present;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &present) == 0 &&
        !((present.sa_flags & SA_SIGINFO) && present.sa_sigaction == on_bus_error)) {
        before = present;
        sigaction(SIGBUS, &action, NULL);
    }
}

int repkv_watch_map(const void *begin, size_t n_bytes, const char *line) {
    int slot = -1;
    pthread_mutex_lock(&writing);
    handle_bus_errors();
    for (int i = 0; i < MAX_WATCHED && slot < 0; i++) {
        if (atomic_load(&watched[i].begin) == NULL) {
            slot = i;
            watched[i].end = (const char *) begin + n_bytes;
            watched[i].line = line;
            atomic_store(&watched[i].begin, begin);
        }
    }
    pthread_mutex_unlock(&writing);
    return slot;
}

void repkv_unwatch_map(int slot) {
    atomic_store(&watched[slot].begin, NULL);
}
