/* The control segment as a filter or a copier sees it: checked once, then plain pointers.
 *
 * shared_init() verifies that every field of every slot, worker and snapshot lies inside the mapping and is aligned,
 * so that no later access needs a check.
 */
#include "core.h"

struct field {
    const char *key;
    uint64_t *value;
    uint64_t size;
};

static bool check_array(const struct shared *shared, const char *name, uint64_t offset, uint64_t count, uint64_t size,
                        const struct field *fields, size_t field_count)
{
    uint64_t length;
    if (size == 0 || size % 8 != 0 || offset % 8 != 0 || __builtin_mul_overflow(count, size, &length)) {
        PyErr_Format(PyExc_ValueError, "layout: %s: offset or size is not a multiple of 8", name);
        return false;
    }
    if (!check_range(name, offset, length, (uint64_t)shared->segment.len))
        return false;
    for (size_t i = 0; i < field_count; i++) {
        if (*fields[i].value % (fields[i].size < 8 ? fields[i].size : 8) != 0) {
            PyErr_Format(PyExc_ValueError, "layout: %s is not aligned", fields[i].key);
            return false;
        }
        if (!check_range(fields[i].key, *fields[i].value, fields[i].size, size))
            return false;
    }
    return true;
}

bool shared_init(struct shared *shared, PyObject *segment, PyObject *layout)
{
    uint64_t epoch, epoch_map, slots, snapshots, workers, snapshot_count;
    struct field slot_fields[] = {
        {"slot_in_flight", &shared->in_flight, 4},
        {"slot_asleep", &shared->asleep, 4},
        {"slot_want_sequence", &shared->want_sequence, 4},
        {"slot_want_first", &shared->want_first, 8},
        {"slot_want_end", &shared->want_end, 8},
        {"slot_error", &shared->error, 8},
        {"slot_writes", &shared->writes, 8},
        {"slot_write_bytes", &shared->write_bytes, 8},
        {"slot_first_touches", &shared->first_touches, 8},
        {"slot_wait_count", &shared->wait_count, 8},
        {"slot_wait_total_ns", &shared->wait_total_ns, 8},
        {"slot_wait_max_ns", &shared->wait_max_ns, 8},
        {"slot_gate_count", &shared->gate_count, 8},
        {"slot_wait_histogram", &shared->wait_histogram, 8},
    };
    struct field snapshot_fields[] = {
        {"snapshot_state", &shared->snapshot_state, 8},
        {"snapshot_serial", &shared->snapshot_serial, 4},
        {"snapshot_timeout_ns", &shared->snapshot_timeout_ns, 8},
    };
    struct field worker_fields[] = {{"worker_state", &shared->worker_state, 4}};
    struct field scalars[] = {
        {"epoch", &epoch, 4},
        {"epoch_map", &epoch_map, 4},
        {"cluster_count", &shared->cluster_count, 0},
        {"cluster_size", &shared->cluster_size, 0},
        {"image_size", &shared->image_size, 0},
        {"slots", &slots, 0},
        {"slot_count", &shared->slot_count, 0},
        {"slot_size", &shared->slot_size, 0},
        {"slot_wait_histogram_count", &shared->wait_histogram_count, 0},
        {"snapshots", &snapshots, 0},
        {"snapshot_count", &snapshot_count, 0},
        {"snapshot_size", &shared->snapshot_size, 0},
        {"workers", &workers, 0},
        {"worker_count", &shared->worker_count, 0},
        {"worker_size", &shared->worker_size, 0},
    };

    if (!PyDict_Check(layout)) {
        PyErr_SetString(PyExc_TypeError, "layout: expected a dict");
        return false;
    }
    for (size_t i = 0; i < Py_ARRAY_LENGTH(scalars); i++)
        if (!layout_u64(layout, scalars[i].key, scalars[i].value))
            return false;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(slot_fields); i++)
        if (!layout_u64(layout, slot_fields[i].key, slot_fields[i].value))
            return false;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(snapshot_fields); i++)
        if (!layout_u64(layout, snapshot_fields[i].key, snapshot_fields[i].value))
            return false;
    if (!layout_u64(layout, "worker_state", &shared->worker_state))
        return false;
    if (snapshot_count != SNAPSHOT_COUNT || shared->wait_histogram_count == 0 || shared->wait_histogram_count > 64 ||
        shared->cluster_size < 512 || (shared->cluster_size & (shared->cluster_size - 1)) != 0 ||
        shared->image_size == 0 ||
        shared->cluster_count != (shared->image_size - 1) / shared->cluster_size + 1) {
        PyErr_SetString(PyExc_ValueError, "layout: counts and sizes do not fit each other");
        return false;
    }
    slot_fields[Py_ARRAY_LENGTH(slot_fields) - 1].size = 8 * shared->wait_histogram_count;

    if (!get_mapping(segment, &shared->segment, true))
        return false;
    bool good = check_array(shared, "slots", slots, shared->slot_count, shared->slot_size, slot_fields,
                            Py_ARRAY_LENGTH(slot_fields)) &&
                check_array(shared, "snapshots", snapshots, SNAPSHOT_COUNT, shared->snapshot_size, snapshot_fields,
                            Py_ARRAY_LENGTH(snapshot_fields)) &&
                check_array(shared, "workers", workers, shared->worker_count, shared->worker_size, worker_fields,
                            Py_ARRAY_LENGTH(worker_fields)) &&
                check_range("epoch_map", epoch_map, shared->cluster_count * 4, (uint64_t)shared->segment.len);
    if (good) {
        shared->epoch = word_at(&shared->segment, epoch, 4);
        shared->epoch_map = word_at(&shared->segment, epoch_map, 4);
        good = shared->epoch != NULL && shared->epoch_map != NULL;
    }
    if (!good) {
        PyBuffer_Release(&shared->segment);
        return false;
    }
    uint8_t *base = shared->segment.buf;
    shared->slots = base + slots;
    shared->snapshots = base + snapshots;
    shared->workers = base + workers;
    return true;
}

