// SPDX-License-Identifier: GPL-2.0-only
/* Report the first bytes of new TCP connections, in the direction of who opened
 * them: at tc ingress where they enter the node, at tc egress where the node
 * itself made them.
 *
 * A connection is known by its SYN, which says where its bytes begin. Of one
 * that begins neither as a PROXY header nor as a request's line, a single byte
 * is reported: no ciphertext leaves the kernel.
 */
#include <uapi/linux/bpf.h>
#include "kernel.h"
#include "packet.h"

/* A return value that leaves a packet's fate to others (TCX_NEXT is the same). */
#define TC_ACT_UNSPEC (-1)
#define LOOPBACK_IFINDEX 1

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_ACK 0x10
#define IP_MF_OR_OFFSET 0x3fff

/* Servers take heads of 8 KiB. A client that sends them byte by byte is cut. */
#define FIRST_BYTES 8192
#define SEGMENTS 64
/* More than FIRST_BYTES, and a power of two: a mask for the verifier. */
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

/* Where in a packet its TCP header and its end are. */
struct place {
	__u32 tcp;
	__u32 end;
};

struct stream_key {
	struct srcip_tuple flow;
	__u32 netns;
};

struct stream {
	__u32 first; /* sequence number of its first byte */
	__u32 seq;   /* of the segment before: a bridge shows it twice */
	__u32 length;
	__u32 segments;
};

struct chunk {
	struct srcip_segment head;
	__u8 bytes[ROOM];
};

BPF_RINGBUF_OUTPUT(segments, SRCIP_SEGMENT_RING_PAGES);
BPF_TABLE("lru_hash", struct stream_key, struct stream, streams, SRCIP_STREAMS);
/* One for each CPU will do: tc runs with softirqs disabled. */
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

/* Frames are padded to 60 bytes, so a packet's end is where IP says. Packets that
 * the kernel has merged beyond 64 KiB say 0.
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

/* What the connection's opener sent: the entry's original tuple where the packet
 * has an entry, else its own addresses. False for an answer.
 */
SRCIP_INLINE bool set_key(struct stream_key *key, struct __sk_buff *ctx, __u64 skb)
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

/* The backend is not chosen yet, and the port may be its own: user space, which
 * has the connection's record, judges the rest of the filter.
 */
SRCIP_INLINE bool is_wanted(const struct srcip_filter *filter, const struct srcip_tuple *flow)
{
	if (filter->proto && filter->proto != IPPROTO_TCP)
		return false;
	if (filter->family && filter->family != flow->family)
		return false;
	return srcip_address_in(flow->src, filter->client, filter->client_mask);
}

SRCIP_INLINE void begin(struct stream_key *key, __u32 first)
{
	struct stream stream = {.first = first};
	struct srcip_config *settings;
	int zero = 0;

	settings = config.lookup(&zero);
	if (settings && settings->is_streaming && is_wanted(&settings->filter, &key->flow))
		streams.update(key, &stream);
}

/* Whether bytes may begin a PROXY header of either version, or a request. */
SRCIP_INLINE bool is_clear_text(__u8 byte)
{
	return (byte >= 'A' && byte <= 'Z') || byte == '\r';
}

/* Fill a chunk with bytes that follow the TCP header; how many, or 0. The verifier
 * believes a mask, not a compare that the compiler has moved.
 */
SRCIP_INLINE __u32 fill(struct __sk_buff *ctx, struct chunk *chunk, __u32 at, __u32 payload)
{
	__u64 last = (payload > FIRST_BYTES ? FIRST_BYTES : payload) - 1;

	asm volatile("" : "+r"(last));
	last &= FIRST_BYTES - 1;
	return bpf_skb_load_bytes(ctx, at, chunk->bytes, last + 1) ? 0 : last + 1;
}

SRCIP_INLINE void emit(struct chunk *chunk, const struct stream_key *key, __u32 length)
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

/* Report a segment of a connection that is followed; whether it was the last. */
SRCIP_INLINE bool report(struct __sk_buff *ctx, struct stream *stream, const struct stream_key *key,
			 __u32 seq, __u32 at, __u32 payload, bool is_end)
{
	__u32 offset = seq - stream->first, length = 0;
	struct chunk *chunk;
	int zero = 0;

	/* Beyond the bytes that are looked at (one of those may yet be sent again),
	 * or a keep-alive's before the first.
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
	struct stream_key key = {};
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
		/* Bytes in a SYN (TCP Fast Open) are not read. */
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

/* What came from elsewhere was seen as it entered; what goes to loopback will be. */
int srcip_segment_egress(struct __sk_buff *ctx)
{
	if (ctx->ingress_ifindex || ctx->ifindex == LOOPBACK_IFINDEX)
		return TC_ACT_UNSPEC;
	return look(ctx);
}
