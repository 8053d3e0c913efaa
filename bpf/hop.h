/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_HOP_H
#define SRCIP_HOP_H

/* Fill a hop's record from a packet.
 *
 * BCC rewrites only the main file: no map operation may be here.
 */
#include "kernel.h"
#include "packet.h"

/* The flags of the TCP header, if it directly follows IP's and can be read; else 0. */
SRCIP_INLINE __u8 srcip_tcp_flags(__u64 skb, const struct srcip_tuple *packet)
{
	__u64 head = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head));
	__u64 at = head + srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header));
	__u64 end = head + srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, tail));
	__u8 byte = 0;

	if (packet->proto != IPPROTO_TCP || (!packet->sport && !packet->dport))
		return 0;
	if (packet->family == AF_INET) {
		bpf_probe_read_kernel(&byte, 1, (void *)at);
		at += (byte & 15) * 4;
	} else {
		bpf_probe_read_kernel(&byte, 1, (void *)(at + 6));
		if (byte != IPPROTO_TCP)
			return 0;
		at += sizeof(struct srcip_ipv6);
	}
	if (at + 13 >= end)
		return 0;
	bpf_probe_read_kernel(&byte, 1, (void *)(at + 13));
	return byte;
}

/* Fill a hop, except for its packet, and for what is known only after the decision:
 * number, netns and the entry.
 */
SRCIP_INLINE void srcip_set_hop(struct srcip_hop *hop, __u64 skb, __u8 hook, __u32 iif, __u32 oif)
{
	__builtin_memset(hop, 0, sizeof(*hop));
	hop->header.ktime_ns = bpf_ktime_get_ns();
	hop->header.size = sizeof(*hop);
	hop->header.version = SRCIP_WIRE_VERSION;
	hop->header.kind = SRCIP_KIND_HOP;
	hop->mark = srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, mark));
	hop->length = srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, len));
	hop->iif = iif;
	hop->oif = oif;
	hop->hook = hook;
}

SRCIP_INLINE void srcip_set_entry(struct srcip_hop *hop, const struct srcip_entry *entry,
				  __u64 info)
{
	srcip_convert_tuple(&hop->orig, srcip_entry_tuple(entry, 0));
	srcip_convert_tuple(&hop->reply, srcip_entry_tuple(entry, 1));
	hop->zone = *(const __u16 *)SRCIP_ENTRY_FIELD(entry, zone_id);
	hop->zone_dir = *SRCIP_ENTRY_FIELD(entry, zone_dir);
	hop->flags |= SRCIP_HOP_HAS_ENTRY;
	if (info >= IP_CT_IS_REPLY)
		hop->flags |= SRCIP_HOP_IS_REPLY;
	if (!(srcip_entry_status(entry) & IPS_CONFIRMED))
		hop->flags |= SRCIP_HOP_IS_NEW;
}

/* The tuple that leaves this node after NAT. For ICMP the id may differ, the type stays. */
SRCIP_INLINE void srcip_set_sent(struct srcip_tuple *out, const struct srcip_hop *hop)
{
	*out = hop->reply;
	__builtin_memcpy(out->src, hop->reply.dst, 16);
	__builtin_memcpy(out->dst, hop->reply.src, 16);
	if (srcip_is_icmp(out)) {
		out->dport = hop->orig.dport;
		return;
	}
	out->sport = hop->reply.dport;
	out->dport = hop->reply.sport;
}

SRCIP_INLINE bool srcip_is_same_packet(const struct srcip_tuple *a, const struct srcip_tuple *b)
{
	return a->sport == b->sport && a->dport == b->dport && a->proto == b->proto &&
	       srcip_address_equal(a->src, b->src) && srcip_address_equal(a->dst, b->dst);
}

/* The fast path for most packets: TCP or UDP right after an IPv4 header without
 * options, all in the linear part, which is all that this helper reads.
 */
SRCIP_INLINE bool srcip_read_plain(struct srcip_tuple *packet, struct __sk_buff *ctx)
{
	struct {
		struct srcip_ipv4 ip;
		__be16 ports[4];
	} v4;

	if (ctx->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes_relative(ctx, 0, &v4, sizeof(v4), BPF_HDR_START_NET))
		return false;
	if (v4.ip.version_ihl != 0x45 || v4.ip.frag_off & bpf_htons(IP_OFFSET_MASK))
		return false;
	if (v4.ip.protocol != IPPROTO_TCP && v4.ip.protocol != IPPROTO_UDP)
		return false;
	srcip_set_mapped(packet->src, &v4.ip.saddr);
	srcip_set_mapped(packet->dst, &v4.ip.daddr);
	packet->sport = bpf_ntohs(v4.ports[0]);
	packet->dport = bpf_ntohs(v4.ports[1]);
	packet->proto = v4.ip.protocol;
	packet->family = AF_INET;
	return true;
}

SRCIP_INLINE __u32 srcip_netns_of_device(__u64 skb)
{
	__u64 device = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, dev));

	if (!device)
		return 0;
	return srcip_net_inum(srcip_read_u64(device, SRCIP_OFFSET(net_device, nd_net_net)));
}

SRCIP_INLINE __u32 srcip_index_of(const void *device)
{
	return device ? srcip_load_u32(device, SRCIP_OFFSET(net_device, ifindex)) : 0;
}

#endif /* SRCIP_HOP_H */
