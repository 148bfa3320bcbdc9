// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* The tap of one guest in the kernel: tc (clsact), direct action, on both hooks of each of the guest's ports.
 *
 * Decodes as appliance/flow/decode.py does and follows TCP as appliance/flow/tcp.py does; user space hears of a flow when
 * it starts, of its first payloads and of its end, never of each packet. Kept plain so that a loader of a few lines can
 * load it: no BTF, no CO-RE, no global data, no loops, no calls; maps are made by layout.py, whose structures repeat the
 * ones below. Every structure is packed by hand: sizes are multiples of 8, there is no hidden padding.
 *
 * The same program as a socket filter on a packet socket only observes: no verdicts, no marks, nothing is queued.
 *
 * Build: clang -O2 -target bpf -fno-jump-tables -I/usr/include/$(uname -m)-linux-gnu -c -o parasight_tap.bpf.o
 * and once more with -DPERF_ARRAY to parasight_tap_perf.bpf.o, for kernels without ring buffers (before 5.8).
 */
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

#define SEC(name) __attribute__((section(name), used))
#define inline inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define SECOND 1000000000ULL
#define PACKET_OUTGOING 4 /* linux/if_packet.h */

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static u64 (*ktime)(void) = (void *)5;
static u32 (*cpu_id)(void) = (void *)8;
static long (*store_bytes)(void *skb, u32 at, const void *from, u64 size, u64 flags) = (void *)9;
static long (*clone_redirect)(void *skb, u32 ifindex, u64 flags) = (void *)13;
static long (*redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*load_bytes)(const void *skb, u32 at, void *to, u64 size) = (void *)26;
static long (*change_tail)(void *skb, u32 size, u64 flags) = (void *)38;
#ifdef PERF_ARRAY
static long (*perf_output)(void *skb, void *events, u64 flags, void *data, u64 size) = (void *)25;
#define output(skb, data, size) perf_output(skb, &events, BPF_F_CURRENT_CPU, data, size)
#else
static long (*ring_output)(void *ring, void *data, u64 size, u64 flags) = (void *)130;
#define output(skb, data, size) ring_output(&events, data, size, 0)
#endif

/* -- what user space shares (layout.py) -- */

struct key {
	u32 ifindex;
	u32 vlan; /* 0: none; outermost VID, with QinQ outer << 12 | inner */
	u16 local_port; /* host order */
	u16 remote_port;
	u8 protocol;
	u8 version; /* 4, 6 */
	u16 zero;
	u32 local[4]; /* the guest's; IPv4 fills the first word */
	u32 remote[4];
};

enum state { SYN_SENT, SYN_RECV, ESTABLISHED, HALF_CLOSED, CLOSING, CLOSED, MIDSTREAM, UDP_ONEWAY, UDP_BIDIR, ICMP, RAW };

/* Arrays of two: 0 sent by the guest, 1 sent to it. */
struct flow {
	u64 id; /* never used twice in the life of the maps */
	u64 first_ns; /* bpf_ktime_get_ns() */
	u64 last_ns;
	u64 packets[2]; /* on the wire: GSO segments */
	u64 bytes[2]; /* IP bytes on the wire */
	u64 frames[2]; /* as the host saw them: GSO super-packets */
	u32 isn[2];
	u32 top[2]; /* sequence number after the last one seen */
	u32 ack[2];
	u32 base[2]; /* where counting of payload bytes begins */
	u32 dropped[2];
	u16 late[2]; /* segments with new data after the end */
	u16 told[2]; /* payload events that brought new bytes */
	u16 sent[2]; /* payload events */
	u8 state;
	u8 first_side;
	u8 first_flags; /* TCP flags of the first packet */
	u8 icmp_type;
	u8 icmp_code;
	u8 fins; /* bit per side */
	u8 last_fin;
	u8 has; /* HAS_* << side */
	u8 missed; /* START, PAYLOAD, END events that found the ring full */
	u8 seen; /* SEEN_* */
	u8 hold; /* enum hold, and DENY */
	u8 copied; /* frames of this hold that were told; TCP: a bit per side */
	u64 held_ns; /* deadline of its hold */
	u8 macs[12]; /* as in the guest's last frame: its target, its source */
	u16 errors[2]; /* ICMP errors that quote it */
};

/* A new flow that waits; one whose first payload will have to, and has to; a pause by verdict; refused for good. */
enum hold { FREE, HELD_NEW, ARMED, HELD_PAYLOAD, PAUSED, REFUSED };

#define DENY 0x80 /* with HELD_NEW, ARMED, HELD_PAYLOAD: what becomes of it at the deadline */

#define HAS_ISN 1
#define HAS_TOP 4
#define HAS_ACK 16
#define HAS_BASE 64
#define SEEN_SYNACK 1 /* << side of its sender */

#define START 1
#define PAYLOAD 2
#define END 4
#define HELD 8 /* instead of PAYLOAD: the packet waits in user space, and its whole frame is behind the event */

enum reason { END_FIN, END_RST, END_IDLE };

struct event {
	u64 id;
	u64 at_ns;
	u8 kind; /* START | PAYLOAD | END in this order, or HELD */
	u8 side;
	u8 reason;
	u8 state;
	u8 missed;
	u8 seen;
	u8 first_side;
	u8 first_flags;
	u32 offset; /* of the payload, from the flow's base */
	u32 wire_len; /* of the payload; HELD: of the frame */
	u32 captured;
	u8 icmp_type;
	u8 icmp_code;
	u8 hold;
	u8 zero;
	u8 macs[12]; /* of the flow */
	u32 tag; /* out of band: TPID (network order) << 16 | TCI; 0: none */
	struct key key;
	u64 packets[2];
	u64 bytes[2];
	u32 gso_size;
	u32 zero2;
};

