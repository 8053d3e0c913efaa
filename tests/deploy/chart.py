"""The chart as its tests see it: rendered, and parsed."""

import yaml

from deploy import render

NAMES = {"name": "srcip", "namespace": "srcip"}
# Everything that can be turned on.
EVERYTHING = {
    "namespace": {"create": True},
    "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}}]},
    "monitor": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "tlsConfig": {"insecureSkipVerify": True},
        "authorization": {"credentials": {"name": "token", "key": "token"}},
    },
    "tls": {"secretName": "srcip-tls"},
    "stream": {"hostPath": "/run/srcip", "group": 4242, "https": True},
    "prometheusRule": {"enabled": True, "runbookBase": "https://docs.example/"},
    "dashboard": {"enabled": True},
    "priorityClass": {"create": True},
    "image": {"pullSecrets": [{"name": "registry"}]},
    "securityContext": {"seLinuxOptions": {"type": "spc_t"}},
    "podLabels": {"team": "network"},
    "podAnnotations": {"note": "yes"},
    "affinity": {"nodeAffinity": {}},
    "agent": {"authorize": "kubernetes", "extraArgs": ["--masquerade-mark=0x4000"]},
}


def objects(values=None, **names):
    """Return the objects that the chart gives for these values, by kind."""
    rendered = render.render(values or {}, **{**NAMES, **names})
    rendered.pop("NOTES")
    found = {}
    for text in rendered.values():
        for each in yaml.safe_load_all(text):
            if each is not None:
                kind = each["kind"]
                name = each["metadata"]["name"]
                if name.endswith("-reader"):
                    kind = {"metrics": "MetricsReader", "stream": "StreamReader"}[
                        name.split("-")[-2]
                    ]
                assert found.setdefault(kind, each) is each, "two of a kind"
    return found


def daemonset(values=None):
    """Return the pod's spec, and its only container."""
    spec = objects(values)["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container
