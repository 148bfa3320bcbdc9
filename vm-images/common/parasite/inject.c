/* inject PID LIBRARY: make a running process dlopen(3) a library, by ptrace(2), and let it go on unharmed.
 *
 * The thread is stopped, usually inside a system call, and made to call dlopen with a return address of 0: the fault
 * that follows is the sign that the call has returned. Then all registers are put back. An interrupted system call is
 * started anew by stepping back over its two-byte instruction, so that the process never sees EINTR.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define RED_ZONE 128
#define RTLD_NOW 2

static void die(const char *what)
{
    fprintf(stderr, "inject: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(1);
}

/* Where the process has libc: the start of its first mapping, and its path. */
static uint64_t find_libc(pid_t pid, char *path, size_t size)
{
    char name[64], line[512], file[400];
    uint64_t start, offset;

    snprintf(name, sizeof name, "/proc/%d/maps", pid);
    FILE *maps = fopen(name, "re");
    if (!maps)
        die(name);
    while (fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%*x %*s %lx %*s %*s %399s", &start, &offset, file) == 3 && offset == 0 &&
            strstr(file, "/libc.so.6")) {
            fclose(maps);
            snprintf(path, size, "/proc/%d/root%s", pid, file);
            return start;
        }
    errno = ENOENT;
    die("the process has no libc.so.6");
    return 0;
}

/* The value of a dynamic symbol of an ELF file, relative to where the file is mapped. */
static uint64_t find_symbol(const char *path, const char *symbol)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &status) != 0)
        die(path);
    const char *elf = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (elf == MAP_FAILED)
        die(path);
    const Elf64_Ehdr *header = (const void *)elf;
    const Elf64_Shdr *sections = (const void *)(elf + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != SHT_DYNSYM)
            continue;
        const Elf64_Sym *symbols = (const void *)(elf + sections[i].sh_offset);
        const char *names = elf + sections[sections[i].sh_link].sh_offset;
        for (size_t n = 0; n < sections[i].sh_size / sizeof *symbols; n++)
            if (symbols[n].st_value && strcmp(names + symbols[n].st_name, symbol) == 0)
                return symbols[n].st_value;
    }
    errno = ENOENT;
    die(symbol);
    return 0;
}

static void write_memory(pid_t pid, uint64_t address, const void *bytes, size_t length)
{
    struct iovec local = {(void *)(uintptr_t)bytes, length}, remote = {(void *)address, length};

    if (process_vm_writev(pid, &local, 1, &remote, 1, 0) != (ssize_t)length)
        die("write memory");
}

/* Run on until the fault at address 0; signals on the way are passed on. */
static void run_to_return(pid_t pid, struct user_regs_struct *regs)
{
    int status, signal = 0;

    for (;;) {
        if (ptrace(PTRACE_CONT, pid, 0, signal) != 0 || waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status))
            die("the process is gone");
        signal = status >> 16 ? 0 : WSTOPSIG(status);
        if (ptrace(PTRACE_GETREGS, pid, 0, regs) != 0)
            die("read registers");
        if (signal == SIGSEGV && regs->rip == 0)
            return;
        if (signal == SIGSEGV) {
            errno = EFAULT;
            die("the process crashed in dlopen");
        }
    }
}

static void restart_system_call(struct user_regs_struct *regs)
{
    switch ((int64_t)regs->rax) {
    case -EINTR: /* epoll_wait and others that are not restarted by themselves */
    case -512:   /* ERESTARTSYS and its relatives, include/linux/errno.h */
    case -513:
    case -514:
    case -516:
        if ((int64_t)regs->orig_rax >= 0) {
            regs->rax = regs->orig_rax;
            regs->rip -= 2;
        }
    }
    regs->orig_rax = (uint64_t)-1;
}

int main(int argc, char **argv)
{
    static char vectors[16384];
    struct user_regs_struct before, now;
    struct iovec state = {vectors, sizeof vectors};
    char libc[512];
    int status;

    if (argc != 3) {
        fprintf(stderr, "usage: inject PID LIBRARY\n");
        return 2;
    }
    pid_t pid = atoi(argv[1]);
    uint64_t base = find_libc(pid, libc, sizeof libc), dlopen_va = base + find_symbol(libc, "dlopen"), home = 0;

    if (ptrace(PTRACE_SEIZE, pid, 0, 0) != 0 || ptrace(PTRACE_INTERRUPT, pid, 0, 0) != 0)
        die("attach");
    if (waitpid(pid, &status, __WALL) != pid || ptrace(PTRACE_GETREGS, pid, 0, &before) != 0 ||
        ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &state) != 0)
        die("stop");

    now = before;
    uint64_t path_va = (before.rsp - RED_ZONE - strlen(argv[2]) - 1) & ~15ull;
    now.rsp = path_va - 8; /* as after a call: 8 below a multiple of 16 */
    now.rdi = path_va;
    now.rsi = RTLD_NOW;
    now.rax = 0;
    now.rip = dlopen_va;
    now.orig_rax = (uint64_t)-1;
    write_memory(pid, path_va, argv[2], strlen(argv[2]) + 1);
    write_memory(pid, now.rsp, &home, sizeof home);
    if (ptrace(PTRACE_SETREGS, pid, 0, &now) != 0)
        die("write registers");
    run_to_return(pid, &now);

    restart_system_call(&before);
    if (ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &state) != 0 || ptrace(PTRACE_SETREGS, pid, 0, &before) != 0 ||
        ptrace(PTRACE_DETACH, pid, 0, 0) != 0)
        die("let go");
    if (now.rax == 0) {
        errno = 0;
        die("dlopen in the process");
    }
    printf("loaded %s into process %d\n", argv[2], pid);
    return 0;
}
