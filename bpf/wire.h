/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SRCIP_WIRE_H
#define SRCIP_WIRE_H

/* The only definition of what crosses between kernel and user space: records to
 * user space, configuration and map keys to the kernel.
 *
 * Types, constants and sizes only: BCC rewrites nothing in a header, so no map
 * operation and no kernel dereference may be here. tracer/wire.py mirrors it;
 * tests/unit/test_wire_layout.py compares both.
 */
#define SRCIP_WIRE_VERSION 1

enum srcip_kind {
	SRCIP_KIND_CONNECTION = 1,
	SRCIP_KIND_DROP = 2,
	SRCIP_KIND_ACCEPT = 3,
	SRCIP_KIND_HOP = 4,
	SRCIP_KIND_SEGMENT = 5,
	SRCIP_KIND_DECLARED = 6,
};

/* Where something was seen. CONNTRACK is not a hook of the packet path: the entry came
 * from conntrack's table or events, without the packet.
 */
enum srcip_hook {
	SRCIP_HOOK_NF_PREROUTING = 1,
	SRCIP_HOOK_NF_INPUT = 2,
	SRCIP_HOOK_NF_FORWARD = 3,
	SRCIP_HOOK_NF_OUTPUT = 4,
	SRCIP_HOOK_NF_POSTROUTING = 5,
	SRCIP_HOOK_CONNTRACK = 6,
	SRCIP_HOOK_TC_INGRESS = 7,
	SRCIP_HOOK_TC_EGRESS = 8,
};

/* Slots of each program's per-CPU counters of what it could not report. */
enum srcip_lost {
	SRCIP_LOST_RING_FULL = 0,      /* record: no room in the ring buffer */
	SRCIP_LOST_PATHS_FULL = 1,     /* count: no room for another path */
	SRCIP_LOST_MARK_OVERTAKEN = 2, /* mark: its slot was reused */
	SRCIP_LOST_UNREADABLE = 3,     /* kernel memory could not be read */
	SRCIP_LOST_UNTRACKED = 4,      /* packet that conntrack was told to skip */
	SRCIP_LOST_HOP_OVERTAKEN = 5,  /* hop: its slot was reused, or is full */
	SRCIP_LOST_OVER_LIMIT = 6,     /* packet: beyond the limit of its direction */
	SRCIP_LOST_SEGMENT_LIMIT = 7,  /* segment: beyond the limit of its connection */
	SRCIP_LOST_SLOTS = 8,
};

enum srcip_client_class {
	SRCIP_CLASS_EXTERNAL = 0, /* what no prefix covers */
	SRCIP_CLASS_POD = 1,
	SRCIP_CLASS_NODE = 2,
	SRCIP_CLASS_LOADBALANCER = 3,
	SRCIP_CLASS_LOOPBACK = 4,
};

/* Further properties of a prefix's addresses. The map stores both in one byte:
 * class | flags << SRCIP_CLASS_BITS.
 */
enum srcip_address_flag {
	SRCIP_ADDRESS_HERE = 1,	   /* the traced node's own */
	SRCIP_ADDRESS_CLUSTER = 2, /* in a range that kube-proxy takes for pods */
};

#define SRCIP_CLASS_BITS 4
#define SRCIP_CLASS_MASK ((1 << SRCIP_CLASS_BITS) - 1)

enum srcip_connection_flag {
	SRCIP_CONNECTION_HAS_MARK = 1, /* mark was seen before SNAT */
	SRCIP_CONNECTION_RELATED = 2,  /* expected by a conntrack helper */
};

/* The reason of the only drops reported by a kernel without drop reasons. */
#define SRCIP_REASON_NETFILTER_DROP 1

enum srcip_drop_flag {
	SRCIP_DROP_HAS_TUPLE = 1, /* the packet's own addresses were readable */
	SRCIP_DROP_HAS_ORIG = 2,  /* the packet had a conntrack entry */
	SRCIP_DROP_HAS_DST = 4,	  /* the packet was routed already */
	SRCIP_DROP_IS_REPLY = 8,  /* it went in the entry's reply direction */
	SRCIP_DROP_IS_NEW = 16,	  /* its flow had no answer yet (IP_CT_NEW) */
};

enum srcip_hop_flag {
	SRCIP_HOP_HAS_ENTRY = 1,    /* the packet had a conntrack entry: orig, reply */
	SRCIP_HOP_IS_REPLY = 2,	    /* it goes in the entry's reply direction */
	SRCIP_HOP_IS_NEW = 4,	    /* the entry is not confirmed yet */
	SRCIP_HOP_AFTER_NAT = 8,    /* the last function of its hook; else just before NAT */
	SRCIP_HOP_IS_FRAGMENT = 16, /* not the first fragment: has no ports */
};

