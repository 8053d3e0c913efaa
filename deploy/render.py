"""
Generate the plain manifests and the copies inside the chart.

``make manifests`` runs it. A test fails when they are out of date.
"""

from pathlib import Path

import helm_python as helm

HERE = Path(__file__).parent
CHART = HERE / "helm/srcip"
# Helm cannot read files outside the chart.
COPIES = {
    CHART / "files/srcip.rules.yaml": HERE / "prometheus/srcip.rules.yaml",
    CHART / "files/srcip.dashboard.json": HERE / "grafana/srcip.dashboard.json",
}
# The templates in each plain manifest, in the order in which they are applied.
MANIFESTS = {
    "srcip.yaml": ("namespace", "rbac", "daemonset"),
    "monitoring.yaml": ("monitor", "prometheusrule"),
}
VALUES = {
    "namespace": {"create": True},
    "monitor": {"enabled": True},
    "prometheusRule": {"enabled": True},
}
HEAD = "# Made by 'make manifests' from deploy/helm/srcip.\n"


def render(values, *, name="srcip", namespace="srcip"):
    """Return the text that each template renders to, by its name without suffix."""
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name=name, namespace=namespace)
    return {Path(path).stem: text for path, text in rendered.items()}


def manifests():
    """Return the plain manifests by file name."""
    rendered = render(VALUES)
    return {
        name: HEAD + "".join(f"---\n{_plain(rendered[each])}\n" for each in templates)
        for name, templates in MANIFESTS.items()
    }


def _plain(text):
    # No tool manages what is applied by hand.
    lines = text.strip().splitlines()
    return "\n".join(line.rstrip() for line in lines if "app.kubernetes.io/managed-by" not in line)


def main():
    """Write all of them."""
    for copy, source in COPIES.items():
        copy.write_bytes(source.read_bytes())
    for name, text in manifests().items():
        (HERE / "manifests" / name).write_text(text)


if __name__ == "__main__":
    main()
