"""What every container has to reach, held against what the NetworkPolicies of its pod allow.

Policies add up: a pod that at least one selects for a direction may do what any of them allows, and nothing else. A
pod that none selects may do everything. Kubelet probes are let through by every network plugin, so they are no need.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from manifest_model import Context, Doc, Workload, arguments, environment, expand, matches, serves

from tests.deploy.generate import overlays, render

Direction = Literal["Egress", "Ingress"]
Labels = Mapping[str, str]
#: An address that only the operator knows: any block may be the one that holds it.
ANY = "any"
#: Addresses for documentation (RFC 5737) stand for public ones.
PUBLIC = "203.0.113.1"
CLIENT = {"dspark-sglang-client": "true"}


@dataclass(frozen=True)
class End:
    """The other end of a connection, as a policy can name it."""

    what: str
    #: Of a pod; None where it is none.
    labels: Labels | None = None
    #: Of the pod's namespace; None for the namespace of the policy.
    namespace: Labels | None = None
    address: str | None = None


#: The cluster's name service, or a resolver on the node with its link-local address.
RESOLVER = End(
    "the name service",
    {"k8s-app": "kube-dns"},
    {"kubernetes.io/metadata.name": "kube-system"},
    "169.254.20.10",
)
API = End("the Kubernetes API", address=ANY)
NEIGHBOUR = End("pods of its namespace", {})
OUTSIDER = End("pods of a client's namespace", {}, CLIENT)


@dataclass(frozen=True)
class Need:
    """A connection that a pod has to make (Egress) or take (Ingress)."""

    work: Workload
    who: str
    direction: Direction
    end: End
    #: Any of these is enough; empty: it needs every port.
    ports: tuple[int, ...]
    protocol: str = "TCP"

    @property
    def message(self) -> str:
        at = " or ".join(map(str, self.ports)) or "any port"
        way = "cannot reach" if self.direction == "Egress" else "cannot be reached by"
        return f"{self.who} {way} {self.end.what} at {self.protocol} {at}: no policy allows it"


# --- What policies allow ----------------------------------------------------------------------


def _policies(context: Context, work: Workload, direction: Direction) -> list[Doc]:
    """The policies that select a pod for a direction."""
    found = []
    for doc in context.of_kind("NetworkPolicy"):
        spec = doc["spec"]
        usual = ["Ingress", *(["Egress"] if "egress" in spec else [])]
        if direction in spec.get("policyTypes", usual) and matches(
            spec["podSelector"], work.labels
        ):
            found.append(doc)
    return found


def _rules(context: Context, work: Workload, direction: Direction) -> list[Doc] | None:
    """The rules that hold for a pod; None where no policy selects it."""
    chosen = _policies(context, work, direction)
    if not chosen:
        return None
    return [rule for doc in chosen for rule in doc["spec"].get(direction.lower(), [])]


def _holds(peer: Doc, end: End) -> bool:
    """Whether one entry of ``to`` or ``from`` names this end."""
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if end.address in (None, ANY):
            return end.address == ANY
        address = ipaddress.ip_address(str(end.address))
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(cut) for cut in block.get("except", [])
        )
    if end.labels is None:
        return False
    selector = peer.get("namespaceSelector")
    # Labels of the policy's own namespace are the operator's: only an empty selector is sure to hold.
    same = end.namespace is None if selector is None else matches(selector, end.namespace or {})
    return same and matches(peer.get("podSelector", {}), end.labels)


def _names(rule: Doc, direction: Direction, end: End) -> bool:
    peers = rule.get("to" if direction == "Egress" else "from")
    return not peers or any(_holds(peer, end) for peer in peers)


def _opens(rule: Doc, need: Need, named: Mapping[str, int]) -> bool:
    """Whether the rule's ports include one that the need asks for."""
    entries = rule.get("ports")
    if not entries:
        return True
    for entry in entries:
        first = entry.get("port")
        first = named.get(first) if isinstance(first, str) else first
        if entry.get("protocol", "TCP") != need.protocol or first is None:
            continue
        if any(first <= port <= entry.get("endPort", first) for port in need.ports):
            return True
    return False


