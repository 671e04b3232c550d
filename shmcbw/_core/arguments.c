/* Checks of what Python hands in: an out-of-range argument is a ValueError, never a stray store. */
#include "core.h"

bool get_mapping(PyObject *object, Py_buffer *view, bool writable)
{
    return PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) == 0;
}

bool check_range(const char *what, uint64_t offset, uint64_t length, uint64_t limit)
{
    if (offset <= limit && length <= limit - offset)
        return true;
    PyErr_Format(PyExc_ValueError, "%s: offset %llu, length %llu is outside 0..%llu", what, (unsigned long long)offset,
                 (unsigned long long)length, (unsigned long long)limit);
    return false;
}

/* The address of an aligned word inside a mapping, or NULL with a ValueError. */
void *word_at(const Py_buffer *view, uint64_t offset, size_t size)
{
    if (!check_range("word", offset, size, (uint64_t)view->len))
        return NULL;
    uint8_t *address = (uint8_t *)view->buf + offset;
    if ((uintptr_t)address % size != 0) {
        PyErr_Format(PyExc_ValueError, "word: offset %llu is not aligned to %zu bytes", (unsigned long long)offset, size);
        return NULL;
    }
    return address;
}

bool as_u64(PyObject *object, const char *name, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(object);
    if (*value != (uint64_t)-1 || !PyErr_Occurred())
        return true;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: %R is not in 0..2^64-1", name, object);
    }
    return false;
}

bool layout_u64(PyObject *layout, const char *key, uint64_t *value)
{
    PyObject *object = PyDict_GetItemString(layout, key);
    if (object == NULL) {
        PyErr_Format(PyExc_ValueError, "layout: %s is missing", key);
        return false;
    }
    return as_u64(object, key, value);
}
