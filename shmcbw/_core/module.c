#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/* file_system(fd) -> the statfs magic number; os.statvfs does not hand it out. */
static PyObject *core_file_system(PyObject *module, PyObject *argument)
{
    struct statfs status;
    (void)module;
    int fd = (int)PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    int result;
    do {
        result = fstatfs(fd, &status);
    } while (result != 0 && errno == EINTR);
    if (result != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLong((unsigned long)status.f_type & 0xffffffff);
}

/* punch_hole(fd, offset, length): what is there reads as zeroes and takes no space; the size stays. */
static PyObject *core_punch_hole(PyObject *module, PyObject *args)
{
    int fd, result;
    long long offset, length;
    (void)module;
    if (!PyArg_ParseTuple(args, "iLL:punch_hole", &fd, &offset, &length))
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
        Py_END_ALLOW_THREADS
    } while (result != 0 && errno == EINTR && PyErr_CheckSignals() == 0);
    if (result == 0)
        Py_RETURN_NONE;
    return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
}

/* start_writeback(fd, offset, length): the kernel begins to write dirty pages out; nobody waits, and an error is left
 * for fdatasync to report. */
static PyObject *core_start_writeback(PyObject *module, PyObject *args)
{
    int fd;
    long long offset, length;
    (void)module;
    if (!PyArg_ParseTuple(args, "iLL:start_writeback", &fd, &offset, &length))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* birth_ns(fd) -> when the file was made, wall clock; 0 where the file system does not say. */
static PyObject *core_birth_ns(PyObject *module, PyObject *argument)
{
    struct statx status;
    (void)module;
    int fd = (int)PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &status) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (!(status.stx_mask & STATX_BTIME))
        return PyLong_FromLong(0);
    return PyLong_FromUnsignedLongLong((unsigned long long)status.stx_btime.tv_sec * 1000000000u +
                                       status.stx_btime.tv_nsec);
}

/* rename_without_replacing(path, to): FileExistsError where something is called `to`; EINVAL where the file system
 * can't say that. */
static PyObject *core_rename_without_replacing(PyObject *module, PyObject *args)
{
    PyObject *path = NULL, *to = NULL;
    int result, number;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:rename_without_replacing", PyUnicode_FSConverter, &path, PyUnicode_FSConverter,
                          &to)) {
        Py_XDECREF(path);
        return NULL;
    }
    const char *from_name = PyBytes_AsString(path), *to_name = PyBytes_AsString(to);
    Py_BEGIN_ALLOW_THREADS
    result = renameat2(AT_FDCWD, from_name, AT_FDCWD, to_name, RENAME_NOREPLACE);
    number = errno;
    Py_END_ALLOW_THREADS
    if (result != 0) {
        errno = number;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, to_name);
    }
    Py_DECREF(path);
    Py_DECREF(to);
    if (result != 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"rename_without_replacing", core_rename_without_replacing, METH_VARARGS, NULL},
    {"start_writeback", core_start_writeback, METH_VARARGS, NULL},
    {"birth_ns", core_birth_ns, METH_O, NULL},
    {"punch_hole", core_punch_hole, METH_VARARGS, NULL},
    {"file_system", core_file_system, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmcbw._core",
    .m_doc = "Words, bytes and ranges of shared mappings: what needs atomics, or one call on the write path.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&module_definition);
    if (module == NULL)
        return NULL;
    if (add_guard(module) != 0 || add_words(module) != 0 || add_clusters(module) != 0 || add_semaphore(module) != 0 ||
        add_filter(module) != 0 || add_copier(module) != 0 || add_failpoint(module) != 0 || add_bits(module) != 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
