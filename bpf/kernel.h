/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_KERNEL_H
#define SRCIP_KERNEL_H

/* Reads of kernel structures. Their offsets come from the running kernel's BTF
 * (tracer/kernel/headers.py writes offsets.h), so neither kernel headers nor a
 * kernel version matter here.
 *
 * BCC rewrites only the main file: no map operation may be here.
 */
#include <uapi/linux/types.h>
#include "offsets.h"
#include "wire.h"

/* Whether to build for probes on kernel functions. */
#ifndef SRCIP_PROBES
#define SRCIP_PROBES 0
#endif

#define SRCIP_INLINE static inline __attribute__((always_inline))
#define SRCIP_OFFSET(type, member) SRCIP_OFFSET_##type##__##member

#define NF_ACCEPT 1
#define AF_INET 2
#define AF_INET6 10

#define IPPROTO_HOPOPTS 0
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_DCCP 33
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_ICMPV6 58
#define IPPROTO_DSTOPTS 60
#define IPPROTO_SCTP 132
#define IPPROTO_UDPLITE 136

/* enum ip_conntrack_info, include/uapi/linux/netfilter/nf_conntrack_common.h:
 * the low three bits of skb->_nfct; the rest is the entry's address.
 */
#define IP_CT_RELATED 1
#define IP_CT_NEW 2
#define IP_CT_IS_REPLY 3
#define IP_CT_UNTRACKED 7
#define NFCT_INFOMASK 7ULL

#define IPS_CONFIRMED (1 << 3)
#define IPS_SRC_NAT (1 << 4)
#define IPS_TEMPLATE (1 << 11)

/* The context of a netfilter program (struct bpf_nf_ctx). The verifier knows the
 * types behind both pointers.
 */
struct srcip_nf_ctx {
	const void *state;
	const void *skb;
};

/* Reads through an address that is a plain number to the verifier; 0 if the memory
 * cannot be read.
 */
SRCIP_INLINE __u64 srcip_read_u64(__u64 base, int offset)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

