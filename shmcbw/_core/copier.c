/* The copy worker's side of the hand-off: find what writers wait for, claim it, wake them; and the coordinator's wait
 * for a quiet image.
 *
 *   want_*   read as a sequence lock: sequence (odd: published), range, sequence again.  A range that was torn by a
 *            withdrawal is dropped; one that slips through is a harmless order to copy PENDING clusters.
 *   state    of a worker: WORKER_ASLEEP is stored before the last look at the wants; a writer publishes its want and
 *            then loads the state (filter.c: ring), all seq_cst.  One of the two sees the other.
 */
#include "core.h"

#include <sched.h>

uint64_t clusters_claim(byte_word *bytes, uint64_t *first, uint64_t end, uint64_t limit, uint8_t id);

struct copier {
    PyObject_HEAD
    struct shared shared;
    bool initialised;
    uint64_t worker;
    uint64_t next_slot; /* where the next look begins: no slot is always first */
    uint64_t seen_state[SNAPSHOT_COUNT];
    uint32_t seen_serial[SNAPSHOT_COUNT];
};

struct found {
    uint64_t slot;
    uint32_t sequence;
    uint64_t want_first;
    int index;
    uint64_t first;
    uint64_t count;
};

static bool read_want(const struct shared *shared, uint64_t slot, uint32_t *sequence, uint64_t *first, uint64_t *end)
{
    word32 *word = slot_word32(shared, slot, shared->want_sequence);
    *sequence = atomic_load(word);
    if (!(*sequence & 1))
        return false;
    *first = atomic_load_explicit(slot_word64(shared, slot, shared->want_first), memory_order_acquire);
    *end = atomic_load_explicit(slot_word64(shared, slot, shared->want_end), memory_order_acquire);
    return atomic_load_explicit(word, memory_order_acquire) == *sequence && *first < *end &&
           *end <= shared->cluster_count;
}

/* Claims for the first slot that waits for something claimable. */
static bool claim_wanted(struct copier *self, uint64_t limit, struct found *found)
{
    const struct shared *shared = &self->shared;
    for (uint64_t turn = 0; turn < shared->slot_count; turn++) {
        uint64_t end;
        found->slot = self->next_slot + turn;
        if (found->slot >= shared->slot_count)
            found->slot -= shared->slot_count;
        if (!read_want(shared, found->slot, &found->sequence, &found->want_first, &end))
            continue;
        for (found->index = 0; found->index < SNAPSHOT_COUNT; found->index++) {
            struct bitmap_view *bitmap = shared->bitmaps[found->index];
            if (bitmap == NULL || !snapshot_active(shared, found->index) ||
                bitmap->serial != snapshot_serial(shared, found->index))
                continue;
            found->first = found->want_first;
            found->count = clusters_claim(bitmap->view.buf, &found->first, end, limit, (uint8_t)self->worker);
            if (found->count != 0) {
                self->next_slot = found->slot + 1 == shared->slot_count ? 0 : found->slot + 1;
                return true;
            }
        }
    }
    return false;
}

/* One worker that spins is enough; more of them would take CPUs from writers. */
static bool somebody_looks(const struct copier *self)
{
    for (uint64_t worker = 0; worker < self->shared.worker_count; worker++)
        if (worker + 1 != self->worker && atomic_load(worker_state(&self->shared, worker)) == WORKER_LOOKING)
            return true;
    return false;
}

/* claim_wanted(limit, spin_ns) -> (slot, sequence, want_first, snapshot, first, end), or None.  With a spin the worker
 * is LOOKING; without one its state stays what it is (the last look of one that has said ASLEEP); a find makes it BUSY. */
static PyObject *copier_claim_wanted(PyObject *object, PyObject *args)
{
    struct copier *self = (struct copier *)object;
    unsigned long long limit, spin_ns;
    struct found found;
    bool claimed;

    if (!PyArg_ParseTuple(args, "KK:claim_wanted", &limit, &spin_ns))
        return NULL;
    if (!self->initialised || limit == 0)
        return PyErr_Format(PyExc_ValueError, "claim_wanted: no limit, or not set up");
    word32 *state = worker_state(&self->shared, self->worker - 1);
    claimed = claim_wanted(self, limit, &found);
    if (!claimed && spin_ns != 0 && !somebody_looks(self)) {
        Py_BEGIN_ALLOW_THREADS
        atomic_store(state, WORKER_LOOKING);
        uint64_t end_ns = now_ns() + spin_ns;
        while (!claimed && now_ns() < end_ns) {
            for (int i = 0; i < 8; i++)
                cpu_pause();
            claimed = claim_wanted(self, limit, &found);
        }
        Py_END_ALLOW_THREADS
    }
    if (!claimed)
        Py_RETURN_NONE;
    /* Not before: a writer that sees LOOKING counts on being found. */
    atomic_store(state, WORKER_BUSY);
    return Py_BuildValue("(KIKiKK)", (unsigned long long)found.slot, found.sequence,
                         (unsigned long long)found.want_first, found.index, (unsigned long long)found.first,
                         (unsigned long long)(found.first + found.count));
}

