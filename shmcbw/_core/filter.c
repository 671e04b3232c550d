/* The filter: a write in six steps, as one call (the protocol is in shmcbw/DESIGN.md, "Write").
 *
 * Words touched, and the partner of each order:
 *   in_flight   seq_cst store of 1, then seq_cst load of the epoch.  Partner: the coordinator stores the odd epoch and
 *               then loads in_flight (pool.c: wait_quiet), both seq_cst.  One of the two sees the other (Dekker).
 *               The release store of 0 after the data pairs with the acquire load there: a quiet slot's data is
 *               visible to whatever the cut does next.
 *   epoch_map   release store in step 5, acquire load in step 3.  Whoever reads the current epoch there has, through
 *               the storing writer's acquire load of the cluster byte, the worker's publication behind it (I1).
 *   byte        acquire load in step 4; partner: the publication in clusters.c.
 *   want_*      a sequence lock: odd while published.  Partner: copier.c.
 *   asleep      seq_cst store of 1, then a second look at what is waited for; a waker changes that first and then
 *               loads asleep.  One of the two sees the other, so no wake-up is lost; if it were, the slice would end.
 *
 * Died here?  Anywhere outside flight: nothing was stored.  In flight: step 5 marked what may have changed, and the
 * holder of the slot's lock clears the mark (I3, I6).
 *
 * What is rare or a matter of policy goes to the Python method _resolve(reason, index, value, cluster), which returns
 * to have the write start over at step 1, or raises to refuse it; nothing has been stored then.
 *
 * Scribbled memory: the slot's words are this thread's own, so what it finds in them is compared with what it stored,
 * the want in each slice of a wait and the in-flight mark at its end.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>

enum reason {
    REASON_ATTACH = 0,    /* the handle is closed or was forked; `index` 1: and this thread must have a slot */
    REASON_UNMAPPED = 1,  /* snapshot `index` is active and its bitmap is not mapped here */
    REASON_FAILED = 2,    /* the copy that this write waits for failed with errno `value` */
    REASON_LATE = 3,      /* snapshot `index` still lacks `cluster` after its timeout */
    REASON_GATED = 4,     /* the epoch is still the odd `value` after a slice of waiting */
    REASON_FAULT = 5,     /* SIGBUS: value = offset, cluster = length; must raise */
    REASON_RANGE = 6,     /* value = offset, cluster = length; raises, or returns when the image has been resized */
    REASON_FAILPOINT = 7, /* failpoint `cluster` makes the write fail with errno `value`; must raise */
    REASON_UNMARKED = 8,  /* after the store of `cluster`: the in-flight mark was gone */
};

/* shmcbw/failpoints.py has these first and in this order. */
enum failpoint {
    WRITER_MARKED,
    WRITER_EPOCH,
    WRITER_LOOKED,
    WRITER_LEFT,
    WRITER_WANTED,
    WRITER_ASLEEP,
    WRITER_READY,
    WRITER_MAP_MARKED,
    WRITER_COMPARED,
    WRITER_HALF_STORED,
    WRITER_STORED,
    WRITER_GATED,
    WRITER_FAILPOINT_COUNT,
};

enum kind { KIND_DATA, KIND_UNCHANGED, KIND_ZEROES };

enum look { LOOK_READY, LOOK_BLOCKED, LOOK_UNMAPPED };

enum {
    SPIN_START_NS = 150 * 1000,
    SPIN_MAX_NS = 300 * 1000,
    SPIN_MIN_NS = 5 * 1000,
    SLEEP_SLICE_NS = 100 * 1000 * 1000,
    GATE_SLICE_NS = 10 * 1000 * 1000,
    LONG_COPY_BYTES = 128 * 1024,
};

/* A write that runs Python in between: _resolve, or the handler of a signal.  That may come back to this handle, in the
 * same thread, and must not wait for the write to leave.  On the stack of the write; changed with the GIL held. */
struct detour {
    unsigned long thread;
    struct detour *next;
};

/* A mapping of the size before a resize, or the new one of the control segment: calls without the GIL may be in them,
 * so they stay until the handle lets go of all of it. */
struct kept_view {
    Py_buffer view;
    struct kept_view *next;
};

struct thread_slot {
    unsigned long thread;
    uint64_t index;
    sem_t *semaphore;
    PyObject *semaphore_object;
    uint64_t spin_ns; /* adapts to whether spinning has been, or would have been, paying off */
};

struct filter {
    PyObject_HEAD
    struct shared shared;
    Py_buffer image;
    struct kept_view *kept;
    Py_buffer failpoints_view;
    word64 *failpoints; /* [0]: any armed; [1 + point] */
    int fd;
    bool initialised;
    bool open;
    bool writable;
    bool may_spin;
    unsigned int cluster_shift;
    sem_t *pool;
    PyObject *pool_object;
    struct thread_slot **threads;
    size_t thread_count;
    size_t last_thread;
    size_t busy; /* calls inside, changed with the GIL held */
    struct detour *detours;
    unsigned long closing_thread; /* whose outermost write finishes a close that came in a detour; 0: none */
    unsigned int forks; /* in how many generations of children we are: a handler may fork in the middle of a write */
};

struct request {
    enum kind kind;
    const uint8_t *data;
    uint64_t offset;
    uint64_t length;
    uint64_t wait_started_ns; /* 0: has not waited */
    int failed_errno;         /* by a failpoint, 0: none */
    enum failpoint failed_at;
    uint64_t patience_ns;     /* how long it may wait for copies before it gives up with nothing done; 0: no limit */
    bool gave_up;
};

static struct thread_slot *find_thread(struct filter *self)
{
    unsigned long thread = PyThread_get_thread_ident();
    if (self->last_thread < self->thread_count && self->threads[self->last_thread]->thread == thread)
        return self->threads[self->last_thread];
    for (size_t i = 0; i < self->thread_count; i++) {
        if (self->threads[i]->thread == thread) {
            self->last_thread = i;
            return self->threads[i];
        }
    }
    return NULL;
}