enum srcip_segment_flag {
	SRCIP_SEGMENT_IS_END = 1, /* the sender closes its side after it (FIN) */
	SRCIP_SEGMENT_IS_CUT = 2, /* nothing more of its connection is reported */
};

/* The headers in which a proxy names its client. */
enum srcip_proxy_header {
	SRCIP_PROXY_HEADER_PROXY_V1 = 1,
	SRCIP_PROXY_HEADER_PROXY_V2 = 2,
	SRCIP_PROXY_HEADER_X_FORWARDED_FOR = 3,
	SRCIP_PROXY_HEADER_FORWARDED = 4,
};

enum srcip_client_form {
	SRCIP_CLIENT_ADDRESS = 1,
	SRCIP_CLIENT_TOKEN = 2,
	SRCIP_CLIENT_UNKNOWN = 3,
	SRCIP_CLIENT_LOCAL = 4,
	SRCIP_CLIENT_INVALID = 5,
};

enum srcip_opening {
	SRCIP_OPENING_HTTP = 1,
	SRCIP_OPENING_OTHER = 2,
	SRCIP_OPENING_CUT = 3,
	SRCIP_OPENING_MALFORMED = 4,
};

enum srcip_declared_flag {
	SRCIP_DECLARED_HAS_MORE = 1, /* earlier clients are left out */
};

enum srcip_path_flag {
	SRCIP_PATH_SNAT = 1,	  /* the source is replaced: seen is filled */
	SRCIP_PATH_DNAT = 2,	  /* dst is what the client addressed */
	SRCIP_PATH_MARKED = 4,	  /* the masquerade mark was set before SNAT */
	SRCIP_PATH_INPUT = 8,	  /* delivered on this node, not sent on */
	SRCIP_PATH_HAS_MARK = 16, /* the mark was seen before SNAT */
	SRCIP_PATH_HAIRPIN = 32,  /* the client is the backend */
	SRCIP_PATH_SRC_NAT = 64,  /* IPS_SRC_NAT is set in conntrack's status */
};

/* For structs whose addresses are accessed in words of 64 bits. */
#define SRCIP_WORDS __attribute__((aligned(8)))

/* Addresses stay in network order, IPv4 as ::ffff:a.b.c.d. Everything else is
 * host order, swapped on the line that reads it. ICMP and ICMPv6 have no
 * ports: sport holds the id, dport the type and code as type << 8 | code.
 */
struct srcip_tuple {
	__u8 src[16];
	__u8 dst[16];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 family;
	__u8 pad[2];
} SRCIP_WORDS;

struct srcip_header {
	__u64 ktime_ns; /* CLOCK_MONOTONIC */
	__u32 netns;	/* inode number of the network namespace */
	__u16 size;	/* of the whole record */
	__u8 version;
	__u8 kind;
};

struct srcip_connection {
	struct srcip_header header;
	struct srcip_tuple orig;
	struct srcip_tuple reply;
	__u32 status;  /* enum ip_conntrack_status */
	__u32 mark;    /* the packet's, before SNAT */
	__u32 ct_mark; /* the entry's */
	__u32 iif;
	__u32 oif;
	__u16 zone;
	__u8 zone_dir; /* 1 original, 2 reply, 3 both */
	__u8 hook;
	__u8 flags;
	__u8 pad[7];
};

struct srcip_drop {
	struct srcip_header header;
	struct srcip_tuple packet;
	struct srcip_tuple orig;
	__u64 location;	 /* address of the code that dropped the packet */
	__u64 dst_input; /* address of the route's input function */
	__u32 reason;	 /* enum skb_drop_reason of the running kernel, if it has one */
	__u32 mark;
	__u32 ifindex;	   /* interface the packet is on now */
	__u32 iif;	   /* interface it came in by, 0 if sent locally */
	__u32 dst_ifindex; /* interface its route leads to */
	__u8 flags;
	__u8 zone_dir; /* of its entry, as in srcip_connection */
	__u16 zone;
};

struct srcip_accept {
	struct srcip_header header;
	struct srcip_tuple peer; /* src is the peer, dst the socket's own */
};

/* A packet of a watched connection at one place on its way. The entry's tuples are as
 * of that moment: before DNAT of a first packet, reply is orig inverted.
 */
struct srcip_hop {
	struct srcip_header header;
	struct srcip_tuple packet; /* as it is at this place */
	struct srcip_tuple orig;
	struct srcip_tuple reply;
	__u64 packet_id; /* random; the same for all hops of a packet on one node */
	__u32 mark;	 /* the packet's */
	__u32 iif;	 /* at tc_ingress the device itself */
	__u32 oif;	 /* at tc_egress the device itself */
	__u32 length;	 /* in bytes, of what the kernel handles as one: may be several segments */
	__u16 number;	 /* of the packet in its direction, from 1 */
	__u8 hook;
	__u8 flags;
	__u8 tcp_flags;
	__u8 zone_dir; /* of its entry, as in srcip_connection */
	__u16 zone;
};

