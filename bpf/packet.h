/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_PACKET_H
#define SRCIP_PACKET_H

/* Reads of a packet's own headers through its sk_buff, wherever its data lies:
 * the headers of IP and what follows are in its linear part once IP has it.
 *
 * BCC rewrites only the main file: no map operation may stand here.
 */
#include "kernel.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define IP_OFFSET_MASK 0x1fff

/* RFC 8200 names six extension headers and wants each at most once, one twice;
 * a packet with more is reported without ports.
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

/* What conntrack would call the ports: of an ICMP echo the id, and the type and
 * code; of everything with ports, the ports.
 */
SRCIP_INLINE void srcip_read_ports(struct srcip_tuple *out, __u64 at)
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

SRCIP_INLINE bool srcip_read_ipv4(struct srcip_tuple *out, __u64 at)
{
	struct srcip_ipv4 ip;

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
		srcip_read_ports(out, at + (ip.version_ihl & 15) * 4);
	return true;
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

SRCIP_INLINE bool srcip_read_ipv6(struct srcip_tuple *out, __u64 at)
{
	struct srcip_ipv6 ip;
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
	for (i = 0; i < MAX_EXTENSIONS && srcip_is_extension(header); i++) {
		if (bpf_probe_read_kernel(extension, sizeof(extension), (void *)at))
			return false;
		at += srcip_extension_length(header, extension[1]);
		if (header == IPPROTO_FRAGMENT && (extension[2] || extension[3] & 0xf8)) {
			out->proto = extension[0];
			return true;
		}
		header = extension[0];
	}
	out->proto = header;
	srcip_read_ports(out, at);
	return true;
}

SRCIP_INLINE bool srcip_read_packet(struct srcip_tuple *out, __u64 skb)
{
	__u16 protocol = srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, protocol));
	__u64 head = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head));
	__u64 at = head + srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header));

	if (protocol == bpf_htons(ETH_P_IP))
		return srcip_read_ipv4(out, at);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return srcip_read_ipv6(out, at);
	return false;
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
