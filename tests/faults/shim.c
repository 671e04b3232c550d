/* Makes the Nth system call of a kind fail: preloaded (LD_PRELOAD), it stands between a process and libc.
 *
 * Each wrapped function finds out what the call touches (a class: by its path, or by what /proc says the descriptor
 * is), counts it, and asks the rule whether this one fails.  Rule and counters are in a file that the test and all
 * processes of a round have mapped (SHMCBW_FAULTS names it), so a test arms and counts in processes that run.  Without
 * the variable, and in a forked child before its exec, every call goes straight through.
 *
 * The role of a process is "worker" or (of NBD) "server" where its command line says so, else what SHMCBW_FAULTS_ROLE
 * says: both are started by the code under test, which must not know of us.
 *
 *   fails with an errno   the real call is not made (but close, which closes: as in the kernel)
 *   short                 the real call is made for half of the bytes, at least one
 *
 * The kernel's own view is only changed in what the call returns, so whatever state follows is one that a kernel could
 * have left.  What libc does within one of its functions (sem_open makes a file, links it and unlinks it) is one call.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define CALLS(X)                                                                                                       \
    X(open) X(close) X(read) X(pread) X(write) X(pwrite) X(ftruncate) X(fallocate) X(posix_fallocate) X(fdatasync)     \
    X(fsync) X(sync_file_range) X(lseek) X(mmap) X(dup) X(lock) X(getlock) X(flock) X(link) X(rename) X(unlink)        \
    X(stat) X(fstat) X(statx) X(statvfs) X(fstatvfs) X(fstatfs) X(access) X(chmod) X(fchmod) X(chown) X(fchown)        \
    X(opendir) X(shm_open) X(shm_unlink) X(sem_open) X(sem_unlink) X(sem_wait) X(sem_post) X(pipe)                     \
    X(accept) X(recv) X(send) X(getsockopt) X(setsockopt) X(shutdown)
#define CLASSES(X)                                                                                                     \
    X(none) X(source) X(target) X(manifest) X(directory) X(state) X(segment) X(bitmap) X(journal) X(semaphore)         \
    X(names) X(socket) X(door) X(process)
#define ROLES(X) X(coordinator) X(worker) X(writer) X(server)

#define AS_CALL(name) CALL_##name,
#define AS_CLASS(name) CLASS_##name,
#define AS_ROLE(name) ROLE_##name,
#define AS_TEXT(name) #name " "
enum call { CALLS(AS_CALL) CALL_COUNT };
enum class { CLASSES(AS_CLASS) CLASS_COUNT };
enum role { ROLES(AS_ROLE) ROLE_COUNT };
/* For the test: it need not repeat the lists. */
const char *const fault_calls = CALLS(AS_TEXT);
const char *const fault_classes = CLASSES(AS_TEXT);
const char *const fault_roles = ROLES(AS_TEXT);

enum action { OFF, FAIL, SHORT };
#define PATH_BYTES 512
#define SEMAPHORE_COUNT 256

/* The mapped file; tests/faults/layer.py knows the offsets. */
struct control {
    _Atomic uint32_t action; /* stored last when armed, first when disarmed */
    uint32_t role;
    uint32_t call;
    uint32_t class;
    uint32_t number; /* errno */
    uint32_t unused;
    uint64_t first; /* how many matching calls go through before */
    uint64_t times; /* how many then fail */
    _Atomic uint64_t seen;
    _Atomic uint64_t fired;
    char image[PATH_BYTES];
    char targets[PATH_BYTES]; /* the directory of the targets */
    char state[PATH_BYTES];   /* that of saved bitmaps */
    _Atomic uint64_t counts[ROLE_COUNT][CALL_COUNT][CLASS_COUNT];
};

static struct control *control;
static enum role role;
static long owner; /* a forked child is nobody until its exec */
static _Atomic(sem_t *) semaphores[SEMAPHORE_COUNT];

#define REAL(name)                                                                                                     \
    ({                                                                                                                 \
        static __typeof__(&name) real;                                                                                 \
        if (real == NULL)                                                                                              \
            real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                                         \
        real;                                                                                                          \
    })

static enum role role_named(const char *name)
{
    char line[4096] = "";
    int fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC, 0);
    long length = fd < 0 ? 0 : syscall(SYS_read, fd, line, sizeof line - 1);
    if (fd >= 0)
        syscall(SYS_close, fd);
    for (long i = 0; i < length; i++)
        if (line[i] == '\0')
            line[i] = ' ';
    if (strstr(line, "shmcbw.workers.copy_worker") != NULL)
        return ROLE_worker;
    if (strstr(line, "shmcbw.workers.nbd.process") != NULL)
        return ROLE_server;
    return name != NULL && strcmp(name, "writer") == 0 ? ROLE_writer : ROLE_coordinator;
}

