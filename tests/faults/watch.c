/* Sees every file event of a process, by LD_PRELOAD, and lets one of them kill the process, stop it or fail.
 *
 * An event is a call that changes files below a folder: opening for writing, writing (write, pwrite, writev,
 * sendfile, copy_file_range), truncating, fsync, rename, unlink, rmdir, mkdir, link, symlink. Nothing happens
 * before watch_arm(). Python, numpy, torch and libraries in Rust call libc by name, and so come by here; what
 * glibc calls inside itself (stdio) or a raw system call would not: a test compares with strace.
 *
 * A write is two points: before its first byte and after half of them. Other calls are one, before them.
 * fsync is noted and not done: only a power cut could tell the difference, and it is rebuilt from the log.
 * The log holds what was done, in its order, with the data: struct record, two paths, data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { RECORD, KILL, FAIL_FROM, FAIL_ONCE, STOP };
/* watch.py has the same names in the same order. */
enum kind { CREATE, OPEN, WRITE, TRUNCATE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, LINK, SYMLINK, CONNECT };

struct record {
    uint32_t kind, path, other;   /* lengths of the paths that follow */
    int32_t error;                /* errno, 0 where it went well */
    uint64_t inode;
    int64_t offset, size;         /* of what was written; the new size where it was truncated */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int armed, log_file = -1, action, error_number;
static long at, count;

void watch_arm(const char *folder, int file, int what, long when, int error) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    log_file = file, action = what, at = when, error_number = error, count = 0, armed = 1;
}

long watch_count(void) { return count; }
void watch_disarm(void) { armed = 0; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0 || root_length == 1);
}

static void path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

/* The absolute path of a name relative to a folder's handle; links in it are not resolved. */
static void absolute(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else path_of(folder, base);
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) path[0] = 0;
}

/* Whether this call must fail: 1 at once, -1 after half of it. Kills the process at its point; `torn` says that
 * the call can be done by halves, and does it. */
static int due(int points, void (*torn)(void *), void *argument) {
    long first = count + 1;
    count += points;
    if (action == RECORD || at > count || (action != FAIL_FROM && at < first)) return 0;
    int half = points == 2 && at == count;
    if (action == KILL) {
        if (half) torn(argument);
        kill(getpid(), SIGKILL);
        pause();
    }
    if (action == STOP) { /* until whoever waits for it has done something, and lets it go on */
        kill(getpid(), SIGSTOP);
        return 0;
    }
    if (half) return torn(argument), -1;
    return 1;
}

static void all(int file, const void *data, size_t size) {
    __typeof__(&write) real = REAL(write);
    for (const char *p = data; size;) {
        ssize_t n = real(file, p, size);
        if (n <= 0) abort(); /* a log with a hole would prove nothing */
        p += n, size -= n;
    }
}

/* Append to the log; with a handle, the bytes of the file at `offset` follow. */
static void note(enum kind kind, const char *path, const char *other, int failed, uint64_t inode, int file, int64_t offset, int64_t size) {
    if (log_file < 0) return;
    struct record r = {kind, strlen(path), strlen(other), failed, inode, offset, size};
    all(log_file, &r, sizeof r), all(log_file, path, r.path), all(log_file, other, r.other);
    if (file < 0) return;
    char link[64], *data = malloc(size ? size : 1);
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int reader = REAL(open)(link, O_RDONLY | O_CLOEXEC);
    if (reader < 0 || pread(reader, data, size, offset) != size) abort();
    close(reader);
    all(log_file, data, size);
    free(data);
}

static uint64_t inode_of(const char *path) {
    struct stat s;
    return lstat(path, &s) == 0 ? s.st_ino : 0;
}

static uint64_t inode_at(int file) {
    struct stat s;
    return fstat(file, &s) == 0 ? s.st_ino : 0;
}

static void nothing(void *argument) { (void)argument; }

/* Calls with one or two paths: refuse, do, note. */
#define EVENT(kind, path, other, inode, call)                                \
    do {                                                                     \
        pthread_mutex_lock(&lock);                                           \
        uint64_t before = (inode);                                           \
        int result = -1;                                                     \
        if (due(1, nothing, 0) && (kind) != UNLINK && (kind) != RMDIR)       \
            errno = error_number; /* a full disk lets go of files */         \
        else result = (call);                                                \
        int kept = errno;                                                    \
        note(kind, path, other, result < 0 ? kept : 0, before ? before : inode_of(path), -1, 0, 0); \
        pthread_mutex_unlock(&lock);                                         \
        errno = kept;                                                        \
        return result;                                                       \
    } while (0)

