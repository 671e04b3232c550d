/* Cluster bytes: claim, publish, release, scan (I1-I4; the states are in shmcbw/bitmap.py).
 *
 * A byte is bitmap, claim and owner at once.  Its one writer is the owner of the claim; 0 (PENDING) may be changed by
 * whoever wins the compare-and-swap.  Publishing is a release (the compare-and-swap is sequentially consistent) whose
 * partner is the acquire load of the byte in the write path (filter.c: look) and in the snapshot reader.
 */
#include "core.h"

#include <string.h>

struct cluster_range {
    Py_buffer view;
    byte_word *bytes;
    uint64_t first;
    uint64_t end;
};

static bool get_clusters(struct cluster_range *range, PyObject *bitmap, unsigned long long first,
                         unsigned long long end)
{
    if (!get_mapping(bitmap, &range->view, true))
        return false;
    if (first > end || end > (uint64_t)range->view.len) {
        PyErr_Format(PyExc_ValueError, "clusters %llu..%llu are not in 0..%zd", first, end, range->view.len);
        PyBuffer_Release(&range->view);
        return false;
    }
    range->bytes = range->view.buf;
    range->first = first;
    range->end = end;
    return true;
}

static bool check_byte(const char *name, unsigned int value, unsigned int low, unsigned int high)
{
    if (value >= low && value <= high)
        return true;
    PyErr_Format(PyExc_ValueError, "%s: %u is not in %u..%u", name, value, low, high);
    return false;
}

/* The words of the epoch map, or NULL with a ValueError. */
static word32 *epoch_map_at(const Py_buffer *view, uint64_t offset, uint64_t clusters)
{
    if (clusters > (uint64_t)view->len / 4) {
        PyErr_SetString(PyExc_ValueError, "epoch map: outside the segment");
        return NULL;
    }
    return check_range("epoch map", offset, clusters * 4, (uint64_t)view->len) ? word_at(view, offset, 4) : NULL;
}

/* The first PENDING byte of a range, or end.  memchr may read bytes that change meanwhile: what it finds is a hint,
 * the compare-and-swap decides. */
static uint64_t find_pending(const byte_word *bytes, uint64_t first, uint64_t end)
{
    const void *found = first < end ? memchr((const void *)(bytes + first), PENDING, end - first) : NULL;
    return found == NULL ? end : (uint64_t)((const byte_word *)found - bytes);
}

uint64_t clusters_claim(byte_word *bytes, uint64_t *first, uint64_t end, uint64_t limit, uint8_t id);

/* Claims the first run of PENDING bytes in *first..end, at most `limit` of them; returns its length. */
uint64_t clusters_claim(byte_word *bytes, uint64_t *first, uint64_t end, uint64_t limit, uint8_t id)
{
    uint64_t cluster = *first, count = 0;
    for (;;) {
        cluster = find_pending(bytes, cluster, end);
        if (cluster == end)
            return 0;
        *first = cluster;
        while (cluster < end && count < limit) {
            uint8_t expected = PENDING;
            if (!atomic_compare_exchange_strong(bytes + cluster, &expected, id))
                break;
            cluster++;
            count++;
        }
        if (count != 0)
            return count;
        cluster++;
    }
}

/* Turns the bytes that hold `from` into `to`; returns how many did. */
static uint64_t exchange(byte_word *bytes, uint64_t first, uint64_t end, uint8_t from, uint8_t to)
{
    uint64_t count = 0;
    for (uint64_t cluster = first; cluster < end; cluster++) {
        uint8_t expected = from;
        if (atomic_load_explicit(bytes + cluster, memory_order_relaxed) == from &&
            atomic_compare_exchange_strong(bytes + cluster, &expected, to))
            count++;
    }
    return count;
}

