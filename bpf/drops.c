// SPDX-License-Identifier: GPL-2.0-only
/* Report packets that the kernel discarded in a traced namespace, with reason and
 * location, from the raw tracepoint kfree_skb.
 *
 * It is hot on a flooded node, so the reason is tested first: without a filter only
 * the configured reasons (netfilter, routing, no listener) are reported; with one,
 * every reason for the flows that match it.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"
#include "packet.h"

#define REASONS 256

BPF_RINGBUF_OUTPUT(drops, SRCIP_DROP_RING_PAGES);
BPF_HASH(traced, __u32, __u8, SRCIP_NAMESPACES);
BPF_ARRAY(config, struct srcip_config, 1);
BPF_PERCPU_ARRAY(lost, __u64, SRCIP_LOST_SLOTS);

static void count_lost(int slot)
{
	__u64 *count = lost.lookup(&slot);

	if (count)
		__sync_fetch_and_add(count, 1);
}

SRCIP_INLINE bool is_asked_for(const struct srcip_config *settings, __u64 reason)
{
	if (reason >= REASONS)
		return false;
	return settings->reasons[reason / 64 & 3] >> (reason & 63) & 1;
}

/* Before Linux 5.17 there are no reasons, and kfree_skb() also frees packets that
 * were not dropped. Only what nf_hook_slow() frees was certainly dropped.
 */
SRCIP_INLINE bool read_reason(struct srcip_drop *record, const struct bpf_raw_tracepoint_args *ctx)
{
	record->location = ctx->args[1];
#if SRCIP_HAS_DROP_REASONS
	record->reason = ctx->args[2];
	return true;
#else
	record->reason = SRCIP_REASON_NETFILTER_DROP;
	return record->location > SRCIP_NF_HOOK_SLOW && record->location <= SRCIP_NF_HOOK_SLOW_END;
#endif
}

/* The packet's conntrack entry, or 0. A rule before conntrack that sets a zone or a helper
 * (CT, ct zone set) leaves a template in its place, which belongs to no flow.
 */
SRCIP_INLINE __u64 entry_of(__u64 nfct)
{
	__u64 nf_conn = nfct & ~NFCT_INFOMASK;

	if (!nf_conn || (nfct & NFCT_INFOMASK) == IP_CT_UNTRACKED)
		return 0;
	if (srcip_read_u64(nf_conn, SRCIP_OFFSET(nf_conn, status)) & IPS_TEMPLATE)
		return 0;
	return nf_conn;
}

SRCIP_INLINE __u64 route_of(__u64 skb)
{
	/* The lowest bit (SKB_DST_NOREF) says that no reference is held. */
	return srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _skb_refdst)) & ~1ULL;
}

/* The conntrack entry's namespace is reliable. A packet's device may be unset, or
 * the field reused once a socket owns the packet.
 */
SRCIP_INLINE __u32 netns_of(__u64 skb, __u64 nf_conn, __u64 dst)
{
	__u64 device;

	if (nf_conn)
		return srcip_net_inum(srcip_read_u64(nf_conn, SRCIP_OFFSET(nf_conn, ct_net_net)));
	device = dst ? srcip_read_u64(dst, SRCIP_OFFSET(dst_entry, dev)) : 0;
	if (!device)
		device = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, dev));
	if (!device)
		return 0;
	return srcip_net_inum(srcip_read_u64(device, SRCIP_OFFSET(net_device, nd_net_net)));
}

SRCIP_INLINE bool read_orig(struct srcip_tuple *out, __u64 nf_conn)
{
	__u8 tuple[SRCIP_SIZE_nf_conntrack_tuple] __attribute__((aligned(8)));
	__u64 at = nf_conn + SRCIP_OFFSET(nf_conn, tuplehash) +
		   SRCIP_OFFSET(nf_conntrack_tuple_hash, tuple);

	if (bpf_probe_read_kernel(tuple, sizeof(tuple), (void *)at))
		return false;
	srcip_convert_tuple(out, tuple);
	return true;
}

/* Multicast and broadcast packets belong to no connection, and nodes drop some all the
 * time: report them only if a filter matches.
 */
SRCIP_INLINE bool is_multicast(const struct srcip_tuple *tuple)
{
	if (tuple->family == AF_INET)
		return tuple->dst[12] >= 224;
	return tuple->dst[0] == 0xff;
}

