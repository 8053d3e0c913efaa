/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_PACKET_H
#define SRCIP_PACKET_H

/* Reads of a packet's own headers through its sk_buff.
 *
 * BCC rewrites only the main file: no map operation may be here.
 */
#include "kernel.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88A8
#define ETH_TYPE_AT 12
#define VLAN_HLEN 4
#define IP_OFFSET_MASK 0x1fff

/* IEEE 802.1ad: a service tag and a customer's. */
#define MAX_TAGS 2

/* RFC 8200 defines six extension headers, each at most once except one, which may
 * occur twice; a packet with more is reported without ports.
 */
#define MAX_EXTENSIONS 7

struct srcip_ipv4 {
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

struct srcip_ipv6 {
	__be32 version_flow;
	__be16 payload_len;
	__u8 nexthdr;
	__u8 hop_limit;
	__u8 saddr[16];
	__u8 daddr[16];
};

/* What could be read of a packet. Ports that could not be read are zero. */
enum srcip_reading {
	SRCIP_UNREADABLE = 0,
	SRCIP_READ = 1,
	SRCIP_FRAGMENT = 2, /* not the first fragment: has no ports */
	SRCIP_NO_PORTS = 3, /* the ports are where they cannot be read */
};

/* Where a packet's network header is: for a program at tc, whose helper reads any
 * byte of the packet, an offset; for others an address, with the end of the linear
 * part. That part holds the IP header once IP has processed it, and usually what
 * follows.
 */
struct srcip_window {
	struct __sk_buff *ctx;
	__u64 at;
	__u64 end;
};

SRCIP_INLINE long srcip_fetch(const struct srcip_window *from, __u32 at, void *to, __u32 size)
{
	if (from->ctx)
		return bpf_skb_load_bytes(from->ctx, from->at + at, to, size);
	if (from->at + at + size > from->end)
		return -1;
	return bpf_probe_read_kernel(to, size, (void *)(from->at + at));
}

/* The ports as conntrack stores them: for ICMP the id, and type and code; for
 * protocols with ports, the ports. None of these headers is shorter than 8 bytes.
 */
SRCIP_INLINE int srcip_read_ports(struct srcip_tuple *out, const struct srcip_window *from,
				  __u32 at)
{
	__be16 words[4] = {};

	if (srcip_fetch(from, at, words, sizeof(words)))
		return SRCIP_NO_PORTS;
	switch (out->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_DCCP:
	case IPPROTO_SCTP:
	case IPPROTO_UDPLITE:
		out->sport = bpf_ntohs(words[0]);
		out->dport = bpf_ntohs(words[1]);
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		out->sport = bpf_ntohs(words[2]);
		out->dport = bpf_ntohs(words[0]);
		break;
	}
	return SRCIP_READ;
}

SRCIP_INLINE int srcip_read_ipv4(struct srcip_tuple *out, const struct srcip_window *from)
{
	struct srcip_ipv4 ip;

	if (srcip_fetch(from, 0, &ip, sizeof(ip)) || ip.version_ihl >> 4 != 4)
		return SRCIP_UNREADABLE;
	out->family = AF_INET;
	out->proto = ip.protocol;
	srcip_set_mapped(out->src, &ip.saddr);
	srcip_set_mapped(out->dst, &ip.daddr);
	if (ip.frag_off & bpf_htons(IP_OFFSET_MASK))
		return SRCIP_FRAGMENT;
	return srcip_read_ports(out, from, (ip.version_ihl & 15) * 4);
}

SRCIP_INLINE bool srcip_is_extension(__u8 header)
{
	return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING ||
	       header == IPPROTO_FRAGMENT || header == IPPROTO_AH || header == IPPROTO_DSTOPTS;
}

/* Length of an extension header in bytes. Fragment headers are always 8; AH
 * counts in words of 4, less two; the others in words of 8, less one.
 */
SRCIP_INLINE __u32 srcip_extension_length(__u8 header, __u8 length)
{
	if (header == IPPROTO_FRAGMENT)
		return 8;
	if (header == IPPROTO_AH)
		return (length + 2) * 4;
	return (length + 1) * 8;
}

SRCIP_INLINE int srcip_read_ipv6(struct srcip_tuple *out, const struct srcip_window *from)
{
	struct srcip_ipv6 ip;
	__u8 extension[4];
	__u32 at = sizeof(ip);
	int i;

	if (srcip_fetch(from, 0, &ip, sizeof(ip)) || *(__u8 *)&ip >> 4 != 6)
		return SRCIP_UNREADABLE;
	out->family = AF_INET6;
	out->proto = ip.nexthdr;
	__builtin_memcpy(out->src, ip.saddr, 16);
	__builtin_memcpy(out->dst, ip.daddr, 16);
#pragma unroll
	for (i = 0; i < MAX_EXTENSIONS && srcip_is_extension(out->proto); i++) {
		__u8 header = out->proto;

		if (srcip_fetch(from, at, extension, sizeof(extension)))
			return SRCIP_NO_PORTS;
		at += srcip_extension_length(header, extension[1]);
		out->proto = extension[0];
		if (header == IPPROTO_FRAGMENT && (extension[2] || extension[3] & 0xf8))
			return SRCIP_FRAGMENT;
	}
	return srcip_read_ports(out, from, at);
}

SRCIP_INLINE int srcip_read_from(struct srcip_tuple *out, const struct srcip_window *from,
				 __be16 protocol)
{
	if (protocol == bpf_htons(ETH_P_IP))
		return srcip_read_ipv4(out, from);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return srcip_read_ipv6(out, from);
	return SRCIP_UNREADABLE;
}

/* For programs that get an sk_buff and can read only its linear part. */
SRCIP_INLINE int srcip_read_packet(struct srcip_tuple *out, __u64 skb)
{
	__u64 head = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head));
	struct srcip_window from = {
	    .at = head + srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header)),
	    .end = head + srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, tail)),
	};

	return srcip_read_from(out, &from, srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, protocol)));
}

/* For programs at tc. A VLAN tag that the kernel has not removed yet, or has already
 * inserted, precedes IP; frames with a tag have an Ethernet header.
 */
SRCIP_INLINE int srcip_read_frame(struct srcip_tuple *out, struct __sk_buff *ctx, __u64 skb)
{
	struct srcip_window from = {.ctx = ctx};
	__be16 protocol = ctx->protocol;
	int i;

	from.at = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head)) +
		  srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header)) -
		  srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, data));
	if (protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD)) {
		from.at = ETH_TYPE_AT;
#pragma unroll
		for (i = 0; i <= MAX_TAGS; i++) {
			if (bpf_skb_load_bytes(ctx, from.at, &protocol, sizeof(protocol)))
				return SRCIP_UNREADABLE;
			if (protocol != bpf_htons(ETH_P_8021Q) &&
			    protocol != bpf_htons(ETH_P_8021AD))
				break;
			from.at += VLAN_HLEN;
		}
		from.at += sizeof(protocol);
	}
	return srcip_read_from(out, &from, protocol);
}

/* A packet of a watched flow, in either direction, before or after NAT. */
SRCIP_INLINE bool srcip_matches_packet(const struct srcip_filter *filter,
				       const struct srcip_tuple *tuple)
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

#endif /* SRCIP_PACKET_H */