/* deliver_error(slot, sequence, want_first, snapshot, cluster, errno): format in filter.c. */
static PyObject *copier_deliver_error(PyObject *object, PyObject *args)
{
    struct copier *self = (struct copier *)object;
    unsigned long long slot, want_first, cluster;
    unsigned int sequence, snapshot, number;
    if (!PyArg_ParseTuple(args, "KIKIKI:deliver_error", &slot, &sequence, &want_first, &snapshot, &cluster, &number))
        return NULL;
    if (!self->initialised || !check_range("slot", slot, 1, self->shared.slot_count) ||
        !check_range("snapshot", snapshot, 1, SNAPSHOT_COUNT))
        return NULL;
    if (cluster < want_first || number == 0 || number > 0xfff)
        return PyErr_Format(PyExc_ValueError, "deliver_error: cluster or errno out of range");
    /* For a message: of a want that is longer than 28 bits can say, the last cluster that they can. */
    uint64_t relative = cluster - want_first < 0xfffffff ? cluster - want_first : 0xfffffff;
    uint64_t word = (uint64_t)(sequence & 0xfffff) << 44 | (uint64_t)number << 32 | relative << 4 | snapshot;
    atomic_store(slot_word64(&self->shared, slot, self->shared.error), word);
    Py_RETURN_NONE;
}

static bool append(PyObject *list, uint64_t value)
{
    PyObject *item = PyLong_FromUnsignedLongLong(value);
    bool good = item != NULL && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return good;
}

/* sleepers(first, end) -> the slots whose owner sleeps and waits for a cluster of the range. */
static PyObject *copier_sleepers(PyObject *object, PyObject *args)
{
    struct copier *self = (struct copier *)object;
    const struct shared *shared = &self->shared;
    unsigned long long first, end;
    if (!PyArg_ParseTuple(args, "KK:sleepers", &first, &end))
        return NULL;
    PyObject *list = PyList_New(0);
    /* The caller has just published: that, then asleep.  Partner: filter.c, asleep and then the byte. */
    atomic_thread_fence(memory_order_seq_cst);
    for (uint64_t slot = 0; self->initialised && list != NULL && slot < shared->slot_count; slot++) {
        uint32_t sequence;
        uint64_t want_first, want_end;
        if (atomic_load(slot_word32(shared, slot, shared->asleep)) == 0 ||
            !read_want(shared, slot, &sequence, &want_first, &want_end) || want_first >= end || want_end <= first)
            continue;
        if (!append(list, slot))
            Py_CLEAR(list);
    }
    return list;
}

/* changed() -> True when the snapshot table is not what it was at the last call. */
static PyObject *copier_changed(PyObject *object, PyObject *unused)
{
    struct copier *self = (struct copier *)object;
    bool changed = false;
    (void)unused;
    if (!self->initialised)
        return PyErr_Format(PyExc_ValueError, "changed: not set up");
    for (int index = 0; index < SNAPSHOT_COUNT; index++) {
        uint64_t state = snapshot_state(&self->shared, index);
        uint32_t serial = snapshot_serial(&self->shared, index);
        changed |= state != self->seen_state[index] || serial != self->seen_serial[index];
        self->seen_state[index] = state;
        self->seen_serial[index] = serial;
    }
    return PyBool_FromLong(changed);
}

