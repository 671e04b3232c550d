/* Atomic words of a mapping, for Python.
 *
 * All of these are sequentially consistent: they run off the write path, where the price of a fence does not count
 * and an argument about weaker orders would.
 */
#include "core.h"

static PyObject *with_word(PyObject *args, const char *format, size_t size, Py_buffer *view, void **word,
                           unsigned long long *first, unsigned long long *second)
{
    PyObject *mapping;
    unsigned long long offset;
    if (!PyArg_ParseTuple(args, format, &mapping, &offset, first, second))
        return NULL;
    if (!get_mapping(mapping, view, true))
        return NULL;
    *word = word_at(view, offset, size);
    if (*word == NULL) {
        PyBuffer_Release(view);
        return NULL;
    }
    if (size == 4 && (*first > UINT32_MAX || *second > UINT32_MAX)) {
        PyBuffer_Release(view);
        return PyErr_Format(PyExc_ValueError, "word: a value does not fit 32 bits");
    }
    return mapping;
}

#define WORD_FUNCTIONS(bits)                                                                                         \
    static PyObject *load_u##bits(PyObject *module, PyObject *args)                                                  \
    {                                                                                                                \
        Py_buffer view;                                                                                              \
        void *word;                                                                                                  \
        unsigned long long first = 0, second = 0;                                                                    \
        (void)module;                                                                                                \
        if (!with_word(args, "OK:load_u" #bits, bits / 8, &view, &word, &first, &second))                            \
            return NULL;                                                                                             \
        uint##bits##_t value = atomic_load((word##bits *)word);                                                      \
        PyBuffer_Release(&view);                                                                                     \
        return PyLong_FromUnsignedLongLong(value);                                                                   \
    }                                                                                                                \
    static PyObject *store_u##bits(PyObject *module, PyObject *args)                                                 \
    {                                                                                                                \
        Py_buffer view;                                                                                              \
        void *word;                                                                                                  \
        unsigned long long first = 0, second = 0;                                                                    \
        (void)module;                                                                                                \
        if (!with_word(args, "OKK:store_u" #bits, bits / 8, &view, &word, &first, &second))                          \
            return NULL;                                                                                             \
        atomic_store((word##bits *)word, (uint##bits##_t)first);                                                     \
        PyBuffer_Release(&view);                                                                                     \
        Py_RETURN_NONE;                                                                                              \
    }                                                                                                                \
    static PyObject *compare_exchange_u##bits(PyObject *module, PyObject *args)                                      \
    {                                                                                                                \
        Py_buffer view;                                                                                              \
        void *word;                                                                                                  \
        unsigned long long first = 0, second = 0;                                                                    \
        (void)module;                                                                                                \
        if (!with_word(args, "OKKK:compare_exchange_u" #bits, bits / 8, &view, &word, &first, &second))              \
            return NULL;                                                                                             \
        uint##bits##_t expected = (uint##bits##_t)first;                                                             \
        bool done = atomic_compare_exchange_strong((word##bits *)word, &expected, (uint##bits##_t)second);           \
        PyBuffer_Release(&view);                                                                                     \
        return PyBool_FromLong(done);                                                                                \
    }                                                                                                                \
    static PyObject *add_u##bits(PyObject *module, PyObject *args)                                                   \
    {                                                                                                                \
        Py_buffer view;                                                                                              \
        void *word;                                                                                                  \
        unsigned long long first = 0, second = 0;                                                                    \
        (void)module;                                                                                                \
        if (!with_word(args, "OKK:add_u" #bits, bits / 8, &view, &word, &first, &second))                            \
            return NULL;                                                                                             \
        uint##bits##_t value = atomic_fetch_add((word##bits *)word, (uint##bits##_t)first);                          \
        PyBuffer_Release(&view);                                                                                     \
        return PyLong_FromUnsignedLongLong(value);                                                                   \
    }

WORD_FUNCTIONS(32)
WORD_FUNCTIONS(64)

static PyObject *core_fence(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    atomic_thread_fence(memory_order_seq_cst);
    Py_RETURN_NONE;
}

static PyMethodDef word_methods[] = {
    {"load_u32", load_u32, METH_VARARGS, NULL},
    {"store_u32", store_u32, METH_VARARGS, NULL},
    {"compare_exchange_u32", compare_exchange_u32, METH_VARARGS, NULL},
    {"add_u32", add_u32, METH_VARARGS, NULL},
    {"load_u64", load_u64, METH_VARARGS, NULL},
    {"store_u64", store_u64, METH_VARARGS, NULL},
    {"compare_exchange_u64", compare_exchange_u64, METH_VARARGS, NULL},
    {"add_u64", add_u64, METH_VARARGS, NULL},
    {"fence", core_fence, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_words(PyObject *module)
{
    return PyModule_AddFunctions(module, word_methods);
}
