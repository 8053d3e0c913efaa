// SPDX-License-Identifier: GPL-2.0-only
/* Report each new connection once, at the last netfilter hook before conntrack
 * confirms it, or (SRCIP_PROBES) in the function that confirms it: there both NAT
 * decisions are final, and one entry holds the tuple that the client sent and the
 * tuple of the backend's reply.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"
#include "probe.h"

/* Slots that keep a packet's mark from the hook before SNAT to the last one. A
 * packet of a local process can be interrupted between the two by a softirq that
 * handles another packet on the same CPU, so each slot holds the entry that its
 * mark belongs to, and eight of them make a clash unlikely. A clash is counted.
 */
#define MARK_SLOTS 8

/* log2 of the number of recently used addresses whose class is cached. */
#define RECENT_BITS 10

struct mark_slot {
	__u64 nf_conn;
	__u64 chain;
	__u32 mark;
	__u32 pad;
};

BPF_RINGBUF_OUTPUT(connections, SRCIP_CONNECTION_RING_PAGES);
/* Nothing is deleted from the active map: another CPU may hold a pointer to the
 * count. User space lets the two take turns, and empties the idle one.
 */
BPF_PERCPU_HASH(paths_0, struct srcip_path_key, __u64, SRCIP_PATHS);
BPF_PERCPU_HASH(paths_1, struct srcip_path_key, __u64, SRCIP_PATHS);
/* One connection of each path, for what is not in the key. */
BPF_HASH(samples, struct srcip_path_key, struct srcip_connection, SRCIP_PATHS * 2);
BPF_LPM_TRIE(classes, struct srcip_prefix, __u32, SRCIP_PREFIXES);
BPF_PERCPU_ARRAY(recent_classes, __u64, 1 << RECENT_BITS);
BPF_PERCPU_ARRAY(marks, struct mark_slot, MARK_SLOTS);
BPF_PERCPU_ARRAY(unannounced, __u64, 1);
#if SRCIP_PROBES
/* A link belongs to one namespace; a probe fires in all of them. */
BPF_HASH(traced, __u32, __u8, SRCIP_NAMESPACES);
#endif
BPF_ARRAY(config, struct srcip_config, 1);
BPF_PERCPU_ARRAY(lost, __u64, SRCIP_LOST_SLOTS);