SRCIP_INLINE __u32 srcip_read_u32(__u64 base, int offset)
{
	__u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

SRCIP_INLINE __u16 srcip_read_u16(__u64 base, int offset)
{
	__u16 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

SRCIP_INLINE __u8 srcip_read_u8(__u64 base, int offset)
{
	__u8 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

/* Loads through a pointer whose kernel type the verifier knows: one instruction
 * instead of a call of bpf_probe_read_kernel(). Volatile keeps the compiler from
 * widening or merging them, which the verifier would reject. In a probe no pointer
 * has a type.
 */
SRCIP_INLINE __u64 srcip_load_u64(const void *base, int offset)
{
	if (SRCIP_PROBES)
		return srcip_read_u64((__u64)base, offset);
	return *(const volatile __u64 *)(base + offset);
}

SRCIP_INLINE __u32 srcip_load_u32(const void *base, int offset)
{
	if (SRCIP_PROBES)
		return srcip_read_u32((__u64)base, offset);
	return *(const volatile __u32 *)(base + offset);
}

SRCIP_INLINE __u8 srcip_load_u8(const void *base, int offset)
{
	return *(const volatile __u8 *)(base + offset);
}

SRCIP_INLINE const void *srcip_load_pointer(const void *base, int offset)
{
	return *(const void *const volatile *)(base + offset);
}

SRCIP_INLINE __u32 srcip_net_inum(__u64 net)
{
	if (!net)
		return 0;
	return srcip_read_u32(net, SRCIP_OFFSET(net, ns_inum));
}

/* Addresses of records and keys are written, copied and compared in words of 64 bits:
 * the processor stalls when a load needs the bytes of several stores that are still
 * under way, which costs more than the rest of the work on an address.
 */
SRCIP_INLINE void srcip_set_mapped(__u8 *address, const void *ipv4)
{
	__u64 value = *(const __u32 *)ipv4, *words = (__u64 *)address;

	words[0] = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	words[1] = value << 32 | 0xffff0000;
#else
	words[1] = 0xffffULL << 32 | value;
#endif
}

SRCIP_INLINE void srcip_copy_address(__u8 *to, const __u8 *from)
{
	((__u64 *)to)[0] = ((const __u64 *)from)[0];
	((__u64 *)to)[1] = ((const __u64 *)from)[1];
}

/* The part of struct nf_conn that holds every field we need, fetched at once:
 * one read of 160 bytes is cheaper than six reads of four.
 */
struct srcip_entry {
	__u8 bytes[SRCIP_NF_CONN_SPAN];
} __attribute__((aligned(8)));

#define SRCIP_ENTRY_FIELD(entry, member)                                                           \
	((entry)->bytes + SRCIP_OFFSET(nf_conn, member) - SRCIP_NF_CONN_FIRST)

SRCIP_INLINE long srcip_read_entry(struct srcip_entry *entry, __u64 nf_conn)
{
	return bpf_probe_read_kernel(entry, sizeof(*entry),
				     (void *)(nf_conn + SRCIP_NF_CONN_FIRST));
}

SRCIP_INLINE __u32 srcip_entry_status(const struct srcip_entry *entry)
{
	return *(const unsigned long *)SRCIP_ENTRY_FIELD(entry, status);
}

#define SRCIP_TUPLE_FIELD(tuple, member) ((tuple) + SRCIP_OFFSET(nf_conntrack_tuple, member))

/* Convert a struct nf_conntrack_tuple. Conntrack stores an ICMP id in place of the
 * source port, and type and code, in this order, in place of the destination port:
 * swapped like a port it is type << 8 | code.
 */
SRCIP_INLINE void srcip_convert_tuple(struct srcip_tuple *out, const __u8 *tuple)
{
	const __u8 *src = SRCIP_TUPLE_FIELD(tuple, src_u3);
	const __u8 *dst = SRCIP_TUPLE_FIELD(tuple, dst_u3);

	out->family = *(const __u16 *)SRCIP_TUPLE_FIELD(tuple, src_l3num);
	if (out->family == AF_INET) {
		srcip_set_mapped(out->src, src);
		srcip_set_mapped(out->dst, dst);
	} else {
		__builtin_memcpy(out->src, src, 16);
		__builtin_memcpy(out->dst, dst, 16);
	}
	out->sport = bpf_ntohs(*(const __be16 *)SRCIP_TUPLE_FIELD(tuple, src_u_all));
	out->dport = bpf_ntohs(*(const __be16 *)SRCIP_TUPLE_FIELD(tuple, dst_u_all));
	out->proto = *SRCIP_TUPLE_FIELD(tuple, dst_protonum);
	out->pad[0] = 0;
	out->pad[1] = 0;
}

SRCIP_INLINE const __u8 *srcip_entry_tuple(const struct srcip_entry *entry, int direction)
{
	return SRCIP_ENTRY_FIELD(entry, tuplehash) +
	       direction * SRCIP_SIZE_nf_conntrack_tuple_hash +
	       SRCIP_OFFSET(nf_conntrack_tuple_hash, tuple);
}

/* Whether the ports hold an ICMP id, type and code, and must not be compared as ports. */
SRCIP_INLINE bool srcip_is_icmp(const struct srcip_tuple *tuple)
{
	return tuple->proto == IPPROTO_ICMP || tuple->proto == IPPROTO_ICMPV6;
}

SRCIP_INLINE bool srcip_address_equal(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

SRCIP_INLINE bool srcip_address_in(const __u8 *address, const __u8 *prefix, const __u8 *mask)
{
	const __u64 *a = (const __u64 *)address, *p = (const __u64 *)prefix,
		    *m = (const __u64 *)mask;

	return (a[0] & m[0]) == p[0] && (a[1] & m[1]) == p[1];
}

/* Whether a connection is wanted, by the two tuples of its entry. */
SRCIP_INLINE bool srcip_matches(const struct srcip_filter *filter, const struct srcip_tuple *orig,
				const struct srcip_tuple *reply)
{
	if (filter->proto && filter->proto != orig->proto)
		return false;
	if (filter->family && filter->family != orig->family)
		return false;
	if (filter->port &&
	    (srcip_is_icmp(orig) || (filter->port != orig->dport && filter->port != reply->sport)))
		return false;
	return srcip_address_in(orig->src, filter->client, filter->client_mask) &&
	       srcip_address_in(reply->src, filter->backend, filter->backend_mask);
}

#endif /* SRCIP_KERNEL_H */
