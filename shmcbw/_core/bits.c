/* Bits of dirty bitmaps: sets of granules, and how they meet the epoch map and the cluster bytes.
 *
 * A set is one bit a granule, the lowest bit of the first byte first; bits beyond the last granule are zero.  A granule
 * and a cluster are powers of two bytes, given by their shifts; either may be the larger one.  All of this is local to
 * its caller but for two inputs that other processes change meanwhile:
 *
 *   epoch map      acquire loads.  A mark stored during the pass is seen or not: its write overlaps the pass.
 *   cluster bytes  compare-and-swap PENDING -> SKIPPED against the workers' claims; whoever comes first has it.
 *
 * Little-endian words, as everywhere in shmcbw.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

enum { SHIFT_MAX = 62, RUN_BYTES = 16 };

static uint64_t load_word(const uint8_t *bits, uint64_t bytes, uint64_t word)
{
    uint64_t value = 0;
    uint64_t offset = word * 8;
    memcpy(&value, bits + offset, bytes - offset < 8 ? bytes - offset : 8);
    return value;
}

static void set_run(uint8_t *bits, uint64_t first, uint64_t end)
{
    while (first < end && first % 8 != 0) {
        bits[first / 8] |= (uint8_t)(1u << first % 8);
        first++;
    }
    if (first >= end)
        return;
    memset(bits + first / 8, 0xff, end / 8 - first / 8);
    if (end % 8 != 0)
        bits[end / 8] |= (uint8_t)((1u << end % 8) - 1);
}

/* The first bit from `first` on that is `wanted`, or end. */
static uint64_t find_bit(const uint8_t *bits, uint64_t bytes, uint64_t first, uint64_t end, bool wanted)
{
    uint64_t flip = wanted ? 0 : ~(uint64_t)0;
    uint64_t word = first / 64;
    if (first >= end)
        return end;
    uint64_t value = (load_word(bits, bytes, word) ^ flip) >> first % 64 << first % 64;
    while (value == 0) {
        word++;
        if (word * 64 >= end)
            return end;
        value = load_word(bits, bytes, word) ^ flip;
    }
    uint64_t found = word * 64 + (uint64_t)__builtin_ctzll(value);
    return found < end ? found : end;
}

/* Units first..end of 2^from bytes as units of 2^to bytes, rounded outward, no more than `limit`. */
static void convert(uint64_t *first, uint64_t *end, unsigned int from, unsigned int to, uint64_t limit)
{
    if (from >= to) {
        *first <<= from - to;
        *end <<= from - to;
    } else {
        *first >>= to - from;
        *end = ((*end - 1) >> (to - from)) + 1;
    }
    if (*end > limit)
        *end = limit;
    if (*first > *end)
        *first = *end;
}

struct bit_set {
    Py_buffer view;
    uint64_t granules;
    unsigned int shift;
};

static bool get_set(struct bit_set *set, PyObject *object, unsigned long long granules, unsigned int shift, bool writable)
{
    /* 2^56 granules: no sum or shift below can overflow. */
    if (shift > SHIFT_MAX || granules > (uint64_t)1 << 56) {
        PyErr_SetString(PyExc_ValueError, "bits: shift or number of granules out of range");
        return false;
    }
    if (!get_mapping(object, &set->view, writable))
        return false;
    if ((uint64_t)set->view.len != (granules + 7) / 8) {
        PyErr_Format(PyExc_ValueError, "bits: %zd bytes do not hold %llu granules", set->view.len, granules);
        PyBuffer_Release(&set->view);
        return false;
    }
    set->granules = granules;
    set->shift = shift;
    return true;
}

/* The epoch map inside a segment: NULL with a ValueError where it is not. */
static word32 *get_map(Py_buffer *view, PyObject *segment, unsigned long long offset, unsigned long long clusters)
{
    word32 *map = NULL;
    if (!get_mapping(segment, view, false))
        return NULL;
    if (clusters > (uint64_t)view->len / 4)
        PyErr_SetString(PyExc_ValueError, "epoch map: outside the segment");
    else if (clusters != 0 && check_range("epoch map", offset, clusters * 4, (uint64_t)view->len))
        map = word_at(view, offset, 4);
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "epoch map: no clusters");
    if (map == NULL)
        PyBuffer_Release(view);
    return map;
}

