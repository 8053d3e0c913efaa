"""Real proxies and a real backend: haproxy and nginx in the namespaces of a box."""

import json
import shutil
import socket
import subprocess
from contextlib import closing, contextmanager

from tests.kernel.box import CLIENT, SERVER, wait_until

# All live in the client's namespace, each with an address of its own; they connect from it.
HAPROXY = {4: "198.51.100.20", 6: "2001:db8:c::20"}
NGINX = {4: "198.51.100.30", 6: "2001:db8:c::30"}
TRUSTED = [f"--trusted-proxy={each}" for each in (*HAPROXY.values(), *NGINX.values())]

# Ports of haproxy: what it sends on. Those of the backend: what it expects.
TCP_V1, TCP_V2, HTTP_XFF, HTTP_FORWARDED, CHAIN = 8001, 8002, 8003, 8004, 8005
EXPECTS_PROXY, EXPECTS_XFF = 8090, 8091
NGINX_XFF, NGINX_BEHIND_PROXY = 8006, 8007

_HAPROXY = """\
global
  stats socket {directory}/haproxy.sock
defaults
  timeout connect 5s
  timeout client 5s
  timeout server 5s
"""
_LISTEN = """\
listen {name}-{version}
  bind {bracketed}:{port}
  mode {mode}
  source {bracketed}:0
  {extra}
  server backend {to} {options}
"""
_NGINX = """\
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
{servers}
}}
"""
_FORWARDING = """\
  server {{
    listen {bracketed}:{port}{protocol};
    location / {{
      proxy_bind {address};
      proxy_set_header X-Forwarded-For {value};
      proxy_pass http://{to};
    }}
  }}
"""
_BACKEND = """\
  server {{
    listen {bracketed}:{port}{protocol};
    {trusted}
    real_ip_header {header};
    real_ip_recursive on;
    return 200 '{{"client": "$remote_addr", "peer": "$realip_remote_addr"}}';
  }}
"""


def bracketed(address):
    return f"[{address}]" if ":" in address else address


def missing():
    """Name what is not installed."""
    return [tool for tool in ("haproxy", "nginx") if shutil.which(tool) is None]


@contextmanager
def running(box, directory):
    """Run the proxies and the backend of a box beside the block."""
    for version, addresses in ((4, (HAPROXY, NGINX)), (6, (HAPROXY, NGINX))):
        for each in addresses:
            length = {4: "24", 6: "64"}[version]
            box.run(
                "client",
                "ip",
                "addr",
                "add",
                f"{each[version]}/{length}",
                "dev",
                "c0",
                *(["nodad"] if version == 6 else []),
            )
    here, there = directory / "proxies", directory / "backend"
    here.mkdir()
    there.mkdir()
    directory.chmod(0o755)
    (here / "haproxy.cfg").write_text(haproxy_configuration(here))
    (here / "nginx.conf").write_text(nginx_configuration(here, "".join(forwarding())))
    (there / "nginx.conf").write_text(nginx_configuration(there, "".join(backends())))
    processes = []
    try:
        processes.append(start(box, "server", "nginx", "-p", there, "-c", there / "nginx.conf"))
        processes.append(start(box, "client", "nginx", "-p", here, "-c", here / "nginx.conf"))
        processes.append(start(box, "client", "haproxy", "-db", "-f", here / "haproxy.cfg"))
        for version in (4, 6):
            wait_for(box, "server", SERVER[version], EXPECTS_PROXY)
            wait_for(box, "client", NGINX[version], NGINX_XFF)
            wait_for(box, "client", HAPROXY[version], TCP_V1)
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait(10)


def start(box, host, *command):
    return subprocess.Popen(
        ["ip", "netns", "exec", box.names[host], *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(box, host, address, port):
    """Wait until somebody listens, without connecting: connections are what the test counts."""
    wait_until(lambda: f"{bracketed(address)}:{port} " in box.run(host, "ss", "-Hlnt"))


def haproxy_configuration(directory):
    text = _HAPROXY.format(directory=directory)
    for version in (4, 6):
        backend = bracketed(SERVER[version])
        ways = (
            ("v1", TCP_V1, "tcp", "", f"{backend}:{EXPECTS_PROXY}", "send-proxy"),
            # With a TLV behind the addresses, and health checks that say LOCAL.
            (
                "v2", TCP_V2, "tcp", "", f"{backend}:{EXPECTS_PROXY}",
                "send-proxy-v2 proxy-v2-options crc32c check check-send-proxy inter 200ms",
            ),
            ("xff", HTTP_XFF, "http", "option forwardfor", f"{backend}:{EXPECTS_XFF}", ""),
            (
                "forwarded", HTTP_FORWARDED, "http",
                'http-request set-header Forwarded for=\\"%[src]\\"' if version == 4
                else 'http-request set-header Forwarded for=\\"[%[src]]\\"',
                f"{backend}:{EXPECTS_XFF}", "",
            ),
            (
                "chain", CHAIN, "tcp", "",
                f"{bracketed(NGINX[version])}:{NGINX_BEHIND_PROXY}", "send-proxy-v2",
            ),
        )  # fmt: skip
        for name, port, mode, extra, to, options in ways:
            text += _LISTEN.format(
                name=name,
                version=version,
                bracketed=bracketed(HAPROXY[version]),
                port=port,
                mode=mode,
                address=HAPROXY[version],
                extra=extra,
                to=to,
                options=options,
            )
    return text


def nginx_configuration(directory, servers):
    return _NGINX.format(directory=directory, servers=servers)


def forwarding():
    """The proxy: nginx adds whom it sees, or whom haproxy before it names."""
    for version in (4, 6):
        for port, protocol, value in (
            (NGINX_XFF, "", "$proxy_add_x_forwarded_for"),
            (NGINX_BEHIND_PROXY, " proxy_protocol", '"$proxy_protocol_addr, $remote_addr"'),
        ):
            yield _FORWARDING.format(
                bracketed=bracketed(NGINX[version]),
                port=port,
                protocol=protocol,
                address=NGINX[version],
                value=value,
                to=f"{bracketed(SERVER[version])}:{EXPECTS_XFF}",
            )


def backends():
    """The backend: nginx says whom it takes for the client, believing the two proxies alone."""
    for version in (4, 6):
        trusted = f"set_real_ip_from {HAPROXY[version]}; set_real_ip_from {NGINX[version]};"
        for port, protocol, header in (
            (EXPECTS_PROXY, " proxy_protocol", "proxy_protocol"),
            (EXPECTS_XFF, "", "X-Forwarded-For"),
        ):
            yield _BACKEND.format(
                bracketed=bracketed(SERVER[version]),
                port=port,
                protocol=protocol,
                trusted=trusted,
                header=header,
            )


def ask(box, address, port, *pieces, source=None):
    """Send a request in pieces; return what the backend answered, and our own socket's name."""
    version = 6 if ":" in address else 4
    sock = box.socket("client", version, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with closing(sock):
        # The kernel would pick the proxy's own address to talk to it.
        sock.bind((source or CLIENT[version], 0))
        sock.connect((address, port))
        local = sock.getsockname()[:2]
        for piece in pieces:
            sock.sendall(piece)
        answer = b""
        while more := sock.recv(65536):
            answer += more
    return json.loads(answer.rpartition(b"\r\n\r\n")[2] or b"null"), local
