/* Copies that survive a page which is not there.
 *
 * A load from or a store to a shared file mapping raises SIGBUS where the file was truncated, or where a hole can't
 * be filled because the file system is full.  The handler below acts only on a fault inside the ranges of a guarded
 * copy of the same thread; every other SIGBUS goes to whoever had the signal before us.
 *
 * The guard is a pointer in thread-local storage to a frame of the guarded function, so it needs no allocation and is
 * safe to read in a handler (initial-exec: no lazy allocation either).
 */
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct guard {
    sigjmp_buf jump;
    const uint8_t *first;
    const uint8_t *second;
    size_t length;
};

static _Thread_local __attribute__((tls_model("initial-exec"))) struct guard *volatile current_guard;
static struct sigaction previous_action;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

static bool within(const uint8_t *address, const uint8_t *start, size_t length)
{
    return start != NULL && address >= start && (size_t)(address - start) < length;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct guard *guard = current_guard;
    const uint8_t *address = info->si_addr;
    /* si_code > 0: raised by the kernel for a fault.  A handler that was installed after ours (faulthandler) gets the
     * fault first, reports it, puts ours back and raises the signal again: sent by this thread to itself, in the middle
     * of a guarded copy, it is that. */
    bool fault = info->si_code > 0 && guard != NULL &&
                 (within(address, guard->first, guard->length) || within(address, guard->second, guard->length));
    bool again = info->si_code == SI_TKILL && info->si_pid == getpid() && guard != NULL;
    if (fault || again) {
        current_guard = NULL;
        siglongjmp(guard->jump, 1);
    }
    if (previous_action.sa_flags & SA_SIGINFO) {
        previous_action.sa_sigaction(number, info, context);
    } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
        /* Returning runs the faulting instruction again, now with the default action. */
        struct sigaction fallback = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &fallback, NULL);
        if (info->si_code <= 0)
            raise(SIGBUS);
    } else {
        previous_action.sa_handler(number);
    }
}

/* Installs the handler, or puts it back in front where somebody has replaced it.  SA_NODEFER: the signal mask is not
 * saved by the guarded functions (that would be a system call), so the signal must not stay blocked. */
int guard_install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    struct sigaction found;
    int result = 0;

    sigemptyset(&action.sa_mask);
    pthread_mutex_lock(&install_lock);
    if (sigaction(SIGBUS, NULL, &found) != 0) {
        result = -1;
    } else if (!(found.sa_flags & SA_SIGINFO) || found.sa_sigaction != on_sigbus) {
        previous_action = found;
        result = sigaction(SIGBUS, &action, NULL);
    }
    pthread_mutex_unlock(&install_lock);
    return result;
}

int guarded_copy(void *to, const void *from, size_t length)
{
    struct guard guard = {.first = to, .second = from, .length = length};
    if (sigsetjmp(guard.jump, 0) != 0)
        return -1;
    current_guard = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    memcpy(to, from, length);
    atomic_signal_fence(memory_order_seq_cst);
    current_guard = NULL;
    return 0;
}

int guarded_fill(void *to, size_t length)
{
    struct guard guard = {.first = to, .length = length};
    if (sigsetjmp(guard.jump, 0) != 0)
        return -1;
    current_guard = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    memset(to, 0, length);
    atomic_signal_fence(memory_order_seq_cst);
    current_guard = NULL;
    return 0;
}

/* A range is zero where its first 16 bytes are and each byte equals the one 16 before it: memcmp is vectorised. */
static bool is_zero(const uint8_t *from, size_t length)
{
    size_t head = length < 16 ? length : 16;
    for (size_t i = 0; i < head; i++)
        if (from[i] != 0)
            return false;
    return length <= 16 || memcmp(from, from + 16, length - 16) == 0;
}

int guarded_is_equal(const void *first, const void *second, size_t length, bool *equal)
{
    struct guard guard = {.first = first, .second = second, .length = length};
    if (sigsetjmp(guard.jump, 0) != 0)
        return -1;
    current_guard = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    *equal = memcmp(first, second, length) == 0;
    atomic_signal_fence(memory_order_seq_cst);
    current_guard = NULL;
    return 0;
}

int guarded_is_zero(const void *from, size_t length, bool *zero)
{
    struct guard guard = {.first = from, .length = length};
    if (sigsetjmp(guard.jump, 0) != 0)
        return -1;
    current_guard = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    *zero = is_zero(from, length);
    atomic_signal_fence(memory_order_seq_cst);
    current_guard = NULL;
    return 0;
}

/* OSError(EIO): the caller in Python looks at the file and says whether it was truncated or the disk is full. */
PyObject *set_bus_error(const char *what, uint64_t offset, uint64_t length)
{
    char message[160];
    snprintf(message, sizeof message, "%s of bytes %llu..%llu of a mapping: a page is not there (SIGBUS)", what,
             (unsigned long long)offset, (unsigned long long)(offset + length));
    PyObject *arguments = Py_BuildValue("(is)", EIO, message);
    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

/* copy(to, to_offset, source, source_offset, length): a guarded memcpy between two buffers. */
static PyObject *core_copy(PyObject *module, PyObject *args)
{
    PyObject *to_object, *from_object;
    unsigned long long to_offset, from_offset, length;
    Py_buffer to, from;
    PyObject *result = NULL;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKOKK:copy", &to_object, &to_offset, &from_object, &from_offset, &length))
        return NULL;
    if (!get_mapping(to_object, &to, true))
        return NULL;
    if (!get_mapping(from_object, &from, false)) {
        PyBuffer_Release(&to);
        return NULL;
    }
    if (check_range("copy to", to_offset, length, (uint64_t)to.len) &&
        check_range("copy from", from_offset, length, (uint64_t)from.len)) {
        int failed;
        uint8_t *target = (uint8_t *)to.buf + to_offset;
        const uint8_t *source = (const uint8_t *)from.buf + from_offset;
        if (length >= 65536) {
            Py_BEGIN_ALLOW_THREADS
            failed = guarded_copy(target, source, length);
            Py_END_ALLOW_THREADS
        } else {
            failed = guarded_copy(target, source, length);
        }
        result = failed ? set_bus_error("copy", from_offset, length) : Py_NewRef(Py_None);
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    return result;
}

static PyObject *core_is_zero(PyObject *module, PyObject *args)
{
    PyObject *object;
    unsigned long long offset, length;
    Py_buffer view;
    PyObject *result = NULL;
    bool zero = false;
    (void)module;

    if (!PyArg_ParseTuple(args, "OKK:is_zero", &object, &offset, &length))
        return NULL;
    if (!get_mapping(object, &view, false))
        return NULL;
    if (check_range("is_zero", offset, length, (uint64_t)view.len)) {
        int failed;
        Py_BEGIN_ALLOW_THREADS
        failed = guarded_is_zero((const uint8_t *)view.buf + offset, length, &zero);
        Py_END_ALLOW_THREADS
        result = failed ? set_bus_error("read", offset, length) : PyBool_FromLong(zero);
    }
    PyBuffer_Release(&view);
    return result;
}

static PyMethodDef guard_methods[] = {
    {"copy", core_copy, METH_VARARGS, NULL},
    {"is_zero", core_is_zero, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int add_guard(PyObject *module)
{
    if (guard_install() != 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return PyModule_AddFunctions(module, guard_methods);
}
