// SPDX-License-Identifier: GPL-2.0-only
/* Report the peer of each TCP connection that a listening socket accepted, in
 * every network namespace: the source that a backend really sees.
 *
 * inet_sock_set_state, SYN_RECV to ESTABLISHED: the child socket exists and has
 * both addresses; accept(2) may still follow.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"

#define TCP_ESTABLISHED 1
#define TCP_SYN_RECV 3

BPF_RINGBUF_OUTPUT(accepts, SRCIP_ACCEPT_RING_PAGES);
BPF_ARRAY(config, struct srcip_config, 1);
BPF_PERCPU_ARRAY(lost, __u64, SRCIP_LOST_SLOTS);

static void count_lost(int slot)
{
	__u64 *count = lost.lookup(&slot);

	if (count)
		__sync_fetch_and_add(count, 1);
}

SRCIP_INLINE void read_addresses(struct srcip_tuple *peer, __u64 sk)
{
	__u32 source, dest;

	if (peer->family == AF_INET6) {
		bpf_probe_read_kernel(peer->src, 16,
				      (void *)(sk + SRCIP_OFFSET(sock_common, skc_v6_daddr)));
		bpf_probe_read_kernel(peer->dst, 16,
				      (void *)(sk + SRCIP_OFFSET(sock_common, skc_v6_rcv_saddr)));
		return;
	}
	source = srcip_read_u32(sk, SRCIP_OFFSET(sock_common, skc_daddr));
	dest = srcip_read_u32(sk, SRCIP_OFFSET(sock_common, skc_rcv_saddr));
	srcip_set_mapped(peer->src, &source);
	srcip_set_mapped(peer->dst, &dest);
}

/* An IPv6 socket may have accepted an IPv4 peer: then the address is mapped,
 * and the connection is an IPv4 one.
 */
SRCIP_INLINE bool is_mapped(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

SRCIP_INLINE void read_peer(struct srcip_tuple *peer, __u64 sk)
{
	peer->family = srcip_read_u16(sk, SRCIP_OFFSET(sock_common, skc_family));
	peer->proto = IPPROTO_TCP;
	read_addresses(peer, sk);
	if (is_mapped(peer->src))
		peer->family = AF_INET;
	peer->sport = bpf_ntohs(srcip_read_u16(sk, SRCIP_OFFSET(sock_common, skc_dport)));
	/* The kernel stores the local port in host order. */
	peer->dport = srcip_read_u16(sk, SRCIP_OFFSET(sock_common, skc_num));
}

/* Only the backend's part of the filter can be applied here: after SNAT the peer
 * may be a node, and the port that the client addressed may be the Service's.
 * User space matches accepts with their connections.
 */
SRCIP_INLINE bool is_wanted(const struct srcip_filter *filter, const struct srcip_tuple *peer)
{
	if (filter->proto && filter->proto != IPPROTO_TCP)
		return false;
	if (filter->family && filter->family != peer->family)
		return false;
	return srcip_address_in(peer->dst, filter->backend, filter->backend_mask);
}

int srcip_accept(struct bpf_raw_tracepoint_args *ctx)
{
	struct srcip_accept record = {};
	struct srcip_config *settings;
	__u64 sk = ctx->args[0];
	int zero = 0;

	if (ctx->args[1] != TCP_SYN_RECV || ctx->args[2] != TCP_ESTABLISHED)
		return 0;
	settings = config.lookup(&zero);
	if (!settings || !settings->is_streaming)
		return 0;
	read_peer(&record.peer, sk);
	if (!is_wanted(&settings->filter, &record.peer))
		return 0;

	record.header.ktime_ns = bpf_ktime_get_ns();
	record.header.netns =
	    srcip_net_inum(srcip_read_u64(sk, SRCIP_OFFSET(sock_common, skc_net_net)));
	record.header.size = sizeof(record);
	record.header.version = SRCIP_WIRE_VERSION;
	record.header.kind = SRCIP_KIND_ACCEPT;
	if (accepts.ringbuf_output(&record, sizeof(record), BPF_RB_NO_WAKEUP))
		count_lost(SRCIP_LOST_RING_FULL);
	return 0;
}
