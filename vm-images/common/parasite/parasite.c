/* A harmless parasite: loaded into a process it starts a thread, which connects out, says one line and stays connected.
 *
 * It reads what to do from PARASITE_ORDERS (a file): "ADDRESS PORT [rwx]". With rwx it also maps a page of anonymous
 * memory that is writable and executable, as unpacked code would need.
 */
#include <arpa/inet.h>
#include <netdb.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define PARASITE_ORDERS "/dev/shm/.x/orders"

static int connect_out(const char *address, const char *port)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV}, *target;

    if (getaddrinfo(address, port, &hints, &target) != 0)
        return -1;
    int fd = socket(target->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, target->ai_addr, target->ai_addrlen) != 0) {
        close(fd);
        fd = -1;
    }
    freeaddrinfo(target);
    return fd;
}

static void *live(void *unused)
{
    char address[64] = "", port[8] = "", option[8] = "", line[64];
    FILE *orders = fopen(PARASITE_ORDERS, "re");

    if (!orders)
        return unused;
    int words = fscanf(orders, "%63s %7s %7s", address, port, option);
    fclose(orders);
    if (words >= 3 && strcmp(option, "rwx") == 0) {
        unsigned char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page != MAP_FAILED)
            page[0] = 0xc3; /* ret */
    }
    int fd = words >= 2 ? connect_out(address, port) : -1;
    if (fd < 0)
        return unused;
    int length = snprintf(line, sizeof line, "parasite in process %d\n", (int)getpid());
    if (write(fd, line, (size_t)length) == length)
        while (read(fd, line, sizeof line) > 0)
            ;
    pause();
    return unused;
}

__attribute__((constructor)) static void arrive(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, live, NULL) == 0)
        pthread_detach(thread);
}