void shared_clear(struct shared *shared)
{
    for (int index = 0; index < SNAPSHOT_COUNT; index++) {
        if (shared->bitmaps[index] != NULL)
            bitmap_release(shared->bitmaps[index]);
        shared->bitmaps[index] = NULL;
    }
    if (shared->segment.obj != NULL)
        PyBuffer_Release(&shared->segment);
}

void bitmap_release(struct bitmap_view *bitmap)
{
    CHECK(bitmap->references > 0);
    if (--bitmap->references != 0)
        return;
    PyBuffer_Release(&bitmap->view);
    PyMem_Free(bitmap);
}

bool shared_detach_bitmap(struct shared *shared, uint64_t index)
{
    if (!check_range("snapshot", index, 1, SNAPSHOT_COUNT))
        return false;
    if (shared->bitmaps[index] != NULL)
        bitmap_release(shared->bitmaps[index]);
    shared->bitmaps[index] = NULL;
    return true;
}

bool shared_attach_bitmap(struct shared *shared, uint64_t index, uint64_t serial, PyObject *mapping)
{
    if (!shared_detach_bitmap(shared, index))
        return false;
    struct bitmap_view *bitmap = PyMem_Calloc(1, sizeof *bitmap);
    if (bitmap == NULL) {
        PyErr_NoMemory();
        return false;
    }
    if (!get_mapping(mapping, &bitmap->view, true)) {
        PyMem_Free(bitmap);
        return false;
    }
    bitmap->references = 1;
    bitmap->serial = (uint32_t)serial;
    if ((uint64_t)bitmap->view.len < shared->cluster_count || serial > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "bitmap: %zd bytes for %llu clusters", bitmap->view.len,
                     (unsigned long long)shared->cluster_count);
        bitmap_release(bitmap);
        return false;
    }
    shared->bitmaps[index] = bitmap;
    return true;
}
