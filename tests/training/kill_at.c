/* Preloaded into a process: counts its file operations below one folder, and kills the process before, within or after
   the n-th. Python, torch and safetensors (Rust) all reach the kernel through these functions of the C library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEFORE, WITHIN, AFTER };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static long wanted, done;
static int moment, log_to = -1;

/* Count operations below `path`; kill at the n-th (from 1; 0: never), and log their names to the descriptor `log`. */
void kill_at(const char *path, long n, int when, int log)
{
    strcpy(folder, path);
    wanted = n, moment = when, log_to = log, done = 0;
}

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static void of_descriptor(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size > 0 ? size : 0] = 0;
}

static void of_path(int at, const char *path, char *out)
{
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX] = "";
    if (at != AT_FDCWD)
        of_descriptor(at, base);
    else if (!getcwd(base, sizeof base))
        base[0] = 0;
    int size = snprintf(out, PATH_MAX, "%s/%s", base, path);
    if (size >= PATH_MAX)
        out[0] = 0;
}

/* Begin an operation: its number, or 0 for one elsewhere. The lock is held until `end`. */
static long begin(const char *name, const char *path)
{
    size_t size = strlen(folder);
    if (!size || strncmp(path, folder, size) || (path[size] && path[size] != '/'))
        return 0;
    pthread_mutex_lock(&lock);
    long number = ++done;
    if (log_to >= 0)
        dprintf(log_to, "%s %s\n", name, path + size);
    if (number == wanted && moment == BEFORE)
        kill(getpid(), SIGKILL);
    return number;
}

static void end(long number)
{
    if (!number)
        return;
    if (number == wanted)
        kill(getpid(), SIGKILL);
    pthread_mutex_unlock(&lock);
}

static int within(long number) { return number && number == wanted && moment == WITHIN; }

#define OPEN(NAME, AT_ARGUMENT, AT_PASSED, AT)                                                                         \
    int NAME(AT_ARGUMENT const char *path, int flags, ...)                                                             \
    {                                                                                                                  \
        int (*real)(AT_ARGUMENT const char *, int, ...) = next(#NAME);                                                 \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        char full[PATH_MAX];                                                                                           \
        full[0] = 0;                                                                                                   \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))                                                           \
            of_path(AT, path, full);                                                                                   \
        long number = begin("open", full);                                                                             \
        int result = real(AT_PASSED path, flags, mode);                                                                \
        end(number);                                                                                                   \
        return result;                                                                                                 \
    }
#define NOTHING
#define COMMA ,
OPEN(open, NOTHING, NOTHING, AT_FDCWD)
OPEN(open64, NOTHING, NOTHING, AT_FDCWD)
OPEN(openat, int at COMMA, at COMMA, at)
OPEN(openat64, int at COMMA, at COMMA, at)

#define FOPEN(NAME)                                                                                                    \
    FILE *NAME(const char *path, const char *mode)                                                                     \
    {                                                                                                                  \
        FILE *(*real)(const char *, const char *) = next(#NAME);                                                       \
        char full[PATH_MAX];                                                                                           \
        full[0] = 0;                                                                                                   \
        if (mode[0] != 'r' || strchr(mode, '+'))                                                                       \
            of_path(AT_FDCWD, path, full);                                                                             \
        long number = begin("open", full);                                                                             \
        FILE *result = real(path, mode);                                                                               \
        end(number);                                                                                                   \
        return result;                                                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Half of the bytes are written where the process dies within. */
#define WRITE(RESULT, NAME, PARAMETERS, FD, SIZE, ...)                                                                 \
    RESULT NAME PARAMETERS                                                                                             \
    {                                                                                                                  \
        RESULT(*real) PARAMETERS = next(#NAME);                                                                        \
        char full[PATH_MAX];                                                                                           \
        of_descriptor(FD, full);                                                                                       \
        long number = begin("write", full);                                                                            \
        if (within(number))                                                                                            \
            SIZE /= 2;                                                                                                 \
        RESULT result = real(__VA_ARGS__);                                                                             \
        end(number);                                                                                                   \
        return result;                                                                                                 \
    }
WRITE(ssize_t, write, (int fd, const void *data, size_t size), fd, size, fd, data, size)
WRITE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), fd, size, fd, data, size, at)
WRITE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), fd, size, fd, data, size, at)
WRITE(ssize_t, writev, (int fd, const struct iovec *parts, int size), fd, size, fd, parts, size)
WRITE(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), fd, size, fd, from, at, size)
WRITE(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), fd, size, fd, from, at, size)
WRITE(ssize_t, copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags), fd, size,
      from, at, fd, to, size, flags)

#define ON_DESCRIPTOR(NAME, PARAMETERS, ...)                                                                           \
    int NAME PARAMETERS                                                                                                \
    {                                                                                                                  \
        int(*real) PARAMETERS = next(#NAME);                                                                           \
        char full[PATH_MAX];                                                                                           \
        of_descriptor(fd, full);                                                                                       \
        long number = begin(#NAME, full);                                                                              \
        int result = real(__VA_ARGS__);                                                                                \
        end(number);                                                                                                   \
        return result;                                                                                                 \
    }
ON_DESCRIPTOR(fsync, (int fd), fd)
ON_DESCRIPTOR(fdatasync, (int fd), fd)
ON_DESCRIPTOR(ftruncate, (int fd, off_t size), fd, size)
ON_DESCRIPTOR(ftruncate64, (int fd, off64_t size), fd, size)
ON_DESCRIPTOR(fchmod, (int fd, mode_t mode), fd, mode)

#define ON_PATH(NAME, PARAMETERS, AT, PATH, ...)                                                                       \
    int NAME PARAMETERS                                                                                                \
    {                                                                                                                  \
        int(*real) PARAMETERS = next(#NAME);                                                                           \
        char full[PATH_MAX];                                                                                           \
        of_path(AT, PATH, full);                                                                                       \
        long number = begin(#NAME, full);                                                                              \
        int result = real(__VA_ARGS__);                                                                                \
        end(number);                                                                                                   \
        return result;                                                                                                 \
    }
ON_PATH(rename, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(renameat, (int at, const char *from, int there, const char *to), there, to, at, from, there, to)
ON_PATH(renameat2, (int at, const char *from, int there, const char *to, unsigned flags), there, to, at, from, there,
        to, flags)
ON_PATH(link, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(linkat, (int at, const char *from, int there, const char *to, int flags), there, to, at, from, there, to, flags)
ON_PATH(symlink, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(unlink, (const char *path), AT_FDCWD, path, path)
ON_PATH(unlinkat, (int at, const char *path, int flags), at, path, at, path, flags)
ON_PATH(rmdir, (const char *path), AT_FDCWD, path, path)
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
ON_PATH(mkdirat, (int at, const char *path, mode_t mode), at, path, at, path, mode)
ON_PATH(truncate, (const char *path, off_t size), AT_FDCWD, path, path, size)
ON_PATH(truncate64, (const char *path, off64_t size), AT_FDCWD, path, path, size)
ON_PATH(chmod, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
ON_PATH(fchmodat, (int at, const char *path, mode_t mode, int flags), at, path, at, path, mode, flags)