__attribute__((constructor)) static void start(void)
{
    const char *file = getenv("SHMCBW_FAULTS"), *name = getenv("SHMCBW_FAULTS_ROLE");
    if (file == NULL)
        return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC, 0);
    void *memory = fd < 0 ? MAP_FAILED
                          : (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "shmcbw faults: %s can't be mapped\n", file);
        abort();
    }
    syscall(SYS_close, fd);
    role = role_named(name);
    owner = syscall(SYS_getpid);
    control = memory;
}

/* -- what a call touches ------------------------------------------------------------------------------------------- */

static bool begins(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

/* A name in /dev/shm, without its slash. */
static enum class class_of_name(const char *name, bool semaphore)
{
    if (semaphore)
        return begins(name, "shmcbw-") ? CLASS_semaphore : CLASS_none;
    if (begins(name, "sem."))
        return class_of_name(name + 4, true);
    if (!begins(name, "shmcbw-"))
        return CLASS_none;
    const char *suffix = strchr(name, '.');
    if (suffix == NULL)
        return CLASS_segment;
    return begins(suffix, ".state") ? CLASS_journal : CLASS_bitmap;
}

static enum class class_of_fd(int fd);

static bool is_below(const char *path, const char *directory)
{
    size_t length = strlen(directory);
    return length != 0 && begins(path, directory) && path[length] == '/';
}

static enum class class_of_path(const char *path)
{
    if (begins(path, "/proc/self/fd/"))
        return class_of_fd(atoi(path + strlen("/proc/self/fd/")));
    if (strcmp(path, "/dev/shm") == 0)
        return CLASS_names;
    if (begins(path, "/dev/shm/"))
        return class_of_name(path + strlen("/dev/shm/"), false);
    if (strcmp(path, control->image) == 0)
        return CLASS_source;
    if (strcmp(path, control->targets) == 0)
        return CLASS_directory;
    if (is_below(path, control->state) || strcmp(path, control->state) == 0)
        return CLASS_state;
    if (is_below(path, control->targets)) {
        /* TARGET.shmcbw, TARGET.shmcbw.shmcbw-partial; but TARGET.shmcbw-partial is the target. */
        const char *suffix = strstr(path + strlen(control->targets), ".shmcbw");
        bool manifest = suffix != NULL && (suffix[7] == '\0' || suffix[7] == '.');
        return manifest ? CLASS_manifest : CLASS_target;
    }
    if (strcmp(path, "/dev/null") == 0 || begins(path, "/proc/"))
        return CLASS_process;
    return CLASS_none;
}

/* One that clients connect to, or one of theirs: it has a name.  A pair that wakes an event loop has none. */
static bool is_named_socket(int fd)
{
    struct sockaddr_storage name;
    socklen_t length = sizeof name;
    return syscall(SYS_getsockname, fd, &name, &length) == 0 && length > sizeof(sa_family_t);
}

/* The pair by which an NBD server hands clients to its processes. */
static bool is_door(int fd)
{
    int type = 0;
    socklen_t length = sizeof type;
    return syscall(SYS_getsockopt, fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type == SOCK_SEQPACKET;
}

static enum class class_of_fd(int fd)
{
    char link[64], path[4096] = "";
    static const char deleted[] = " (deleted)";
    if (control == NULL || fd < 0)
        return CLASS_none;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    bool is_socket = length > 0 && begins(path, "socket:"), named = is_socket && is_named_socket(fd);
    bool door = is_socket && !named && is_door(fd);
    errno = before;
    if (length <= 0)
        return CLASS_none;
    if (is_socket)
        return named ? CLASS_socket : door ? CLASS_door : CLASS_none;
    path[length] = '\0';
    size_t end = strlen(path), tail = strlen(deleted);
    if (end > tail && strcmp(path + end - tail, deleted) == 0)
        path[end - tail] = '\0';
    return begins(path, "/proc/self/fd/") ? CLASS_none : class_of_path(path);
}

static enum class path_class(const char *path)
{
    return control == NULL || path == NULL ? CLASS_none : class_of_path(path);
}

/* -- the rule ------------------------------------------------------------------------------------------------------ */

/* Counts a call, and says what becomes of it. */
static enum action decide(enum call call, enum class class)
{
    if (control == NULL || class == CLASS_none || syscall(SYS_getpid) != owner)
        return OFF;
    atomic_fetch_add(&control->counts[role][call][class], 1);
    uint32_t action = atomic_load(&control->action);
    if (action == OFF || control->role != role || control->call != call || control->class != class)
        return OFF;
    uint64_t seen = atomic_fetch_add(&control->seen, 1);
    if (seen < control->first || seen - control->first >= control->times)
        return OFF;
    atomic_fetch_add(&control->fired, 1);
    errno = (int)control->number;
    return action;
}

static bool fails(enum call call, enum class class)
{
    return decide(call, class) == FAIL;
}

/* How many of the bytes the call is made for; -1: it fails. */
static ssize_t allowed(enum call call, enum class class, size_t count)
{
    switch (decide(call, class)) {
    case FAIL:
        return -1;
    case SHORT:
        return (ssize_t)(count > 1 ? count / 2 : count);
    default:
        return (ssize_t)count;
    }
}

/* -- the wrapped functions ----------------------------------------------------------------------------------------- */

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return fails(CALL_open, path_class(path)) ? -1 : REAL(name)(path, flags, mode);                                \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...)                                                          \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return fails(CALL_open, path_class(path)) ? -1 : REAL(name)(directory, path, flags, mode);                     \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd)
{
    enum class class = class_of_fd(fd);
    int result = REAL(close)(fd);
    return result == 0 && fails(CALL_close, class) ? -1 : result;
}

