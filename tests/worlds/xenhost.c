/* libxenforeignmemory and libxenctrl of a Xen host that is made up: one domain, whose RAM and state are two files beside them.
 *
 * Prototypes of xenforeignmemory.h and xenctrl.h (Xen 4.17). As on a real host a mapping succeeds although frames in it
 * failed, errors are negative errnos, and who touches a failed frame dies of SIGSEGV.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FRAMES 65536 /* 256 MiB, low and high together */
#define HIGH 0x100000

struct state { /* tests/worlds/xenhost.py has the same */
    uint32_t domid, present, dying, hvm, flags, vcpus, refuse_errno, refuse_times, busy_times, protections, opened, closed, silent;
    uint8_t uuid[16];
    uint64_t low, high, extra, pages, max_pages, dom0_max_pages, last_frame, on_demand, ready;
    uint64_t maps, unmaps, mapped, largest, asked;
    uint8_t cpu[2048];
    uint8_t errors[FRAMES]; /* errno of each frame */
};

static struct state *state;
static int ram = -1;

__attribute__((constructor)) static void attach(void)
{
    char path[4096];
    Dl_info here;
    int fd;

    dladdr((void *)attach, &here);
    snprintf(path, sizeof(path), "%.*sstate", (int)(strrchr(here.dli_fname, '/') + 1 - here.dli_fname), here.dli_fname);
    fd = open(path, O_RDWR | O_CLOEXEC);
    state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    strcpy(path + strlen(path) - strlen("state"), "ram");
    ram = open(path, O_RDONLY | O_CLOEXEC);
}

/* Where a frame lies in the RAM file; -1: the guest has none there. `extra` ones are no RAM, such as video memory. */
static int64_t find(uint64_t frame)
{
    if (frame < state->low)
        return frame;
    if (frame >= HIGH && frame < HIGH + state->high)
        return state->low + frame - HIGH;
    return frame == state->extra && frame ? 0 : -1;
}

static int fail(uint64_t frame)
{
    int64_t at = find(frame);
    if (!state->present)
        return -ESRCH;
    if (at < 0)
        return -EINVAL;
    if (state->errors[at] == EAGAIN && state->busy_times == 0)
        return 0;
    return -(int)state->errors[at];
}

void *xenforeignmemory_open(void *logger, unsigned flags)
{
    if (state->refuse_errno && !state->refuse_times) {
        errno = state->refuse_errno;
        return NULL;
    }
    state->opened++;
    return state;
}

int xenforeignmemory_close(void *handle)
{
    state->closed++;
    return 0;
}

void *xenforeignmemory_map(void *handle, uint32_t domid, int protection, size_t count, const uint64_t frames[], int errors[])
{
    char *place;
    size_t i;

    if (state->refuse_errno && state->refuse_times) {
        state->refuse_times--;
        errno = state->refuse_errno;
        if (!state->refuse_times)
            state->refuse_errno = 0;
        return NULL;
    }
    if (domid != state->domid || !state->present) {
        for (i = 0; i < count; i++)
            errors[i] = -ESRCH;
    }
    place = mmap(NULL, count << 12, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (i = 0; i < count; i++) {
        errors[i] = domid == state->domid ? fail(frames[i]) : -ESRCH;
        if (!errors[i])
            mmap(place + (i << 12), 4096, protection, MAP_SHARED | MAP_FIXED, ram, find(frames[i]) << 12);
    }
    if (state->busy_times)
        state->busy_times--;
    state->maps++;
    state->mapped += count;
    state->asked += count;
    state->protections |= protection;
    if (count > state->largest)
        state->largest = count;
    return place;
}

int xenforeignmemory_unmap(void *handle, void *address, size_t count)
{
    state->unmaps++;
    state->mapped -= count;
    return munmap(address, count << 12);
}

void *xc_interface_open(void *logger, void *builder, unsigned flags)
{
    if (state->refuse_errno && !state->refuse_times) {
        errno = state->refuse_errno;
        return NULL;
    }
    state->opened++;
    return state;
}

int xc_interface_close(void *handle)
{
    state->closed++;
    return 0;
}

static void put(char *to, uint64_t value, int size)
{
    memcpy(to, &value, size);
}

int xc_domain_getinfolist(void *handle, uint32_t first, unsigned count, char *info)
{
    if (state->silent) {
        errno = state->silent;
        return -1;
    }
    memset(info, 0, 112);
    if (first > state->domid || (first && !state->present))
        return 0;
    put(info, first ? state->domid : 0, 2);
    put(info + 4, first ? state->flags | (state->dying ? 1 : 0) | (state->hvm ? 2 : 0) : 0, 4);
    put(info + 8, first ? state->pages : 1000, 8);
    put(info + 16, first ? state->max_pages : state->dom0_max_pages, 8);
    put(info + 68, state->vcpus - 1, 4);
    if (first)
        memcpy(info + 76, state->uuid, 16);
    return 1;
}

int xc_domain_maximum_gpfn(void *handle, uint32_t domid, uint64_t *frame)
{
    *frame = state->last_frame;
    return 0;
}

int xc_domain_hvm_getcontext_partial(void *handle, uint32_t domid, uint16_t type, uint16_t vcpu, void *to, uint32_t size)
{
    errno = !state->present || domid != state->domid ? ESRCH : type != 2 || vcpu > 1 ? ENOENT : size < 1032 ? ENOBUFS : 0;
    if (errno)
        return -1;
    memcpy(to, state->cpu, 1032);
    return 0;
}

int xc_domain_get_pod_target(void *handle, uint32_t domid, uint64_t *total, uint64_t *ready, uint64_t *frames)
{
    if (state->on_demand > UINT64_MAX - 4096) { /* it cannot be told: EACCES by a policy, ENOSYS by an older Xen */
        errno = UINT64_MAX - state->on_demand;
        return -1;
    }
    *total = state->pages;
    *ready = state->ready;
    *frames = state->on_demand;
    return 0;
}

int xc_domain_setmaxmem(void *handle, uint32_t domid, uint64_t kib)
{
    if (domid && (domid != state->domid || state->dying)) {
        errno = ESRCH;
        return -1;
    }
    *(domid ? &state->max_pages : &state->dom0_max_pages) = kib / 4;
    return 0;
}
