// Preloaded into a test's process: at the K-th call that changes what lies below a folder the process is killed, with
// half of a buffer written, or the disk is full from then on. fault_arm() starts the counting, fault_points() tells it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static long at, points;
static int full;  // what happens at the point: 0 kill, 1 no space from there on

void fault_arm(const char *folder, long point, int no_space) {
    snprintf(below, sizeof below, "%s/", folder);
    at = point, full = no_space, points = 0;
}
long fault_points(void) { return points; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int inside(int dir, const char *path) {
    char link[64], name[4096];
    if (!below[0]) return 0;
    if (path && path[0] == '/') return strncmp(path, below, strlen(below)) == 0;
    if (dir == AT_FDCWD) {
        if (!getcwd(name, sizeof name - 1)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t size = readlink(link, name, sizeof name - 2);
        if (size <= 0) return 0;
        name[size] = 0;
    }
    if (path) strcat(name, "/");
    return strncmp(name, below, strlen(below)) == 0;
}

// 0: go on; 1: die now, after half of the work; -1: fail with ENOSPC. "grows": a full disk can refuse it.
static int meet(int dir, const char *path, int grows) {
    if (!inside(dir, path)) return 0;
    long here = __atomic_add_fetch(&points, 1, __ATOMIC_SEQ_CST);  // a save writes from several threads
    if (!at) return 0;
    if (full) {
        if (!grows || here < at) return 0;
        errno = ENOSPC;
        return -1;
    }
    return here == at;
}
static void die(void) { kill(getpid(), SIGKILL); }

#define BEFORE(dir, path, grows) \
    switch (meet(dir, path, grows)) { case 1: die(); break; case -1: return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    switch (fd > 2 ? meet(fd, NULL, 1) : 0) { case 1: real(fd, data, size / 2); die(); break; case -1: return -1; }
    return real(fd, data, size);
}
#define PWRITE(name, off) ssize_t name(int fd, const void *data, size_t size, off where) { \
    REAL(ssize_t, #name, int, const void *, size_t, off); \
    switch (meet(fd, NULL, 1)) { case 1: real(fd, data, size / 2, where); die(); break; case -1: return -1; } \
    return real(fd, data, size, where); }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    switch (fd > 2 ? meet(fd, NULL, 1) : 0) { case 1: real(fd, parts, (count + 1) / 2); die(); break; case -1: return -1; }
    return real(fd, parts, count);
}
#define PWRITEV(name, off) ssize_t name(int fd, const struct iovec *parts, int count, off where) { \
    REAL(ssize_t, #name, int, const struct iovec *, int, off); \
    BEFORE(fd, NULL, 1) return real(fd, parts, count, where); }
PWRITEV(pwritev, off_t) PWRITEV(pwritev64, off64_t)
#define SENDFILE(name, off) ssize_t name(int to, int from, off *where, size_t size) { \
    REAL(ssize_t, #name, int, int, off *, size_t); \
    switch (meet(to, NULL, 1)) { case 1: real(to, from, where, size < 1000 ? 10 : 500); die(); break; case -1: return -1; } \
    return real(to, from, where, size); }
SENDFILE(sendfile, off_t) SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    BEFORE(to, NULL, 1) return real(from, a, to, b, size, flags);
}

#define CHANGES(flags) (flags & (O_CREAT | O_TRUNC))
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    REAL(int, #name, const char *, int, ...); \
    if (CHANGES(flags)) { BEFORE(AT_FDCWD, path, 1) } return real(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    REAL(int, #name, int, const char *, int, ...); \
    if (CHANGES(flags)) { BEFORE(dir, path, 1) } return real(dir, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)

#define PATH1(name, type, grows) int name(const char *path, type value) { \
    REAL(int, #name, const char *, type); BEFORE(AT_FDCWD, path, grows) return real(path, value); }
PATH1(mkdir, mode_t, 1) PATH1(truncate, off_t, 0) PATH1(chmod, mode_t, 0)
int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t); BEFORE(dir, path, 1) return real(dir, path, mode);
}
int unlink(const char *path) { REAL(int, "unlink", const char *); BEFORE(AT_FDCWD, path, 0) return real(path); }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); BEFORE(AT_FDCWD, path, 0) return real(path); }
int unlinkat(int dir, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int); BEFORE(dir, path, 0) return real(dir, path, flags);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *); BEFORE(AT_FDCWD, to, 0) return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *); BEFORE(b, to, 0) return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned); BEFORE(b, to, 0) return real(a, from, b, to, flags);
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *); BEFORE(AT_FDCWD, to, 1) return real(from, to);
}
#define FD1(name, type) int name(int fd, type value) { REAL(int, #name, int, type); BEFORE(fd, NULL, 1) return real(fd, value); }
FD1(ftruncate, off_t) FD1(ftruncate64, off64_t)
int fsync(int fd) { REAL(int, "fsync", int); BEFORE(fd, NULL, 1) return real(fd); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); BEFORE(fd, NULL, 1) return real(fd); }