def allowed(context: Context, need: Need) -> bool:
    """Whether the policies of the rendering let a connection through."""
    rules = _rules(context, need.work, need.direction)
    if rules is None:
        return True
    # A port's name is looked up at the pod that is connected to.
    named = {p["name"]: p["containerPort"] for p in need.work.ports if "name" in p}
    named = named if need.direction == "Ingress" else {}
    return any(_names(r, need.direction, need.end) and _opens(r, need, named) for r in rules)


def unreachable(context: Context) -> list[Need]:
    """Every need of the rendering that its policies do not allow."""
    return [need for need in needs(context) if not allowed(context, need)]


def policies_unreachable(deploy: Path) -> int:
    """Needs that policies do not allow, over all overlays."""
    found = 0
    for overlay in overlays(deploy):
        docs = list(yaml.safe_load_all(render(overlay)))
        found += len(unreachable(Context(docs, {}, frozenset())))
    return found


# --- What containers need ---------------------------------------------------------------------


def needs(context: Context) -> Iterator[Need]:
    """What every container has to reach, and who has to reach every pod."""
    for work in context.workloads():
        for container in work.containers:
            yield from _container(context, work, container)
        scraped = work.annotations.get("prometheus.io/port")
        if scraped:
            yield Need(work, "its metrics", "Ingress", OUTSIDER, (int(scraped),))
    for service in context.of_kind("Service"):
        if service["spec"].get("clusterIP") == "None":
            continue  # for the pods behind it only: their own needs say so
        for work, port in _behind(context, service):
            for end in (NEIGHBOUR, OUTSIDER):
                yield Need(work, service["metadata"]["name"], "Ingress", end, (port,))


def _container(context: Context, work: Workload, container: Doc) -> Iterator[Need]:
    name = container["name"]
    hosts: list[str] = []
    for host, port in _downloads(container, context) + _urls(container, context):
        hosts.append(host)
        service = context.named("Service", host)
        if service is None:
            yield Need(work, name, "Egress", End(host, address=_address(host)), (port,))
        for other, inside in _behind(context, service, port) if service else []:
            yield from _between(work, name, other, (inside,))
    for host, other in _peers(context, work, container):
        hosts.append(host)
        # NCCL and Gloo listen wherever they like.
        yield from _between(work, name, other, ())
    if routes(container):
        hosts.append("kubernetes.default.svc")
        # Policies hold before or after a Service address becomes the server's, plugin by plugin.
        yield Need(work, name, "Egress", API, (443, 6443))
        port = int(_flags(container, context).get("--service-discovery-port", ["80"])[0])
        for other in discovered(context, work, container):
            yield from _between(work, name, other, (port,))
    if any(not _is_address(host) for host in hosts):
        for protocol in ("UDP", "TCP"):
            yield Need(work, name, "Egress", RESOLVER, (53,), protocol)


def _between(work: Workload, who: str, other: Workload, ports: tuple[int, ...]) -> Iterator[Need]:
    """A connection between two pods of the rendering: out of one, into the other."""
    yield Need(work, who, "Egress", End(other.where, other.labels), ports)
    yield Need(other, other.where, "Ingress", End(work.where, work.labels), ports)


def _flags(container: Doc, context: Context) -> dict[str, list[str]]:
    return dict(arguments(container, context))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _address(host: str) -> str:
    """An address for a host outside the cluster; the operator's own may lie anywhere."""
    if _is_address(host):
        return host
    return PUBLIC if host in ("huggingface.co", "pypi.org") else ANY


def _downloads(container: Doc, context: Context) -> list[tuple[str, int]]:
    words = container.get("command", [])[:2]
    if words == ["hf", "download"]:
        mirror = environment(container, context).get("HF_ENDPOINT", "https://huggingface.co")
        found = re.match(r"https?://([^/:]+)(?::(\d+))?", mirror)
        if found:
            plain = 80 if mirror.startswith("http:") else 443
            return [(found[1], int(found[2] or plain))]
    fetches = words == ["dspark", "demo"] and "--fetch-only" in container.get("args", [])
    return [("pypi.org", 443)] if fetches else []