static PyObject *copier_attach_bitmap(PyObject *object, PyObject *args)
{
    struct copier *self = (struct copier *)object;
    unsigned long long index, serial;
    PyObject *mapping;
    if (!PyArg_ParseTuple(args, "KKO:attach_bitmap", &index, &serial, &mapping))
        return NULL;
    if (!self->initialised || !shared_attach_bitmap(&self->shared, index, serial, mapping))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *copier_detach_bitmap(PyObject *object, PyObject *argument)
{
    struct copier *self = (struct copier *)object;
    uint64_t index;
    if (!as_u64(argument, "snapshot", &index) || !shared_detach_bitmap(&self->shared, index))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *copier_release(PyObject *object, PyObject *unused)
{
    struct copier *self = (struct copier *)object;
    (void)unused;
    self->initialised = false;
    shared_clear(&self->shared);
    Py_RETURN_NONE;
}

/* Copier(segment, layout, worker_id) */
static PyObject *copier_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"segment", "layout", "worker", NULL};
    PyObject *segment, *layout;
    unsigned long long worker;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOK:Copier", names, &segment, &layout, &worker))
        return NULL;
    struct copier *self = (struct copier *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        return NULL;
    if (!shared_init(&self->shared, segment, layout)) {
        Py_DECREF(self);
        return NULL;
    }
    if (worker < 1 || worker > WORKER_ID_MAX || worker > self->shared.worker_count) {
        Py_DECREF(self);
        return PyErr_Format(PyExc_ValueError, "worker id: %llu is not in the worker table", worker);
    }
    self->worker = worker;
    self->next_slot = worker % self->shared.slot_count;
    self->initialised = true;
    return (PyObject *)self;
}

static void copier_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    shared_clear(&((struct copier *)object)->shared);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyMethodDef copier_methods[] = {
    {"claim_wanted", copier_claim_wanted, METH_VARARGS, NULL},
    {"deliver_error", copier_deliver_error, METH_VARARGS, NULL},
    {"sleepers", copier_sleepers, METH_VARARGS, NULL},
    {"changed", copier_changed, METH_NOARGS, NULL},
    {"attach_bitmap", copier_attach_bitmap, METH_VARARGS, NULL},
    {"detach_bitmap", copier_detach_bitmap, METH_O, NULL},
    {"release", copier_release, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot copier_slots[] = {
    {Py_tp_new, copier_new},
    {Py_tp_dealloc, copier_dealloc},
    {Py_tp_methods, copier_methods},
    {0, NULL},
};

static PyType_Spec copier_spec = {
    .name = "shmcbw._core.Copier",
    .basicsize = sizeof(struct copier),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = copier_slots,
};

static bool get_slot_words(PyObject *mapping, Py_buffer *view, unsigned long long offset, unsigned long long stride,
                           unsigned long long count)
{
    uint64_t length;
    if (count == 0 || stride % 4 != 0 || offset % 4 != 0 || __builtin_mul_overflow(stride, count - 1, &length) ||
        __builtin_add_overflow(length, 4, &length)) {
        PyErr_SetString(PyExc_ValueError, "slots: bad offset, size or count");
        return false;
    }
    if (!get_mapping(mapping, view, true))
        return false;
    if (check_range("slots", offset, length, (uint64_t)view->len) && word_at(view, offset, 4) != NULL)
        return true;
    PyBuffer_Release(view);
    return false;
}

/* wait_quiet(mapping, offset, stride, count, first, timeout_ns) -> the first slot from `first` on whose word stayed
 * non-zero until the time was over, or None.  Each word is seen to be zero once; after the odd epoch that is enough,
 * for whoever marks itself in flight later reads the odd epoch and stores nothing. */
static PyObject *core_wait_quiet(PyObject *module, PyObject *args)
{
    PyObject *mapping;
    unsigned long long offset, stride, count, first, timeout_ns;
    Py_buffer view;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKKKK:wait_quiet", &mapping, &offset, &stride, &count, &first, &timeout_ns) ||
        !get_slot_words(mapping, &view, offset, stride, count))
        return NULL;
    uint64_t slot = first;
    Py_BEGIN_ALLOW_THREADS
    uint64_t end_ns = now_ns() + timeout_ns;
    for (unsigned int turn = 0; slot < count; turn++) {
        word32 *word = (word32 *)((uint8_t *)view.buf + offset + slot * stride);
        if (atomic_load(word) == 0) {
            slot++;
            continue;
        }
        if (turn % 16 == 15 && now_ns() >= end_ns)
            break;
        /* The writer in flight may need this CPU: give it away early. */
        if (turn > 64)
            sched_yield();
        else
            cpu_pause();
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    if (slot >= count)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(slot);
}

/* nonzero(mapping, offset, stride, count) -> the indexes whose word is not zero. */
static PyObject *core_nonzero(PyObject *module, PyObject *args)
{
    PyObject *mapping;
    unsigned long long offset, stride, count;
    Py_buffer view;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKK:nonzero", &mapping, &offset, &stride, &count) ||
        !get_slot_words(mapping, &view, offset, stride, count))
        return NULL;
    PyObject *list = PyList_New(0);
    for (uint64_t index = 0; list != NULL && index < count; index++)
        if (atomic_load((word32 *)((uint8_t *)view.buf + offset + index * stride)) != 0 && !append(list, index))
            Py_CLEAR(list);
    PyBuffer_Release(&view);
    return list;
}

static PyMethodDef slot_functions[] = {
    {"wait_quiet", core_wait_quiet, METH_VARARGS, NULL},
    {"nonzero", core_nonzero, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_copier(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&copier_spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Copier", type) != 0)
        return -1;
    return PyModule_AddFunctions(module, slot_functions);
}
