// SPDX-License-Identifier: GPL-2.0-only
/* Report the first bytes that a TCP client sends: at tc ingress where they enter the
 * node, at tc egress for clients on the node itself.
 *
 * A connection is followed from its SYN, which holds the sequence number of its first
 * byte. If that byte can begin neither a PROXY header nor an HTTP request, only this
 * one byte is reported: no ciphertext leaves the kernel.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"
#include "packet.h"

/* Return value that continues with the next program (the same as TCX_NEXT). */
#define TC_ACT_UNSPEC (-1)
#define LOOPBACK_IFINDEX 1

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_ACK 0x10
#define IP_MF_OR_OFFSET 0x3fff

/* Servers accept request heads of up to 8 KiB. A client that sends its head in very
 * many segments is not followed to the end.
 */
#define FIRST_BYTES 8192
#define SEGMENTS 64
/* A power of two above FIRST_BYTES, so that the verifier accepts a mask as the bound. */
#define ROOM 16384

struct tcp_header {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack_seq;
	__u8 doff; /* in its upper half, words of 4 */
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urg_ptr;
};

/* Offsets of a packet's TCP header and of its end. */
struct place {
	__u32 tcp;
	__u32 end;
};

struct stream {
	__u32 first; /* sequence number of its first byte */
	__u32 seq;   /* of the previous segment: a bridge shows each twice */
	__u32 length;
	__u32 segments;
};

struct chunk {
	struct srcip_segment head;
	__u8 bytes[ROOM];
};

BPF_RINGBUF_OUTPUT(segments, SRCIP_SEGMENT_RING_PAGES);
BPF_TABLE("lru_hash", struct srcip_stream_key, struct stream, streams, SRCIP_STREAMS);
/* One per CPU is enough: tc runs with softirqs disabled. */
BPF_PERCPU_ARRAY(chunks, struct chunk, 1);
BPF_PERCPU_ARRAY(self, __u64, 1);
BPF_ARRAY(config, struct srcip_config, 1);
BPF_PERCPU_ARRAY(lost, __u64, SRCIP_LOST_SLOTS);

static void count_lost(int slot)
{
	__u64 *count = lost.lookup(&slot);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* The address of an sk_buff as a number: the verifier allows no arithmetic on the
 * pointer.
 */
SRCIP_INLINE __u64 address_of(struct __sk_buff *ctx)
{
	int zero = 0;
	volatile __u64 *place = self.lookup(&zero);

	if (!place)
		return 0;
	*place = (__u64)ctx;
	return *place;
}

/* Frames may be padded to 60 bytes, so use IP's length. It is 0 for packets that the
 * kernel has merged beyond 64 KiB.
 */
SRCIP_INLINE bool find_tcp(struct __sk_buff *ctx, __u64 skb, struct place *place)
{
	__u64 data = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, data)) -
		     srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, head));
	__u32 at = srcip_read_u16(skb, SRCIP_OFFSET(sk_buff, network_header)) - data;
	struct srcip_ipv4 ip;
	struct srcip_ipv6 ip6;

	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(ctx, at, &ip, sizeof(ip)) || ip.protocol != IPPROTO_TCP ||
		    ip.frag_off & bpf_htons(IP_MF_OR_OFFSET))
			return false;
		place->tcp = at + (ip.version_ihl & 15) * 4;
		place->end = ip.tot_len ? at + bpf_ntohs(ip.tot_len) : ctx->len;
		return true;
	}
	if (ctx->protocol != bpf_htons(ETH_P_IPV6) ||
	    bpf_skb_load_bytes(ctx, at, &ip6, sizeof(ip6)) || ip6.nexthdr != IPPROTO_TCP)
		return false;
	place->tcp = at + sizeof(ip6);
	place->end = ip6.payload_len ? place->tcp + bpf_ntohs(ip6.payload_len) : ctx->len;
	return true;
}

/* The client's tuple: the entry's original one if the packet has an entry, else the
 * packet's own. False for a packet in the reply direction.
 */
SRCIP_INLINE bool set_key(struct srcip_stream_key *key, struct __sk_buff *ctx, __u64 skb)
{
	__u64 nfct = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, _nfct));
	__u64 nf_conn = nfct & ~NFCT_INFOMASK, info = nfct & NFCT_INFOMASK;
	__u64 device = srcip_read_u64(skb, SRCIP_OFFSET(sk_buff, dev));
	struct srcip_entry entry;

	key->netns = srcip_net_inum(srcip_read_u64(device, SRCIP_OFFSET(net_device, nd_net_net)));
	if (!nf_conn || info == IP_CT_UNTRACKED)
		return srcip_read_frame(&key->flow, ctx, skb) == SRCIP_READ;
	if (info >= IP_CT_IS_REPLY)
		return false;
	if (srcip_read_entry(&entry, nf_conn)) {
		count_lost(SRCIP_LOST_UNREADABLE);
		return false;
	}
	srcip_convert_tuple(&key->flow, srcip_entry_tuple(&entry, 0));
	return true;
}

/* The backend is not known yet, and the filter's port may be the backend's: user space,
 * which has the connection's record, applies the rest of the filter.
 */
SRCIP_INLINE bool is_wanted(const struct srcip_filter *filter, const struct srcip_tuple *flow)
{
	if (filter->proto && filter->proto != IPPROTO_TCP)
		return false;
	if (filter->family && filter->family != flow->family)
		return false;
	return srcip_address_in(flow->src, filter->client, filter->client_mask);
}