/* 0: start over.  -1: an exception is set. */
static int resolve(struct filter *self, enum reason reason, uint64_t index, uint64_t value, uint64_t cluster)
{
    PyObject *result =
        PyObject_CallMethod((PyObject *)self, "_resolve", "iKKK", (int)reason, (unsigned long long)index,
                            (unsigned long long)value, (unsigned long long)cluster);
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    return 0;
}

static int refuse(struct filter *self, enum reason reason, uint64_t value, uint64_t cluster)
{
    if (resolve(self, reason, 0, value, cluster) == 0)
        PyErr_Format(PyExc_SystemError, "_resolve(%d) must raise", (int)reason);
    return -1;
}

static void begin_detour(struct filter *self, struct detour *detour)
{
    detour->thread = PyThread_get_thread_ident();
    detour->next = self->detours;
    self->detours = detour;
}

static void end_detour(struct filter *self, const struct detour *detour)
{
    struct detour **link = &self->detours;
    /* Not the first one when other threads have begun theirs meanwhile; not there at all in a forked child. */
    while (*link != NULL && *link != detour)
        link = &(*link)->next;
    if (*link != NULL)
        *link = detour->next;
}

static bool in_detour(const struct filter *self)
{
    const struct detour *detour = self->detours;
    while (detour != NULL && detour->thread != PyThread_get_thread_ident())
        detour = detour->next;
    return detour != NULL;
}

/* resolve(), from inside a write. */
static int resolve_write(struct filter *self, enum reason reason, uint64_t index, uint64_t value, uint64_t cluster)
{
    struct detour detour;
    begin_detour(self, &detour);
    int result = resolve(self, reason, index, value, cluster);
    end_detour(self, &detour);
    return result;
}

static int refuse_write(struct filter *self, enum reason reason, uint64_t value, uint64_t cluster)
{
    struct detour detour;
    begin_detour(self, &detour);
    refuse(self, reason, value, cluster);
    end_detour(self, &detour);
    return -1;
}

/* Runs the handlers of signals that came; -1: one has raised. */
static int handle_signals(struct filter *self)
{
    struct detour detour;
    begin_detour(self, &detour);
    int result = PyErr_CheckSignals();
    end_detour(self, &detour);
    return result;
}

static inline bool failpoints_armed(const struct filter *self)
{
    return __builtin_expect(atomic_load_explicit(self->failpoints, memory_order_relaxed) != 0, 0);
}

/* With an armed point: acts.  True: the write is to fail here; who called leaves flight and calls `fail`. */
static bool reach(const struct filter *self, bool armed, enum failpoint point, struct request *request)
{
    if (__builtin_expect(!armed, 1))
        return false;
    int number = failpoint_act(self->failpoints + 1 + point);
    if (number == 0)
        return false;
    request->failed_errno = number;
    request->failed_at = point;
    return true;
}

/* Raises what a failpoint wants. */
static int fail(struct filter *self, const struct request *request)
{
    return refuse_write(self, REASON_FAILPOINT, (uint64_t)request->failed_errno, (uint64_t)request->failed_at);
}

static void add64(const struct shared *shared, uint64_t slot, uint64_t field, uint64_t amount)
{
    word64 *word = slot_word64(shared, slot, field);
    atomic_store_explicit(word, atomic_load_explicit(word, memory_order_relaxed) + amount, memory_order_relaxed);
}

/* Step 4: does each active snapshot have the clusters?  Says which one lacks which cluster. */
static enum look look(const struct shared *shared, struct bitmap_view *const *bitmaps, uint64_t first, uint64_t end,
                      int *index, uint64_t *cluster)
{
    for (int i = 0; i < SNAPSHOT_COUNT; i++) {
        if (!snapshot_active(shared, i))
            continue;
        *index = i;
        if (bitmaps[i] == NULL || bitmaps[i]->serial != snapshot_serial(shared, i))
            return LOOK_UNMAPPED;
        const byte_word *bytes = bitmaps[i]->view.buf;
        for (uint64_t c = first; c < end; c++) {
            if (atomic_load_explicit(bytes + c, memory_order_acquire) < COPIED) {
                *cluster = c;
                return LOOK_BLOCKED;
            }
        }
    }
    return LOOK_READY;
}

/* The pool is told only when somebody in it sleeps and nobody is looking: a worker that looks finds the want, and one
 * that is about to sleep looks once more after it has said so. */
static void ring(const struct filter *self, bool insist)
{
    bool asleep = false;
    for (uint64_t worker = 0; worker < self->shared.worker_count; worker++) {
        uint32_t state = atomic_load(worker_state(&self->shared, worker));
        if (state == WORKER_LOOKING && !insist)
            return;
        asleep |= state == WORKER_ASLEEP;
    }
    if (asleep)
        sem_post(self->pool);
}

/* Error word: want sequence (low 20 bits) << 44 | errno (12 bits) << 32 | cluster relative to the want (28 bits) << 4
 * | snapshot.  Written by the worker that serves the want, read by the slot's owner. */
static bool delivered_error(const struct shared *shared, uint64_t slot, uint32_t sequence, uint64_t *error)
{
    *error = atomic_load_explicit(slot_word64(shared, slot, shared->error), memory_order_acquire);
    return *error != 0 && *error >> 44 == (sequence & 0xfffff);
}

enum waited { WAITED_READY, WAITED_ERROR, WAITED_BLOCKED };

static enum waited look_at_want(const struct filter *self, struct bitmap_view *const *bitmaps, uint64_t slot,
                                uint32_t sequence, uint64_t first, uint64_t end, uint64_t *error, int *index,
                                uint64_t *cluster)
{
    if (delivered_error(&self->shared, slot, sequence, error))
        return WAITED_ERROR;
    /* LOOK_UNMAPPED: a new snapshot; the write starts over and has it mapped. */
    return look(&self->shared, bitmaps, first, end, index, cluster) == LOOK_BLOCKED ? WAITED_BLOCKED : WAITED_READY;
}

