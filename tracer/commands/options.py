"""Options that several commands share, and their values."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tracer.commands.values import Cidr, Number, ServiceName
from tracer.errors import TracerError
from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.kernel import netns
from tracer.kernel.ladder import Rung
from tracer.kernel.netns import Netns
from tracer.model import PROTOCOLS
from tracer.pipeline import Wanted

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Combine several options into one decorator, in the order in which help lists them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


where_options = together(
    click.option(
        "--netns",
        multiple=True,
        metavar="NAME|PID|PATH[=NODE]",
        help="Network namespace of a node: a name from 'ip netns list', a process ID, or a path,"
        " optionally with '=' and the node's name. May be given several times. Default: the current"
        " one.",
    ),
    click.option(
        "--node-name",
        metavar="NAME",
        help="Name of this node, as in its Node object. Default: the host name.",
    ),
)

filter_options = together(
    click.option(
        "--filter-client",
        type=Cidr(),
        metavar="CIDR",
        help="Only connections whose original source address is in CIDR.",
    ),
    click.option(
        "--filter-backend",
        type=Cidr(),
        metavar="CIDR",
        help="Only connections whose backend's address is in CIDR.",
    ),
    click.option(
        "--filter-port",
        type=Number(1, 65535),
        metavar="PORT",
        help="Only connections to this port (1-65535): the one that the client addressed, or the"
        " backend's.",
    ),
    click.option(
        "--filter-proto",
        type=click.Choice(list(PROTOCOLS)),
        help="Only this protocol.",
    ),
    click.option(
        "--filter-verdict",
        type=click.Choice([verdict.value for verdict in Verdict]),
        multiple=True,
        help="Only this verdict on the source address. May be given several times.",
    ),
    click.option(
        "--filter-cause",
        type=click.Choice([cause.value for cause in Cause]),
        metavar="CAUSE",
        multiple=True,
        help="Only this cause; 'srcip explain --causes' lists them. May be given several times.",
    ),
    click.option(
        "--filter-service",
        type=ServiceName(),
        metavar="NAMESPACE/NAME",
        multiple=True,
        help="Only this Service. May be given several times.",
    ),
)

trusted_proxy_option = click.option(
    "--trusted-proxy",
    type=Cidr(),
    metavar="CIDR",
    multiple=True,
    help="Trust the client addresses that proxies in CIDR declare. In a chain of proxies, the last"
    " address that is not trusted is the client. May be given several times.",
)

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="table: aligned rows for people; json: one object per line, nothing else on stdout.",
)

path_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "diagram"]),
    default="table",
    show_default=True,
    help="table: aligned rows for people; json: one object per line, nothing else on stdout;"
    " diagram: the path of each connection, hop by hop.",
)

packets_option = click.option(
    "--packets",
    type=Number(1, 1000),
    metavar="N",
    help="Record the hops of the first N packets (1-1000) of each direction; -o json then prints a"
    " line per path instead of one per connection. Default: none; 1 with -o diagram.",
)


def _rung(*rungs: Rung) -> Decorator:
    return click.option(
        "--rung",
        type=click.Choice([rung.value for rung in rungs]),
        help=f"Use only this kernel mechanism: {'; '.join(map(_RUNGS.__getitem__, rungs))}."
        " Default: the first that the kernel supports.",
    )


_RUNGS = {
    Rung.LINKS: "links (BPF netfilter links)",
    Rung.PROBES: "probes (kprobes on conntrack and NAT functions)",
    Rung.EVENTS: "events (of conntrack, over netlink)",
}
rung_option = _rung(*Rung)
programs_rung_option = _rung(Rung.LINKS, Rung.PROBES)

explain_option = click.option(
    "--explain",
    is_flag=True,
    help="Under each row of the table, print the evidence for the verdict and the command that"
    " would keep the client's address.",
)

expect_option = click.option(
    "--expect",
    type=click.Choice([verdict.value for verdict in Verdict]),
    help="Exit with 3 if any connection or drop has another verdict, with 4 if none was seen.",
)

count_option = click.option(
    "--count",
    type=Number(1),
    metavar="N",
    help="Stop after N connections and drops together.",
)

ready_option = click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Create FILE once everything is attached, for scripts that wait for it.",
)

record_option = click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the raw records to FILE, for 'srcip replay', 'stitch' and 'report'.",
)


def namespaces(parameters: dict[str, Any]) -> list[Netns]:
    """
    Take ``--netns`` and ``--node-name`` out of a command's parameters.

    Raises:
        NetnsError: If one does not exist.
    """
    specs: tuple[str, ...] = parameters.pop("netns")
    node = parameters.pop("node_name") or socket.gethostname()
    if not specs:
        return [netns.current(node)]
    found = [netns.find(spec, node) for spec in specs]
    # Named twice, a namespace is still traced once.
    return list({each.inode: each for each in found}.values())


def rung_of(value: str | None) -> Rung | None:
    """Return what ``--rung`` asks for."""
    return Rung(value) if value else None


def make_ready_file(path: Path) -> None:
    """
    Create the file of ``--ready-file``.

    Raises:
        TracerError: If it cannot be created.
    """
    try:
        path.touch()
    except OSError as error:
        raise TracerError(f"cannot create the ready file {path}: {error.strerror}") from error


def wanted(parameters: dict[str, Any], *, has_strays: bool) -> Wanted:
    """
    Take the ``--filter-*`` options out of a command's parameters.

    Args:
        parameters: What click passed; the filters are removed from it.
        has_strays: Whether to keep accepts of no shown connection, if nothing is filtered.
    """
    proto = parameters.pop("filter_proto")
    flows = Filter(
        client=parameters.pop("filter_client"),
        backend=parameters.pop("filter_backend"),
        port=parameters.pop("filter_port"),
        proto=PROTOCOLS[proto] if proto else None,
    )
    verdicts = frozenset(map(Verdict, parameters.pop("filter_verdict")))
    causes = frozenset(map(Cause, parameters.pop("filter_cause")))
    services = frozenset(parameters.pop("filter_service"))
    is_filtered = bool(verdicts or causes or services) or not flows.is_empty
    return Wanted(
        flows=flows,
        verdicts=verdicts,
        causes=causes,
        services=services,
        are_stray_accepts=has_strays and not is_filtered,
    )
