/* Traffic for the benchmarks of the packet eye: whole frames, from both ends of some wires, as fast as asked and no more.
 *
 * sender KIND SLICES COUNT RATE {GUEST_NETNS PEER_NETNS}...    (the device is eth0)
 *
 * KIND is "bulk" (one TCP connection for each wire, frames of 1,514 bytes), "short" (TCP connections of ten packets, as HTTP
 * makes them) or "flood" (small UDP datagrams of one flow). The wires have their turns: COUNT of those in each slice, RATE of
 * them in a second (0: no limit). Frames go past the queueing discipline, so they travel to the other end in this
 * process's own CPU time. At the end: one line of JSON with the CPU time of each slice. Sources: packet(7), RFC 791,
 * RFC 9293.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_BATCH 64
#define MAX_FRAME 1514
#define MAX_WIRES 4
#define MAX_SLICES 4096
#define MAX_COUNT 10000000UL
#define SECOND 1000000000ULL

struct frame {
	struct ether_header eth;
	struct iphdr ip;
	union {
		struct tcphdr tcp;
		struct udphdr udp;
		uint8_t payload[MAX_FRAME - sizeof(struct ether_header) - sizeof(struct iphdr)];
	};
} __attribute__((packed));

struct end {
	int fd;
	uint8_t mac[6];
};

struct wire {
	struct end ends[2]; /* 0: the guest, 1: its peer */
	uint64_t flow, packets; /* sent so far */
	uint64_t cpu_ns[MAX_SLICES];
	uint32_t seq;
};

static struct frame frames[MAX_BATCH];
static struct mmsghdr messages[MAX_BATCH];
static struct iovec spans[MAX_BATCH];
static struct wire wires[MAX_WIRES], *wire; /* the one whose turn it is */
static uint64_t refused;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
	struct timespec t = {ns / SECOND, ns % SECOND};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static struct end open_end(const char *netns)
{
	struct end end;
	struct ifreq request = {0};
	int one = 1, fd = open(netns, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail(netns);
	close(fd);
	end.fd = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it receives nothing */
	strcpy(request.ifr_name, "eth0");
	if (end.fd < 0 || ioctl(end.fd, SIOCGIFHWADDR, &request))
		fail("eth0");
	memcpy(end.mac, request.ifr_hwaddr.sa_data, 6);
	struct sockaddr_ll here = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex("eth0")};
	if (bind(end.fd, (void *)&here, sizeof(here)))
		fail("bind");
	if (setsockopt(end.fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)))
		fail("PACKET_QDISC_BYPASS");
	return end;
}