/* A wait ended after needed_ns: had we spun for that long, a wake-up (the dearer part of a short wait) would have been
 * saved.  Where there are fewer CPUs than runnable processes the spin keeps the worker from running: then waits are long
 * and spins fail, and the bound goes to nothing. */
static void adapt_spin(struct thread_slot *thread, uint64_t needed_ns, bool spun_in_vain)
{
    if (spun_in_vain)
        thread->spin_ns = thread->spin_ns / 2 < SPIN_MIN_NS ? 0 : thread->spin_ns / 2;
    else if (needed_ns < SPIN_MAX_NS)
        thread->spin_ns = needed_ns * 2 < SPIN_START_NS ? SPIN_START_NS : SPIN_MAX_NS;
}

/* Of the snapshots that lack a cluster of the range, the one whose timeout ends first: its index, or -1. */
static int earliest_deadline(const struct filter *self, struct bitmap_view *const *bitmaps, uint64_t first,
                             uint64_t end, uint64_t started_ns, uint64_t *deadline_ns)
{
    int earliest = -1;
    *deadline_ns = UINT64_MAX;
    for (int i = 0; i < SNAPSHOT_COUNT; i++) {
        if (bitmaps[i] == NULL || !snapshot_active(&self->shared, i))
            continue;
        uint64_t timeout_ns = snapshot_timeout_ns(&self->shared, i), at;
        if (timeout_ns == 0 || __builtin_add_overflow(started_ns, timeout_ns, &at) || at >= *deadline_ns)
            continue;
        const byte_word *bytes = bitmaps[i]->view.buf;
        bool lacks = false;
        for (uint64_t c = first; c < end && !lacks; c++)
            lacks = atomic_load_explicit(bytes + c, memory_order_acquire) < COPIED;
        if (lacks) {
            earliest = i;
            *deadline_ns = at;
        }
    }
    return earliest;
}

static void publish_want(const struct shared *shared, uint64_t slot, uint64_t first, uint64_t end, uint32_t *sequence)
{
    word32 *word = slot_word32(shared, slot, shared->want_sequence);
    *sequence = (atomic_load_explicit(word, memory_order_relaxed) + 1) | 1;
    /* Release: not before the even sequence of the withdrawal; a reader that sees the new range sees that too. */
    atomic_store_explicit(slot_word64(shared, slot, shared->want_first), first, memory_order_release);
    atomic_store_explicit(slot_word64(shared, slot, shared->want_end), end, memory_order_release);
    /* Forget the error of an earlier want: its 20 bits of sequence come round again. */
    atomic_store_explicit(slot_word64(shared, slot, shared->error), 0, memory_order_release);
    atomic_store(word, *sequence);
}

/* Nobody else may write these: a worker that reads something else would serve something else. */
static bool want_intact(const struct shared *shared, uint64_t slot, uint64_t first, uint64_t end, uint32_t sequence)
{
    return atomic_load_explicit(slot_word32(shared, slot, shared->want_sequence), memory_order_relaxed) == sequence &&
           atomic_load_explicit(slot_word64(shared, slot, shared->want_first), memory_order_relaxed) == first &&
           atomic_load_explicit(slot_word64(shared, slot, shared->want_end), memory_order_relaxed) == end;
}

static void withdraw_want(const struct shared *shared, uint64_t slot, uint32_t sequence)
{
    atomic_store(slot_word32(shared, slot, shared->want_sequence), sequence + 1);
}

