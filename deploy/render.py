"""
Make what is made from other files: the plain manifests, and the copies inside the chart.

``make manifests`` runs it. A test says when it must be run again.
"""

from pathlib import Path

import helm_python as helm

HERE = Path(__file__).parent
CHART = HERE / "helm/srcip"
# Helm reads no file outside the chart.
COPIES = {
    CHART / "files/srcip.rules.yaml": HERE / "prometheus/srcip.rules.yaml",
    CHART / "files/srcip.dashboard.json": HERE / "grafana/srcip.dashboard.json",
}
# What each plain manifest holds: the templates' names, in the order in which they are applied.
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
    """Return what each template gives, by its name without ending."""
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
    # Nobody's tool manages what was applied by hand.
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
