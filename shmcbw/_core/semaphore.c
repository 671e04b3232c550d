/* Named POSIX semaphores, opened: posix_ipc creates and unlinks them, the core posts and sleeps.
 *
 * posix_ipc's own acquire() follows the wall clock and loses exceptions of signal handlers; sem_clockwait() on the
 * monotonic clock has neither fault.  A semaphore only wakes: every sleeper looks at the shared state again.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>

struct semaphore {
    PyObject_HEAD
    sem_t *handle;
};

PyTypeObject *semaphore_type;

sem_t *semaphore_of(PyObject *object)
{
    if (!PyObject_TypeCheck(object, semaphore_type)) {
        PyErr_Format(PyExc_TypeError, "expected a Semaphore, got %R", (PyObject *)Py_TYPE(object));
        return NULL;
    }
    return ((struct semaphore *)object)->handle;
}

/* Sleeps until a post or the time is over: 0 posted, ETIMEDOUT, or EINTR.  Call without the GIL. */
int semaphore_sleep(sem_t *semaphore, uint64_t timeout_ns)
{
    uint64_t at = now_ns() + timeout_ns;
    struct timespec deadline = {.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
    return sem_clockwait(semaphore, CLOCK_MONOTONIC, &deadline) == 0 ? 0 : errno;
}

static PyObject *semaphore_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"name", NULL};
    const char *name;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "s:Semaphore", names, &name))
        return NULL;
    sem_t *handle = sem_open(name, 0);
    if (handle == SEM_FAILED)
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError, name);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct semaphore *self = (struct semaphore *)allocate(type, 0);
    if (self == NULL) {
        sem_close(handle);
        return NULL;
    }
    self->handle = handle;
    return (PyObject *)self;
}

static void semaphore_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    sem_close(((struct semaphore *)object)->handle);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *semaphore_post(PyObject *object, PyObject *unused)
{
    (void)unused;
    /* EOVERFLOW: two thousand million unread posts wake as well as one more would. */
    if (sem_post(((struct semaphore *)object)->handle) != 0 && errno != EOVERFLOW)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* wait(timeout_ns) -> True when posted, False when the time is over or a signal came (its handler has run). */
static PyObject *semaphore_wait(PyObject *object, PyObject *argument)
{
    uint64_t timeout_ns;
    int result;
    if (!as_u64(argument, "timeout_ns", &timeout_ns))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = semaphore_sleep(((struct semaphore *)object)->handle, timeout_ns);
    Py_END_ALLOW_THREADS
    /* Not only at EINTR: the kernel may have given the signal to another thread. */
    if (PyErr_CheckSignals() != 0)
        return NULL;
    return PyBool_FromLong(result == 0);
}

static PyMethodDef semaphore_methods[] = {
    {"post", semaphore_post, METH_NOARGS, NULL},
    {"wait", semaphore_wait, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot semaphore_slots[] = {
    {Py_tp_new, semaphore_new},
    {Py_tp_dealloc, semaphore_dealloc},
    {Py_tp_methods, semaphore_methods},
    {0, NULL},
};

static PyType_Spec semaphore_spec = {
    .name = "shmcbw._core.Semaphore",
    .basicsize = sizeof(struct semaphore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = semaphore_slots,
};

int add_semaphore(PyObject *module)
{
    semaphore_type = (PyTypeObject *)PyType_FromSpec(&semaphore_spec);
    return semaphore_type == NULL ? -1 : PyModule_AddObjectRef(module, "Semaphore", (PyObject *)semaphore_type);
}