/* Waits, out of flight, until the clusters are copied, or something has to be decided.  0: start over; -1: raised. */
static int await_copies(struct filter *self, struct thread_slot *thread, struct request *request, uint64_t first,
                        uint64_t end)
{
    const struct shared *shared = &self->shared;
    struct bitmap_view *bitmaps[SNAPSHOT_COUNT];
    uint64_t slot = thread->index, error = 0, cluster = first, deadline_ns = 0;
    uint32_t sequence;
    int index = 0, result = 0, late = -1;
    enum waited waited = WAITED_BLOCKED;
    unsigned int forks = self->forks;

    if (request->wait_started_ns == 0)
        request->wait_started_ns = now_ns();
    uint64_t give_up_ns = UINT64_MAX;
    if (request->patience_ns != 0 &&
        __builtin_add_overflow(request->wait_started_ns, request->patience_ns, &give_up_ns))
        give_up_ns = UINT64_MAX;
    /* Without the GIL another thread may attach or detach bitmaps: keep the ones of this wait. */
    for (int i = 0; i < SNAPSHOT_COUNT; i++) {
        bitmaps[i] = shared->bitmaps[i];
        if (bitmaps[i] != NULL)
            bitmaps[i]->references++;
    }
    publish_want(shared, slot, first, end, &sequence);
    bool failed = reach(self, failpoints_armed(self), WRITER_WANTED, request);
    if (!failed)
        ring(self, false);
    while (!failed) {
        uint64_t budget_ns = self->may_spin ? thread->spin_ns : 0, started_ns = now_ns();
        bool in_vain = false;
        if (started_ns >= give_up_ns || give_up_ns - started_ns < budget_ns)
            budget_ns = started_ns < give_up_ns ? give_up_ns - started_ns : 0;
        Py_BEGIN_ALLOW_THREADS
        waited = look_at_want(self, bitmaps, slot, sequence, first, end, &error, &index, &cluster);
        for (unsigned int turn = 0; waited == WAITED_BLOCKED && budget_ns != 0; turn++) {
            cpu_pause();
            waited = look_at_want(self, bitmaps, slot, sequence, first, end, &error, &index, &cluster);
            if (turn % 16 == 15 && now_ns() - started_ns >= budget_ns)
                break;
        }
        if (waited == WAITED_BLOCKED) {
            in_vain = budget_ns != 0;
            late = earliest_deadline(self, bitmaps, first, end, request->wait_started_ns, &deadline_ns);
            uint64_t now = now_ns(), slice_ns = SLEEP_SLICE_NS;
            if (late >= 0 && deadline_ns <= now)
                slice_ns = 0;
            else if (late >= 0 && deadline_ns - now < slice_ns)
                slice_ns = deadline_ns - now;
            if (give_up_ns <= now)
                slice_ns = 0;
            else if (give_up_ns - now < slice_ns)
                slice_ns = give_up_ns - now;
            if (slice_ns != 0 && self->open) {
                word32 *asleep = slot_word32(shared, slot, shared->asleep);
                atomic_store(asleep, 1);
                waited = look_at_want(self, bitmaps, slot, sequence, first, end, &error, &index, &cluster);
                if (waited == WAITED_BLOCKED) {
                    ring(self, true);
                    failed = reach(self, failpoints_armed(self), WRITER_ASLEEP, request);
                    if (!failed)
                        semaphore_sleep(thread->semaphore, slice_ns);
                    waited = look_at_want(self, bitmaps, slot, sequence, first, end, &error, &index, &cluster);
                }
                atomic_store(asleep, 0);
            }
        }
        adapt_spin(thread, now_ns() - started_ns, in_vain);
        Py_END_ALLOW_THREADS
        if (waited != WAITED_BLOCKED || failed || !self->open)
            break;
        if (__builtin_expect(!want_intact(shared, slot, first, end, sequence), 0)) {
            late = -1;
            break; /* starts over and publishes it again */
        }
        /* Not only at EINTR: the kernel may have given the signal to another thread. */
        if (handle_signals(self) != 0) {
            result = -1;
            break;
        }
        if (forks != self->forks)
            break;
        /* A handler that wrote through this handle has used the slot: ask again. */
        if (self->open && atomic_load(slot_word32(shared, slot, shared->want_sequence)) != sequence) {
            publish_want(shared, slot, first, end, &sequence);
            ring(self, false);
        }
        late = earliest_deadline(self, bitmaps, first, end, request->wait_started_ns, &deadline_ns);
        if (late >= 0 && deadline_ns <= now_ns())
            break;
        late = -1;
        if (give_up_ns <= now_ns()) {
            request->gave_up = true;
            break;
        }
    }
    /* By a handler: we are the child, and the slot is our parent's.  The write starts over, with one of its own. */
    bool forked = forks != self->forks;
    if (!forked) {
        withdraw_want(shared, slot, sequence);
        failed |= reach(self, failpoints_armed(self), WRITER_READY, request);
    }
    uint32_t late_serial = 0;
    if (late >= 0 && bitmaps[late] != NULL)
        late_serial = bitmaps[late]->serial;
    for (int i = 0; i < SNAPSHOT_COUNT; i++)
        if (bitmaps[i] != NULL)
            bitmap_release(bitmaps[i]);
    if (result != 0 || !self->open || forked)
        return result;
    if (failed)
        return fail(self, request);
    if (waited == WAITED_ERROR)
        return resolve_write(self, REASON_FAILED, error & 15, error >> 32 & 0xfff, first + (error >> 4 & 0xfffffff));
    if (waited == WAITED_BLOCKED && late >= 0)
        return resolve_write(self, REASON_LATE, (uint64_t)late, late_serial, cluster);
    return 0;
}

/* Waits, out of flight, while the drained section with this odd epoch lasts.  0: start over; -1: raised. */
static int wait_gate(struct filter *self, struct thread_slot *thread, uint32_t epoch)
{
    const struct shared *shared = &self->shared;
    word32 *asleep = slot_word32(shared, thread->index, shared->asleep);
    int slept = 0;
    bool still;

    add64(shared, thread->index, shared->gate_count, 1);
    /* No spin: the writer that is still in flight may need this very CPU. */
    Py_BEGIN_ALLOW_THREADS
    atomic_store(asleep, 1);
    if (atomic_load(shared->epoch) == epoch)
        slept = semaphore_sleep(thread->semaphore, GATE_SLICE_NS);
    atomic_store(asleep, 0);
    still = atomic_load(shared->epoch) == epoch;
    Py_END_ALLOW_THREADS
    unsigned int forks = self->forks;
    if (handle_signals(self) != 0)
        return -1;
    if (still && slept == ETIMEDOUT && forks == self->forks)
        return resolve_write(self, REASON_GATED, 0, epoch, 0);
    return 0;
}

static int punch(int fd, uint64_t offset, uint64_t length)
{
    int result;
    do {
        result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    } while (result != 0 && errno == EINTR);
    return result;
}

/* Step 6, the data.  Zeroes are a hole where the file can have one.  An unchanged write stores nothing: it is compared,
 * for its caller may be wrong.  Another writer's data, or a cut, can come between the call and this step, and data that
 * was equal then would be put back here without a copy and without a mark (the model shows it).  A difference makes it
 * an ordinary write.  `image` was read with the GIL: a resize changes it meanwhile. */
static int store_data(const struct filter *self, uint8_t *image, struct request *request)
{
    uint8_t *target = image + request->offset;
    if (request->kind == KIND_UNCHANGED) {
        bool equal = false;
        int failed = guarded_is_equal(target, request->data, request->length, &equal);
        if (!failed && !equal)
            request->kind = KIND_DATA;
        return reach(self, failpoints_armed(self), WRITER_COMPARED, request) ? -1 : failed;
    }
    if (request->kind != KIND_ZEROES) {
        uint64_t half = failpoints_armed(self) ? request->length / 2 : 0;
        if (half != 0 && guarded_copy(target, request->data, half) != 0)
            return -1;
        if (reach(self, half != 0, WRITER_HALF_STORED, request))
            return -1;
        return guarded_copy(target + half, request->data + half, request->length - half);
    }
    return punch(self->fd, request->offset, request->length) == 0 ? 0 : guarded_fill(target, request->length);
}

