// SPDX-License-Identifier: GPL-2.0-only
/* Report packets that the kernel discarded in a traced namespace, with its
 * reason and place, from the raw tracepoint kfree_skb.
 *
 * It is hot on a flooded node, so the reason is tested first: unasked, only
 * reasons of netfilter and routing are reported; every reason for a flow that
 * the reader asked for.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"

#define REASONS 256
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define IP_OFFSET_MASK 0x1fff

/* RFC 8200 names six extension headers and wants each at most once, one twice;
 * a packet with more is reported without ports.
 */
#define MAX_EXTENSIONS 7

struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__be16 tot_len;
	__be16 id;
	__be16 frag_off;
	__u8 ttl;
	__u8 protocol;
	__be16 check;
	__be32 saddr;
	__be32 daddr;
};

struct ipv6_header {
	__be32 version_flow;
	__be16 payload_len;
	__u8 nexthdr;
	__u8 hop_limit;
	__u8 saddr[16];
	__u8 daddr[16];
};

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

SRCIP_INLINE bool is_reported(const struct srcip_config *settings, __u64 reason)
{
	/* All reasons of one flow: the flow is looked at later. */
	if (settings->is_filtered)
		return true;
	if (reason >= REASONS)
		return false;
	return settings->reasons[reason / 64 & 3] >> (reason & 63) & 1;
}

SRCIP_INLINE __u64 route_of(__u64 skb)
{
	/* The lowest bit says whether a reference is held. */
	return srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _skb_refdst)) & ~1ULL;
}

/* The conntrack entry knows its namespace for certain. A device may be unset,
 * or its place used for something else once a socket owns the packet.
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

/* What conntrack would call the ports: of an ICMP echo the id, and the type and
 * code; of everything with ports, the ports.
 */
SRCIP_INLINE void read_ports(struct srcip_tuple *out, __u64 at)
{
	__be16 words[4] = {};

	bpf_probe_read_kernel(words, sizeof(words), (void *)at);
	switch (out->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		out->sport = bpf_ntohs(words[0]);
		out->dport = bpf_ntohs(words[1]);
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		out->sport = bpf_ntohs(words[2]);
		out->dport = bpf_ntohs(words[0]);
		break;
	}
}

SRCIP_INLINE bool read_ipv4(struct srcip_tuple *out, __u64 at)
{
	struct ipv4_header ip;

	if (bpf_probe_read_kernel(&ip, sizeof(ip), (void *)at))
		return false;
	if (ip.version_ihl >> 4 != 4)
		return false;
	out->family = AF_INET;
	out->proto = ip.protocol;
	srcip_set_mapped(out->src, &ip.saddr);
	srcip_set_mapped(out->dst, &ip.daddr);
	/* Only the first fragment carries ports. */
	if (!(ip.frag_off & bpf_htons(IP_OFFSET_MASK)))
		read_ports(out, at + (ip.version_ihl & 15) * 4);
	return true;
}

SRCIP_INLINE bool is_extension(__u8 header)
{
	return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING ||
	       header == IPPROTO_FRAGMENT || header == IPPROTO_AH || header == IPPROTO_DSTOPTS;
}

/* Length of an extension header in bytes. Fragment headers are always 8; AH
 * counts in words of 4, less two; the others in words of 8, less one.
 */
SRCIP_INLINE __u32 extension_length(__u8 header, __u8 length)
{
	if (header == IPPROTO_FRAGMENT)
		return 8;
	if (header == IPPROTO_AH)
		return (length + 2) * 4;
	return (length + 1) * 8;
}

SRCIP_INLINE bool read_ipv6(struct srcip_tuple *out, __u64 at)
{
	struct ipv6_header ip;
	__u8 extension[4];
	__u8 header;
	int i;

	if (bpf_probe_read_kernel(&ip, sizeof(ip), (void *)at))
		return false;
	if (*(__u8 *)&ip >> 4 != 6)
		return false;
	out->family = AF_INET6;
	__builtin_memcpy(out->src, ip.saddr, 16);
	__builtin_memcpy(out->dst, ip.daddr, 16);
	header = ip.nexthdr;
	at += sizeof(ip);
#pragma unroll
	for (i = 0; i < MAX_EXTENSIONS && is_extension(header); i++) {
		if (bpf_probe_read_kernel(extension, sizeof(extension), (void *)at))
			return false;
		at += extension_length(header, extension[1]);
		if (header == IPPROTO_FRAGMENT && (extension[2] || extension[3] & 0xf8)) {
			out->proto = extension[0];
			return true;
		}
		header = extension[0];
	}
	out->proto = header;
	read_ports(out, at);
	return true;
}

