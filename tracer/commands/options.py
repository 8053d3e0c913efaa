"""Options that several commands share."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tracer.commands.values import Cidr, Number, ServiceName
from tracer.errors import TracerError
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.kernel import netns
from tracer.kernel.ladder import Rung
from tracer.kernel.netns import Netns
from tracer.model import PROTOCOLS, Filter
from tracer.pipeline import Wanted

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Make one decorator of several, in the order in which help shows them."""

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
        help="Network namespace to look into: a name of 'ip netns list', a process id, or a path;"
        " with the node's name after '='. May be given several times. Default: the current one.",
    ),
    click.option(
        "--node-name",
        metavar="NAME",
        help="Name of this node in the output. Default: the host name.",
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
        help="Only connections that an address in CIDR answers.",
    ),
    click.option(
        "--filter-port",
        type=Number(1, 65535),
        metavar="PORT",
        help="Only connections to this port, as the client addressed it or as the backend"
        " answers it.",
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
        help="Only this verdict. May be given several times.",
    ),
    click.option(
        "--filter-cause",
        type=click.Choice([cause.value for cause in Cause]),
        metavar="CAUSE",
        multiple=True,
        help="Only this cause ('srcip explain --causes'). May be given several times.",
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
    help="Believe the headers of proxies in CIDR. Of several proxies in a row, the last that is not"
    " in the list is the client. May be given several times.",
)

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="table: aligned rows for people; json: one object a line, and nothing else on stdout.",
)

path_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "diagram"]),
    default="table",
    show_default=True,
    help="table: aligned rows for people; json: one object a line, and nothing else on stdout;"
    " diagram: each connection as a picture of its way, hop by hop.",
)

packets_option = click.option(
    "--packets",
    type=Number(1, 1000),
    metavar="N",
    help="Watch the first N packets of each direction hop by hop: with -o json a line for each"
    " path instead of each connection. Default: none; 1 with -o diagram.",
)


def _rung(*rungs: Rung) -> Decorator:
    return click.option(
        "--rung",
        type=click.Choice([rung.value for rung in rungs]),
        help=f"Look at the kernel in this way alone: {'; '.join(map(_RUNGS.__getitem__, rungs))}."
        " Default: the first that the kernel offers.",
    )


_RUNGS = {
    Rung.LINKS: "links, BPF netfilter links",
    Rung.PROBES: "probes, on functions of conntrack and NAT",
    Rung.EVENTS: "events, those of conntrack",
}
rung_option = _rung(*Rung)
programs_rung_option = _rung(Rung.LINKS, Rung.PROBES)

explain_option = click.option(
    "--explain",
    is_flag=True,
    help="Under each row of the table: what the verdict rests on, and what would keep the source.",
)

expect_option = click.option(
    "--expect",
    type=click.Choice([verdict.value for verdict in Verdict]),
    help="Exit with 3 if any connection or drop has another verdict, with 4 if there was none.",
)

count_option = click.option(
    "--count",
    type=Number(1),
    metavar="N",
    help="Stop after N connections and drops.",
)

ready_option = click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Make FILE once everything is attached, for scripts that wait for it.",
)

record_option = click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also keep the raw records in FILE, for 'srcip replay'.",
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
    Make the file of ``--ready-file``.

    Raises:
        TracerError: If it cannot be made.
    """
    try:
        path.touch()
    except OSError as error:
        raise TracerError(f"cannot make the ready file {path}: {error.strerror}") from error


def wanted(parameters: dict[str, Any], *, has_strays: bool) -> Wanted:
    """
    Take the ``--filter-*`` options out of a command's parameters.

    Args:
        parameters: What click passed; the filters are removed from it.
        has_strays: Whether accepts without a shown connection are wanted where nothing is filtered.
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
