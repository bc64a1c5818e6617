"""What NetworkPolicies allow, evaluated as a network plugin would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_lint import Context, Doc, lint
from manifest_model import Workload
from manifest_network import (
    API,
    CLIENT,
    NEIGHBOUR,
    OUTSIDER,
    PUBLIC,
    RESOLVER,
    End,
    Need,
    allowed,
    policies_unreachable,
    unreachable,
)

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
LABELS = {"app": "server"}
POD: Doc = {
    "kind": "Deployment",
    "metadata": {"name": "server"},
    "spec": {
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 30000}]}]},
        }
    },
}
WORK = Workload(POD, POD["spec"]["template"])
HUB = End("the Hub", address=PUBLIC)
ALL = {"ipBlock": {"cidr": "0.0.0.0/0"}}
SYSTEM = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
RESOLVERS = SYSTEM | {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}


def policy(*rules: Doc, way: str = "egress", **spec: Any) -> Doc:
    body = {"podSelector": {"matchLabels": LABELS}, "policyTypes": [way.title()], way: list(rules)}
    return {"kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": body | spec}


def rule(*peers: Doc, port: int | str | None = None, **more: Any) -> Doc:
    ports = {"ports": [{"port": port, "protocol": "TCP"} | more]} if port is not None else {}
    return {"to": list(peers), "from": list(peers)} | ports


def reaches(
    end: End, *policies: Doc, direction: Any = "Egress", ports: tuple[int, ...] = (443,)
) -> bool:
    context = Context([POD, *policies], {}, frozenset())
    return allowed(context, Need(WORK, "server", direction, end, ports))


@pytest.mark.parametrize(
    ("expected", "policies"),
    [
        (True, []),
        (False, [policy()]),
        (True, [policy(rule(port=443), way="ingress")]),  # it isolates nothing outward
        (True, [policy(podSelector={"matchLabels": {"app": "other"}})]),
        (True, [policy(), policy(rule(ALL, port=443))]),  # they add up
        (True, [policy(rule())]),
        (False, [policy(rule(ALL, port=80))]),
        (True, [policy(rule(ALL, port=400, endPort=500))]),
        (False, [policy(rule(ALL, port=443, protocol="UDP"))]),
        (False, [policy(rule({"podSelector": {}}))]),
        (False, [policy(rule({"ipBlock": {"cidr": "10.0.0.0/8"}}))]),
        (False, [policy(rule({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["203.0.113.0/24"]}}))]),
        (False, [policy(policyTypes=["Ingress", "Egress"])]),
        (True, [policy(podSelector={"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]})]),
        (False, [policy(podSelector={"matchExpressions": [{"key": "app", "operator": "In", "values": ["server"]}]})]),
    ],
)  # fmt: skip
def test_a_public_address(expected: bool, policies: list[Doc]) -> None:
    assert reaches(HUB, *policies) is expected


@pytest.mark.parametrize(
    ("expected", "end", "peers"),
    [
        (True, RESOLVER, [RESOLVERS]),
        (True, RESOLVER, [{"namespaceSelector": {}}]),
        (True, RESOLVER, [{"ipBlock": {"cidr": "169.254.0.0/16"}}]),
        (False, RESOLVER, [{"podSelector": {}}]),  # those of the own namespace
        (True, API, [{"ipBlock": {"cidr": "192.0.2.1/32"}}]),  # the operator knows where it is
        (False, API, [{"namespaceSelector": {}}]),
        (True, NEIGHBOUR, [{"podSelector": {}}]),
        (True, NEIGHBOUR, [{"namespaceSelector": {}}]),
        (False, NEIGHBOUR, [{"podSelector": {"matchLabels": {"app": "gateway"}}}]),
        (True, OUTSIDER, [{"namespaceSelector": {"matchLabels": CLIENT}}]),
        (False, OUTSIDER, [{"podSelector": {}}]),
    ],
)
def test_the_other_end(expected: bool, end: End, peers: list[Doc]) -> None:
    assert reaches(end, policy(rule(*peers, port=443))) is expected


def test_ports_have_names_where_they_are_taken() -> None:
    opened = policy(rule(port="http"), way="ingress")
    assert reaches(NEIGHBOUR, opened, direction="Ingress", ports=(30000,))
    assert not reaches(NEIGHBOUR, opened, direction="Ingress", ports=(20000,))


def test_every_port_takes_a_rule_without_ports() -> None:
    assert not reaches(NEIGHBOUR, policy(rule({"podSelector": {}}, port=20000)), ports=())
    assert reaches(NEIGHBOUR, policy(rule({"podSelector": {}})), ports=())


def test_no_overlay_denies_what_it_needs() -> None:
    assert policies_unreachable(DEPLOY) == 0


@pytest.mark.parametrize("overlay", ["h100-pro-2x8", "h100-pro-2x8-lws"])
def test_two_nodes_without_a_way_out_are_found(overlay: str) -> None:
    """As both were: they could talk to each other, and neither download nor ask for a name."""
    docs = _rendered(overlay)
    fetch = [doc for doc in docs if doc["metadata"]["name"].startswith("dspark-sglang-fetch")]
    for doc in fetch:
        docs.remove(doc)
    found = unreachable(Context(docs, {}, frozenset()))
    denied = sorted((need.who, need.protocol, *need.ports) for need in found)
    names = [("server", "TCP", 53), ("server", "UDP", 53)]
    names += [
        ("fetch-target", "TCP", 53),
        ("fetch-target", "UDP", 53),
        ("fetch-target", "TCP", 443),
    ]
    assert denied == sorted(names * 2)
    reported = lint(docs, flags={}, sglang_env=frozenset())
    assert sum(finding.rule == "reachable" for finding in reported) == len(found)


def test_peers_need_every_port() -> None:
    docs = _rendered("h100-pro-2x8")
    (peers,) = [
        d for d in docs if d["kind"] == "NetworkPolicy" and "peers" in d["metadata"]["name"]
    ]
    peers["spec"]["egress"][0]["ports"] = [{"port": 20000, "protocol": "TCP"}]
    found = unreachable(Context(docs, {}, frozenset()))
    assert [need.ports for need in found] == [(), ()]
    assert "at TCP any port" in found[0].message


def test_a_router_with_another_secret_is_found() -> None:
    docs = _rendered("qwen3-8b-1xh100")
    (router,) = [d for d in docs if d["kind"] == "Deployment" and "router" in d["metadata"]["name"]]
    (container,) = router["spec"]["template"]["spec"]["containers"]
    (entry,) = [e for e in container["env"] if e["name"] == "API_KEY"]
    entry["valueFrom"]["secretKeyRef"]["name"] = "another"
    found = lint(docs, flags={}, sglang_env=frozenset())
    said = [finding.message for finding in found if finding.rule == "routers"]
    assert said == [
        "Deployment/dspark-sglang-qwen3-8b has another key, so it would be refused there"
    ]


def _rendered(overlay: str) -> list[Doc]:
    text = (DEPLOY / "rendered" / f"{overlay}.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))