SRCIP_INLINE bool read_packet(struct srcip_tuple *out, __u64 skb)
{
	__u16 protocol = srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, protocol));
	__u64 head = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head));
	__u64 at = head + srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header));

	if (protocol == bpf_htons(ETH_P_IP))
		return read_ipv4(out, at);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return read_ipv6(out, at);
	return false;
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

/* A packet of a watched flow, in either direction, before or after NAT. */
SRCIP_INLINE bool matches(const struct srcip_filter *filter, const struct srcip_tuple *tuple)
{
	if (filter->proto && filter->proto != tuple->proto)
		return false;
	if (filter->family && filter->family != tuple->family)
		return false;
	if (filter->port && (srcip_is_icmp(tuple) ||
			     (filter->port != tuple->dport && filter->port != tuple->sport)))
		return false;
	return (srcip_address_in(tuple->src, filter->client, filter->client_mask) ||
		srcip_address_in(tuple->dst, filter->client, filter->client_mask)) &&
	       (srcip_address_in(tuple->src, filter->backend, filter->backend_mask) ||
		srcip_address_in(tuple->dst, filter->backend, filter->backend_mask));
}

/* Multicast and broadcast packets are no connections, and nodes drop a steady
 * trickle of them: reported only to who asked for their flow.
 */
SRCIP_INLINE bool is_multicast(const struct srcip_tuple *tuple)
{
	if (tuple->family == AF_INET)
		return tuple->dst[12] >= 224;
	return tuple->dst[0] == 0xff;
}

/* An ICMP error carries the entry of the flow that it speaks of, and is not a
 * packet of it. NAT discards redirects behind every hairpin, for example.
 */
SRCIP_INLINE bool is_error_about(const struct srcip_drop *record)
{
	__u8 both = SRCIP_DROP_HAS_TUPLE | SRCIP_DROP_HAS_ORIG;

	return (record->flags & both) == both && record->packet.proto != record->orig.proto;
}

SRCIP_INLINE bool is_wanted(const struct srcip_filter *filter, const struct srcip_drop *record)
{
	if (record->flags & SRCIP_DROP_HAS_ORIG && matches(filter, &record->orig))
		return true;
	return record->flags & SRCIP_DROP_HAS_TUPLE && matches(filter, &record->packet);
}

SRCIP_INLINE void read_tuples(struct srcip_drop *record, __u64 skb, __u64 nfct, __u64 nf_conn)
{
	if (read_packet(&record->packet, skb))
		record->flags |= SRCIP_DROP_HAS_TUPLE;
	if (!nf_conn || !read_orig(&record->orig, nf_conn))
		return;
	record->flags |= SRCIP_DROP_HAS_ORIG;
	if ((nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY)
		record->flags |= SRCIP_DROP_IS_REPLY;
	if ((nfct & NFCT_INFOMASK) == IP_CT_NEW)
		record->flags |= SRCIP_DROP_IS_NEW;
}

/* Where in the stack the packet was: user space tells the hook from these. */
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
	record.reason = ctx->args[2];
	if (!is_reported(settings, record.reason))
		return 0;

	nfct = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	nf_conn = (nfct & NFCT_INFOMASK) == IP_CT_UNTRACKED ? 0 : nfct & ~NFCT_INFOMASK;
	dst = route_of(skb);
	record.header.netns = netns_of(skb, nf_conn, dst);
	if (!traced.lookup(&record.header.netns))
		return 0;
	read_tuples(&record, skb, nfct, nf_conn);
	if (!settings->is_filtered && is_error_about(&record))
		return 0;
	if (settings->is_filtered ? !is_wanted(&settings->filter, &record)
				  : is_multicast(&record.packet))
		return 0;

	record.header.ktime_ns = bpf_ktime_get_ns();
	record.header.size = sizeof(record);
	record.header.version = SRCIP_WIRE_VERSION;
	record.header.kind = SRCIP_KIND_DROP;
	record.location = ctx->args[1];
	read_place(&record, skb, dst);
	if (drops.ringbuf_output(&record, sizeof(record), BPF_RB_NO_WAKEUP))
		count_lost(SRCIP_LOST_RING_FULL);
	return 0;
}
