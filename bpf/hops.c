// SPDX-License-Identifier: GPL-2.0-only
/* Report the hops of watched connections' first packets: tc ingress and egress
 * of each interface, and the five netfilter hooks, just before NAT and last.
 *
 * Which connection a packet belongs to is known only when it has its conntrack entry
 * and DNAT has chosen a backend. Until then its hops wait in a slot; once a packet is
 * known to be unwatched, a hop costs one lookup and one compare.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"
#include "hop.h"
#include "packet.h"

/* Return value that continues with the next program (the same as TCX_NEXT). */
#define TC_ACT_UNSPEC (-1)
#define LOOPBACK_IFINDEX 1

/* How many packets one CPU may process at once: an interface delivers up to 64
 * (NAPI_POLL_WEIGHT), and a softirq may interrupt a sending process. Their sk_buffs
 * are 256 bytes apart, so they get different slots.
 */
#define FLIGHTS 128
/* Hops that may precede the decision: tc ingress of a network card, of its bond, of a
 * VLAN on the bond, of a bridge with the VLAN as a port, of a VLAN on the bridge; and
 * the first netfilter hook. One less than a power of two.
 */
#define HELD 7

/* Indexes in the array of programs, in the order of CONNECTIONS in programs.py. */
#define SRCIP_CALL_MARK 0
#define SRCIP_CALL_POSTROUTING 1
#define SRCIP_CALL_INPUT 2
#define SRCIP_CALLS 3

enum flight_state {
	UNDECIDED = 0,
	WATCHED = 1,
	IGNORED = 2,
};

struct flight {
	__u64 skb;
	__u64 packet_id;
	__u64 nf_conn; /* of an ignored packet */
	__u16 number;
	__u8 state;
	__u8 has_come; /* tc ingress saw it, and netfilter has not yet */
	__u8 held;
	__u8 pad[3];
	/* The interface that it left by, or 0; what follows is in another namespace. */
	__u32 left_by;
	/* The interface at whose tc ingress it was last, or 0. */
	__u32 came_by;
	struct srcip_hop hops[HELD + 1]; /* those that wait, and last the current one */
};

struct watch_key {
	struct srcip_tuple orig;
	__u32 netns;
	__u32 zone;
};

struct watch {
	__u32 packets[3]; /* in the original and reply direction, and ICMP errors about it */
	__u32 is_made;	  /* entry confirmed: another first packet is a new connection's */
};

BPF_RINGBUF_OUTPUT(hops, SRCIP_HOP_RING_PAGES);
BPF_PERCPU_ARRAY(flights, struct flight, FLIGHTS);
BPF_TABLE("lru_hash", struct watch_key, struct watch, watches, SRCIP_WATCHES);
/* Tuples of watched connections that the filter does not match: answers to a replaced
 * source, and on the next node what left this one.
 */
BPF_TABLE("lru_hash", struct srcip_tuple, __u8, known, SRCIP_WATCHES * 2);
BPF_PERCPU_ARRAY(self, __u64, 1);
/* The programs for connections at the same hooks: calling them from here costs each
 * packet one program less than attaching both.
 */
BPF_PROG_ARRAY(connections, SRCIP_CALLS);
BPF_ARRAY(config, struct srcip_config, 1);
BPF_PERCPU_ARRAY(lost, __u64, SRCIP_LOST_SLOTS);