static void count_write(struct filter *self, struct thread_slot *thread, const struct request *request,
                        bool first_touch)
{
    const struct shared *shared = &self->shared;
    add64(shared, thread->index, shared->writes, 1);
    add64(shared, thread->index, shared->write_bytes, request->length);
    if (first_touch)
        add64(shared, thread->index, shared->first_touches, 1);
    if (request->wait_started_ns == 0)
        return;
    uint64_t waited_ns = now_ns() - request->wait_started_ns;
    word64 *maximum = slot_word64(shared, thread->index, shared->wait_max_ns);
    add64(shared, thread->index, shared->wait_count, 1);
    add64(shared, thread->index, shared->wait_total_ns, waited_ns);
    if (waited_ns > atomic_load_explicit(maximum, memory_order_relaxed))
        atomic_store_explicit(maximum, waited_ns, memory_order_relaxed);
    /* Bucket b counts waits of 2^(b-1) <= ns < 2^b; the last one takes the rest. */
    uint64_t bucket = 64 - (uint64_t)__builtin_clzll(waited_ns | 1);
    if (bucket >= shared->wait_histogram_count)
        bucket = shared->wait_histogram_count - 1;
    add64(shared, thread->index, shared->wait_histogram + 8 * bucket, 1);
}

/* One round of the six steps: 1 done, 0 start over, -1 raised. */
static int try_write(struct filter *self, struct request *request)
{
    const struct shared *shared = &self->shared;
    struct thread_slot *thread = find_thread(self);
    if (__builtin_expect(thread == NULL || !self->open, 0))
        return resolve_write(self, REASON_ATTACH, 1, 0, 0);
    if (__builtin_expect(request->offset > shared->image_size || request->length > shared->image_size - request->offset,
                         0))
        return resolve_write(self, REASON_RANGE, 0, request->offset, request->length);
    if (__builtin_expect(request->length == 0, 0))
        return 1;

    word32 *in_flight = slot_word32(shared, thread->index, shared->in_flight);
    uint64_t first = request->offset >> self->cluster_shift;
    uint64_t end = ((request->offset + request->length - 1) >> self->cluster_shift) + 1;
    bool first_touch = false;
    bool armed = failpoints_armed(self);
    bool unchanged = request->kind == KIND_UNCHANGED;
    int failed = 0;

    atomic_store(in_flight, 1);                    /* step 1 */
    if (reach(self, armed, WRITER_MARKED, request))
        goto leave;
    uint32_t epoch = atomic_load(shared->epoch);   /* step 2 */
    if (__builtin_expect(epoch & 1, 0)) {
        atomic_store_explicit(in_flight, 0, memory_order_release);
        if (reach(self, armed, WRITER_GATED, request))
            return fail(self, request);
        return wait_gate(self, thread, epoch);
    }
    if (reach(self, armed, WRITER_EPOCH, request))
        goto leave;
    if (!unchanged) {
        uint64_t c = first;                        /* step 3 */
        while (c < end && atomic_load_explicit(shared->epoch_map + c, memory_order_acquire) == epoch)
            c++;
        if (__builtin_expect(c != end, 0)) {
            int index;
            uint64_t cluster;
            enum look found = look(shared, self->shared.bitmaps, c, end, &index, &cluster); /* step 4 */
            if (found != LOOK_READY) {
                atomic_store_explicit(in_flight, 0, memory_order_release);
                if (reach(self, armed, WRITER_LEFT, request))
                    return fail(self, request);
                if (found == LOOK_UNMAPPED)
                    return resolve_write(self, REASON_UNMAPPED, (uint64_t)index, 0, 0);
                return await_copies(self, thread, request, cluster, end);
            }
            if (reach(self, armed, WRITER_LOOKED, request))
                goto leave;
            first_touch = true;
            for (; c < end; c++)                   /* step 5 */
                atomic_store_explicit(shared->epoch_map + c, epoch, memory_order_release);
            if (reach(self, armed, WRITER_MAP_MARKED, request))
                goto leave;
        }
    }
    /* The marks may not sink below the data: a writer that dies in the store has marked what it changed (I6). */
    atomic_thread_fence(memory_order_release);
    uint8_t *image = self->image.buf;
    if (request->kind == KIND_ZEROES || request->length >= LONG_COPY_BYTES) {
        Py_BEGIN_ALLOW_THREADS
        failed = store_data(self, image, request); /* step 6 */
        Py_END_ALLOW_THREADS
    } else {
        failed = store_data(self, image, request);
    }
    reach(self, armed, WRITER_STORED, request);
leave:;
    /* A cut that did not see the mark may have been taken in the middle of the store.  No fence: this finds scribbles,
     * it is no part of the protocol. */
    bool unmarked = atomic_load_explicit(in_flight, memory_order_relaxed) != 1;
    atomic_store_explicit(in_flight, 0, memory_order_release);
    if (__builtin_expect(unmarked, 0) && resolve(self, REASON_UNMARKED, 0, 0, first) != 0)
        return -1;
    if (__builtin_expect(request->failed_errno != 0, 0))
        return fail(self, request);
    if (__builtin_expect(failed, 0))
        return refuse_write(self, REASON_FAULT, request->offset, request->length);
    if (__builtin_expect(unchanged && request->kind != KIND_UNCHANGED, 0))
        return 0;
    count_write(self, thread, request, first_touch);
    return 1;
}

/* The outermost write of the thread whose handler closed the disk has left: now nothing of it is in use here. */
static void finish_close(struct filter *self)
{
    PyObject *type, *value, *trace;
    if (self->closing_thread != PyThread_get_thread_ident() || in_detour(self))
        return;
    self->closing_thread = 0;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_finish_close", NULL);
    if (result == NULL)
        PyErr_WriteUnraisable((PyObject *)self);
    Py_XDECREF(result);
    PyErr_Restore(type, value, trace);
}

/* 1: written; 0: gave up, nothing done; -1: raised. */
static int run_request(struct filter *self, struct request *request)
{
    int done = 0;
    self->busy++;
    while (done == 0 && !request->gave_up)
        done = try_write(self, request);
    self->busy--;
    if (__builtin_expect(self->closing_thread != 0, 0))
        finish_close(self);
    return done;
}

static PyObject *run_write(struct filter *self, struct request *request)
{
    return run_request(self, request) < 0 ? NULL : PyLong_FromUnsignedLongLong(request->length);
}

