/* updater HOST PORT SECONDS: an honest program. Every so often it asks DNS for HOST and fetches / from it over HTTP,
 * from each address it is given: IPv6 and IPv4. Prints a line per fetch.
 */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static long fetch(const struct addrinfo *target, const char *host)
{
    char request[256], answer[4096];
    long total = 0;
    ssize_t got;
    int fd = socket(target->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -1;
    int length = snprintf(request, sizeof request, "GET / HTTP/1.0\r\nHost: %s\r\nUser-Agent: updater\r\n\r\n", host);
    if (connect(fd, target->ai_addr, target->ai_addrlen) != 0 || write(fd, request, (size_t)length) != length) {
        close(fd);
        return -1;
    }
    while ((got = read(fd, answer, sizeof answer)) > 0)
        total += got;
    close(fd);
    return total;
}

int main(int argc, char **argv)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;

    if (argc != 4)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (;;) {
        int error = getaddrinfo(argv[1], argv[2], &hints, &found);
        if (error)
            printf("%s: %s\n", argv[1], gai_strerror(error));
        for (struct addrinfo *one = found; !error && one; one = one->ai_next)
            printf("%s: %ld bytes\n", argv[1], fetch(one, argv[1]));
        if (!error)
            freeaddrinfo(found);
        usleep((useconds_t)(atof(argv[3]) * 1e6));
    }
}