def _urls(container: Doc, context: Context) -> list[tuple[str, int]]:
    values = environment(container, context)
    words = [expand(word, values) for word in container.get("args", [])]
    found = [re.fullmatch(r"http://([a-z0-9.-]+):(\d+)", word) for word in words]
    return [(match[1], int(match[2])) for match in found if match]


def _behind(
    context: Context, service: Doc, port: int | None = None
) -> Iterator[tuple[Workload, int]]:
    """The pods of a Service, each with its own port (of the Service's ``port``, or of all)."""
    selector = {"matchLabels": service["spec"].get("selector", {})}
    for work in context.workloads():
        named = {p.get("name"): p["containerPort"] for p in work.ports}
        for entry in service["spec"]["ports"] if matches(selector, work.labels) else []:
            if port in (None, entry["port"]):
                target = entry.get("targetPort", entry["port"])
                target = named.get(target, target)
                if isinstance(target, int):  # a name that no container has is a fault of `ports`
                    yield work, target


def _peers(context: Context, work: Workload, container: Doc) -> Iterator[tuple[str, Workload]]:
    """The other nodes of a server that runs on several, with the host that they meet at."""
    own = _flags(container, context).get("--dist-init-addr")
    if not serves(container) or not own:
        return
    for other in context.workloads():
        # StatefulSets of one node each: a pod is not its own peer.
        for server in filter(serves, other.pod["containers"]):
            if (
                other.template is not work.template
                and _flags(server, context).get("--dist-init-addr") == own
            ):
                yield own[0].rpartition(":")[0], other


# --- Routers ----------------------------------------------------------------------------------


def routes(container: Doc) -> bool:
    return "sglang_router.launch_router" in container.get("command", [])


def discovered(context: Context, work: Workload, container: Doc) -> list[Workload]:
    """The servers that a router's ``--selector`` finds."""
    fields: dict[str, str] = {}
    for entry in container.get("env", []):
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        found = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        if found:
            fields[entry["name"]] = work.labels.get(found[1], "")
    words = dict(_raw_flags(container)).get("--selector", [])
    labels = dict(expand(word, fields).split("=", 1) for word in words)
    return [w for w in context.workloads() if labels and matches({"matchLabels": labels}, w.labels)]


def _raw_flags(container: Doc) -> Sequence[tuple[str, list[str]]]:
    """Flags with their values as they are written, before ``$(NAME)`` is replaced."""
    return arguments({"args": container.get("args", [])}, Context([], {}, frozenset()))


def secret_of(container: Doc, flag: str) -> tuple[str, str] | None:
    """Secret and key behind a flag whose value is ``$(NAME)``; None where it is something else."""
    (value, *_) = dict(_raw_flags(container)).get(flag) or [""]
    sources: dict[str, Any] = {
        f"$({entry['name']})": entry.get("valueFrom", {}).get("secretKeyRef")
        for entry in container.get("env", [])
    }
    found = sources.get(value)
    return (found["name"], found["key"]) if found and not found.get("optional") else None


def router_faults(context: Context, work: Workload, container: Doc) -> Iterator[str]:
    """A router with which somebody else's worker could get prompts and keys."""
    secret = secret_of(container, "--api-key")
    if secret is None:
        yield "it listens without --api-key from a Secret: anybody may register a worker"
    servers = discovered(context, work, container)
    if not servers:
        yield "its --selector finds no server"
    for other in servers:
        for server in filter(serves, other.pod["containers"]):
            if secret and secret_of(server, "--api-key") not in (None, secret):
                yield f"{other.where} has another key, so it would be refused there"
    rules = _rules(context, work, "Egress")
    anybody = End("anybody", address=PUBLIC)
    if rules is None or any(_names(rule, "Egress", anybody) for rule in rules):
        yield "its policies let it connect to any public address, so a worker may be anywhere"