static void count_lost(int slot)
{
	__u64 *count = lost.lookup(&slot);

	/* Atomic, because a softirq may interrupt a local process's packet
	 * between load and store.
	 */
	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Conntrack itself skips neighbour discovery and multicast listener reports
 * (nf_conntrack_icmpv6_error()); the latter follow a hop-by-hop header. Do not
 * count them as untracked.
 */
SRCIP_INLINE bool is_ipv6_housekeeping(const void *skb)
{
	__u64 header = srcip_load_u64(skb, SRCIP_OFFSET(sk_buff, head)) +
		       srcip_read_u16((__u64)skb, SRCIP_OFFSET(sk_buff, network_header));
	__u64 start = srcip_read_u64(header, 0);
	const __u8 *bytes = (const __u8 *)&start;

	/* Byte 0 begins with the IP version; byte 6 of IPv6 is the next header. */
	return bytes[0] >> 4 == 6 && (bytes[6] == IPPROTO_ICMPV6 || bytes[6] == IPPROTO_HOPOPTS);
}

/* The entry of a packet that may be the first of its connection, else 0: an
 * established packet costs one load and one test. Every packet of an unanswered
 * UDP flow is NEW, and an ICMP error is RELATED, so the caller must still check
 * the entry's status.
 */
SRCIP_INLINE __u64 new_entry(const void *skb, __u64 nfct)
{
	__u64 info = nfct & NFCT_INFOMASK;
	__u64 wanted = 1 << IP_CT_RELATED | 1 << IP_CT_NEW | 1 << IP_CT_UNTRACKED;

	if (!(wanted >> info & 1))
		return 0;
	if (info == IP_CT_UNTRACKED) {
		if (!is_ipv6_housekeeping(skb))
			count_lost(SRCIP_LOST_UNTRACKED);
		return 0;
	}
	return nfct & ~NFCT_INFOMASK;
}

SRCIP_INLINE int mark_index(__u64 nf_conn)
{
	/* Entries are aligned to cache lines: the low bits are always the same. */
	return nf_conn >> 8 & (MARK_SLOTS - 1);
}

/* Keep a packet's mark before its source is replaced; chain identifies the caller. */
SRCIP_INLINE void keep_mark(const void *skb, __u64 chain)
{
	__u64 nfct = srcip_load_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	__u64 nf_conn = nfct & ~NFCT_INFOMASK;
	__u64 info = nfct & NFCT_INFOMASK;
	struct mark_slot *slot;
	int index;

	if (info != IP_CT_NEW && info != IP_CT_RELATED)
		return;
	index = mark_index(nf_conn);
	slot = marks.lookup(&index);
	if (!slot)
		return;
	/* The first of several chains has seen the original mark. If the same chain
	 * calls again, the address belongs to a new entry.
	 */
	if (slot->nf_conn == nf_conn && slot->chain != chain)
		return;
	slot->mark = srcip_load_u32(skb, SRCIP_OFFSET(sk_buff, mark));
	slot->chain = chain;
	slot->nf_conn = nf_conn;
}

/* Probes sit in nat chains, which do not run for an expected connection, or where
 * there is no chain: then the mark is unchanged. A chain that ran has replaced the
 * source, or else has not cleared kube-proxy's mark.
 */
SRCIP_INLINE bool is_mark_untouched(const struct srcip_connection *record)
{
	return record->flags & SRCIP_CONNECTION_RELATED || !(record->status & IPS_SRC_NAT);
}

/* kube-proxy clears its mark before it masquerades, so at POST_ROUTING use the mark
 * that was kept. Nothing clears it at LOCAL_IN.
 */
SRCIP_INLINE bool find_mark(const void *skb, __u64 nf_conn, struct srcip_connection *record)
{
	int index = mark_index(nf_conn);
	struct mark_slot *slot;

	if (record->hook == SRCIP_HOOK_NF_INPUT) {
		record->mark = srcip_load_u32(skb, SRCIP_OFFSET(sk_buff, mark));
		return true;
	}
	slot = marks.lookup(&index);
	if (slot && slot->nf_conn == nf_conn) {
		record->mark = slot->mark;
		slot->nf_conn = 0;
		return true;
	}
	if (SRCIP_PROBES && is_mark_untouched(record)) {
		record->mark = srcip_load_u32(skb, SRCIP_OFFSET(sk_buff, mark));
		return true;
	}
	count_lost(SRCIP_LOST_MARK_OVERTAKEN);
	return false;
}

SRCIP_INLINE void stream(const struct srcip_config *settings, struct srcip_connection *record)
{
	__u64 *sent, flags = BPF_RB_NO_WAKEUP;
	int zero = 0;

	record->header.ktime_ns = bpf_ktime_get_ns();

	/* A wake-up costs a hundred times as much as a record. The reader polls
	 * regularly; wake it only to keep the ring from filling up.
	 */
	sent = unannounced.lookup(&zero);
	if (sent && ++*sent >= settings->wakeup_records) {
		*sent = 0;
		flags = BPF_RB_FORCE_WAKEUP;
	}
	if (connections.ringbuf_output(record, sizeof(*record), flags))
		count_lost(SRCIP_LOST_RING_FULL);
}

/* Class and flags of an address; 0 (external) if no prefix covers it. */
SRCIP_INLINE __u32 find_class(__u32 netns, const __u8 *address)
{
	struct srcip_prefix prefix = {.length = 32 + 128, .netns = netns};
	__u32 *class;

	srcip_copy_address(prefix.address, address);
	class = classes.lookup(&prefix);
	return class ? *class : SRCIP_CLASS_EXTERNAL;
}

/* Like find_class(), but with a cache for IPv4 addresses: walking the trie costs
 * half as much as the count. A slot is one word, address << 32 | round << 8 |
 * class, so that a softirq cannot tear it. The round is read before the trie, so
 * that a class from an older trie is never cached under a newer round.
 */
SRCIP_INLINE __u32 class_of(__u32 netns, __u32 round, __u8 family, const __u8 *address)
{
	__u32 ipv4 = *(const __u32 *)(address + 12), class;
	int index = ipv4 * 2654435769U >> (32 - RECENT_BITS);
	__u64 wanted = (__u64)ipv4 << 32 | round << 8, held;
	volatile __u64 *recent;

	recent = round && family == AF_INET ? recent_classes.lookup(&index) : 0;
	if (!recent)
		return find_class(netns, address);
	held = *recent;
	if (held >> 8 == wanted >> 8)
		return held & 0xff;
	class = find_class(netns, address);
	*recent = wanted | class;
	return class;
}

SRCIP_INLINE bool is_translated(const struct srcip_connection *record)
{
	return !srcip_address_equal(record->orig.dst, record->reply.src) ||
	       (!srcip_is_icmp(&record->orig) && record->orig.dport != record->reply.sport);
}

/* Nothing that an outsider can choose freely may enter the key, or a flood would
 * fill the map: no client address or port, no id of a ping, no external
 * destination, and no port of a node without DNAT.
 */
SRCIP_INLINE void set_destination(struct srcip_path_key *key, __u32 round,
				  const struct srcip_connection *record)
{
	bool has_ports = !srcip_is_icmp(&record->orig);

	if (key->flags & SRCIP_PATH_DNAT) {
		srcip_copy_address(key->backend, record->reply.src);
		if (has_ports)
			key->backend_port = record->reply.sport;
	} else {
		key->dst_class =
		    class_of(key->netns, round, key->family, record->orig.dst) & SRCIP_CLASS_MASK;
		if (key->dst_class == SRCIP_CLASS_EXTERNAL)
			return;
		if (record->hook == SRCIP_HOOK_NF_INPUT) {
			srcip_copy_address(key->dst, record->orig.dst);
			return;
		}
	}
	srcip_copy_address(key->dst, record->orig.dst);
	if (has_ports)
		key->dport = record->orig.dport;
}

SRCIP_INLINE __u8 path_flags(const struct srcip_config *settings,
			     const struct srcip_connection *record)
{
	__u8 flags = 0;

	if (!srcip_address_equal(record->orig.src, record->reply.dst))
		flags |= SRCIP_PATH_SNAT;
	if (is_translated(record))
		flags |= SRCIP_PATH_DNAT;
	if (srcip_address_equal(record->orig.src, record->reply.src))
		flags |= SRCIP_PATH_HAIRPIN;
	if (record->status & IPS_SRC_NAT)
		flags |= SRCIP_PATH_SRC_NAT;
	if (record->flags & SRCIP_CONNECTION_HAS_MARK)
		flags |= SRCIP_PATH_HAS_MARK;
	if (record->mark & settings->masquerade_mark)
		flags |= SRCIP_PATH_MARKED;
	if (record->hook == SRCIP_HOOK_NF_INPUT)
		flags |= SRCIP_PATH_INPUT;
	return flags;
}

SRCIP_INLINE void set_path_key(struct srcip_path_key *key, const struct srcip_config *settings,
			       const struct srcip_connection *record)
{
	__u32 round = *(const volatile __u32 *)&settings->classes_round;
	__u32 client = class_of(record->header.netns, round, record->orig.family, record->orig.src);

	key->netns = record->header.netns;
	key->zone = record->zone;
	key->proto = record->orig.proto;
	key->family = record->orig.family;
	key->client_class = client & SRCIP_CLASS_MASK;
	key->client_flags = client >> SRCIP_CLASS_BITS;
	key->flags = path_flags(settings, record);
	if (key->flags & SRCIP_PATH_SNAT)
		srcip_copy_address(key->seen, record->reply.dst);
	set_destination(key, round, record);
}

SRCIP_INLINE __u64 *find_total(__u8 active, struct srcip_path_key *key)
{
	return active ? paths_1.lookup(key) : paths_0.lookup(key);
}

SRCIP_INLINE bool has_sample(struct srcip_path_key *key, struct srcip_connection *record)
{
	if (samples.lookup(key))
		return true;
	record->header.ktime_ns = bpf_ktime_get_ns();
	return !samples.insert(key, record);
}

SRCIP_INLINE void count(const struct srcip_config *settings, struct srcip_connection *record)
{
	/* Read once: user space may change it before the insertion. */
	__u8 active = *(const volatile __u8 *)&settings->active_paths;
	__u64 round = *(const volatile __u16 *)&settings->sample_round;
	struct srcip_path_key key = {};
	__u64 zero = 0, *total, before;

	set_path_key(&key, settings, record);
	total = find_total(active, &key);
	if (!total) {
		/* Does nothing if another CPU was faster. */
		if (active)
			paths_1.insert(&key, &zero);
		else
			paths_0.insert(&key, &zero);
		total = find_total(active, &key);
	}
	if (!total) {
		count_lost(SRCIP_LOST_PATHS_FULL);
		return;
	}
	__sync_fetch_and_add(total, 1);
	/* Once per path, CPU and round, because the lookup costs as much as the
	 * count. If a softirq does the same in between, the round becomes wrong,
	 * and the next connection looks again.
	 */
	before = *(const volatile __u64 *)total >> SRCIP_COUNT_BITS;
	if (before != round && has_sample(&key, record))
		__sync_fetch_and_add(total, (round - before) << SRCIP_COUNT_BITS);
}

/* Everything but the time: counting does not need it, and the clock costs 20 ns. */
SRCIP_INLINE void set_record(struct srcip_connection *record, const struct srcip_entry *entry)
{
	record->header.size = sizeof(*record);
	record->header.version = SRCIP_WIRE_VERSION;
	record->header.kind = SRCIP_KIND_CONNECTION;
	srcip_convert_tuple(&record->orig, srcip_entry_tuple(entry, 0));
	srcip_convert_tuple(&record->reply, srcip_entry_tuple(entry, 1));
	record->status = srcip_entry_status(entry);
	record->ct_mark = *(const __u32 *)SRCIP_ENTRY_FIELD(entry, mark);
	record->zone = *(const __u16 *)SRCIP_ENTRY_FIELD(entry, zone_id);
	record->zone_dir = *SRCIP_ENTRY_FIELD(entry, zone_dir);
}

/* Report the connection of a packet; hook, interfaces and namespace are set already. */
SRCIP_INLINE void report(const void *skb, __u64 nfct, struct srcip_connection *record)
{
	__u64 nf_conn = nfct & ~NFCT_INFOMASK;
	struct srcip_config *settings;
	struct srcip_entry entry;
	int zero = 0;

	if (srcip_read_entry(&entry, nf_conn)) {
		count_lost(SRCIP_LOST_UNREADABLE);
		return;
	}
	settings = config.lookup(&zero);
	if (!settings || srcip_entry_status(&entry) & IPS_CONFIRMED)
		return;

	set_record(record, &entry);
	if ((nfct & NFCT_INFOMASK) == IP_CT_RELATED)
		record->flags |= SRCIP_CONNECTION_RELATED;
	if (find_mark(skb, nf_conn, record))
		record->flags |= SRCIP_CONNECTION_HAS_MARK;
	if (settings->is_counting)
		count(settings, record);
	if (settings->is_streaming &&
	    (settings->is_broad || srcip_matches(&settings->filter, &record->orig, &record->reply)))
		stream(settings, record);
}

#if SRCIP_PROBES

/* nft_nat_do_chain(priv, skb, state) and similar functions run once per connection
 * and chain, before the chain's rules; nf_nat_ipv4_out() and similar ones per packet.
 */
int srcip_nat(struct srcip_registers *ctx)
{
	__u64 chain = srcip_argument(ctx, 0), state = srcip_argument(ctx, 2);

	if (srcip_read_u8(state, SRCIP_OFFSET(nf_hook_state, hook)) == NF_INET_POST_ROUTING)
		keep_mark((void *)srcip_argument(ctx, 1), chain);
	return 0;
}

/* __nf_conntrack_confirm(skb) runs only for entries that are not confirmed yet. */
int srcip_confirm(struct srcip_registers *ctx)
{
	__u64 skb = srcip_argument(ctx, 0);
	__u64 nfct = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	__u64 nf_conn = new_entry((void *)skb, nfct);
	struct srcip_connection record;

	if (!nf_conn)
		return 0;
	__builtin_memset(&record, 0, sizeof(record));
	record.header.netns =
	    srcip_net_inum(srcip_read_u64(nf_conn, SRCIP_OFFSET(nf_conn, ct_net_net)));
	if (!traced.lookup(&record.header.netns))
		return 0;
	srcip_set_place(&record, skb);
	report((void *)skb, nfct, &record);
	return 0;
}

#else

int srcip_mark(struct srcip_nf_ctx *ctx)
{
	keep_mark(ctx->skb, 0);
	return NF_ACCEPT;
}

SRCIP_INLINE __u32 device_index(const void *state, int offset)
{
	const void *device = srcip_load_pointer(state, offset);

	return device ? srcip_load_u32(device, SRCIP_OFFSET(net_device, ifindex)) : 0;
}

SRCIP_INLINE int last_hook(struct srcip_nf_ctx *ctx, __u8 hook)
{
	const void *skb = ctx->skb, *state = ctx->state, *net;
	__u64 nfct = srcip_load_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	struct srcip_connection record;

	if (!new_entry(skb, nfct))
		return NF_ACCEPT;
	__builtin_memset(&record, 0, sizeof(record));
	record.hook = hook;
	net = srcip_load_pointer(state, SRCIP_OFFSET(nf_hook_state, net));
	record.header.netns = srcip_load_u32(net, SRCIP_OFFSET(net, ns_inum));
	record.iif = device_index(state, SRCIP_OFFSET(nf_hook_state, in));
	record.oif = device_index(state, SRCIP_OFFSET(nf_hook_state, out));
	report(skb, nfct, &record);
	return NF_ACCEPT;
}

int srcip_postrouting(struct srcip_nf_ctx *ctx)
{
	return last_hook(ctx, SRCIP_HOOK_NF_POSTROUTING);
}

int srcip_input(struct srcip_nf_ctx *ctx)
{
	return last_hook(ctx, SRCIP_HOOK_NF_INPUT);
}

#endif
