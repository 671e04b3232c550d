/* What an armed failpoint does (the words and the names are in shmcbw/failpoints.py). */
#include "core.h"

#include <signal.h>
#include <unistd.h>

enum { ACTION_KILL = 1, ACTION_STOP = 2, ACTION_DELAY = 3, ACTION_ERRNO = 4 };

/* Counts down what is to be skipped, then how often to act; false: not now. */
static bool due(word64 *word, uint64_t *value)
{
    *value = atomic_load(word);
    while ((*value & 0xff) != 0) {
        uint64_t skip = *value >> 32 & 0xffff, times = *value >> 48, next = *value;
        if (skip != 0)
            next -= (uint64_t)1 << 32;
        else if (times == 1)
            next = 0;
        else if (times != 0)
            next -= (uint64_t)1 << 48;
        if (atomic_compare_exchange_strong(word, value, next))
            return skip == 0;
    }
    return false;
}

int failpoint_act(word64 *word)
{
    uint64_t value;
    if (!due(word, &value))
        return 0;
    uint64_t argument = value >> 8 & 0xffffff;
    switch (value & 0xff) {
    case ACTION_KILL:
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    case ACTION_STOP:
        kill(getpid(), SIGSTOP);
        return 0;
    case ACTION_DELAY: {
        struct timespec left = {.tv_sec = (time_t)(argument / 1000), .tv_nsec = (long)(argument % 1000) * 1000000};
        while (nanosleep(&left, &left) != 0)
            ;
        return 0;
    }
    case ACTION_ERRNO:
        return (int)argument;
    default:
        return 0;
    }
}

/* failpoint(mapping, offset) -> the errno to fail with, or 0. */
static PyObject *core_failpoint(PyObject *module, PyObject *args)
{
    PyObject *mapping;
    unsigned long long offset;
    Py_buffer view;
    int number = 0;
    (void)module;

    if (!PyArg_ParseTuple(args, "OK:failpoint", &mapping, &offset) || !get_mapping(mapping, &view, true))
        return NULL;
    word64 *word = word_at(&view, offset, 8);
    if (word != NULL) {
        Py_BEGIN_ALLOW_THREADS
        number = failpoint_act(word);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    return word == NULL ? NULL : PyLong_FromLong(number);
}

static PyMethodDef failpoint_methods[] = {
    {"failpoint", core_failpoint, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_failpoint(PyObject *module)
{
    return PyModule_AddFunctions(module, failpoint_methods);
}
