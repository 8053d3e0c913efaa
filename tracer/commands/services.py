"""Look up the Services that a user names, and suggest similar names."""

import difflib
from collections.abc import Collection

import click

from exporters.terminal import printable
from tracer.cluster.index import Cluster
from tracer.cluster.objects import Service
from tracer.errors import TracerError


def find_service(cluster: Cluster, name: tuple[str, str]) -> Service:
    """
    Return a Service by namespace and name.

    Raises:
        TracerError: If there is none; the message suggests similar names.
    """
    service = cluster.service(*name)
    if service is not None:
        return service
    near = [str(each.key) for each in cluster.services() if each.name == name[1]]
    near = near or difflib.get_close_matches(
        "/".join(name), [str(each.key) for each in cluster.services()], cutoff=0.8
    )
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    raise TracerError(f"no Service {'/'.join(name)} in the cluster{hint}")


def warn_of_unknown(services: Collection[tuple[str, str]], cluster: Cluster | None) -> None:
    """
    Warn of Services in ``--filter-service`` that do not exist, or cannot be known.

    Args:
        services: Namespaces and names.
        cluster: The objects; None if there are none.
    """
    if cluster is None:
        if services:
            click.echo("srcip: --filter-service matches nothing without cluster objects", err=True)
        return
    for name in sorted(services):
        try:
            find_service(cluster, name)
        except TracerError as error:
            click.echo(f"srcip: {printable(str(error))}", err=True)