/* What to do with a flow or a peer. Written by user space only, read here. */
struct verdict {
	u32 action;
	u32 ifindex; /* REDIRECT: where to */
	u64 deadline_ns; /* 0: none; bpf_ktime_get_ns() */
	u64 flow; /* its id; not read for peers */
	u8 mac[6]; /* REDIRECT: the new target */
	u8 otherwise; /* action after the deadline */
	u8 zero;
};

enum action { ALLOW, DROP, HOLD, REDIRECT, NOTHING };

/* Written by user space only. */
struct port {
	u64 heartbeat_ns;
	u64 patience_ns; /* verdicts hold for so long after the last heartbeat */
	u64 hold_ns; /* deadline of a hold */
	u32 flags;
	u32 mark; /* of packets that user space sends; the low bits say which; 0: there are none */
};

#define FAIL_CLOSED 1 /* verdicts hold without a heartbeat */
#define HAS_VERDICTS 2 /* otherwise the look-ups are spared */
#define HAS_BANS 4
#define SWAPPED 8 /* a macvtap: what the guest sends is outgoing for a packet socket */
#define HOLD_OUT 16 /* new flows of the guest wait */
#define HOLD_IN 32
#define HOLD_PAYLOAD 64 /* not the SYN but the first payload of its sender */
#define HOLD_DENY 128

#define FORGED 1 /* in the mark: a reset of ours, not a packet that was held */
#define REFUSE 2 /* in the mark: a packet that was held, as a word to us: its flow is refused for good */
#define MARK_BITS 3

struct peer4 {
	u32 prefix; /* bits, 32 for the scope included */
	u32 scope; /* ifindex; 0: all ports */
	u32 address;
};

struct peer6 {
	u32 prefix;
	u32 scope;
	u32 address[4];
};

enum ignored {
	NONE, RUNT, LLC, ARP, LLDP, PPPOE, EAPOL, OTHER_ETHERTYPE, CUT_IP, BAD_IP_VERSION, BAD_IP_LENGTH, LONG_CHAIN, BAD_TCP,
	BAD_UDP, CUT_ICMP, CUT_TRANSPORT, NO_FIRST, IGMP, MULTICAST, STRAY_CLOSE, FLOODED, ICMP_ERROR, ND, MLD, ROUTER, REASONS
};

struct stats {
	u64 packets;
	u64 bytes;
	u64 flows;
	u64 events;
	u64 lost; /* events that found the ring full */
	u64 unmade; /* packets of flows for which the map had no room */
	u64 dropped; /* packets, by verdict or ban */
	u64 held; /* packets that wait, or whose repetition will do */
	u64 next_id;
	u64 ignored[REASONS];
};

/* -- of this file only -- */

struct mac {
	u32 ifindex;
	u8 address[6];
	u16 zero;
};

struct datagram {
	u32 ifindex;
	u32 vlan;
	u32 ident;
	u32 protocol;
	u32 src[4];
	u32 dst[4];
};

struct noted {
	struct key key;
	u64 at_ns;
};

#define MAX_DATA 2048
#define MAX_FRAME 16384
#define MAX_COPIES 8 /* datagrams of a held flow */
#define MAX_PIECES 64 /* fragments of them */
#define FIRST 1
#define LATER 2

struct scratch {
	struct event event;
	u8 data[MAX_FRAME]; /* behind the event: one output tells both */
	struct key key;
	struct flow fresh;
	struct datagram datagram;
	struct noted noted;
	u32 ip_at, ip_bytes, payload_at, payload_len, header_len;
	u32 seq, ack, ident;
	u8 flags, icmp_type, icmp_code, fragment;
	u32 target; /* ifindex to redirect to; 0: none */
	u8 mac[6]; /* the new target, or source, of the frame */
	u16 mac_at; /* where it belongs; 1: nowhere */
};

struct map { int unused; };
struct map flows SEC("maps");
struct map verdicts SEC("maps");
struct map peers4 SEC("maps");
struct map peers6 SEC("maps");
struct map ports SEC("maps");
struct map stats SEC("maps");
struct map events SEC("maps");
struct map macs SEC("maps");
struct map fragments SEC("maps");
struct map scratch SEC("maps");
struct map tail SEC("maps"); /* of a frame that is too long for one test run */

#define ntohs(x) __builtin_bswap16(x)
#define ntohl(x) __builtin_bswap32(x)
#define FIN 1
#define SYN 2
#define RST 4
#define ACK 16
#define HALF 0x80000000U
#define SLACK (1U << 20)
#define MAX_LATE 1024

static inline u64 timeout(u8 state)
{
	if (state == ESTABLISHED)
		return 3600 * SECOND;
	if (state == UDP_BIDIR)
		return 180 * SECOND;
	if (state == CLOSED || state == CLOSING)
		return 10 * SECOND;
	if (state == SYN_SENT)
		return 40 * SECOND;
	if (state == SYN_RECV)
		return 60 * SECOND;
	if (state == MIDSTREAM)
		return 300 * SECOND;
	if (state == HALF_CLOSED)
		return 120 * SECOND;
	if (state == RAW)
		return 600 * SECOND;
	return 30 * SECOND; /* UDP_ONEWAY, ICMP */
}

static inline int after(u32 a, u32 b)
{
	return a - b - 1 < HALF - 1; /* 0 < a - b < HALF */
}

/* -- decoding (appliance/flow/decode.py) -- */

static inline int is_icmp_reply(u8 type)
{
	return type == 0 || type == 14 || type == 16 || type == 18 || type == 129 || type == 140 || type == 145;
}

static inline void set_ports(struct key *key, int side, u16 src, u16 dst)
{
	key->local_port = side ? dst : src;
	key->remote_port = side ? src : dst;
}