static bool check_shift(unsigned int from, unsigned int to, uint64_t units)
{
    /* A cluster may be many granules: their numbers must stay below 2^62. */
    if (from <= SHIFT_MAX && (from < to || units == 0 || from - to + (64 - (unsigned int)__builtin_clzll(units)) < SHIFT_MAX))
        return true;
    PyErr_SetString(PyExc_ValueError, "bits: shift out of range");
    return false;
}

/* bits_add(bits, granules, first, end): set a run. */
static PyObject *core_bits_add(PyObject *module, PyObject *args)
{
    PyObject *object;
    unsigned long long granules, first, end;
    struct bit_set set;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKKK:bits_add", &object, &granules, &first, &end) ||
        !get_set(&set, object, granules, 0, true))
        return NULL;
    if (first > end || end > granules) {
        PyBuffer_Release(&set.view);
        return PyErr_Format(PyExc_ValueError, "bits: %llu..%llu is not in 0..%llu", first, end, granules);
    }
    set_run(set.view.buf, first, end);
    PyBuffer_Release(&set.view);
    Py_RETURN_NONE;
}

/* bits_add_epochs(bits, granules, shift, segment, map_offset, clusters, cluster_shift, start): add every cluster that
 * was marked after the epoch `start`. */
static PyObject *core_bits_add_epochs(PyObject *module, PyObject *args)
{
    PyObject *object, *segment;
    unsigned long long granules, offset, clusters;
    unsigned int shift, cluster_shift, start;
    struct bit_set set;
    Py_buffer view;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKIOKKII:bits_add_epochs", &object, &granules, &shift, &segment, &offset, &clusters,
                          &cluster_shift, &start) ||
        !check_shift(cluster_shift, shift, clusters) || !get_set(&set, object, granules, shift, true))
        return NULL;
    word32 *map = get_map(&view, segment, offset, clusters);
    if (map == NULL) {
        PyBuffer_Release(&set.view);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    for (uint64_t cluster = 0; cluster < clusters; cluster++) {
        if (atomic_load_explicit(map + cluster, memory_order_acquire) <= start)
            continue;
        uint64_t first = cluster++;
        while (cluster < clusters && atomic_load_explicit(map + cluster, memory_order_acquire) > start)
            cluster++;
        uint64_t end = cluster;
        convert(&first, &end, cluster_shift, shift, granules);
        set_run(set.view.buf, first, end);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    PyBuffer_Release(&set.view);
    Py_RETURN_NONE;
}

/* bits_add_uncopied(bits, granules, shift, cluster_bytes, clusters, cluster_shift): add every cluster whose byte is
 * below COPIED. */
static PyObject *core_bits_add_uncopied(PyObject *module, PyObject *args)
{
    PyObject *object, *bytes;
    unsigned long long granules, clusters;
    unsigned int shift, cluster_shift;
    struct bit_set set;
    Py_buffer view;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKIOKI:bits_add_uncopied", &object, &granules, &shift, &bytes, &clusters,
                          &cluster_shift) ||
        !check_shift(cluster_shift, shift, clusters) || !get_set(&set, object, granules, shift, true))
        return NULL;
    if (!get_mapping(bytes, &view, false)) {
        PyBuffer_Release(&set.view);
        return NULL;
    }
    bool inside = check_range("clusters", 0, clusters, (uint64_t)view.len);
    if (inside) {
        byte_word *states = view.buf;
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t cluster = 0; cluster < clusters; cluster++) {
            if (atomic_load_explicit(states + cluster, memory_order_acquire) >= COPIED)
                continue;
            uint64_t first = cluster, end = cluster + 1;
            convert(&first, &end, cluster_shift, shift, granules);
            set_run(set.view.buf, first, end);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&set.view);
    return inside ? Py_NewRef(Py_None) : NULL;
}

