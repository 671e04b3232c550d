/* What the files of the core share.
 *
 * The core knows words, bytes and ranges of mappings.  The byte layout belongs to shmcbw/layout.py and is handed
 * in; no offset of the shared memory is written down here.
 *
 * Every number that comes out of shared memory is a hint from an untrusted party: it is compared, or checked
 * against a bound that was computed from trusted arguments, before it is used as an index.
 */
#ifndef SHMCBW_CORE_H
#define SHMCBW_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* CPython builds extensions with -DNDEBUG, which removes assert(): this check stays. */
#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (__builtin_expect(!(condition), 0))                                                      \
            Py_FatalError("shmcbw core: " #condition " does not hold");                             \
    } while (0)

/* Cluster bytes (the table is in shmcbw/bitmap.py; a test holds the two together). */
enum {
    PENDING = 0,
    WORKER_ID_MAX = 239,
    COPIED = 240, /* every byte from here on lets a write go on */
    SKIPPED = 241,
};

enum { SNAPSHOT_COUNT = 8 };

/* Low half of a snapshot's state word (shmcbw/snapshots.py). */
enum { SNAPSHOT_ACTIVE = 3 };

typedef _Atomic uint8_t byte_word;
typedef _Atomic uint32_t word32;
typedef _Atomic uint64_t word64;

static inline uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void cpu_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

/* guard.c: copies that turn SIGBUS into -1.  They may be called without the GIL. */
int guard_install(void);
int guarded_copy(void *to, const void *from, size_t length);
int guarded_fill(void *to, size_t length);
int guarded_is_equal(const void *first, const void *second, size_t length, bool *equal);
int guarded_is_zero(const void *from, size_t length, bool *zero);
PyObject *set_bus_error(const char *what, uint64_t offset, uint64_t length);

/* arguments.c: parsing and checking of what Python hands in. */
bool get_mapping(PyObject *object, Py_buffer *view, bool writable);
bool check_range(const char *what, uint64_t offset, uint64_t length, uint64_t limit);
void *word_at(const Py_buffer *view, uint64_t offset, size_t size);
bool as_u64(PyObject *object, const char *name, uint64_t *value);
bool layout_u64(PyObject *layout, const char *key, uint64_t *value);

/* failpoint.c: act as an armed word says; the errno to fail with, or 0.  Call without the GIL. */
int failpoint_act(word64 *word);

/* semaphore.c */
extern PyTypeObject *semaphore_type;
sem_t *semaphore_of(PyObject *object);
int semaphore_sleep(sem_t *semaphore, uint64_t timeout_ns);

/* table.c: the snapshot table and the slots, as a filter or a copier sees them. */
struct bitmap_view {
    size_t references; /* changed with the GIL held */
    uint32_t serial;
    Py_buffer view;
};

struct shared {
    Py_buffer segment;
    uint64_t cluster_count;
    uint64_t cluster_size;
    uint64_t image_size;
    word32 *epoch;
    word32 *epoch_map;
    uint64_t slot_count;
    uint64_t slot_size;
    uint8_t *slots;
    uint64_t in_flight, asleep, want_sequence, want_first, want_end, error;
    uint64_t writes, write_bytes, first_touches, wait_count, wait_total_ns, wait_max_ns, gate_count;
    uint64_t wait_histogram, wait_histogram_count;
    uint8_t *snapshots;
    uint64_t snapshot_size, snapshot_state, snapshot_serial, snapshot_timeout_ns;
    uint8_t *workers;
    uint64_t worker_count, worker_size, worker_state;
    struct bitmap_view *bitmaps[SNAPSHOT_COUNT];
};

enum { WORKER_AWAY = 0, WORKER_BUSY = 1, WORKER_LOOKING = 2, WORKER_ASLEEP = 3 };

bool shared_init(struct shared *shared, PyObject *segment, PyObject *layout);
void shared_clear(struct shared *shared);
bool shared_attach_bitmap(struct shared *shared, uint64_t index, uint64_t serial, PyObject *mapping);
bool shared_detach_bitmap(struct shared *shared, uint64_t index);
void bitmap_release(struct bitmap_view *bitmap);

static inline uint64_t snapshot_state(const struct shared *shared, int index)
{
    word64 *word = (word64 *)(shared->snapshots + (uint64_t)index * shared->snapshot_size + shared->snapshot_state);
    return atomic_load(word);
}

static inline bool snapshot_active(const struct shared *shared, int index)
{
    return (uint32_t)snapshot_state(shared, index) == SNAPSHOT_ACTIVE;
}

static inline uint32_t snapshot_serial(const struct shared *shared, int index)
{
    return atomic_load(
        (word32 *)(shared->snapshots + (uint64_t)index * shared->snapshot_size + shared->snapshot_serial));
}

static inline uint64_t snapshot_timeout_ns(const struct shared *shared, int index)
{
    return atomic_load(
        (word64 *)(shared->snapshots + (uint64_t)index * shared->snapshot_size + shared->snapshot_timeout_ns));
}

static inline word32 *slot_word32(const struct shared *shared, uint64_t slot, uint64_t field)
{
    return (word32 *)(shared->slots + slot * shared->slot_size + field);
}

static inline word64 *slot_word64(const struct shared *shared, uint64_t slot, uint64_t field)
{
    return (word64 *)(shared->slots + slot * shared->slot_size + field);
}

static inline word32 *worker_state(const struct shared *shared, uint64_t worker)
{
    return (word32 *)(shared->workers + worker * shared->worker_size + shared->worker_state);
}

/* Registration of each subject's part of the module. */
int add_words(PyObject *module);
int add_clusters(PyObject *module);
int add_guard(PyObject *module);
int add_semaphore(PyObject *module);
int add_filter(PyObject *module);
int add_copier(PyObject *module);
int add_failpoint(PyObject *module);
int add_bits(PyObject *module);

#endif