static int opened(int folder, const char *name, int flags, mode_t mode) {
    __typeof__(&openat) real = REAL(openat);
    char path[PATH_MAX];
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (!armed || !changes) return real(folder, name, flags, mode);
    absolute(folder, name, path);
    if (!below(path)) return real(folder, name, flags, mode);
    pthread_mutex_lock(&lock);
    int nameless = (flags & O_TMPFILE) == O_TMPFILE, fresh = nameless || inode_of(path) == 0, result = -1;
    if (due(1, nothing, 0) && fresh) errno = error_number; /* one that exists takes no room */
    else result = real(folder, name, flags, mode);
    int kept = errno;
    note(fresh && !nameless ? CREATE : OPEN, path, "", result < 0 ? kept : 0, inode_at(result), -1, 0, 0);
    if (result >= 0 && !fresh && flags & O_TRUNC) note(TRUNCATE, path, "", 0, inode_at(result), -1, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = kept;
    return result;
}

#define MODE                                                      \
    mode_t mode = 0;                                              \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {    \
        va_list list;                                             \
        va_start(list, flags);                                    \
        mode = va_arg(list, mode_t);                              \
        va_end(list);                                             \
    }

int open(const char *name, int flags, ...) { MODE return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return opened(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE return opened(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE return opened(folder, name, flags, mode); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* Every way to write, as one call: `size` may be cut to half. */
struct writing {
    enum { PLAIN, AT, VECTOR, VECTOR_AT, SENDFILE, COPY } way;
    int file, source;
    const void *data;
    int pieces;
    size_t size;
    off_t offset, *from;
    off64_t *to;
};

static ssize_t perform(struct writing *w, size_t size) {
    switch (w->way) {
    case PLAIN: return REAL(write)(w->file, w->data, size);
    case AT: return REAL(pwrite)(w->file, w->data, size, w->offset);
    case SENDFILE: return REAL(sendfile)(w->file, w->source, w->from, size);
    case COPY: return REAL(copy_file_range)(w->source, (off64_t *)w->from, w->file, w->to, size, 0);
    default: break;
    }
    if (size == w->size)
        return w->way == VECTOR ? REAL(writev)(w->file, w->data, w->pieces) : REAL(pwritev)(w->file, w->data, w->pieces, w->offset);
    const struct iovec *first = w->data; /* by halves: of the first piece */
    struct iovec cut = {first->iov_base, first->iov_len / 2};
    return w->way == VECTOR ? REAL(writev)(w->file, &cut, 1) : REAL(pwritev)(w->file, &cut, 1, w->offset);
}

static void half(void *argument) {
    struct writing *w = argument;
    w->size = perform(w, w->size / 2);
}

static ssize_t written(struct writing w) {
    char path[PATH_MAX];
    if (armed) path_of(w.file, path);
    if (!armed || w.file == log_file || !below(path)) return perform(&w, w.size);
    pthread_mutex_lock(&lock);
    off_t position = w.way == AT || w.way == VECTOR_AT ? w.offset : w.way == COPY && w.to ? *w.to : lseek(w.file, 0, SEEK_CUR);
    if (REAL(fcntl)(w.file, F_GETFL) & O_APPEND) position = lseek(w.file, 0, SEEK_END);
    int fails = due(w.size > 1 ? 2 : 1, half, &w);
    ssize_t result = -1;
    if (fails > 0) errno = error_number;
    else result = fails < 0 ? (ssize_t)w.size : perform(&w, w.size);
    int kept = errno;
    if (result >= 0) note(WRITE, path, "", 0, inode_at(w.file), w.file, position, result);
    else note(WRITE, path, "", kept, inode_at(w.file), -1, position, 0);
    pthread_mutex_unlock(&lock);
    errno = kept;
    return result;
}

static size_t total(const struct iovec *pieces, int count) {
    size_t size = 0;
    for (int i = 0; i < count; i++) size += pieces[i].iov_len;
    return size;
}

#define WRITTEN(...) return written((struct writing){__VA_ARGS__})
ssize_t write(int f, const void *d, size_t n) { WRITTEN(.way = PLAIN, .file = f, .data = d, .size = n); }
ssize_t pwrite(int f, const void *d, size_t n, off_t o) { WRITTEN(.way = AT, .file = f, .data = d, .size = n, .offset = o); }
ssize_t pwrite64(int f, const void *d, size_t n, off64_t o) { WRITTEN(.way = AT, .file = f, .data = d, .size = n, .offset = o); }
ssize_t writev(int f, const struct iovec *v, int c) { WRITTEN(.way = VECTOR, .file = f, .data = v, .pieces = c, .size = total(v, c)); }
ssize_t pwritev(int f, const struct iovec *v, int c, off_t o) {
    WRITTEN(.way = VECTOR_AT, .file = f, .data = v, .pieces = c, .size = total(v, c), .offset = o);
}
ssize_t pwritev64(int f, const struct iovec *v, int c, off64_t o) { return pwritev(f, v, c, o); }
ssize_t pwritev2(int f, const struct iovec *v, int c, off_t o, int flags) { (void)flags; return o == -1 ? writev(f, v, c) : pwritev(f, v, c, o); }
ssize_t pwritev64v2(int f, const struct iovec *v, int c, off64_t o, int flags) { return pwritev2(f, v, c, o, flags); }
ssize_t sendfile(int f, int s, off_t *o, size_t n) { WRITTEN(.way = SENDFILE, .file = f, .source = s, .from = o, .size = n); }
ssize_t sendfile64(int f, int s, off64_t *o, size_t n) { WRITTEN(.way = SENDFILE, .file = f, .source = s, .from = o, .size = n); }
ssize_t copy_file_range(int s, off64_t *so, int f, off64_t *o, size_t n, unsigned flags) {
    (void)flags;
    WRITTEN(.way = COPY, .file = f, .source = s, .from = so, .to = o, .size = n);
}

static int with_handle(enum kind kind, int file, off_t size, int (*sync)(int)) {
    char path[PATH_MAX];
    if (armed) path_of(file, path);
    if (!armed || !below(path)) return sync ? sync(file) : REAL(ftruncate)(file, size);
    pthread_mutex_lock(&lock);
    int result = -1;
    if (due(1, nothing, 0)) errno = kind == FSYNC ? EIO : error_number;
    else result = sync ? 0 : REAL(ftruncate)(file, size);
    int kept = errno;
    note(kind, path, "", result < 0 ? kept : 0, inode_at(file), -1, 0, size);
    pthread_mutex_unlock(&lock);
    errno = kept;
    return result;
}

int fsync(int file) { return with_handle(FSYNC, file, 0, REAL(fsync)); }
int fdatasync(int file) { return with_handle(FSYNC, file, 0, REAL(fdatasync)); }
int ftruncate(int file, off_t size) { return with_handle(TRUNCATE, file, size, 0); }
int ftruncate64(int file, off64_t size) { return with_handle(TRUNCATE, file, size, 0); }

static int one_path(enum kind kind, int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (armed) absolute(folder, name, path);
    if (!armed || !below(path))
        return kind == MKDIR ? REAL(mkdirat)(folder, name, mode) : REAL(unlinkat)(folder, name, flags);
    EVENT(kind, path, "", inode_of(path), kind == MKDIR ? REAL(mkdirat)(folder, name, mode) : REAL(unlinkat)(folder, name, flags));
}

int mkdir(const char *name, mode_t mode) { return one_path(MKDIR, AT_FDCWD, name, 0, mode); }
int mkdirat(int folder, const char *name, mode_t mode) { return one_path(MKDIR, folder, name, 0, mode); }
int unlink(const char *name) { return one_path(UNLINK, AT_FDCWD, name, 0, 0); }
int rmdir(const char *name) { return one_path(RMDIR, AT_FDCWD, name, AT_REMOVEDIR, 0); }
int unlinkat(int folder, const char *name, int flags) { return one_path(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, name, flags, 0); }

static int renamed(int from, const char *name, int to, const char *target, unsigned flags) {
    char path[PATH_MAX], other[PATH_MAX];
    if (armed) absolute(from, name, path), absolute(to, target, other);
    if (!armed || !(below(path) || below(other))) return REAL(renameat2)(from, name, to, target, flags);
    EVENT(RENAME, path, other, inode_of(path), REAL(renameat2)(from, name, to, target, flags));
}

int rename(const char *name, const char *target) { return renamed(AT_FDCWD, name, AT_FDCWD, target, 0); }
int renameat(int from, const char *name, int to, const char *target) { return renamed(from, name, to, target, 0); }
int renameat2(int from, const char *name, int to, const char *target, unsigned flags) { return renamed(from, name, to, target, flags); }

int linkat(int from, const char *name, int to, const char *target, int flags) {
    char path[PATH_MAX], other[PATH_MAX];
    if (armed) absolute(to, target, path), absolute(from, name, other);
    if (!armed || !below(path)) return REAL(linkat)(from, name, to, target, flags);
    EVENT(LINK, path, other, 0, REAL(linkat)(from, name, to, target, flags));
}
int link(const char *name, const char *target) { return linkat(AT_FDCWD, name, AT_FDCWD, target, 0); }

int symlinkat(const char *content, int folder, const char *name) {
    char path[PATH_MAX];
    if (armed) absolute(folder, name, path);
    if (!armed || !below(path)) return REAL(symlinkat)(content, folder, name);
    EVENT(SYMLINK, path, content, 0, REAL(symlinkat)(content, folder, name));
}
int symlink(const char *content, const char *name) { return symlinkat(content, AT_FDCWD, name); }

/* No event: only noted, with the family. Sockets of this machine alone are none of a network. */
int connect(int file, const struct sockaddr *address, socklen_t length) {
    if (armed && (address->sa_family == AF_INET || address->sa_family == AF_INET6)) {
        pthread_mutex_lock(&lock);
        note(CONNECT, "", "", 0, 0, -1, 0, address->sa_family);
        pthread_mutex_unlock(&lock);
    }
    return REAL(connect)(file, address, length);
}
