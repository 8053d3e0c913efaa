"""srcip demo: run scenarios on a lab cluster, and compare srcip's answers with the backends'."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from ipaddress import ip_network

import click

from exporters import jsonl
from exporters.demo import DemoWriter, kept_lines, scenario_to_line
from exporters.terminal import screen_of
from lab import hosts, kube_proxy, probe, relay, topology
from lab.agreement import Finding, Traced
from lab.hosts import FAMILIES, NODES
from lab.kube_proxy import Mode
from lab.probe import Answer
from lab.scenarios import SCENARIOS, Case, cases
from lab.services import OBJECTS, PROTOS
from lab.topology import Lab
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, live_views
from tracer.commands.run import stop_on_signals
from tracer.judge.cause import Cause
from tracer.judge.verdict import Judged
from tracer.kernel import ladder, netns, privileges
from tracer.kernel.attachment import NO_TCX
from tracer.kernel.ladder import Rung
from tracer.kernel.probes import has_tcx_links
from tracer.kernel.probing import NO_REASONS
from tracer.kernel.source import KernelSource, Settings
from tracer.pipeline import Pipeline, Wanted
from tracer.proxies import Proxies

# A record arrives within one poll; the rest is slack for a busy machine.
_PATIENCE_S = 5.0
_POLL_S = 0.1
_OBJECTS = ClusterChoice(
    file=OBJECTS, kubeconfig=None, context=None, is_off=False, mode=None, mark=None
)


@click.command(short_help="Run the tutorial's scenarios on a cluster in a box.")
@click.option(
    "--scenario",
    multiple=True,
    type=click.Choice([scenario.id for scenario in SCENARIOS], case_sensitive=False),
    metavar="ID",
    help="Only this scenario, such as S3 (docs/scenarios.md). May be given several times.",
)
@click.option(
    "--mode",
    multiple=True,
    type=click.Choice(kube_proxy.ALL_MODES),
    help="Only this mode of kube-proxy. May be given several times. Default: iptables and "
    "nftables; ipvs needs a kernel with IPVS, ipvsadm and ipset.",
)
@click.option(
    "--family",
    multiple=True,
    type=click.Choice(FAMILIES),
    help="Only this address family. May be given several times. Default: both.",
)
@click.option(
    "--proto",
    multiple=True,
    type=click.Choice(PROTOS),
    help="Only this protocol. May be given several times. Default: all.",
)
@options.programs_rung_option
@click.option(
    "--keep",
    is_flag=True,
    help="Run no scenario: print how to use the cluster, and keep it up until Ctrl-C.",
)
@options.output_option
def demo(
    scenario: tuple[str, ...],
    mode: tuple[str, ...],
    family: tuple[str, ...],
    proto: tuple[str, ...],
    rung: str | None,
    keep: bool,
    output: str,
) -> None:
    """
    Run the scenarios of the Kubernetes tutorial "Using Source IP", and check srcip's answers.

    Builds a cluster of two nodes, four pods and an outside client from network namespaces, loads
    rules that a real kube-proxy wrote (for IPVS: rules modelled on its source), connects to each
    Service in every way, and compares srcip's answer with the address that the backend printed.
    Removes the cluster afterwards, and any leftovers of a demo that was killed. Exits with 1 if an
    answer does not agree.

    \b
    Examples:
      srcip demo
      srcip demo --scenario S3 --scenario S5 --family ipv4
      srcip demo --keep                             the cluster alone, to try commands on it
      srcip demo -o json | jq -c 'select(.kind == "scenario")'
    """
    if keep:
        if scenario or family or proto or rung or len(mode) > 1 or output == "json":
            raise click.UsageError("--keep runs no scenario: it takes one --mode and nothing else")
        _keep(next(each for each in kube_proxy.ALL_MODES if not mode or each in mode))
        return
    privileges.require_for_tracing()
    asked = options.rung_of(rung)
    ladder.require_programs(asked)
    wanted = cases(
        modes=mode or kube_proxy.MODES,
        families=family or FAMILIES,
        protos=proto or PROTOS,
        scenarios=scenario,
        has_relay=True,
    )
    if not has_tcx_links():
        wanted = [case for case in wanted if case.scenario.relay is None]
        click.echo(f"without S9: proxies' headers are read at {NO_TCX}", err=True)
    if not wanted:
        raise click.UsageError("no scenario matches these options; see docs/scenarios.md")
    for each in {case.mode for case in wanted}:
        kube_proxy.require(each)
    writer = DemoWriter(sys.stdout, screen_of(sys.stdout))
    findings: list[Finding] = []
    for each in kube_proxy.ALL_MODES:
        chosen = [case for case in wanted if case.mode == each]
        if not chosen:
            continue
        found, judged = _run_mode(each, chosen, asked)
        findings += found
        if output == "json":
            for line in (*map(jsonl.to_line, judged), *map(scenario_to_line, found)):
                click.echo(line)
        else:
            writer.write(each, found)
    disagreeing = [finding for finding in findings if not finding.agrees]
    connections = "1 connection" if len(findings) == 1 else f"{len(findings)} connections"
    click.echo(
        f"{connections}, {len(findings) - len(disagreeing)} answered as the backend saw them",
        err=True,
    )
    sys.exit(1 if disagreeing else 0)


def _keep(mode: Mode) -> None:
    """Build a lab, print how to use it, and remove it when the user stops it."""
    kube_proxy.require(mode)
    with topology.build() as lab:
        kube_proxy.load(lab, mode)
        with stop_on_signals() as stop:
            click.echo("\n".join(kept_lines(lab, mode)))
            while not stop.is_set:
                time.sleep(_POLL_S)


def _run_mode(
    mode: Mode, chosen: Sequence[Case], asked: Rung | None
) -> tuple[list[Finding], list[Judged]]:
    """Build a lab, make the connections, and return the findings in the table's order."""
    with topology.build() as lab:
        kube_proxy.load(lab, mode)
        namespaces = [netns.find(f"{lab.netns(node)}={node}", node) for node in NODES]
        relayed = [case.scenario for case in chosen if case.scenario.relay is not None]
        settings = Settings(has_proxy_headers=bool(relayed))
        trusted = [ip_network(hosts.ROUTER_TO_NODES.of(family)) for family in FAMILIES]
        with ExitStack() as stack:
            if relayed:
                stack.enter_context(relay.serving(lab, list(dict.fromkeys(relayed))))
            views = stack.enter_context(live_views(_OBJECTS, namespaces))
            source = stack.enter_context(closing(ladder.open_programs(namespaces, settings, asked)))
            pipeline = Pipeline(
                source, Wanted(), views, proxies=Proxies(trusted), clock=time.monotonic_ns
            )
            told = _without_reasons(chosen) if NO_REASONS in source.info.not_seen else chosen
            answers = _probe(lab, mode, told)
            return _collect(pipeline, source, told, answers)