/* An int that does not fit is out of range, like any other offset outside the image. */
static bool get_position(struct filter *self, PyObject *object, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(object);
    if (*value != (uint64_t)-1 || !PyErr_Occurred())
        return true;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        refuse(self, REASON_RANGE, UINT64_MAX, 0);
    }
    return false;
}

static PyObject *filter_pwrite(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    struct filter *self = (struct filter *)object;
    struct request request = {.kind = KIND_DATA};
    Py_buffer data;

    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "pwrite() takes data and offset (%zd positional arguments were given)",
                            count);
    for (Py_ssize_t i = 0; names != NULL && i < PyTuple_Size(names); i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "unchanged") != 0)
            return PyErr_Format(PyExc_TypeError, "pwrite() got an unexpected keyword argument %R", name);
        int unchanged = PyObject_IsTrue(args[count + i]);
        if (unchanged < 0)
            return NULL;
        if (unchanged)
            request.kind = KIND_UNCHANGED;
    }
    if (!get_position(self, args[1], &request.offset))
        return NULL;
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) != 0)
        return NULL;
    request.data = data.buf;
    request.length = (uint64_t)data.len;
    PyObject *result = run_write(self, &request);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *filter_try_pwrite(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    struct filter *self = (struct filter *)object;
    struct request request = {.kind = KIND_DATA};
    Py_buffer data;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "try_pwrite() takes data, offset and patience_ns (%zd were given)", count);
    if (!as_u64(args[2], "patience_ns", &request.patience_ns) || !get_position(self, args[1], &request.offset))
        return NULL;
    if (request.patience_ns == 0)
        return PyErr_Format(PyExc_ValueError, "try_pwrite: patience_ns must be above 0");
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) != 0)
        return NULL;
    request.data = data.buf;
    request.length = (uint64_t)data.len;
    int done = run_request(self, &request);
    PyBuffer_Release(&data);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *filter_zeroes(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    struct filter *self = (struct filter *)object;
    struct request request = {.kind = KIND_ZEROES};

    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "expected count and offset (%zd arguments were given)", count);
    if (!get_position(self, args[0], &request.length) || !get_position(self, args[1], &request.offset))
        return NULL;
    return run_write(self, &request);
}

/* Reads never wait and need no slot: 0 done, -1 raised. */
static int read_image(struct filter *self, uint8_t *to, uint64_t offset, uint64_t length)
{
    int failed;
    if (!self->initialised || !self->open) {
        if (resolve(self, REASON_ATTACH, 0, 0, 0) != 0)
            return -1;
        if (!self->initialised || !self->open) {
            PyErr_SetString(PyExc_ValueError, "the filter is closed");
            return -1;
        }
    }
    while (offset > self->shared.image_size || length > self->shared.image_size - offset)
        if (resolve(self, REASON_RANGE, 0, offset, length) != 0)
            return -1;
    const uint8_t *from = (const uint8_t *)self->image.buf + offset;
    self->busy++;
    if (length >= LONG_COPY_BYTES) {
        Py_BEGIN_ALLOW_THREADS
        failed = guarded_copy(to, from, length);
        Py_END_ALLOW_THREADS
    } else {
        failed = guarded_copy(to, from, length);
    }
    self->busy--;
    return failed ? refuse(self, REASON_FAULT, offset, length) : 0;
}

static PyObject *filter_pread(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    struct filter *self = (struct filter *)object;
    uint64_t length, offset;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "pread() takes count and offset (%zd arguments were given)", count);
    if (!get_position(self, args[0], &length) || !get_position(self, args[1], &offset))
        return NULL;
    /* Before memory is asked for: a length from outside must not exhaust it. */
    if (!self->initialised || !self->open)
        if (resolve(self, REASON_ATTACH, 0, 0, 0) != 0)
            return NULL;
    if (!self->initialised) {
        refuse(self, REASON_ATTACH, 0, 0);
        return NULL;
    }
    while (length > self->shared.image_size)
        if (resolve(self, REASON_RANGE, 0, offset, length) != 0)
            return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (bytes != NULL && read_image(self, (uint8_t *)PyBytes_AsString(bytes), offset, length) != 0)
        Py_CLEAR(bytes);
    return bytes;
}

static PyObject *filter_pread_into(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    struct filter *self = (struct filter *)object;
    uint64_t offset;
    Py_buffer view;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "pread_into() takes buffer and offset (%zd arguments were given)", count);
    if (!get_position(self, args[1], &offset) || PyObject_GetBuffer(args[0], &view, PyBUF_WRITABLE) != 0)
        return NULL;
    PyObject *result = NULL;
    if (read_image(self, view.buf, offset, (uint64_t)view.len) == 0)
        result = PyLong_FromSsize_t(view.len);
    PyBuffer_Release(&view);
    return result;
}

static void free_thread(struct thread_slot *thread)
{
    Py_DECREF(thread->semaphore_object);
    PyMem_Free(thread);
}

/* bind(slot, semaphore): the calling thread writes with this slot from now on. */
static PyObject *filter_bind(PyObject *object, PyObject *args)
{
    struct filter *self = (struct filter *)object;
    unsigned long long index;
    PyObject *semaphore;
    if (!PyArg_ParseTuple(args, "KO:bind", &index, &semaphore))
        return NULL;
    sem_t *handle = semaphore_of(semaphore);
    if (handle == NULL || !self->initialised || !check_range("slot", index, 1, self->shared.slot_count))
        return NULL;
    if (find_thread(self) != NULL)
        return PyErr_Format(PyExc_ValueError, "this thread has a slot");
    struct thread_slot *thread = PyMem_Calloc(1, sizeof *thread);
    struct thread_slot **threads = PyMem_Realloc(self->threads, (self->thread_count + 1) * sizeof *threads);
    if (threads != NULL)
        self->threads = threads;
    if (thread == NULL || threads == NULL) {
        PyMem_Free(thread);
        return PyErr_NoMemory();
    }
    thread->thread = PyThread_get_thread_ident();
    thread->index = index;
    thread->semaphore = handle;
    thread->semaphore_object = Py_NewRef(semaphore);
    thread->spin_ns = self->may_spin ? SPIN_START_NS : 0;
    self->threads[self->thread_count++] = thread;
    Py_RETURN_NONE;
}