/* Some of the first bytes of a TCP connection, which follow this struct. They are never
 * recorded: the ring's reader turns them into srcip_declared.
 */
struct srcip_segment {
	struct srcip_header header;
	struct srcip_tuple flow;
	__u32 offset; /* of the first byte, from the connection's first */
	__u16 length; /* how many follow */
	__u8 flags;
	__u8 pad;
};

/* One client that a header names. */
struct srcip_client {
	__u8 header;	/* enum srcip_proxy_header */
	__u8 form;	/* enum srcip_client_form */
	__u16 port;	/* 0 if unknown */
	__u8 value[32]; /* an address in the first 16 bytes, or a token; else zero */
};

/* What the first bytes of a connection declare; its clients follow. */
struct srcip_declared {
	struct srcip_header header;
	struct srcip_tuple flow; /* as the connection's orig */
	__u8 opening;
	__u8 flags;
	__u8 clients;
	__u8 pad[5];
};

/* A prefix of mapped addresses in one namespace, whose inode forms the leading bits:
 * IPv4 10.0.0.0/8 has length 32 + 96 + 8.
 */
struct srcip_prefix {
	__u32 length;
	__u32 netns;
	__u8 address[16];
} SRCIP_WORDS;

/* Which records the reader wants. A zero mask, port, protocol or family matches all. */
struct srcip_filter {
	__u8 client[16];
	__u8 client_mask[16];
	__u8 backend[16];
	__u8 backend_mask[16];
	__u16 port;
	__u8 proto;
	__u8 family; /* of the prefixes: ::/0 is not 0.0.0.0/0 */
	__u8 pad[4];
} SRCIP_WORDS;

struct srcip_config {
	struct srcip_filter filter;
	__u64 reasons[4];     /* bit set of drop reasons to report without a filter */
	__u32 wakeup_records; /* a CPU wakes the reader once per this many records */
	__u32 masquerade_mark;
	__u8 is_streaming;
	__u8 is_counting;
	__u8 is_filtered;
	__u8 active_paths; /* which of the two maps counts, 0 or 1 */
	__u8 is_broad;	   /* also report what a wanted connection becomes on other nodes */
	__u8 pad[1];
	__u16 packets;	    /* per direction, whose hops are reported */
	__u16 sample_round; /* never 0; a new one makes each path's sample be looked up again */
	__u8 pad2[2];
	__u32 classes_round; /* 24 bits; a new one empties the cache of classes; 0: no cache */
};

/* A path's value on one CPU: its count of connections in the low bits, and above them
 * the round in which this CPU last found or stored a sample.
 */
#define SRCIP_COUNT_BITS 48

/* A path through the node, without who used it: the number of paths grows with Services
 * and their backends, never with clients.
 */
struct srcip_path_key {
	__u8 dst[16];	  /* as the client addressed it; zero: any external address */
	__u8 backend[16]; /* zero without DNAT */
	__u8 seen[16];	  /* source that the backend sees; zero without SNAT: the client's */
	__u32 netns;
	__u16 dport;
	__u16 backend_port;
	__u16 zone;
	__u8 proto;
	__u8 family;
	__u8 client_class;
	__u8 dst_class;
	__u8 flags;
	__u8 client_flags; /* enum srcip_address_flag */
} SRCIP_WORDS;

/* A connection whose first bytes are read; user space deletes it once it is understood. */
struct srcip_stream_key {
	struct srcip_tuple flow; /* as the connection's orig */
	__u32 netns;
	__u8 pad[4];
};

_Static_assert(sizeof(struct srcip_tuple) == 40, "wire layout changed");
_Static_assert(sizeof(struct srcip_header) == 16, "wire layout changed");
_Static_assert(sizeof(struct srcip_connection) == 128, "wire layout changed");
_Static_assert(sizeof(struct srcip_drop) == 136, "wire layout changed");
_Static_assert(sizeof(struct srcip_accept) == 56, "wire layout changed");
_Static_assert(sizeof(struct srcip_hop) == 168, "wire layout changed");
_Static_assert(sizeof(struct srcip_segment) == 64, "wire layout changed");
_Static_assert(sizeof(struct srcip_client) == 36, "wire layout changed");
_Static_assert(sizeof(struct srcip_declared) == 64, "wire layout changed");
_Static_assert(sizeof(struct srcip_prefix) == 24, "wire layout changed");
_Static_assert(sizeof(struct srcip_filter) == 72, "wire layout changed");
_Static_assert(sizeof(struct srcip_config) == 128, "wire layout changed");
_Static_assert(sizeof(struct srcip_path_key) == 64, "wire layout changed");
_Static_assert(sizeof(struct srcip_stream_key) == 48, "wire layout changed");

#endif /* SRCIP_WIRE_H */