static inline int transport(struct __sk_buff *skb, struct scratch *s, int side, u32 at)
{
	struct key *key = &s->key;
	u8 protocol = key->protocol;
	u32 rest = s->ip_bytes > at - s->ip_at ? s->ip_bytes - (at - s->ip_at) : 0;
	u32 header = 0;
	u16 two[7];

	s->payload_at = at;
	s->header_len = at - s->ip_at;
	if (protocol == 6) {
		header = 20;
		if (rest >= 14 && !load_bytes(skb, at, two, 14)) {
			header = (two[6] & 0xf0) >> 2;
			if (header < 20 || (header > rest && !s->fragment))
				return BAD_TCP;
			s->flags = two[6] >> 8;
			s->seq = ntohs(two[2]) << 16 | ntohs(two[3]);
			s->ack = ntohs(two[4]) << 16 | ntohs(two[5]);
			goto done;
		}
	} else if (protocol == 17) {
		header = 8;
		if (rest >= 8 && !load_bytes(skb, at, two, 8)) {
			u32 length = ntohs(two[2]);

			if (length && length < 8)
				return BAD_UDP;
			set_ports(key, side, ntohs(two[0]), ntohs(two[1]));
			s->payload_at += 8;
			s->header_len += 8;
			s->payload_len = rest - 8;
			if (length && length < rest && !s->fragment)
				s->payload_len = length - 8;
			return 0;
		}
	} else if (protocol == 1 || protocol == 58) {
		if (rest < 8 || load_bytes(skb, at, two, 8))
			return CUT_ICMP;
		s->icmp_type = two[0] & 0xff;
		s->icmp_code = two[0] >> 8;
		u16 ident = ntohs(two[2]);
		/* the one who asks owns the identifier */
		if (is_icmp_reply(s->icmp_type))
			set_ports(key, side, 0, ident);
		else
			set_ports(key, side, ident, 0);
		s->payload_at += 8;
		s->header_len += 8;
		s->payload_len = rest - 8;
		return 0;
	} else if (protocol == 33 || protocol == 132 || protocol == 136) {
		header = 4;
	} else {
		s->payload_len = rest;
		return 0;
	}
	if (rest < 4 || load_bytes(skb, at, two, 4))
		return CUT_TRANSPORT;
done:
	set_ports(key, side, ntohs(two[0]), ntohs(two[1]));
	s->payload_at += header;
	s->header_len += header;
	s->payload_len = rest > header ? rest - header : 0;
	return 0;
}

static inline int ipv4(struct __sk_buff *skb, struct scratch *s, int side, u32 at)
{
	struct { u8 version_ihl, tos; u16 total, ident, frag; u8 ttl, protocol; u16 check; u32 src, dst; } head;
	struct key *key = &s->key;

	if (load_bytes(skb, at, &head, 20))
		return CUT_IP;
	u32 header = (head.version_ihl & 15) << 2, room = skb->len - at, size = ntohs(head.total);
	if (head.version_ihl >> 4 != 4)
		return BAD_IP_VERSION;
	if (!size) /* BIG TCP */
		size = room;
	if (header < 20 || size < header)
		return BAD_IP_LENGTH;
	s->ip_bytes = size < room ? size : room;
	key->version = 4;
	key->protocol = head.protocol;
	key->local[0] = side ? head.dst : head.src;
	key->remote[0] = side ? head.src : head.dst;
	u16 frag = ntohs(head.frag);
	if (frag & 0x3fff) {
		s->ident = ntohs(head.ident);
		s->fragment = frag & 0x1fff ? LATER : FIRST;
		if (s->fragment == LATER)
			return 0;
	}
	return transport(skb, s, side, at + header);
}

static inline int ipv6(struct __sk_buff *skb, struct scratch *s, int side, u32 at)
{
	struct { u32 version; u16 length; u8 next, hops; u32 src[4], dst[4]; } head;
	struct key *key = &s->key;

	if (load_bytes(skb, at, &head, 40))
		return CUT_IP;
	if ((head.version & 0xf0) != 0x60)
		return BAD_IP_VERSION;
	u32 room = skb->len - at, size = head.length ? 40 + ntohs(head.length) : room, here = at + 40;
	u8 next = head.next;
	s->ip_bytes = size < room ? size : room;
	key->version = 6;
	__builtin_memcpy(key->local, side ? head.dst : head.src, 16);
	__builtin_memcpy(key->remote, side ? head.src : head.dst, 16);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		u8 word[8];

		if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60 && next != 135 && next != 139 && next != 140) {
			key->protocol = next;
			return transport(skb, s, side, here);
		}
		if (load_bytes(skb, here, word, 8))
			return CUT_IP;
		if (next == 44) {
			u32 offset = word[2] << 8 | word[3];

			here += 8;
			s->ident = (u32)word[4] << 24 | word[5] << 16 | word[6] << 8 | word[7];
			if (offset & 0xfff9) /* RFC 6946: offset 0 without M is a whole packet */
				s->fragment = offset & 0xfff8 ? LATER : FIRST;
			next = word[0];
			if (s->fragment == LATER) {
				key->protocol = next;
				return 0;
			}
		} else {
			here += next == 51 ? (word[1] + 2) << 2 : (word[1] + 1) << 3;
			next = word[0];
		}
	}
	return LONG_CHAIN;
}

static inline int decode(struct __sk_buff *skb, struct scratch *s, int side, u16 kind)
{
	u32 at = 14;

	if (skb->vlan_present)
		s->key.vlan = skb->vlan_tci & 0xfff;
#pragma unroll
	for (int i = 0; i < 4; i++) {
		u16 tag[2];

		if (kind != 0x8100 && kind != 0x88a8 && kind != 0x9100)
			break;
		if (load_bytes(skb, at, tag, 4))
			break;
		u32 vid = ntohs(tag[0]) & 0xfff;
		kind = ntohs(tag[1]);
		at += 4;
		if (vid)
			s->key.vlan = s->key.vlan ? (s->key.vlan & 0xfff) << 12 | vid : vid;
	}
	s->ip_at = at;
	if (kind == 0x0800)
		return ipv4(skb, s, side, at);
	if (kind == 0x86dd)
		return ipv6(skb, s, side, at);
	if (kind < 0x0600)
		return LLC;
	if (kind == 0x0806 || kind == 0x8035)
		return ARP;
	if (kind == 0x88cc)
		return LLDP;
	if (kind == 0x8863 || kind == 0x8864)
		return PPPOE;
	if (kind == 0x8100 || kind == 0x88a8 || kind == 0x9100)
		return LONG_CHAIN; /* a receiver may still find IP behind more tags than we look for */
	return kind == 0x888e ? EAPOL : OTHER_ETHERTYPE;
}