SRCIP_INLINE void begin(struct srcip_stream_key *key, __u32 first)
{
	struct stream stream = {.first = first};
	struct srcip_config *settings;
	int zero = 0;

	settings = config.lookup(&zero);
	if (settings && settings->is_streaming && is_wanted(&settings->filter, &key->flow))
		streams.update(key, &stream);
}

/* Whether a byte may begin a PROXY header of either version, or an HTTP request. */
SRCIP_INLINE bool is_clear_text(__u8 byte)
{
	return (byte >= 'A' && byte <= 'Z') || byte == '\r';
}

/* Fill a chunk with the bytes after the TCP header; return how many, or 0. The verifier
 * accepts a mask as a bound, but not a comparison that the compiler has moved.
 */
SRCIP_INLINE __u32 fill(struct __sk_buff *ctx, struct chunk *chunk, __u32 at, __u32 payload)
{
	__u64 last = (payload > FIRST_BYTES ? FIRST_BYTES : payload) - 1;

	asm volatile("" : "+r"(last));
	last &= FIRST_BYTES - 1;
	return bpf_skb_load_bytes(ctx, at, chunk->bytes, last + 1) ? 0 : last + 1;
}

SRCIP_INLINE void emit(struct chunk *chunk, const struct srcip_stream_key *key, __u32 length)
{
	__u64 bytes = length;

	chunk->head.header.ktime_ns = bpf_ktime_get_ns();
	chunk->head.header.netns = key->netns;
	chunk->head.header.size = sizeof(chunk->head) + length;
	chunk->head.header.version = SRCIP_WIRE_VERSION;
	chunk->head.header.kind = SRCIP_KIND_SEGMENT;
	chunk->head.flow = key->flow;
	chunk->head.length = length;
	asm volatile("" : "+r"(bytes));
	bytes &= ROOM - 1;
	if (segments.ringbuf_output(chunk, sizeof(chunk->head) + bytes, BPF_RB_NO_WAKEUP))
		count_lost(SRCIP_LOST_RING_FULL);
}

/* Report a segment of a followed connection; return whether it was the last one. */
SRCIP_INLINE bool report(struct __sk_buff *ctx, struct stream *stream,
			 const struct srcip_stream_key *key, __u32 seq, __u32 at, __u32 payload,
			 bool is_end)
{
	__u32 offset = seq - stream->first, length = 0;
	struct chunk *chunk;
	int zero = 0;

	/* Beyond the first bytes, of which one may still be retransmitted, or a
	 * keep-alive before the first byte.
	 */
	if (offset >= FIRST_BYTES)
		return false;
	if (stream->segments && stream->seq == seq && stream->length == payload)
		return false;
	chunk = chunks.lookup(&zero);
	if (!chunk)
		return false;
	if (payload) {
		length = fill(ctx, chunk, at, payload);
		if (!length) {
			count_lost(SRCIP_LOST_UNREADABLE);
			return true;
		}
		if (length > FIRST_BYTES - offset)
			length = FIRST_BYTES - offset;
	}
	stream->seq = seq;
	stream->length = payload;
	chunk->head.offset = offset;
	chunk->head.flags = is_end ? SRCIP_SEGMENT_IS_END : 0;
	if (length && !offset && !is_clear_text(chunk->bytes[0])) {
		length = 1;
		chunk->head.flags |= SRCIP_SEGMENT_IS_CUT;
	} else if (++stream->segments >= SEGMENTS) {
		count_lost(SRCIP_LOST_SEGMENT_LIMIT);
		chunk->head.flags |= SRCIP_SEGMENT_IS_CUT;
	}
	emit(chunk, key, length);
	return chunk->head.flags & SRCIP_SEGMENT_IS_CUT;
}

SRCIP_INLINE int look(struct __sk_buff *ctx)
{
	__u64 skb = address_of(ctx);
	struct srcip_stream_key key = {};
	struct stream *stream;
	struct tcp_header tcp;
	struct place place;
	__u32 payload, seq;

	if (!skb || !find_tcp(ctx, skb, &place) ||
	    bpf_skb_load_bytes(ctx, place.tcp, &tcp, sizeof(tcp)))
		return TC_ACT_UNSPEC;
	seq = bpf_ntohl(tcp.seq);
	place.tcp += (tcp.doff >> 4) * 4;
	payload = place.end > place.tcp ? place.end - place.tcp : 0;
	if (tcp.flags & TCP_SYN) {
		/* Data in a SYN (TCP Fast Open) is not read. */
		if (!(tcp.flags & TCP_ACK) && set_key(&key, ctx, skb))
			begin(&key, seq + 1);
		return TC_ACT_UNSPEC;
	}
	if ((!payload && !(tcp.flags & TCP_FIN)) || !set_key(&key, ctx, skb))
		return TC_ACT_UNSPEC;
	stream = streams.lookup(&key);
	if (stream && report(ctx, stream, &key, seq, place.tcp, payload, tcp.flags & TCP_FIN))
		streams.delete(&key);
	return TC_ACT_UNSPEC;
}

int srcip_segment_ingress(struct __sk_buff *ctx)
{
	return look(ctx);
}

/* Forwarded packets were seen at ingress; packets to loopback will be seen there. */
int srcip_segment_egress(struct __sk_buff *ctx)
{
	if (ctx->ingress_ifindex || ctx->ifindex == LOOPBACK_IFINDEX)
		return TC_ACT_UNSPEC;
	return look(ctx);
}