/* result name(fd, bytes, count, …): the count may be cut short. */
#define TRANSFER(call, name, type, parameters, ...)                                                                    \
    ssize_t name(int fd, type bytes, size_t count parameters)                                                          \
    {                                                                                                                  \
        ssize_t good = allowed(CALL_##call, class_of_fd(fd), count);                                                   \
        return good < 0 ? -1 : REAL(name)(fd, bytes, (size_t)good __VA_ARGS__);                                        \
    }
#define NO_PARAMETERS
#define OFFSET , off_t offset
#define FLAGS , int flags
TRANSFER(read, read, void *, NO_PARAMETERS)
TRANSFER(write, write, const void *, NO_PARAMETERS)
TRANSFER(pread, pread, void *, OFFSET, , offset)
TRANSFER(pread, pread64, void *, OFFSET, , offset)
TRANSFER(pwrite, pwrite, const void *, OFFSET, , offset)
TRANSFER(pwrite, pwrite64, const void *, OFFSET, , offset)

#define VECTOR(name, parameters, ...)                                                                                  \
    ssize_t name(int fd, const struct iovec *pieces, int count, off_t offset parameters)                              \
    {                                                                                                                  \
        struct iovec first = count > 0 ? pieces[0] : (struct iovec){0};                                               \
        ssize_t good = allowed(CALL_pread, class_of_fd(fd), first.iov_len);                                            \
        if (good < 0)                                                                                                  \
            return -1;                                                                                                 \
        if ((size_t)good == first.iov_len)                                                                             \
            return REAL(name)(fd, pieces, count, offset __VA_ARGS__);                                                  \
        first.iov_len = (size_t)good;                                                                                  \
        return REAL(name)(fd, &first, 1, offset __VA_ARGS__);                                                          \
    }
VECTOR(preadv, NO_PARAMETERS)
VECTOR(preadv64, NO_PARAMETERS)
VECTOR(preadv2, FLAGS, , flags)
VECTOR(preadv64v2, FLAGS, , flags)

/* A function of a descriptor, or of a path, that returns -1 where it fails. */
#define OF_FD(call, name, parameters, ...)                                                                             \
    int name parameters                                                                                                \
    {                                                                                                                  \
        return fails(CALL_##call, class_of_fd(fd)) ? -1 : REAL(name)(__VA_ARGS__);                                     \
    }
#define OF_PATH(call, name, parameters, ...)                                                                           \
    int name parameters                                                                                                \
    {                                                                                                                  \
        return fails(CALL_##call, path_class(path)) ? -1 : REAL(name)(__VA_ARGS__);                                    \
    }
OF_FD(ftruncate, ftruncate, (int fd, off_t length), fd, length)
OF_FD(ftruncate, ftruncate64, (int fd, off64_t length), fd, length)
OF_FD(fallocate, fallocate, (int fd, int mode, off_t offset, off_t length), fd, mode, offset, length)
OF_FD(fallocate, fallocate64, (int fd, int mode, off64_t offset, off64_t length), fd, mode, offset, length)
OF_FD(fdatasync, fdatasync, (int fd), fd)
OF_FD(fsync, fsync, (int fd), fd)
OF_FD(sync_file_range, sync_file_range, (int fd, off64_t offset, off64_t length, unsigned int flags), fd, offset,
      length, flags)
OF_FD(flock, flock, (int fd, int operation), fd, operation)
OF_FD(fstat, fstat, (int fd, struct stat *status), fd, status)
OF_FD(fstat, fstat64, (int fd, struct stat64 *status), fd, status)
OF_FD(fstatvfs, fstatvfs, (int fd, struct statvfs *status), fd, status)
OF_FD(fstatvfs, fstatvfs64, (int fd, struct statvfs64 *status), fd, status)
OF_FD(fstatfs, fstatfs, (int fd, struct statfs *status), fd, status)
OF_FD(fstatfs, fstatfs64, (int fd, struct statfs64 *status), fd, status)
OF_FD(fchmod, fchmod, (int fd, mode_t mode), fd, mode)
OF_FD(fchown, fchown, (int fd, uid_t user, gid_t group), fd, user, group)
OF_PATH(stat, stat, (const char *path, struct stat *status), path, status)
OF_PATH(stat, stat64, (const char *path, struct stat64 *status), path, status)
OF_PATH(stat, lstat, (const char *path, struct stat *status), path, status)
OF_PATH(stat, lstat64, (const char *path, struct stat64 *status), path, status)
OF_PATH(statvfs, statvfs, (const char *path, struct statvfs *status), path, status)
OF_PATH(statvfs, statvfs64, (const char *path, struct statvfs64 *status), path, status)
OF_PATH(access, access, (const char *path, int mode), path, mode)
OF_PATH(chmod, chmod, (const char *path, mode_t mode), path, mode)
OF_PATH(chown, chown, (const char *path, uid_t user, gid_t group), path, user, group)
OF_PATH(unlink, unlink, (const char *path), path)
OF_PATH(link, link, (const char *path, const char *to), path, to)
OF_PATH(rename, rename, (const char *path, const char *to), path, to)

int renameat2(int directory, const char *path, int to_directory, const char *to, unsigned int flags)
{
    return fails(CALL_rename, path_class(path)) ? -1 : REAL(renameat2)(directory, path, to_directory, to, flags);
}

int fstatat64(int fd, const char *path, struct stat64 *status, int flags)
{
    bool of_fd = path[0] == '\0' && flags & AT_EMPTY_PATH;
    bool failed = of_fd ? fails(CALL_fstat, class_of_fd(fd)) : fails(CALL_stat, path_class(path));
    return failed ? -1 : REAL(fstatat64)(fd, path, status, flags);
}

/* What was built against a glibc before 2.33 (wheels of posix_ipc) calls this for fstat. */
int __fxstat64(int version, int fd, struct stat64 *status);
int __fxstat64(int version, int fd, struct stat64 *status)
{
    return fails(CALL_fstat, class_of_fd(fd)) ? -1 : REAL(__fxstat64)(version, fd, status);
}

int statx(int fd, const char *path, int flags, unsigned int mask, struct statx *status)
{
    enum class class = path[0] == '\0' ? class_of_fd(fd) : path_class(path);
    return fails(CALL_statx, class) ? -1 : REAL(statx)(fd, path, flags, mask, status);
}

/* Returns the errno. */
#define POSIX_FALLOCATE(name, type)                                                                                    \
    int name(int fd, type offset, type length)                                                                         \
    {                                                                                                                  \
        return fails(CALL_posix_fallocate, class_of_fd(fd)) ? errno : REAL(name)(fd, offset, length);                  \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

#define LSEEK(name, type)                                                                                              \
    type name(int fd, type offset, int whence)                                                                         \
    {                                                                                                                  \
        return fails(CALL_lseek, class_of_fd(fd)) ? -1 : REAL(name)(fd, offset, whence);                               \
    }
LSEEK(lseek, off_t)
LSEEK(lseek64, off64_t)

#define MMAP(name, type)                                                                                               \
    void *name(void *address, size_t length, int protection, int flags, int fd, type offset)                           \
    {                                                                                                                  \
        enum class class = flags & MAP_ANONYMOUS ? CLASS_none : class_of_fd(fd);                                       \
        return fails(CALL_mmap, class) ? MAP_FAILED : REAL(name)(address, length, protection, flags, fd, offset);      \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

static bool fcntl_fails(int fd, int command)
{
    switch (command) {
    case F_DUPFD:
    case F_DUPFD_CLOEXEC:
        return fails(CALL_dup, class_of_fd(fd));
    case F_SETLK:
    case F_SETLKW:
    case F_OFD_SETLK:
    case F_OFD_SETLKW:
        return fails(CALL_lock, class_of_fd(fd));
    case F_GETLK:
    case F_OFD_GETLK:
        return fails(CALL_getlock, class_of_fd(fd));
    default:
        return false;
    }
}

/* The third argument is an int or a pointer; as a register it is the same. */
#define FCNTL(name)                                                                                                    \
    int name(int fd, int command, ...)                                                                                 \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, command);                                                                                       \
        void *argument = va_arg(rest, void *);                                                                         \
        va_end(rest);                                                                                                  \
        return fcntl_fails(fd, command) ? -1 : REAL(name)(fd, command, argument);                                      \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    return fails(CALL_accept, class_of_fd(fd)) ? -1 : REAL(accept4)(fd, address, length, flags);
}

TRANSFER(recv, recv, void *, FLAGS, , flags)
TRANSFER(send, send, const void *, FLAGS, , flags)

/* Cut short it sends of the first piece only. */
ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    struct msghdr first = *message;
    struct iovec piece = message->msg_iovlen > 0 ? message->msg_iov[0] : (struct iovec){0};
    ssize_t good = allowed(CALL_send, class_of_fd(fd), piece.iov_len);
    if (good < 0)
        return -1;
    if ((size_t)good == piece.iov_len)
        return REAL(sendmsg)(fd, message, flags);
    piece.iov_len = (size_t)good;
    first.msg_iov = &piece;
    first.msg_iovlen = 1;
    return REAL(sendmsg)(fd, &first, flags);
}

/* A packet: whole, or not. */
ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    return fails(CALL_recv, class_of_fd(fd)) ? -1 : REAL(recvmsg)(fd, message, flags);
}

OF_FD(shutdown, shutdown, (int fd, int how), fd, how)
OF_FD(setsockopt, setsockopt, (int fd, int level, int name, const void *value, socklen_t length), fd, level, name,
      value, length)

int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    return fails(CALL_getsockopt, class_of_fd(fd)) ? -1 : REAL(getsockopt)(fd, level, name, value, length);
}