/* -- what is no flow (appliance/flow/table.py, icmp.py) -- */

static inline int is_foreign(u32 ifindex, const u16 *eth, int side, u64 now)
{
	struct mac mac = {.ifindex = ifindex}, any = {.ifindex = ifindex};

	if (eth[0] & 1) /* to a group */
		return 0;
	__builtin_memcpy(mac.address, side ? eth : eth + 3, 6);
	if (map_lookup(&macs, &mac))
		return 0;
	if (!side) {
		map_update(&macs, &mac, &now, BPF_ANY);
		map_update(&macs, &any, &now, BPF_ANY); /* at least one is known */
		return 0;
	}
	return map_lookup(&macs, &any) != 0;
}

/* Whether the guest's end of a frame has the MAC address that it had in the flow's last frame: then it is no stranger's. */
static inline int is_familiar(struct flow *f, const u16 *eth, int side)
{
	const u16 *known = (const u16 *)f->macs + 3, *here = side ? eth : eth + 3;

	return known[0] == here[0] && known[1] == here[1] && known[2] == here[2];
}

static inline int control(struct scratch *s)
{
	u8 type = s->icmp_type;

	if (s->key.protocol == 1) {
		if (type == 3 || type == 4 || type == 5 || type == 11 || type == 12)
			return ICMP_ERROR;
		return type == 9 || type == 10 ? ROUTER : 0;
	}
	if (type >= 1 && type <= 4)
		return ICMP_ERROR;
	if ((type >= 130 && type <= 132) || type == 143)
		return MLD;
	if ((type >= 133 && type <= 137) || type == 141 || type == 142 || type == 148 || type == 149)
		return ND;
	return type >= 151 && type <= 153 ? ROUTER : 0;
}

static inline int is_group(const struct key *key, const u32 *address)
{
	u8 first = address[0] & 0xff;

	if (key->version == 6)
		return first == 0xff;
	return (first >= 224 && first < 240) || address[0] == 0xffffffff;
}

/* -- TCP (appliance/flow/tcp.py) -- */

static inline int has(struct flow *f, int what, int side)
{
	return f->has & (what << side);
}

static inline int is_new_connection(struct flow *f, struct scratch *s, int side)
{
	if ((s->flags & (SYN | ACK)) != SYN)
		return 0;
	if (has(f, HAS_ISN, side))
		return f->isn[side] != s->seq;
	return f->state != SYN_SENT && f->state != SYN_RECV;
}

static inline int absorbs(struct flow *f, struct scratch *s, int side)
{
	if (s->flags & RST)
		return 1;
	if (s->flags & ACK && has(f, HAS_TOP, 1 - side) && after(s->ack, f->top[1 - side]))
		return 0;
	if (s->payload_len && (!has(f, HAS_TOP, side) || after(s->seq + s->payload_len, f->top[side])))
		f->late[side]++;
	return (!f->late[0] || !f->late[1]) && f->late[0] <= MAX_LATE && f->late[1] <= MAX_LATE;
}

static inline int is_valid_reset(struct flow *f, struct scratch *s, int side)
{
	int other = 1 - side;
	u32 floor;

	if (!has(f, HAS_TOP, side)) {
		if (!has(f, HAS_ISN, other) || !(s->flags & ACK))
			return 1;
		return s->ack - f->isn[other] - 1 < SLACK;
	}
	if (has(f, HAS_ACK, other))
		floor = f->ack[other];
	else if (has(f, HAS_ISN, side))
		floor = f->isn[side];
	else
		return 1;
	return s->seq - floor + 1 <= SLACK;
}

/* The flow after one more segment; 1 when it ends here. */
static inline int step(struct flow *f, struct scratch *s, int side, u8 *reason)
{
	u8 flags = s->flags, state = f->state;
	int other = 1 - side;

	if (flags & RST) {
		if (!is_valid_reset(f, s, side))
			return 0;
		f->state = CLOSED;
		*reason = END_RST;
		return 1;
	}
	if (flags & SYN) {
		f->isn[side] = s->seq;
		f->has |= HAS_ISN << side;
		if ((has(f, HAS_ISN, other) || flags & ACK) && state == SYN_SENT)
			state = SYN_RECV;
		if (flags & ACK)
			f->seen |= SEEN_SYNACK << side;
	}
	u32 top = s->seq + s->payload_len + (flags & FIN) + (flags >> 1 & 1);
	if (!has(f, HAS_TOP, side) || after(top, f->top[side])) {
		f->top[side] = top;
		f->has |= HAS_TOP << side;
	}
	if (flags & ACK) {
		f->ack[side] = s->ack;
		f->has |= HAS_ACK << side;
		if (!(flags & SYN)) {
			if (state == SYN_RECV)
				state = ESTABLISHED;
			else if ((state == SYN_SENT || state == MIDSTREAM) && has(f, HAS_ACK, other))
				state = ESTABLISHED;
		}
	}
	if (flags & FIN) {
		f->fins |= 1 << side;
		f->last_fin = side;
		f->state = f->fins == 3 ? CLOSING : HALF_CLOSED;
		return 0;
	}
	f->state = state;
	if (state == CLOSING && side != f->last_fin && flags & ACK) {
		f->state = CLOSED;
		*reason = END_FIN;
		return 1;
	}
	return 0;
}

/* -- telling -- */