/* bits_merge(bits, granules, shift, other, other_granules, other_shift): add another set, rounded outward. */
static PyObject *core_bits_merge(PyObject *module, PyObject *args)
{
    PyObject *object, *other;
    unsigned long long granules, other_granules;
    unsigned int shift, other_shift;
    struct bit_set set, from;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKIOKI:bits_merge", &object, &granules, &shift, &other, &other_granules, &other_shift) ||
        !check_shift(other_shift, shift, other_granules) || !get_set(&set, object, granules, shift, true))
        return NULL;
    if (!get_set(&from, other, other_granules, other_shift, false)) {
        PyBuffer_Release(&set.view);
        return NULL;
    }
    const uint8_t *source = from.view.buf;
    uint64_t bytes = (uint64_t)from.view.len;
    Py_BEGIN_ALLOW_THREADS
    if (shift == other_shift && granules == other_granules) {
        uint8_t *target = set.view.buf;
        for (uint64_t i = 0; i < bytes; i++)
            target[i] |= source[i];
    } else {
        uint64_t first = find_bit(source, bytes, 0, other_granules, true);
        while (first < other_granules) {
            uint64_t end = find_bit(source, bytes, first, other_granules, false);
            uint64_t to_first = first, to_end = end;
            convert(&to_first, &to_end, other_shift, shift, granules);
            set_run(set.view.buf, to_first, to_end);
            first = find_bit(source, bytes, end, other_granules, true);
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&from.view);
    PyBuffer_Release(&set.view);
    Py_RETURN_NONE;
}

/* bits_count(bits, granules) -> how many are set. */
static PyObject *core_bits_count(PyObject *module, PyObject *args)
{
    PyObject *object;
    unsigned long long granules;
    struct bit_set set;
    uint64_t count = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OK:bits_count", &object, &granules) || !get_set(&set, object, granules, 0, false))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (uint64_t word = 0; word * 64 < granules; word++)
        count += (uint64_t)__builtin_popcountll(load_word(set.view.buf, (uint64_t)set.view.len, word));
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&set.view);
    return PyLong_FromUnsignedLongLong(count);
}

/* A list of (offset, length) of runs of granules, in bytes, cut off at offset..end. */
static PyObject *as_extents(const uint64_t *runs, uint64_t count, unsigned int shift, uint64_t offset, uint64_t end)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (uint64_t i = 0; list != NULL && i < count; i++) {
        uint64_t first = runs[2 * i] << shift, stop = runs[2 * i + 1] << shift;
        first = first < offset ? offset : first;
        stop = stop > end ? end : stop;
        PyObject *pair = PyTuple_New(2);
        if (pair == NULL || PyTuple_SetItem(pair, 0, PyLong_FromUnsignedLongLong(first)) != 0 ||
            PyTuple_SetItem(pair, 1, PyLong_FromUnsignedLongLong(stop - first)) != 0 || PyErr_Occurred()) {
            Py_XDECREF(pair);
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, (Py_ssize_t)i, pair);
        }
    }
    return list;
}

/* bits_extents(bits, granules, shift, offset, end, limit) -> the runs of granules in the set as (offset, length) in
 * bytes, within offset..end, at most `limit` of them. */
static PyObject *core_bits_extents(PyObject *module, PyObject *args)
{
    PyObject *object;
    unsigned long long granules, offset, end, limit;
    unsigned int shift;
    struct bit_set set;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKIKKK:bits_extents", &object, &granules, &shift, &offset, &end, &limit) ||
        !check_shift(shift, 0, granules) || !get_set(&set, object, granules, shift, false))
        return NULL;
    if (offset > end || end > granules << shift || limit == 0 || limit > (uint64_t)1 << 32) {
        PyBuffer_Release(&set.view);
        return PyErr_Format(PyExc_ValueError, "bits: bytes %llu..%llu are not in the set, or a bad limit", offset, end);
    }
    uint64_t count = 0, room = 0;
    uint64_t *runs = NULL;
    bool full = false;
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *bits = set.view.buf;
    uint64_t bytes = (uint64_t)set.view.len;
    uint64_t last = offset == end ? offset >> shift : ((end - 1) >> shift) + 1;
    uint64_t position = find_bit(bits, bytes, offset >> shift, last, true);
    while (position < last && count < limit) {
        if (count == room) {
            room = room == 0 ? 1024 : room * 2;
            uint64_t *more = realloc(runs, room * RUN_BYTES);
            full = more == NULL;
            if (full)
                break;
            runs = more;
        }
        uint64_t stop = find_bit(bits, bytes, position, last, false);
        runs[2 * count] = position;
        runs[2 * count + 1] = stop;
        count++;
        position = find_bit(bits, bytes, stop, last, true);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&set.view);
    PyObject *result = full ? PyErr_NoMemory() : as_extents(runs, count, shift, offset, end);
    free(runs);
    return result;
}