DIR *opendir(const char *path)
{
    return fails(CALL_opendir, path_class(path)) ? NULL : REAL(opendir)(path);
}

int pipe2(int ends[2], int flags)
{
    return fails(CALL_pipe, CLASS_process) ? -1 : REAL(pipe2)(ends, flags);
}

int shm_open(const char *name, int flags, mode_t mode)
{
    return fails(CALL_shm_open, class_of_name(name + 1, false)) ? -1 : REAL(shm_open)(name, flags, mode);
}

int shm_unlink(const char *name)
{
    return fails(CALL_shm_unlink, class_of_name(name + 1, false)) ? -1 : REAL(shm_unlink)(name);
}

int sem_unlink(const char *name)
{
    return fails(CALL_sem_unlink, class_of_name(name + 1, true)) ? -1 : REAL(sem_unlink)(name);
}

/* Python's own locks are semaphores too: ours are those that have a name. */
static void remember(sem_t *old, sem_t *new)
{
    for (size_t i = 0; i < SEMAPHORE_COUNT; i++) {
        sem_t *expected = old;
        if (atomic_compare_exchange_strong(&semaphores[i], &expected, new))
            return;
    }
}

static enum class class_of_semaphore(sem_t *semaphore)
{
    for (size_t i = 0; control != NULL && i < SEMAPHORE_COUNT; i++)
        if (atomic_load(&semaphores[i]) == semaphore)
            return CLASS_semaphore;
    return CLASS_none;
}

sem_t *sem_open(const char *name, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    unsigned int value = flags & O_CREAT ? va_arg(rest, unsigned int) : 0;
    va_end(rest);
    enum class class = class_of_name(name + 1, true);
    if (fails(CALL_sem_open, class))
        return SEM_FAILED;
    sem_t *semaphore = REAL(sem_open)(name, flags, mode, value);
    if (semaphore != SEM_FAILED && class == CLASS_semaphore)
        remember(NULL, semaphore);
    return semaphore;
}

int sem_close(sem_t *semaphore)
{
    if (class_of_semaphore(semaphore) == CLASS_semaphore)
        remember(semaphore, NULL);
    return REAL(sem_close)(semaphore);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *deadline)
{
    return fails(CALL_sem_wait, class_of_semaphore(semaphore)) ? -1 : REAL(sem_clockwait)(semaphore, clock, deadline);
}

int sem_post(sem_t *semaphore)
{
    return fails(CALL_sem_post, class_of_semaphore(semaphore)) ? -1 : REAL(sem_post)(semaphore);
}
