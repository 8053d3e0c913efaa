// SPDX-License-Identifier: Apache-2.0
/* Traffic for the benchmarks, from the namespace it is started in:
 *
 *   traffic flow SRC DST PORT PACKETS   datagrams of one flow that was answered
 *   traffic new NET DST PORT FLOWS [PORTS]
 *                                       one datagram each of so many new flows,
 *                                       from the 200 addresses NET.10 and up, to
 *                                       PORT and those after it in turn
 *   traffic connect SRC DST PORT CONNECTIONS
 *                                       TCP connections, each ended by a reset
 *
 * Prints the nanoseconds that sending took, and those of CPU time. Over veth a
 * packet is forwarded and delivered within the sender's system call, so this is
 * the cost of the path; the CPU time, whatever else runs on the machine.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define SOURCES 200
#define FIRST_PORT 1024

static long long now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long started_ns, started_cpu_ns;

static void start(void)
{
	started_ns = now_ns(CLOCK_MONOTONIC);
	started_cpu_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID);
}

static void end(void)
{
	printf("%lld %lld\n", now_ns(CLOCK_MONOTONIC) - started_ns,
	       now_ns(CLOCK_PROCESS_CPUTIME_ID) - started_cpu_ns);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_in address(const char *host, int port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};

	if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
		fail(host);
	return a;
}

static void send_flow(const char *src, const char *dst, int port, long packets)
{
	struct sockaddr_in from = address(src, 0), to = address(dst, port);
	struct iovec payload = {.iov_base = "x", .iov_len = 1};
	struct mmsghdr batch[BATCH] = {};
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	char answer;
	long sent;

	if (bind(s, (void *)&from, sizeof(from)) || connect(s, (void *)&to, sizeof(to)))
		fail("connect");
	/* The answer makes the flow an established one. */
	if (send(s, "?", 1, 0) != 1 || recv(s, &answer, 1, 0) != 1)
		fail("answer");
	for (int i = 0; i < BATCH; i++) {
		batch[i].msg_hdr.msg_iov = &payload;
		batch[i].msg_hdr.msg_iovlen = 1;
	}
	start();
	for (sent = 0; sent < packets; sent += BATCH)
		if (sendmmsg(s, batch, BATCH, 0) != BATCH)
			fail("sendmmsg");
	end();
}

struct datagram {
	struct iphdr ip;
	struct udphdr udp;
	char payload;
} __attribute__((packed));

static void send_new(const char *net, const char *dst, int port, long flows, int ports)
{
	struct sockaddr_in to = address(dst, 0);
	struct datagram d = {
	    .ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP},
	    .udp = {.len = htons(9)},
	};
	int s = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	unsigned int base = ntohl(address(net, 0).sin_addr.s_addr);

	d.ip.daddr = to.sin_addr.s_addr;
	start();
	for (long i = 0; i < flows; i++) {
		d.ip.saddr = htonl(base + 10 + i % SOURCES);
		d.udp.source = htons(FIRST_PORT + i / SOURCES);
		d.udp.dest = htons(port + i % ports);
		if (sendto(s, &d, sizeof(d), 0, (void *)&to, sizeof(to)) != sizeof(d))
			fail("sendto");
	}
	end();
}

static void connect_all(const char *src, const char *dst, int port, long connections)
{
	struct sockaddr_in from = address(src, 0), to = address(dst, port);
	struct linger reset = {.l_onoff = 1};

	start();
	for (long i = 0; i < connections; i++) {
		int s = socket(AF_INET, SOCK_STREAM, 0);

		/* With a reset nothing is left that holds the port. */
		setsockopt(s, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		if (bind(s, (void *)&from, sizeof(from)) || connect(s, (void *)&to, sizeof(to)))
			fail("connect");
		close(s);
	}
	end();
}

int main(int argc, char **argv)
{
	if (argc < 6) {
		fprintf(stderr, "usage: traffic flow|new|connect SRC|NET DST PORT COUNT [PORTS]\n");
		return 2;
	}
	if (!strcmp(argv[1], "flow"))
		send_flow(argv[2], argv[3], atoi(argv[4]), atol(argv[5]));
	else if (!strcmp(argv[1], "connect"))
		connect_all(argv[2], argv[3], atoi(argv[4]), atol(argv[5]));
	else
		send_new(argv[2], argv[3], atoi(argv[4]), atol(argv[5]),
			 argc > 6 ? atoi(argv[6]) : 1);
	return 0;
}