/* A size of 1 to MAX_FRAME, said in the one way that the verifiers of all kernels follow: in the register that is used. */
#define bounded(size)                                                                                                  \
	({                                                                                                             \
		u64 less_ = (size) - 1;                                                                                \
		asm volatile("%0 &= %1" : "+r"(less_) : "i"(MAX_FRAME - 1));                                           \
		less_ + 1;                                                                                             \
	})

static inline void tell(struct __sk_buff *skb, struct scratch *s, struct flow *f, struct stats *st, u8 kind, int side,
			u8 reason, u64 at_ns)
{
	struct event *e = &s->event;
	u64 size = 0;

	e->id = f->id;
	e->at_ns = at_ns;
	e->side = side;
	e->reason = reason;
	e->state = f->state;
	e->seen = f->seen;
	e->missed = f->missed;
	e->first_side = f->first_side;
	e->first_flags = f->first_flags;
	e->icmp_type = f->icmp_type;
	e->icmp_code = f->icmp_code;
	e->hold = f->hold;
	e->tag = 0;
	e->key = s->key;
	e->packets[0] = f->packets[0];
	e->packets[1] = f->packets[1];
	e->bytes[0] = f->bytes[0];
	e->bytes[1] = f->bytes[1];
	__builtin_memcpy(e->macs, f->macs, 12);
	if (kind & (PAYLOAD | HELD)) {
		u32 at = kind & HELD ? 0 : s->payload_at, max = kind & HELD ? MAX_FRAME : MAX_DATA;

		size = skb->len > at ? skb->len - at : 0;
		e->wire_len = size;
		if (kind & HELD) {
			if (skb->vlan_present)
				e->tag = skb->vlan_proto << 16 | (skb->vlan_tci & 0xffff);
			e->gso_size = skb->gso_size;
		} else {
			e->wire_len = s->payload_len;
			if (size > s->payload_len)
				size = s->payload_len;
		}
		if (size > max)
			size = max;
		if (kind & HELD && (f->hold & ~DENY) == ARMED)
			size = 0; /* it passes; only its payload will wait */
		if (!size || load_bytes(skb, at, s->data, bounded(size))) {
			kind &= ~PAYLOAD;
			size = 0;
		}
		e->offset = s->seq + (s->flags >> 1 & 1) - f->base[side];
	}
	e->captured = size;
	e->kind = kind;
	if (!kind)
		return;
	st->events++;
	if (likely(!(size ? output(skb, e, sizeof(*e) + bounded(size)) : output(skb, e, sizeof(*e))))) {
		f->missed &= ~(kind & START);
		return;
	}
	if (kind & HELD && size) { /* that it waits matters more than what */
		e->captured = 0;
		if (!output(skb, e, sizeof(*e)))
			return;
	}
	st->lost++;
	f->missed |= kind & (START | PAYLOAD | END);
}

/* Whether this packet has bytes that may be a new first payload; counts it. User space removes what it knows. */
static inline int is_payload(struct flow *f, struct scratch *s, int side)
{
	u32 limit = 3, tries = 8;
	u32 begin = s->seq + (s->flags >> 1 & 1);

	if (!s->payload_len)
		return 0;
	if (s->key.protocol == 17 && s->key.remote_port == 53)
		limit = tries = 256;
	if (f->told[side] >= limit || f->sent[side] >= tries)
		return 0;
	f->sent[side]++;
	if (s->key.protocol != 6) {
		f->told[side]++;
		return 1;
	}
	if (!has(f, HAS_BASE, side)) {
		f->base[side] = has(f, HAS_ISN, side) ? f->isn[side] + 1 : begin;
		f->has |= HAS_BASE << side;
		f->told[side]++;
		return 1;
	}
	return 1;
}

/* -- one packet -- */

static inline int is_banned(struct key *key, u64 now)
{
	struct verdict *v;

	if (key->version == 4) {
		struct peer4 peer = {64, key->ifindex, key->remote[0]};

		v = map_lookup(&peers4, &peer);
		if (!v || (v->deadline_ns && v->deadline_ns < now)) {
			peer.scope = 0;
			v = map_lookup(&peers4, &peer);
		}
	} else {
		struct peer6 peer = {160, key->ifindex, {key->remote[0], key->remote[1], key->remote[2], key->remote[3]}};

		v = map_lookup(&peers6, &peer);
		if (!v || (v->deadline_ns && v->deadline_ns < now)) {
			peer.scope = 0;
			v = map_lookup(&peers6, &peer);
		}
	}
	return v && v->action == DROP && (!v->deadline_ns || v->deadline_ns >= now);
}

static inline int is_alive(struct port *port, u64 now)
{
	return now <= port->heartbeat_ns || now - port->heartbeat_ns <= port->patience_ns;
}