static uint16_t checksum(const void *data, size_t size)
{
	const uint16_t *words = data;
	uint32_t sum = 0;

	for (size_t i = 0; i < size / 2; i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(sum + (sum >> 16));
}

/* Ethernet and IP of the frame at `slot`, sent by `from`; `flow` chooses the addresses and ports. */
static struct frame *begin(int slot, int from, uint64_t flow, uint8_t protocol, size_t size)
{
	struct frame *f = &frames[slot];
	uint32_t guest = htonl(0x0a090002), peer = htonl(0x0a0a0000 + flow / 60000);
	uint16_t guest_port = htons(1024 + flow % 60000), peer_port = htons(80);

	memset(f, 0, 54);
	memcpy(f->eth.ether_shost, wire->ends[from].mac, 6);
	memcpy(f->eth.ether_dhost, wire->ends[1 - from].mac, 6);
	f->eth.ether_type = htons(ETHERTYPE_IP);
	f->ip.version = 4;
	f->ip.ihl = 5;
	f->ip.ttl = 64;
	f->ip.protocol = protocol;
	f->ip.saddr = from ? peer : guest;
	f->ip.daddr = from ? guest : peer;
	f->ip.tot_len = htons(size - sizeof(f->eth));
	f->ip.check = checksum(&f->ip, sizeof(f->ip));
	f->udp.uh_sport = from ? peer_port : guest_port; /* where TCP has its own */
	f->udp.uh_dport = from ? guest_port : peer_port;
	spans[slot].iov_len = size;
	return f;
}

static void put_tcp(int slot, int from, uint64_t flow, uint32_t seq, uint32_t ack, uint8_t flags, size_t payload)
{
	struct frame *f = begin(slot, from, flow, IPPROTO_TCP, 54 + payload);

	f->tcp.th_seq = htonl(seq);
	f->tcp.th_ack = htonl(flags & TH_ACK ? ack : 0);
	f->tcp.th_off = 5;
	f->tcp.th_flags = flags;
	f->tcp.th_win = htons(65535);
}

static void send_batch(int from, int count)
{
	for (int done = 0; done < count;) {
		int n = sendmmsg(wire->ends[from].fd, messages + done, count - done, 0);

		if (n <= 0) {
			refused++;
			n = 1;
		} else {
			wire->packets += n;
		}
		done += n;
	}
}

static void one_tcp(int from, uint64_t flow, uint32_t seq, uint32_t ack, uint8_t flags, size_t payload)
{
	put_tcp(0, from, flow, seq, ack, flags, payload);
	send_batch(from, 1);
}

static int batch_of(uint64_t rate, uint64_t left)
{
	uint64_t batch = rate ? rate / 250 : MAX_BATCH; /* every 4 ms */

	batch = batch > MAX_BATCH ? MAX_BATCH : batch ? batch : 1;
	return batch < left ? batch : left;
}

static void pace(uint64_t start, uint64_t done, uint64_t rate)
{
	if (rate)
		sleep_until(start + done * SECOND / rate);
}

/* One slice of the wire's only connection; the first one opens it and the last one closes it. */
static void bulk(uint64_t count, uint64_t rate, int first, int last)
{
	const uint32_t size = MAX_FRAME - 54;
	uint64_t start = now_ns(CLOCK_MONOTONIC);

	if (first) {
		one_tcp(0, 0, 1000, 0, TH_SYN, 0);
		one_tcp(1, 0, 2000, 1001, TH_SYN | TH_ACK, 0);
		one_tcp(0, 0, wire->seq = 1001, 2001, TH_ACK, 0);
	}
	for (uint64_t done = 0; done < count;) {
		int batch = batch_of(rate, count - done);

		for (int i = 0; i < batch; i++, wire->seq += size)
			put_tcp(i, 0, 0, wire->seq, 2001, TH_ACK, size);
		send_batch(0, batch);
		one_tcp(1, 0, 2001, wire->seq, TH_ACK, 0);
		pace(start, done += batch, rate);
	}
	if (last) {
		one_tcp(0, 0, wire->seq, 2001, TH_FIN | TH_ACK, 0);
		one_tcp(1, 0, 2001, wire->seq + 1, TH_FIN | TH_ACK, 0);
		one_tcp(0, 0, wire->seq + 1, 2002, TH_ACK, 0);
	}
}

static const struct step {
	int from;
	uint32_t seq, ack;
	uint8_t flags;
	size_t payload;
} http[] = {
	{0, 0, 0, TH_SYN, 0},
	{1, 0, 1, TH_SYN | TH_ACK, 0},
	{0, 1, 1, TH_ACK, 0},
	{0, 1, 1, TH_PUSH | TH_ACK, 200},
	{1, 1, 201, TH_ACK, 0},
	{1, 1, 201, TH_PUSH | TH_ACK, 1000},
	{0, 201, 1001, TH_ACK, 0},
	{0, 201, 1001, TH_FIN | TH_ACK, 0},
	{1, 1001, 202, TH_FIN | TH_ACK, 0},
	{0, 202, 1002, TH_ACK, 0},
};

/* The connections of a batch go through the script side by side. */
static void short_flows(uint64_t count, uint64_t rate)
{
	uint64_t start = now_ns(CLOCK_MONOTONIC);

	for (uint64_t done = 0; done < count;) {
		int batch = batch_of(rate, count - done);

		for (size_t i = 0; i < sizeof(http) / sizeof(*http); i++) {
			const struct step *s = &http[i];

			for (int n = 0; n < batch; n++)
				put_tcp(n, s->from, wire->flow + n, 5000 + s->seq, 7000 + s->ack, s->flags, s->payload);
			send_batch(s->from, batch);
		}
		wire->flow += batch;
		pace(start, done += batch, rate);
	}
}

static void flood(uint64_t count, uint64_t rate)
{
	uint64_t start = now_ns(CLOCK_MONOTONIC);

	for (int n = 0; n < MAX_BATCH; n++)
		begin(n, 0, 0, IPPROTO_UDP, 60)->udp.uh_ulen = htons(26);
	for (uint64_t done = 0; done < count;) {
		int batch = batch_of(rate, count - done);

		send_batch(0, batch);
		pace(start, done += batch, rate);
	}
}

int main(int argc, char **argv)
{
	if (argc < 7 || argc > 5 + 2 * MAX_WIRES || argc % 2 == 0)
		return 2;
	int count_wires = (argc - 5) / 2;
	uint64_t slices = strtoull(argv[2], NULL, 10), count = strtoull(argv[3], NULL, 10), rate = strtoull(argv[4], NULL, 10);
	if (!slices || slices > MAX_SLICES || !count || count * slices > MAX_COUNT)
		return 2;
	for (int i = 0; i < 2 * count_wires; i++)
		wires[i / 2].ends[i % 2] = open_end(argv[5 + i]);
	for (int n = 0; n < MAX_BATCH; n++) {
		spans[n].iov_base = &frames[n];
		messages[n].msg_hdr.msg_iov = &spans[n];
		messages[n].msg_hdr.msg_iovlen = 1;
		memset(&frames[n], 'x', MAX_FRAME);
	}
	for (uint64_t slice = 0; slice < slices; slice++) {
		for (int i = 0; i < count_wires; i++) {
			wire = &wires[(slice + i) % count_wires];
			uint64_t start = now_ns(CLOCK_PROCESS_CPUTIME_ID);
			if (!strcmp(argv[1], "bulk"))
				bulk(count, rate, slice == 0, slice == slices - 1);
			else if (!strcmp(argv[1], "short"))
				short_flows(count, rate);
			else
				flood(count, rate);
			wire->cpu_ns[slice] = now_ns(CLOCK_PROCESS_CPUTIME_ID) - start;
		}
	}
	printf("{\"refused\": %lu, \"wires\": [", refused);
	for (int i = 0; i < count_wires; i++) {
		printf("%s{\"packets\": %lu, \"cpu_ns\": [", i ? ", " : "", wires[i].packets);
		for (uint64_t slice = 0; slice < slices; slice++)
			printf("%s%lu", slice ? ", " : "", wires[i].cpu_ns[slice]);
		printf("]}");
	}
	printf("]}\n");
	return 0;
}