static PyObject *core_claim(PyObject *module, PyObject *args)
{
    PyObject *bitmap;
    unsigned long long first, end, limit;
    unsigned int id;
    struct cluster_range range;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKIK:claim", &bitmap, &first, &end, &id, &limit) ||
        !check_byte("worker id", id, 1, WORKER_ID_MAX) || !get_clusters(&range, bitmap, first, end))
        return NULL;
    uint64_t start = first;
    uint64_t count = clusters_claim(range.bytes, &start, end, limit, (uint8_t)id);
    PyBuffer_Release(&range.view);
    if (count == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(KK)", (unsigned long long)start, (unsigned long long)(start + count));
}

static PyObject *core_exchange(PyObject *module, PyObject *args)
{
    PyObject *bitmap;
    unsigned long long first, end;
    unsigned int from, to;
    struct cluster_range range;
    uint64_t count;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKII:exchange", &bitmap, &first, &end, &from, &to) ||
        !check_byte("state", from, 0, 255) || !check_byte("state", to, 0, 255) ||
        !get_clusters(&range, bitmap, first, end))
        return NULL;
    if (end - first < 65536) {
        count = exchange(range.bytes, first, end, (uint8_t)from, (uint8_t)to);
    } else {
        Py_BEGIN_ALLOW_THREADS
        count = exchange(range.bytes, first, end, (uint8_t)from, (uint8_t)to);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&range.view);
    return PyLong_FromUnsignedLongLong(count);
}

/* find_byte(bitmap, first, end, value) -> the first cluster whose byte is `value`, or `end`; other threads go on. */
static PyObject *core_find_byte(PyObject *module, PyObject *args)
{
    PyObject *bitmap;
    unsigned long long first, end;
    unsigned int value;
    struct cluster_range range;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKI:find_byte", &bitmap, &first, &end, &value) ||
        !check_byte("value", value, 0, 255) || !get_clusters(&range, bitmap, first, end))
        return NULL;
    const void *found = NULL;
    Py_BEGIN_ALLOW_THREADS
    if (first < end)
        found = memchr((const void *)(range.bytes + first), (int)value, end - first);
    Py_END_ALLOW_THREADS
    uint64_t cluster = found == NULL ? end : (uint64_t)((const byte_word *)found - range.bytes);
    PyBuffer_Release(&range.view);
    return PyLong_FromUnsignedLongLong(cluster);
}

/* find_marked(segment, epoch_map, first, end, epoch) -> the first cluster of first..end that is marked later than
 * `epoch`, or None.  Partner of each load: the mark in step 5 (filter.c).  Who loads the cluster's byte afterwards sees
 * the copy that came before the mark (I1). */
static PyObject *core_find_marked(PyObject *module, PyObject *args)
{
    PyObject *segment;
    unsigned long long offset, first, end;
    unsigned int epoch;
    Py_buffer view;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKKI:find_marked", &segment, &offset, &first, &end, &epoch) ||
        !get_mapping(segment, &view, false))
        return NULL;
    word32 *map = NULL;
    if (first > end)
        PyErr_Format(PyExc_ValueError, "find_marked: clusters %llu..%llu are no range", first, end);
    else
        map = epoch_map_at(&view, offset, end);
    uint64_t cluster = first;
    while (map != NULL && cluster < end && atomic_load_explicit(map + cluster, memory_order_acquire) <= epoch)
        cluster++;
    PyBuffer_Release(&view);
    if (map == NULL)
        return NULL;
    if (cluster == end)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(cluster);
}

/* clamp_marks(segment, epoch_map, clusters, epoch) -> how many clusters were marked later than `epoch`; they are marked
 * with it now. */
static PyObject *core_clamp_marks(PyObject *module, PyObject *args)
{
    PyObject *segment;
    unsigned long long offset, clusters;
    unsigned int epoch;
    Py_buffer view;
    uint64_t count = 0;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKKI:clamp_marks", &segment, &offset, &clusters, &epoch) ||
        !get_mapping(segment, &view, true))
        return NULL;
    word32 *map = epoch_map_at(&view, offset, clusters);
    if (map != NULL) {
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t cluster = 0; cluster < clusters; cluster++) {
            uint32_t mark = atomic_load_explicit(map + cluster, memory_order_relaxed);
            while (mark > epoch && !atomic_compare_exchange_strong(map + cluster, &mark, epoch))
                ;
            count += mark > epoch;
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    return map == NULL ? NULL : PyLong_FromUnsignedLongLong(count);
}