/* An ICMP error has the entry of the flow that it is about, but is not part of that
 * flow. NAT drops redirects after every hairpin connection, for example.
 */
SRCIP_INLINE bool is_error_about(const struct srcip_drop *record)
{
	__u8 both = SRCIP_DROP_HAS_TUPLE | SRCIP_DROP_HAS_ORIG;

	return (record->flags & both) == both && record->packet.proto != record->orig.proto;
}

SRCIP_INLINE bool is_wanted(const struct srcip_filter *filter, const struct srcip_drop *record)
{
	if (record->flags & SRCIP_DROP_HAS_ORIG && srcip_matches_packet(filter, &record->orig))
		return true;
	return record->flags & SRCIP_DROP_HAS_TUPLE &&
	       srcip_matches_packet(filter, &record->packet);
}

SRCIP_INLINE bool is_reported(const struct srcip_config *settings, const struct srcip_drop *record)
{
	if (settings->is_filtered && is_wanted(&settings->filter, record))
		return true;
	if (settings->is_filtered && !settings->is_broad)
		return false;
	return is_asked_for(settings, record->reason) && !is_error_about(record) &&
	       !is_multicast(&record->packet);
}

SRCIP_INLINE void read_tuples(struct srcip_drop *record, __u64 skb, __u64 nfct, __u64 nf_conn)
{
	if (srcip_read_packet(&record->packet, skb))
		record->flags |= SRCIP_DROP_HAS_TUPLE;
	if (!nf_conn || !read_orig(&record->orig, nf_conn))
		return;
	record->flags |= SRCIP_DROP_HAS_ORIG;
	record->zone = srcip_read_u16(nf_conn, SRCIP_OFFSET(nf_conn, zone_id));
	record->zone_dir = srcip_read_u8(nf_conn, SRCIP_OFFSET(nf_conn, zone_dir));
	if ((nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY)
		record->flags |= SRCIP_DROP_IS_REPLY;
	if ((nfct & NFCT_INFOMASK) == IP_CT_NEW)
		record->flags |= SRCIP_DROP_IS_NEW;
}

/* Where in the stack the packet was: user space derives the hook from this. */
SRCIP_INLINE void read_place(struct srcip_drop *record, __u64 skb, __u64 dst)
{
	__u64 device = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, dev));

	record->mark = srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, mark));
	record->iif = srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, skb_iif));
	if (device)
		record->ifindex = srcip_read_u32(device, SRCIP_OFFSET(net_device, ifindex));
	if (!dst)
		return;
	record->flags |= SRCIP_DROP_HAS_DST;
	record->dst_input = srcip_read_u64(dst, SRCIP_OFFSET(dst_entry, input));
	device = srcip_read_u64(dst, SRCIP_OFFSET(dst_entry, dev));
	if (device)
		record->dst_ifindex = srcip_read_u32(device, SRCIP_OFFSET(net_device, ifindex));
}

int srcip_drop(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 skb = ctx->args[0], nfct, nf_conn, dst;
	struct srcip_drop record = {};
	struct srcip_config *settings;
	int zero = 0;

	settings = config.lookup(&zero);
	if (!settings || !settings->is_streaming)
		return 0;
	if (!read_reason(&record, ctx))
		return 0;
	/* With a filter every reason may matter; the flow is checked below. */
	if (!settings->is_filtered && !is_asked_for(settings, record.reason))
		return 0;

	nfct = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	nf_conn = entry_of(nfct);
	dst = route_of(skb);
	record.header.netns = netns_of(skb, nf_conn, dst);
	if (!traced.lookup(&record.header.netns))
		return 0;
	read_tuples(&record, skb, nfct, nf_conn);
	if (!is_reported(settings, &record))
		return 0;

	record.header.ktime_ns = bpf_ktime_get_ns();
	record.header.size = sizeof(record);
	record.header.version = SRCIP_WIRE_VERSION;
	record.header.kind = SRCIP_KIND_DROP;
	read_place(&record, skb, dst);
	if (drops.ringbuf_output(&record, sizeof(record), BPF_RB_NO_WAKEUP))
		count_lost(SRCIP_LOST_RING_FULL);
	return 0;
}