static inline int is_same_mac(const u8 *one, const u8 *other)
{
	const u16 *a = (const u16 *)one, *b = (const u16 *)other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

/* What becomes of this packet. A flow's own verdict comes before its hold, and that before a ban of its peer. ``ours``:
 * the packet was held and is sent on. */
static inline u32 judge(struct scratch *s, struct port *port, struct flow *f, const u8 *eth, int side, int ours, u64 now)
{
	int alive = is_alive(port, now);
	u32 action;
	u8 hold;

	if (!alive && !(port->flags & FAIL_CLOSED)) { /* nobody is there who would lift it */
		if (f)
			f->hold = FREE;
		return ALLOW;
	}
	if (f && port->flags & HAS_VERDICTS) {
		struct verdict *v = map_lookup(&verdicts, &s->key);

		if (v && v->flow == f->id) {
			action = v->deadline_ns && v->deadline_ns < now ? v->otherwise : v->action;
			if (action == REDIRECT) {
				f->hold = FREE;
				__builtin_memcpy(s->mac, v->mac, 6);
				if (side == f->first_side) {
					s->target = v->ifindex;
					s->mac_at = 0;
					return ALLOW;
				}
				/* the answer: from the decoy, and to the guest as if from its peer */
				if (!side || !is_same_mac(eth + 6, s->mac))
					return DROP;
				__builtin_memcpy(s->mac, f->macs, 6);
				s->mac_at = 6;
				return ALLOW;
			}
			if (action == ALLOW || ours)
				f->hold = FREE;
			if (action == ALLOW)
				return ALLOW;
			if (action == HOLD && !f->hold && !ours) {
				f->hold = PAUSED;
				f->copied = 0;
			}
			if (action != NOTHING && !ours)
				return action;
		}
	}
	hold = f ? f->hold & ~DENY : FREE;
	if (hold && (ours || hold == PAUSED)) /* the verdict was lifted */
		hold = f->hold = FREE;
	if (hold == REFUSED)
		return DROP;
	if (hold) {
		int waits = hold == HELD_NEW || ((s->payload_len || s->fragment) && side == f->first_side);

		if (waits && hold == ARMED) {
			f->hold += HELD_PAYLOAD - ARMED;
			f->held_ns = now + port->hold_ns;
			f->copied = 0;
		}
		if (waits && now <= f->held_ns)
			return HOLD;
		if (waits && (f->hold & DENY || !alive))
			return DROP;
		if (waits)
			f->hold = FREE;
	}
	return !ours && port->flags & HAS_BANS && is_banned(&s->key, now) ? DROP : ALLOW;
}

/* Whether user space needs this frame of a flow that waits, to send it on. TCP repeats; a datagram comes once. */
static inline int is_wanted(struct flow *f, struct scratch *s, int side)
{
	if (s->key.protocol != 6) {
		if (f->copied >= (s->fragment == LATER ? MAX_PIECES : MAX_COPIES))
			return 0;
		f->copied++;
		return 1;
	}
	if (f->missed & START)
		return 1;
	if (!s->payload_len || f->copied & (1 << side))
		return 0;
	f->copied |= 1 << side;
	return 1;
}

/* The flow that an ICMP error quotes (RFC 792, RFC 4443): its sender is the receiver of the error. */
static inline struct flow *note_error(struct __sk_buff *skb, struct scratch *s, int side)
{
	u32 at = s->payload_at;
	u16 ports[2];
	struct flow *f;

	if (s->key.version == 4) {
		struct { u8 version_ihl, tos; u16 total, ident, frag; u8 ttl, protocol; u16 check; u32 src, dst; } head;

		if (load_bytes(skb, at, &head, 20))
			return 0;
		at += (head.version_ihl & 15) << 2;
		s->key.protocol = head.protocol;
		s->key.local[0] = side ? head.src : head.dst;
		s->key.remote[0] = side ? head.dst : head.src;
	} else {
		struct { u32 version; u16 length; u8 next, hops; u32 src[4], dst[4]; } head;

		if (load_bytes(skb, at, &head, 40))
			return 0;
		at += 40;
		s->key.protocol = head.next;
		__builtin_memcpy(s->key.local, side ? head.src : head.dst, 16);
		__builtin_memcpy(s->key.remote, side ? head.dst : head.src, 16);
	}
	if (load_bytes(skb, at, ports, 4))
		return 0;
	set_ports(&s->key, !side, ntohs(ports[0]), ntohs(ports[1]));
	f = map_lookup(&flows, &s->key);
	if (f)
		f->errors[side]++;
	return f;
}

static inline void count(struct flow *f, struct scratch *s, int side, u32 segments, u64 now)
{
	__sync_fetch_and_add(&f->packets[side], segments);
	__sync_fetch_and_add(&f->frames[side], 1);
	__sync_fetch_and_add(&f->bytes[side], s->ip_bytes + (u64)(segments - 1) * s->header_len);
	if (now > f->last_ns)
		f->last_ns = now;
}

static inline int has_deadline(struct flow *f) /* it may be silent because it waits */
{
	return f->hold && f->hold != REFUSED;
}

static inline int is_in_force(struct port *port, u64 now)
{
	return port->flags & FAIL_CLOSED || is_alive(port, now);
}

static inline int is_midstream(struct scratch *s)
{
	return s->key.protocol == 6 && (s->flags & (SYN | ACK)) != SYN;
}

/* Where new flows wait, any packet that makes one does. Who began a connection that is picked up in the middle is a
 * guess, and its first packet may be forged from either end, so it waits in both directions. */
static inline int must_wait(struct port *port, struct scratch *s, int side, u64 now)
{
	u32 which = is_midstream(s) ? HOLD_OUT | HOLD_IN : side ? HOLD_IN : HOLD_OUT;

	return unlikely(port->flags & which) && is_in_force(port, now);
}

/* Whether a packet that makes no flow may not pass either: nobody could say whose it is, and a receiver may take more
 * than we understand. ARP, EAPOL, LLDP, spanning tree and neighbour discovery pass: without them there is no network. */
static inline int is_barred(struct scratch *s, struct port *port, int side, int why, u64 now)
{
	u32 flags = port->flags;

	if (!is_in_force(port, now))
		return 0;
	if (flags & HAS_BANS && s->key.version && is_banned(&s->key, now))
		return 1;
	if (side)
		return 0;
	if (why == NO_FIRST) /* a guest sends the first fragment first */
		return flags & (HOLD_OUT | HAS_VERDICTS);
	if (!(flags & HOLD_OUT))
		return 0;
	if ((why >= CUT_IP && why < NO_FIRST) || why == STRAY_CLOSE)
		return 1;
	if (!(flags & HOLD_DENY))
		return 0;
	if (why == IGMP || why == MLD || why == ROUTER)
		return !is_group(&s->key, s->key.remote);
	return why == PPPOE || why == OTHER_ETHERTYPE;
}

static inline void note_fragment(struct scratch *s, u64 now)
{
	s->noted.key = s->key;
	s->noted.at_ns = now;
	map_update(&fragments, &s->datagram, &s->noted, BPF_ANY);
}

#define SHOOT -1 /* drop it */
#define KEEP -2 /* it waits: neither passes nor counts */
#define OURS -3 /* let it pass, uncounted */

/* Returns why it is no flow; 0 when it is and the packet passes. */
static inline int place(struct __sk_buff *skb, struct scratch *s, struct port *port, struct stats *st, const u16 *eth, int side,
			u32 segments, u32 mark, u64 now, const int observe)
{
	struct key *key = &s->key;
	int forged = mark & FORGED, waits = 0, why = 0;
	u8 kind = 0, reason = 0;
	struct flow *f;

	if (s->fragment) {
		s->datagram.ifindex = key->ifindex;
		s->datagram.vlan = key->vlan;
		s->datagram.ident = s->ident;
		s->datagram.protocol = key->version == 4 ? key->protocol : 0; /* RFC 8200: only the first one's counts */
		__builtin_memcpy(s->datagram.src, side ? key->remote : key->local, 16);
		__builtin_memcpy(s->datagram.dst, side ? key->local : key->remote, 16);
		if (s->fragment == LATER) {
			struct noted *noted = map_lookup(&fragments, &s->datagram);

			if (noted && now - noted->at_ns <= 30 * SECOND)
				*key = noted->key;
			else
				why = NO_FIRST;
		}
	} else if (key->protocol == 1 || key->protocol == 58) {
		why = control(s);
	}
	if (key->protocol == 2)
		why = IGMP;
	f = map_lookup(&flows, key);
	if (!(f && is_familiar(f, eth, side)) && is_foreign(key->ifindex, eth, side, now))
		return FLOODED;
	if (why)
		return why;
	if (f && s->fragment != LATER) { /* does this packet still belong to it? */
		u64 limit = timeout(f->state), over_ns = 0;

		if (now > f->last_ns && now - f->last_ns > limit && !has_deadline(f)) {
			reason = f->state == CLOSING ? END_FIN : END_IDLE;
			over_ns = f->last_ns + limit;
		} else if (key->protocol == 6 && s->flags & SYN && is_new_connection(f, s, side)) {
			reason = f->fins ? END_FIN : END_IDLE;
			over_ns = now;
		}
		if (over_ns) {
			if (f->state != CLOSED)
				tell(skb, s, f, st, END, side, reason, over_ns);
			f = 0;
			reason = 0;
		}
	}
	if (!observe && mark & REFUSE) {
		if (f)
			f->hold = REFUSED;
		return KEEP;
	}
	if (f && s->fragment == FIRST) /* also of a packet that waits or is dropped: the later ones share its fate */
		note_fragment(s, now);
	if (!observe && forged) {
		if (!f || key->protocol != 6)
			return OURS;
		if (f->hold)
			f->hold = REFUSED;
		if (f->state != CLOSED && step(f, s, side, &reason))
			tell(skb, s, f, st, END, side, reason, now);
		return OURS;
	}
	if (!observe && unlikely(port->flags & (HAS_VERDICTS | HAS_BANS) || (f && f->hold))) {
		u32 action = judge(s, port, f, (const u8 *)eth, side, !!mark, now);

		if (action == HOLD && f) {
			st->held += segments;
			f->last_ns = now;
			if (is_wanted(f, s, side))
				tell(skb, s, f, st, HELD | (f->missed & START), side, 0, now);
			return KEEP;
		}
		if (action == DROP) {
			if (f) {
				f->dropped[side] += segments;
				f->last_ns = now;
				if (key->protocol == 6 && s->flags & ACK && !(s->flags & RST))
					f->ack[side] = s->ack; /* a challenge to our reset says what it should have been */
			}
			st->dropped += segments;
			return SHOOT;
		}
	}
	if (s->fragment == LATER) {
		if (!f)
			return NO_FIRST;
		count(f, s, side, segments, now);
		return 0;
	}
	if (f && f->state == CLOSED && key->protocol == 6) {
		int alive = s->flags & SYN || (s->payload_len && after(s->seq + s->payload_len, f->top[side]));

		if (!absorbs(f, s, side)) {
			f = 0;
		} else if (!observe && !mark && !side && alive && port->flags & HOLD_OUT && is_in_force(port, now)) {
			st->dropped += segments; /* the verdict on a connection that is over covers nothing new */
			return SHOOT;
		}
	}
	if (!f) {
		struct flow *n = &s->fresh;

		if (side && (eth[0] & 1 || is_group(key, key->local)))
			return MULTICAST;
		if (key->protocol == 6 && s->flags & (FIN | RST) && !(s->flags & SYN) && !s->payload_len)
			return STRAY_CLOSE;
		__builtin_memset(n, 0, sizeof(*n));
		n->id = (u64)cpu_id() << 40 | ++st->next_id;
		n->first_ns = n->last_ns = now;
		n->first_side = side;
		n->first_flags = s->flags;
		n->icmp_type = s->icmp_type;
		n->icmp_code = s->icmp_code;
		__builtin_memcpy(n->macs, side ? eth + 3 : eth, 6);
		__builtin_memcpy(n->macs + 6, side ? eth : eth + 3, 6);
		n->state = RAW;
		if (key->protocol == 6)
			n->state = !(s->flags & SYN) ? MIDSTREAM : s->flags & ACK ? SYN_RECV : SYN_SENT;
		else if (key->protocol == 17)
			n->state = UDP_ONEWAY;
		else if (key->protocol == 1 || key->protocol == 58)
			n->state = ICMP;
		if (!observe && !mark && must_wait(port, s, side, now)) {
			int syn = key->protocol == 6 && !is_midstream(s);

			n->hold = syn && port->flags & HOLD_PAYLOAD && !s->payload_len ? ARMED : HELD_NEW;
			waits = n->hold == HELD_NEW;
			if (port->flags & HOLD_DENY)
				n->hold |= DENY;
			n->held_ns = now + port->hold_ns;
			n->copied = key->protocol == 6 ? 3 : 1; /* a segment is told here, and only it: TCP repeats */
			if (syn) { /* another SYN of this tuple is another connection */
				n->isn[side] = s->seq;
				n->has = HAS_ISN << side;
			}
			kind = HELD;
		}
		map_update(&flows, key, n, BPF_ANY);
		f = map_lookup(&flows, key);
		if (!f) {
			st->unmade += segments;
			return waits ? SHOOT : 0;
		}
		st->flows++;
		kind |= START;
		if (s->fragment)
			note_fragment(s, now);
	}
	if (waits) {
		st->held += segments;
		goto telling;
	}
	count(f, s, side, segments, now);
	if (!side)
		__builtin_memcpy(f->macs, eth, 12);
	if (f->state == CLOSED)
		return 0;
	/* Before step(), which moves top: whether this segment goes beyond all earlier ones. */
	u32 end = s->seq + s->payload_len + (s->flags >> 1 & 1);
	int fresh = has(f, HAS_BASE, side) && after(end, f->top[side]);
	if (key->protocol == 6) {
		if (step(f, s, side, &reason))
			kind |= END;
	} else if (f->state == UDP_ONEWAY && f->packets[0] && f->packets[1]) {
		f->state = UDP_BIDIR;
	}
	if (is_payload(f, s, side)) {
		kind |= PAYLOAD;
		if (key->protocol == 6 && fresh)
			f->told[side]++;
	}
telling:
	if (kind)
		tell(skb, s, f, st, kind, side, reason, now);
	return waits ? KEEP : 0;
}

static inline int handle(struct __sk_buff *skb, int side, const int observe)
{
	u32 zero = 0, ifindex = skb->ifindex, segments = 1, mark = 0;
	struct port *port = map_lookup(&ports, &ifindex);
	struct scratch *s = map_lookup(&scratch, &zero);
	struct stats *st = map_lookup(&stats, &zero);
	u16 eth[8];
	int why = RUNT, barred = 0;

	if (!port || !s || !st)
		return -1; /* TC_ACT_UNSPEC: other filters still run */
	if (observe) {
		side = (skb->pkt_type == PACKET_OUTGOING) ^ !!(port->flags & SWAPPED);
	} else if (port->mark && (skb->mark & ~MARK_BITS) == port->mark) {
		mark = skb->mark;
		skb->mark = 0;
	}
	u64 now = ktime();
	__builtin_memset(&s->key, 0, sizeof(s->key));
	s->payload_len = s->seq = s->ack = s->ident = s->header_len = s->target = 0;
	s->flags = s->icmp_type = s->icmp_code = s->fragment = 0;
	s->mac_at = 1;
	s->key.ifindex = ifindex;
	if (load_bytes(skb, 0, eth, 14))
		goto ignore;
	why = decode(skb, s, side, ntohs(eth[6]));
	if (likely(!why)) {
		u32 size = skb->gso_size, headers = s->ip_at + s->header_len;

		if (size && skb->len > headers)
			segments = (skb->len - headers + size - 1) / size;
		why = place(skb, s, port, st, eth, side, segments, mark, now, observe);
		if (why == KEEP)
			return 2; /* TC_ACT_SHOT */
		if (why == OURS)
			return -1;
	} else if (is_foreign(ifindex, eth, side, now)) {
		why = FLOODED;
	}
	if (why > 0) {
		barred = !observe && !mark && port->flags & (HOLD_OUT | HAS_VERDICTS | HAS_BANS) && is_barred(s, port, side, why, now);
		if (why == ICMP_ERROR) {
			struct flow *f = note_error(skb, s, side);

			/* it carries whatever its sender likes: it has to be about a flow that there is, and that may pass */
			if (!observe && !side && (port->flags & (HOLD_OUT | HOLD_DENY)) == (HOLD_OUT | HOLD_DENY))
				barred |= is_in_force(port, now) && (!f || f->hold);
		}
	}
ignore:
	st->packets += segments;
	st->bytes += skb->len;
	if (why == SHOOT)
		return 2;
	if (why > 0) {
		u64 which = why;

		asm volatile("" : "+r"(which)); /* the bound must be on the very register that is the index */
		if (which < REASONS)
			st->ignored[which]++;
	}
	if (barred) {
		st->dropped += segments;
		return 2;
	}
	if (!observe && s->mac_at != 1) {
		if (store_bytes(skb, s->mac_at & 7, s->mac, 6, 0))
			return 2;
		if (s->target)
			return redirect(s->target, 0);
	}
	return -1;
}

SEC("classifier/from_guest") int from_guest(struct __sk_buff *skb)
{
	return handle(skb, 0, 0);
}

SEC("classifier/to_guest") int to_guest(struct __sk_buff *skb)
{
	return handle(skb, 1, 0);
}

/* Sends a frame on at a port, as its cb[] says: ifindex, BPF_F_INGRESS or 0, mark, length. Run by user space. */
SEC("classifier/inject") int inject(struct __sk_buff *skb)
{
	u32 ifindex = skb->cb[0], flags = skb->cb[1], zero = 0, have = skb->len;
	u64 more = skb->cb[3] - have;

	skb->mark = skb->cb[2];
	if (more) {
		void *rest = map_lookup(&tail, &zero);

		if (!rest || more > MAX_FRAME || change_tail(skb, have + more, 0))
			return -1;
		if (store_bytes(skb, have, rest, bounded(more), 0))
			return -1;
	}
	return clone_redirect(skb, ifindex, flags);
}

SEC("socket/observe") int observe(struct __sk_buff *skb)
{
	handle(skb, 0, 1);
	return 0; /* bytes to queue */
}

/* For which structures this was built: layout.py has to have the same. */
const u32 _layout[] SEC("layout") = {
	sizeof(struct key), sizeof(struct flow), sizeof(struct event), sizeof(struct verdict), sizeof(struct port),
	sizeof(struct stats), sizeof(struct scratch),
};

char _license[] SEC("license") = "Dual MIT/GPL";