/* skip_clean(cluster_bytes, first, end, segment, map_offset, clusters, cluster_shift, start, bits, granules, shift)
 * -> how many clusters of first..end became SKIPPED: those that are PENDING, not marked after the epoch `start`, and
 * have no granule in the set.
 *
 * Called after the cut.  A cluster that is written meanwhile is copied for its writer first, or is skipped first and
 * then written: both are right, for it is not part of what was asked for.  A mark that is seen although it was made
 * after the cut keeps its cluster: more than needed, never less (I6). */
static PyObject *core_skip_clean(PyObject *module, PyObject *args)
{
    PyObject *states_object, *segment, *bits;
    unsigned long long first, end, offset, clusters, granules;
    unsigned int cluster_shift, start, shift;
    struct bit_set set;
    Py_buffer states, view;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKKOKKIIOKI:skip_clean", &states_object, &first, &end, &segment, &offset, &clusters,
                          &cluster_shift, &start, &bits, &granules, &shift) ||
        !check_shift(cluster_shift, shift, clusters) || !get_set(&set, bits, granules, shift, false))
        return NULL;
    if (!get_mapping(states_object, &states, true)) {
        PyBuffer_Release(&set.view);
        return NULL;
    }
    word32 *map = NULL;
    if (first <= end && end <= clusters && clusters <= (uint64_t)states.len)
        map = get_map(&view, segment, offset, clusters);
    else
        PyErr_Format(PyExc_ValueError, "clusters %llu..%llu are not in 0..%llu", first, end, clusters);
    uint64_t count = 0;
    if (map != NULL) {
        byte_word *bytes = states.buf;
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t cluster = first; cluster < end; cluster++) {
            uint64_t granule = cluster, granule_end = cluster + 1;
            uint8_t expected = PENDING;
            if (atomic_load_explicit(map + cluster, memory_order_acquire) > start)
                continue;
            convert(&granule, &granule_end, cluster_shift, shift, granules);
            if (find_bit(set.view.buf, (uint64_t)set.view.len, granule, granule_end, true) < granule_end)
                continue;
            if (atomic_load_explicit(bytes + cluster, memory_order_relaxed) == PENDING &&
                atomic_compare_exchange_strong(bytes + cluster, &expected, SKIPPED))
                count++;
        }
        Py_END_ALLOW_THREADS
        PyBuffer_Release(&view);
    }
    PyBuffer_Release(&states);
    PyBuffer_Release(&set.view);
    return map == NULL ? NULL : PyLong_FromUnsignedLongLong(count);
}

static PyMethodDef bits_methods[] = {
    {"bits_add", core_bits_add, METH_VARARGS, NULL},
    {"bits_add_epochs", core_bits_add_epochs, METH_VARARGS, NULL},
    {"bits_add_uncopied", core_bits_add_uncopied, METH_VARARGS, NULL},
    {"bits_merge", core_bits_merge, METH_VARARGS, NULL},
    {"bits_count", core_bits_count, METH_VARARGS, NULL},
    {"bits_extents", core_bits_extents, METH_VARARGS, NULL},
    {"skip_clean", core_skip_clean, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_bits(PyObject *module)
{
    return PyModule_AddFunctions(module, bits_methods);
}