/* The end of the run of bytes from `first` that, masked, are all what the first one is: (byte, end). */
static PyObject *core_run(PyObject *module, PyObject *args)
{
    PyObject *bitmap;
    unsigned long long first, end;
    struct cluster_range range;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKK:run", &bitmap, &first, &end) || !get_clusters(&range, bitmap, first, end))
        return NULL;
    if (first == end) {
        PyBuffer_Release(&range.view);
        return PyErr_Format(PyExc_ValueError, "run: the range is empty");
    }
    uint8_t value = atomic_load(range.bytes + first);
    uint64_t cluster = first + 1;
    while (cluster < end && atomic_load(range.bytes + cluster) == value)
        cluster++;
    PyBuffer_Release(&range.view);
    return Py_BuildValue("(BK)", value, (unsigned long long)cluster);
}

/* How many bytes of the range hold each value: a list of 256 counts. */
static PyObject *core_histogram(PyObject *module, PyObject *args)
{
    PyObject *bitmap;
    unsigned long long first, end;
    struct cluster_range range;
    uint64_t counts[4][256];
    (void)module;

    if (!PyArg_ParseTuple(args, "OKK:histogram", &bitmap, &first, &end) ||
        !get_clusters(&range, bitmap, first, end))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    memset(counts, 0, sizeof counts);
    /* Four tables: equal neighbours would make each increment wait for the one before. */
    for (uint64_t cluster = first; cluster < end; cluster++)
        counts[cluster % 4][atomic_load_explicit(range.bytes + cluster, memory_order_relaxed)]++;
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&range.view);
    PyObject *list = PyList_New(256);
    for (int value = 0; list != NULL && value < 256; value++) {
        PyObject *count = PyLong_FromUnsignedLongLong(counts[0][value] + counts[1][value] + counts[2][value] +
                                                      counts[3][value]);
        if (count == NULL || PyList_SetItem(list, value, count) != 0)
            Py_CLEAR(list);
    }
    return list;
}

/* find_uncopied(segment, epoch_map, bitmap, clusters, epoch) -> the first cluster that was written after `epoch` while
 * its byte is below COPIED (I1 does not hold), or None.  The mark is read before the byte: marks come after copies. */
static PyObject *core_find_uncopied(PyObject *module, PyObject *args)
{
    PyObject *segment, *bitmap;
    unsigned long long offset, clusters;
    unsigned int epoch;
    struct cluster_range range;
    Py_buffer view;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKOKI:find_uncopied", &segment, &offset, &bitmap, &clusters, &epoch) ||
        !get_clusters(&range, bitmap, 0, clusters))
        return NULL;
    if (!get_mapping(segment, &view, false)) {
        PyBuffer_Release(&range.view);
        return NULL;
    }
    word32 *map = epoch_map_at(&view, offset, clusters);
    uint64_t cluster = 0;
    if (map != NULL) {
        Py_BEGIN_ALLOW_THREADS
        while (cluster < clusters && (atomic_load_explicit(map + cluster, memory_order_acquire) <= epoch ||
                                      atomic_load_explicit(range.bytes + cluster, memory_order_acquire) >= COPIED))
            cluster++;
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&range.view);
    if (map == NULL)
        return NULL;
    if (cluster == clusters)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(cluster);
}

static PyMethodDef cluster_methods[] = {
    {"find_uncopied", core_find_uncopied, METH_VARARGS, NULL},
    {"find_byte", core_find_byte, METH_VARARGS, NULL},
    {"clamp_marks", core_clamp_marks, METH_VARARGS, NULL},
    {"find_marked", core_find_marked, METH_VARARGS, NULL},
    {"claim", core_claim, METH_VARARGS, NULL},
    {"exchange", core_exchange, METH_VARARGS, NULL},
    {"run", core_run, METH_VARARGS, NULL},
    {"histogram", core_histogram, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_clusters(PyObject *module)
{
    return PyModule_AddFunctions(module, cluster_methods);
}
