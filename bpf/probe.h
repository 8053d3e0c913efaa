/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_PROBE_H
#define SRCIP_PROBE_H

/* What a probe on a kernel function must find out itself, unlike a netfilter program:
 * the function's arguments, and the packet's hook.
 *
 * BCC rewrites only the main file: no map operation may be here.
 */
#include "kernel.h"

#if SRCIP_PROBES

#define NF_INET_POST_ROUTING 4

/* The registers at the function's first instruction. offsets.h says where those with
 * arguments are.
 */
struct srcip_registers;

SRCIP_INLINE __u64 srcip_argument(const struct srcip_registers *ctx, int number)
{
	const int offsets[] = {SRCIP_ARGUMENT_0, SRCIP_ARGUMENT_1, SRCIP_ARGUMENT_2};

	return *(const volatile __u64 *)((const void *)ctx + offsets[number]);
}

/* Whether a route's input function delivers to this node; a function that the kernel
 * does not have is 0.
 */
SRCIP_INLINE bool srcip_is_delivery(__u64 input)
{
	return input && (input == SRCIP_IP_LOCAL_DELIVER || input == SRCIP_IP6_INPUT ||
			 input == SRCIP_IP6_MC_INPUT);
}

/* Conntrack confirms at LOCAL_IN and at POST_ROUTING. A packet that came in by an
 * interface and is for this node is at LOCAL_IN. One that a local process sends to
 * this node has such a route, too, but did not come in by an interface.
 */
SRCIP_INLINE void srcip_set_place(struct srcip_connection *record, __u64 skb)
{
	/* The lowest bit (SKB_DST_NOREF) says that no reference is held. */
	__u64 dst = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _skb_refdst)) & ~1ULL;
	__u64 device = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, dev));
	__u32 ifindex = device ? srcip_read_u32(device, SRCIP_OFFSET(net_device, ifindex)) : 0;

	record->iif = srcip_read_u32(skb, SRCIP_OFFSET(sk_buff, skb_iif));
	if (record->iif && dst &&
	    srcip_is_delivery(srcip_read_u64(dst, SRCIP_OFFSET(dst_entry, input)))) {
		record->hook = SRCIP_HOOK_NF_INPUT;
		record->iif = ifindex;
	} else {
		record->hook = SRCIP_HOOK_NF_POSTROUTING;
		record->oif = ifindex;
	}
}

#endif /* SRCIP_PROBES */

#endif /* SRCIP_PROBE_H */