static void count_lost(int slot)
{
	__u64 *count = lost.lookup(&slot);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* The slot of a packet. The verifier allows no arithmetic on a pointer, but a value
 * read from a map is a number. A softirq may overwrite it in between: then this
 * returns another packet's slot, which flight->skb shows.
 */
SRCIP_INLINE struct flight *flight_of(const void *skb)
{
	int zero = 0, index;
	volatile __u64 *place = self.lookup(&zero);

	if (!place)
		return NULL;
	*place = (__u64)skb;
	index = *place >> 8 & (FLIGHTS - 1);
	return flights.lookup(&index);
}

SRCIP_INLINE void begin(struct flight *flight, const void *skb)
{
	flight->skb = (__u64)skb;
	flight->state = UNDECIDED;
	flight->nf_conn = 0;
	flight->has_come = 0;
	flight->left_by = 0;
	flight->came_by = 0;
	flight->held = 0;
	flight->number = 0;
	flight->hops[HELD].packet.sport = 0;
	flight->hops[HELD].packet.dport = 0;
}

SRCIP_INLINE void emit(struct flight *flight, struct srcip_hop *hop, __u32 netns)
{
	hop->header.netns = netns;
	hop->number = flight->number;
	hop->packet_id = flight->packet_id;
	hop->tcp_flags = srcip_tcp_flags(flight->skb, &hop->packet);
	if (hops.ringbuf_output(hop, sizeof(*hop), BPF_RB_NO_WAKEUP))
		count_lost(SRCIP_LOST_RING_FULL);
}

SRCIP_INLINE void emit_held(struct flight *flight, __u32 netns)
{
	int i;

#pragma unroll
	for (i = 0; i < HELD; i++)
		if (i < flight->held) {
			flight->hops[i].flags |= flight->hops[HELD].flags & SRCIP_HOP_IS_REPLY;
			emit(flight, &flight->hops[i], netns);
		}
	flight->held = 0;
}

/* Keep the current hop until the decision. */
SRCIP_INLINE void hold(struct flight *flight)
{
	__u8 place = flight->held;

	if (place >= HELD) {
		count_lost(SRCIP_LOST_HOP_OVERTAKEN);
		return;
	}
	flight->hops[place & HELD] = flight->hops[HELD];
	flight->held = place + 1;
}

SRCIP_INLINE void set_watch_key(struct watch_key *key, const struct srcip_hop *hop, __u32 netns)
{
	/* Without an entry each direction counts as a connection. */
	key->orig = hop->flags & SRCIP_HOP_HAS_ENTRY ? hop->orig : hop->packet;
	key->netns = netns;
	key->zone = hop->zone;
}

/* Count a packet in its direction and return its number; 0 beyond the wanted ones. */
SRCIP_INLINE __u16 number_of(const struct srcip_config *settings, const struct srcip_hop *hop,
			     __u32 netns)
{
	int kind = hop->flags & SRCIP_HOP_IS_REPLY ? 1 : 0;
	struct watch none = {}, *watch;
	struct watch_key key = {};
	__u32 number;

	set_watch_key(&key, hop, netns);
	/* An ICMP error has the entry of the connection that it is about. */
	if (key.orig.proto != hop->packet.proto)
		kind = 2;
	watch = watches.lookup(&key);
	if (watch && watch->is_made && hop->flags & SRCIP_HOP_IS_NEW && !kind)
		watches.update(&key, &none); /* the same tuple is used again */
	else if (!watch)
		watches.insert(&key, &none);
	watch = watches.lookup(&key);
	if (!watch)
		return 1;
	/* A packet that waited for neighbour discovery, or was fragmented, has lost
	 * its slot but keeps its entry: do not count it again at tc egress. If two
	 * CPUs take the same number, both report their packet.
	 */
	if (hop->hook != SRCIP_HOOK_TC_EGRESS || !(hop->flags & SRCIP_HOP_HAS_ENTRY) ||
	    !watch->packets[kind])
		watch->packets[kind]++;
	number = watch->packets[kind];
	if (number <= settings->packets)
		return number;
	count_lost(SRCIP_LOST_OVER_LIMIT);
	return 0;
}

/* Conntrack confirms an entry after the last hook of its first packet. If that packet
 * is dropped before, its retransmission gets a new entry, but is the same connection.
 */
SRCIP_INLINE void remember_made(const struct srcip_hop *hop, __u32 netns)
{
	struct watch_key key = {};
	struct watch *watch;

	if (!(hop->flags & SRCIP_HOP_IS_NEW) || !(hop->flags & SRCIP_HOP_AFTER_NAT) ||
	    (hop->hook != SRCIP_HOOK_NF_POSTROUTING && hop->hook != SRCIP_HOOK_NF_INPUT))
		return;
	set_watch_key(&key, hop, netns);
	watch = watches.lookup(&key);
	if (watch)
		watch->is_made = 1;
}

/* The filter matches what the client sent. On the next node the original tuple is what
 * left this one, which is in known.
 */
SRCIP_INLINE bool is_watched(const struct srcip_config *settings, struct flight *flight)
{
	struct srcip_hop *hop = &flight->hops[HELD];

	if (hop->flags & SRCIP_HOP_HAS_ENTRY)
		return srcip_matches(&settings->filter, &hop->orig, &hop->reply) ||
		       (settings->is_broad && known.lookup(&hop->orig));
	return srcip_matches_packet(&settings->filter, &hop->packet) ||
	       (flight->held && srcip_matches_packet(&settings->filter, &flight->hops[0].packet));
}

/* After SNAT, remember what leaves and what comes back. */
SRCIP_INLINE void follow(const struct srcip_hop *hop)
{
	struct srcip_tuple sent;
	__u8 yes = 1;

	if (hop->hook != SRCIP_HOOK_NF_POSTROUTING || !(hop->flags & SRCIP_HOP_AFTER_NAT) ||
	    hop->flags & SRCIP_HOP_IS_REPLY || !(hop->flags & SRCIP_HOP_HAS_ENTRY))
		return;
	srcip_set_sent(&sent, hop);
	known.update(&sent, &yes);
	sent = hop->reply;
	known.update(&sent, &yes);
}

/* Decide whether the current hop's packet is watched; if so, report it and held hops. */
SRCIP_INLINE void look(struct flight *flight, const void *skb, __u64 nfct, __u32 netns)
{
	struct srcip_hop *hop = &flight->hops[HELD];
	__u64 nf_conn = nfct & ~NFCT_INFOMASK, info = nfct & NFCT_INFOMASK;
	struct srcip_config *settings;
	struct srcip_entry entry;
	int zero = 0;

	if (nf_conn && info != IP_CT_UNTRACKED) {
		if (srcip_read_entry(&entry, nf_conn)) {
			count_lost(SRCIP_LOST_UNREADABLE);
			return;
		}
		srcip_set_entry(hop, &entry, info);
	}
	/* A softirq may have used the slot for another packet in between. */
	if (flight->skb != (__u64)skb) {
		count_lost(SRCIP_LOST_HOP_OVERTAKEN);
		return;
	}
	if (flight->state == WATCHED) {
		emit(flight, hop, netns);
		follow(hop);
		remember_made(hop, netns);
		return;
	}
	hop->header.netns = netns;
	/* Before NAT, the backend of a first packet is not known. */
	if (hop->flags & SRCIP_HOP_IS_NEW && !(hop->flags & SRCIP_HOP_AFTER_NAT) &&
	    hop->hook != SRCIP_HOOK_TC_EGRESS && hop->hook != SRCIP_HOOK_NF_POSTROUTING) {
		hold(flight);
		return;
	}
	settings = config.lookup(&zero);
	if (!settings)
		return;
	flight->state = IGNORED;
	flight->nf_conn = nf_conn;
	if (!is_watched(settings, flight))
		return;
	flight->number = number_of(settings, hop, netns);
	if (!flight->number)
		return;
	flight->packet_id = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
	flight->state = WATCHED;
	emit_held(flight, netns);
	emit(flight, hop, netns);
	follow(hop);
}

/* IPVS takes a packet out of LOCAL_IN or LOCAL_OUT and sends it through LOCAL_OUT
 * with another destination (ip_vs_nat_send_or_cont).
 */
SRCIP_INLINE bool comes_from_ipvs(const struct flight *flight)
{
	const struct srcip_hop *last = &flight->hops[HELD];
	struct srcip_tuple packet = {};

	if (last->hook != SRCIP_HOOK_NF_INPUT && last->hook != SRCIP_HOOK_NF_OUTPUT)
		return false;
	return !(last->flags & SRCIP_HOP_AFTER_NAT) &&
	       srcip_read_packet(&packet, flight->skb) != SRCIP_UNREADABLE &&
	       packet.sport == last->packet.sport && packet.proto == last->packet.proto &&
	       srcip_address_equal(packet.src, last->packet.src);
}

/* A packet that comes in by a port of a VRF passes PRE_ROUTING twice: the second time
 * the VRF is its interface (vrf_ip_rcv).
 */
SRCIP_INLINE bool comes_from_vrf(const struct flight *flight, __u32 iif)
{
	const struct srcip_hop *last = &flight->hops[HELD];
	struct srcip_tuple packet = {};

	return last->hook == SRCIP_HOOK_NF_PREROUTING && last->flags & SRCIP_HOP_AFTER_NAT &&
	       last->iif != iif && srcip_read_packet(&packet, flight->skb) != SRCIP_UNREADABLE &&
	       srcip_is_same_packet(&last->packet, &packet);
}

/* A new packet may reuse the memory of a freed one. It begins at LOCAL_OUT, or at tc
 * ingress, or at PRE_ROUTING if nothing is attached at tc; over loopback the same
 * packet continues.
 */
SRCIP_INLINE bool begins_here(struct flight *flight, const void *skb, __u8 hook, __u8 flags,
			      __u32 iif)
{
	bool has_come = flight->has_come;

	if (flight->skb != (__u64)skb)
		return true;
	if (flags & SRCIP_HOP_AFTER_NAT)
		return false;
	if (hook == SRCIP_HOOK_NF_OUTPUT)
		return !comes_from_ipvs(flight);
	if (hook != SRCIP_HOOK_NF_PREROUTING)
		return false;
	flight->has_come = 0;
	return !has_come && iif != LOOPBACK_IFINDEX && !comes_from_vrf(flight, iif);
}

/* If the ports are outside the linear part, NAT has not changed them, because it pulls
 * whatever it changes into the linear part: they are those of the previous hop.
 */
SRCIP_INLINE bool read_packet(struct flight *flight, struct srcip_hop *hop, __u16 sport,
			      __u16 dport)
{
	int found = srcip_read_packet(&hop->packet, flight->skb);

	if (found == SRCIP_FRAGMENT)
		hop->flags |= SRCIP_HOP_IS_FRAGMENT;
	if (found == SRCIP_NO_PORTS) {
		hop->packet.sport = sport;
		hop->packet.dport = dport;
	}
	return found != SRCIP_UNREADABLE;
}

/* enum nf_inet_hooks counts from 0, enum srcip_hook in the same order from 1. */
SRCIP_INLINE void netfilter_hop(struct srcip_nf_ctx *ctx, __u8 hook, __u8 flags)
{
	const void *skb = ctx->skb, *state = ctx->state, *net;
	struct flight *flight = flight_of(skb);
	struct srcip_hop *hop;
	__u16 sport, dport;
	__u32 iif, oif;
	__u64 nfct;

	if (!flight)
		return;
	nfct = srcip_load_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	iif = srcip_index_of(srcip_load_pointer(state, SRCIP_OFFSET(nf_hook_state, in)));
	if (begins_here(flight, skb, hook, flags, iif))
		begin(flight, skb);
	else if (flight->state == IGNORED) {
		flight->nf_conn = nfct & ~NFCT_INFOMASK;
		return;
	}

	hop = &flight->hops[HELD];
	sport = hop->packet.sport;
	dport = hop->packet.dport;
	oif = srcip_index_of(srcip_load_pointer(state, SRCIP_OFFSET(nf_hook_state, out)));
	srcip_set_hop(hop, flight->skb, hook, iif, oif);
	hop->flags = flags;
	if (!read_packet(flight, hop, sport, dport)) {
		flight->state = IGNORED;
		return;
	}
	net = srcip_load_pointer(state, SRCIP_OFFSET(nf_hook_state, net));
	look(flight, skb, nfct, srcip_load_u32(net, SRCIP_OFFSET(net, ns_inum)));
}

SRCIP_INLINE __u8 hook_of(const struct srcip_nf_ctx *ctx)
{
	return srcip_load_u8(ctx->state, SRCIP_OFFSET(nf_hook_state, hook)) + 1;
}

int srcip_before_nat(struct srcip_nf_ctx *ctx)
{
	__u8 hook = hook_of(ctx);

	netfilter_hop(ctx, hook, 0);
	if (hook == SRCIP_HOOK_NF_POSTROUTING)
		connections.call((void *)ctx, SRCIP_CALL_MARK);
	return NF_ACCEPT;
}

int srcip_after_nat(struct srcip_nf_ctx *ctx)
{
	__u8 hook = hook_of(ctx);

	netfilter_hop(ctx, hook, SRCIP_HOP_AFTER_NAT);
	if (hook == SRCIP_HOOK_NF_POSTROUTING)
		connections.call((void *)ctx, SRCIP_CALL_POSTROUTING);
	else if (hook == SRCIP_HOOK_NF_INPUT)
		connections.call((void *)ctx, SRCIP_CALL_INPUT);
	return NF_ACCEPT;
}

/* Whether an incoming packet may be watched. Before conntrack's lookup only the
 * client's address and the tuples in known can be checked.
 */
SRCIP_INLINE bool may_be_watched(const struct srcip_filter *filter, struct srcip_tuple *packet)
{
	if (filter->proto && filter->proto != packet->proto)
		return false;
	if (filter->family && filter->family != packet->family)
		return false;
	return srcip_address_in(packet->src, filter->client, filter->client_mask) ||
	       srcip_address_in(packet->dst, filter->client, filter->client_mask) ||
	       known.lookup(packet);
}

/* A new packet may reuse the memory of a freed one. The same packet continues from a
 * bridge's port to the bridge, and over loopback. With br_netfilter it passes
 * PRE_ROUTING before it reaches the bridge device.
 */
SRCIP_INLINE bool goes_on(const struct flight *flight, const struct __sk_buff *ctx,
			  const struct srcip_tuple *packet, __u32 netns)
{
	const struct srcip_hop *last = &flight->hops[HELD];

	if (flight->skb != (__u64)ctx || flight->state == IGNORED)
		return false;
	if (flight->left_by) {
		if (ctx->ifindex != LOOPBACK_IFINDEX)
			return false;
	} else if (flight->came_by == ctx->ifindex) {
		return false;
	} else if (last->hook != SRCIP_HOOK_TC_INGRESS && last->hook != SRCIP_HOOK_NF_PREROUTING) {
		return false;
	}
	/* A device in another namespace may be stacked on the one that it came in by. */
	return last->header.netns == netns && srcip_is_same_packet(&last->packet, packet);
}

/* Read a packet at tc; return the flags of its hop, or -1 if it is not an IP packet. */
SRCIP_INLINE int read_frame(struct srcip_tuple *packet, struct __sk_buff *ctx, __u64 skb)
{
	int found;

	if (srcip_read_plain(packet, ctx))
		return 0;
	found = srcip_read_frame(packet, ctx, skb);
	if (found == SRCIP_UNREADABLE)
		return -1;
	return found == SRCIP_FRAGMENT ? SRCIP_HOP_IS_FRAGMENT : 0;
}

int srcip_tc_ingress(struct __sk_buff *ctx)
{
	struct flight *flight = flight_of(ctx);
	struct srcip_tuple packet = {};
	struct srcip_config *settings;
	struct srcip_hop *hop;
	int zero = 0, flags;
	__u32 netns;

	settings = config.lookup(&zero);
	if (!flight || !settings)
		return TC_ACT_UNSPEC;
	flags = read_frame(&packet, ctx, (__u64)ctx);
	/* The slot may still hold another packet's state. */
	if (flags < 0 || !may_be_watched(&settings->filter, &packet)) {
		begin(flight, ctx);
		flight->state = IGNORED;
		flight->has_come = 1;
		return TC_ACT_UNSPEC;
	}
	netns = srcip_netns_of_device((__u64)ctx);
	if (!goes_on(flight, ctx, &packet, netns))
		begin(flight, ctx);
	flight->has_come = 1;
	flight->came_by = ctx->ifindex;
	flight->left_by = 0;
	hop = &flight->hops[HELD];
	srcip_set_hop(hop, flight->skb, SRCIP_HOOK_TC_INGRESS, ctx->ifindex, 0);
	hop->header.netns = netns;
	hop->packet = packet;
	hop->flags = flags;
	if (flight->state == WATCHED)
		emit(flight, hop, netns);
	else
		hold(flight);
	return TC_ACT_UNSPEC;
}

int srcip_tc_egress(struct __sk_buff *ctx)
{
	struct flight *flight = flight_of(ctx);
	struct srcip_hop *hop;
	__u64 nfct;
	int flags;

	if (!flight)
		return TC_ACT_UNSPEC;
	/* A packet that has already left by this interface is gone; its memory now
	 * holds one that netfilter has not seen, such as a packet socket's.
	 */
	if (flight->skb != (__u64)ctx || flight->left_by == ctx->ifindex)
		begin(flight, ctx);
	/* Fragments are made after netfilter, in the memory of packets that are gone. */
	nfct = srcip_read_u64(flight->skb, SRCIP_OFFSET(sk_buff, _nfct));
	if (flight->state == IGNORED && flight->nf_conn != (nfct & ~NFCT_INFOMASK))
		begin(flight, ctx);
	flight->left_by = ctx->ifindex;
	if (flight->state == IGNORED)
		return TC_ACT_UNSPEC;
	hop = &flight->hops[HELD];
	srcip_set_hop(hop, flight->skb, SRCIP_HOOK_TC_EGRESS, 0, ctx->ifindex);
	flags = read_frame(&hop->packet, ctx, flight->skb);
	if (flags < 0)
		return TC_ACT_UNSPEC;
	hop->flags = flags;
	look(flight, ctx, nfct, srcip_netns_of_device(flight->skb));
	return TC_ACT_UNSPEC;
}

/* A packet that is dropped before the decision: report its hops all the same, and free
 * its slot, because its memory may soon hold another packet.
 */
int srcip_hop_end(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 skb = ctx->args[0];
	struct flight *flight = flight_of((void *)skb);
	struct srcip_config *settings;
	struct srcip_hop *hop;
	__u32 netns;
	int zero = 0;

	if (!flight || flight->skb != skb)
		return 0;
	flight->skb = 0;
	settings = config.lookup(&zero);
	if (!settings || flight->state != UNDECIDED || !flight->held)
		return 0;
	hop = &flight->hops[HELD];
	netns = hop->header.netns ? hop->header.netns : srcip_netns_of_device(skb);
	if (!is_watched(settings, flight))
		return 0;
	flight->number = number_of(settings, hop, netns);
	if (!flight->number)
		return 0;
	flight->skb = skb;
	flight->packet_id = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
	emit_held(flight, netns);
	flight->skb = 0;
	return 0;
}