/* unbind(slot): the thread that had this slot has none now. */
static PyObject *filter_unbind(PyObject *object, PyObject *argument)
{
    struct filter *self = (struct filter *)object;
    uint64_t index;
    if (!as_u64(argument, "slot", &index))
        return NULL;
    for (size_t i = 0; i < self->thread_count; i++) {
        if (self->threads[i]->index != index)
            continue;
        free_thread(self->threads[i]);
        self->threads[i] = self->threads[--self->thread_count];
        break;
    }
    Py_RETURN_NONE;
}

static PyObject *filter_attach_bitmap(PyObject *object, PyObject *args)
{
    struct filter *self = (struct filter *)object;
    unsigned long long index, serial;
    PyObject *mapping;
    if (!PyArg_ParseTuple(args, "KKO:attach_bitmap", &index, &serial, &mapping))
        return NULL;
    if (!self->initialised || !shared_attach_bitmap(&self->shared, index, serial, mapping))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *filter_detach_bitmap(PyObject *object, PyObject *argument)
{
    struct filter *self = (struct filter *)object;
    uint64_t index;
    if (!as_u64(argument, "snapshot", &index) || !shared_detach_bitmap(&self->shared, index))
        return NULL;
    Py_RETURN_NONE;
}

static void clear(struct filter *self)
{
    for (size_t i = 0; i < self->thread_count; i++)
        free_thread(self->threads[i]);
    PyMem_Free(self->threads);
    self->threads = NULL;
    self->thread_count = 0;
    shared_clear(&self->shared);
    while (self->kept != NULL) {
        struct kept_view *kept = self->kept;
        self->kept = kept->next;
        PyBuffer_Release(&kept->view);
        PyMem_Free(kept);
    }
    if (self->image.obj != NULL)
        PyBuffer_Release(&self->image);
    if (self->failpoints_view.obj != NULL)
        PyBuffer_Release(&self->failpoints_view);
    Py_CLEAR(self->pool_object);
    self->initialised = false;
}

/* stop() -> number of calls that are still inside; no new ones come in.  release() then lets the mappings go. */
static PyObject *filter_stop(PyObject *object, PyObject *unused)
{
    struct filter *self = (struct filter *)object;
    (void)unused;
    self->open = false;
    return PyLong_FromSize_t(self->busy);
}

/* defer_close() -> whether the calling thread is in the middle of a write (a handler or a finalizer closes the disk):
 * then no new calls come in, and that write ends with ClosedError and calls _finish_close. */
static PyObject *filter_defer_close(PyObject *object, PyObject *unused)
{
    struct filter *self = (struct filter *)object;
    (void)unused;
    if (!in_detour(self))
        Py_RETURN_FALSE;
    self->open = false;
    self->closing_thread = PyThread_get_thread_ident();
    Py_RETURN_TRUE;
}

/* In a forked child: of the calls that were inside only those of this thread exist; how many. */
static size_t forget_other_threads(struct filter *self)
{
    self->closing_thread = 0;
    self->forks++;
    self->busy = 0;
    for (struct detour **link = &self->detours; *link != NULL;) {
        if ((*link)->thread == PyThread_get_thread_ident()) {
            self->busy++;
            link = &(*link)->next;
        } else {
            *link = (*link)->next;
        }
    }
    return self->busy;
}

enum release_mode {
    RELEASE_IDLE = 0,   /* nobody may be inside */
    RELEASE_INSIDE = 1, /* called by _resolve to attach anew: readers may be inside, their mapping stays */
    RELEASE_FORKED = 2, /* in a child: the threads that were inside do not exist */
};

static PyObject *filter_release(PyObject *object, PyObject *argument)
{
    struct filter *self = (struct filter *)object;
    uint64_t mode;
    if (!as_u64(argument, "mode", &mode))
        return NULL;
    if (self->busy != 0 && mode == RELEASE_IDLE)
        return PyErr_Format(PyExc_ValueError, "release: %zu calls are inside", self->busy);
    self->open = false;
    if (mode == RELEASE_FORKED && forget_other_threads(self) != 0) {
        /* The fork was in the middle of a write, by the handler of a signal: the write goes on in the child too, and
         * has everything cleared when it attaches anew. */
        self->open = false;
        Py_RETURN_NONE;
    }
    clear(self);
    Py_RETURN_NONE;
}

/* setup(segment, image, fd, writable, layout, pool, failpoints, failpoints_offset): (re)attaches. */
static PyObject *filter_setup(PyObject *object, PyObject *args)
{
    struct filter *self = (struct filter *)object;
    PyObject *segment, *image, *layout, *pool, *failpoints;
    unsigned long long failpoints_offset;
    int fd, writable;
    cpu_set_t cpus;

    if (!PyArg_ParseTuple(args, "OOipOOOK:setup", &segment, &image, &fd, &writable, &layout, &pool, &failpoints,
                          &failpoints_offset))
        return NULL;
    if (self->initialised)
        return PyErr_Format(PyExc_ValueError, "setup: release first");
    sem_t *handle = semaphore_of(pool);
    if (handle == NULL || !shared_init(&self->shared, segment, layout))
        return NULL;
    if (!get_mapping(image, &self->image, writable != 0)) {
        shared_clear(&self->shared);
        return NULL;
    }
    if ((uint64_t)self->image.len != self->shared.image_size) {
        clear(self);
        return PyErr_Format(PyExc_ValueError, "setup: the image mapping is not as long as the image");
    }
    if (!get_mapping(failpoints, &self->failpoints_view, true) ||
        !check_range("failpoints", failpoints_offset, 8 * (1 + WRITER_FAILPOINT_COUNT),
                     (uint64_t)self->failpoints_view.len) ||
        (self->failpoints = word_at(&self->failpoints_view, failpoints_offset, 8)) == NULL) {
        clear(self);
        return NULL;
    }
    if (guard_install() != 0) {
        clear(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self->pool = handle;
    self->pool_object = Py_NewRef(pool);
    self->fd = fd;
    self->writable = writable != 0;
    self->cluster_shift = (unsigned int)__builtin_ctzll(self->shared.cluster_size);
    CPU_ZERO(&cpus);
    self->may_spin = sched_getaffinity(0, sizeof cpus, &cpus) != 0 || CPU_COUNT(&cpus) > 1;
    self->initialised = true;
    self->open = true;
    Py_RETURN_NONE;
}

/* grow(segment, image, layout): the image was resized; both mappings are longer, and nothing has moved in them.
 *
 * Other threads may be inside without the GIL.  What they use then stays as it is: the old mapping of the segment, with
 * all its words but the epoch map, and the old mapping of the image.  Both show the same pages as the new ones.  What
 * changes here (size, epoch map, image) is used with the GIL held.  Bitmaps are as long as the image was: they are mapped
 * anew when the next snapshot is seen. */
static PyObject *filter_grow(PyObject *object, PyObject *args)
{
    struct filter *self = (struct filter *)object;
    struct shared *shared = &self->shared, grown = {0};
    PyObject *segment, *image, *layout;
    struct kept_view *new_segment, *old_image;
    Py_buffer view;

    if (!PyArg_ParseTuple(args, "OOO:grow", &segment, &image, &layout))
        return NULL;
    if (!self->initialised)
        return PyErr_Format(PyExc_ValueError, "grow: set up first");
    if (!shared_init(&grown, segment, layout))
        return NULL;
    new_segment = PyMem_Calloc(1, sizeof *new_segment);
    old_image = PyMem_Calloc(1, sizeof *old_image);
    if (new_segment == NULL || old_image == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    if (!get_mapping(image, &view, self->writable))
        goto failed;
    if ((uint64_t)view.len != grown.image_size || grown.image_size < shared->image_size ||
        grown.cluster_size != shared->cluster_size || grown.slot_count != shared->slot_count ||
        grown.slots - (uint8_t *)grown.segment.buf != shared->slots - (uint8_t *)shared->segment.buf ||
        grown.snapshots - (uint8_t *)grown.segment.buf != shared->snapshots - (uint8_t *)shared->segment.buf) {
        PyErr_SetString(PyExc_ValueError, "grow: not the same image, or not larger");
        PyBuffer_Release(&view);
        goto failed;
    }
    for (uint64_t index = 0; index < SNAPSHOT_COUNT; index++)
        shared_detach_bitmap(shared, index);
    /* Buffers may be moved: they were asked for without a shape, which could point into them. */
    new_segment->view = grown.segment;
    old_image->view = self->image;
    self->image = view;
    new_segment->next = self->kept;
    old_image->next = new_segment;
    self->kept = old_image;
    shared->epoch_map = grown.epoch_map;
    shared->cluster_count = grown.cluster_count;
    shared->image_size = grown.image_size;
    Py_RETURN_NONE;

failed:
    PyMem_Free(new_segment);
    PyMem_Free(old_image);
    shared_clear(&grown);
    return NULL;
}

static PyObject *filter_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    (void)args;
    (void)keywords;
    return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

static void filter_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    clear((struct filter *)object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef filter_methods[] = {
    {"pwrite", (PyCFunction)(void (*)(void))filter_pwrite, METH_FASTCALL | METH_KEYWORDS,
     "pwrite($self, data, offset, /, *, unchanged=False)\n--\n\n"
     "Write a bytes-like object at a byte offset and return the number of bytes written.\n\n"
     "Waits while a snapshot still needs old content of a cluster it touches; see shmcbw.filter.Disk."},
    {"try_pwrite", (PyCFunction)(void (*)(void))filter_try_pwrite, METH_FASTCALL,
     "try_pwrite($self, data, offset, patience_ns, /)\n--\n\n"
     "Write like pwrite, but wait for copies for at most patience_ns (nanoseconds, above 0) and then give up with\n"
     "nothing done.  Returns whether the data was written."},
    {"pwrite_zeroes", (PyCFunction)(void (*)(void))filter_zeroes, METH_FASTCALL,
     "pwrite_zeroes($self, count, offset, /)\n--\n\nMake count bytes at offset read as zeroes; a hole where the file "
     "can have one.  Returns count."},
    {"pdiscard", (PyCFunction)(void (*)(void))filter_zeroes, METH_FASTCALL,
     "pdiscard($self, count, offset, /)\n--\n\nGive up count bytes at offset: they read as zeroes.  Returns count."},
    {"pread", (PyCFunction)(void (*)(void))filter_pread, METH_FASTCALL,
     "pread($self, count, offset, /)\n--\n\nReturn count bytes at offset.  Never waits."},
    {"pread_into", (PyCFunction)(void (*)(void))filter_pread_into, METH_FASTCALL,
     "pread_into($self, buffer, offset, /)\n--\n\nFill a writable buffer from offset and return its length."},
    {"_setup", filter_setup, METH_VARARGS, NULL},
    {"_bind", filter_bind, METH_VARARGS, NULL},
    {"_unbind", filter_unbind, METH_O, NULL},
    {"_attach_bitmap", filter_attach_bitmap, METH_VARARGS, NULL},
    {"_detach_bitmap", filter_detach_bitmap, METH_O, NULL},
    {"_grow", filter_grow, METH_VARARGS, NULL},
    {"_stop", filter_stop, METH_NOARGS, NULL},
    {"_defer_close", filter_defer_close, METH_NOARGS, NULL},
    {"_release", filter_release, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot filter_slots[] = {
    {Py_tp_new, filter_new},
    {Py_tp_dealloc, filter_dealloc},
    {Py_tp_methods, filter_methods},
    {0, NULL},
};

static PyType_Spec filter_spec = {
    .name = "shmcbw._core.Filter",
    .basicsize = sizeof(struct filter),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = filter_slots,
};

int add_filter(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&filter_spec);
    return type == NULL ? -1 : PyModule_AddObjectRef(module, "Filter", type);
}