def _without_reasons(chosen: Sequence[Case]) -> list[Case]:
    """Leave out cases that need the kernel's drop reasons."""
    told = [case for case in chosen if case.cause != Cause.NO_LISTENER]
    left = sorted({case.scenario.id for case in chosen} - {case.scenario.id for case in told})
    if left:
        click.echo(f"without {', '.join(left)}: {NO_REASONS}", err=True)
    return told


def _probe(lab: Lab, mode: Mode, chosen: Sequence[Case]) -> dict[Case, Answer]:
    if not sys.stderr.isatty():
        return probe.run(lab, chosen)
    with click.progressbar(
        length=len(chosen), label=f"{mode:<9}", file=sys.stderr, width=30
    ) as bar:
        return probe.run(lab, chosen, on_answer=lambda _case, _answer: bar.update(1))


def _collect(
    pipeline: Pipeline, source: KernelSource, chosen: Sequence[Case], answers: dict[Case, Answer]
) -> tuple[list[Finding], list[Judged]]:
    """Read until every connection is explained or time is up; what is left then disagrees."""
    traced, everything = Traced(), []
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        judged = list(pipeline.judge(source.read(_POLL_S) or []))
        traced.add(judged)
        everything += judged
        findings = [traced.find(case, answers[case]) for case in chosen]
        if all(finding.agrees for finding in findings) or time.monotonic() > deadline:
            return findings, everything
