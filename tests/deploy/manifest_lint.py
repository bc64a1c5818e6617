"""Faults between the fields of Kubernetes manifests, which no schema sees.

``lint`` takes the documents that kustomize renders and returns one :class:`Finding` for each
fault. It knows how SGLang 0.5.23 behaves behind its probes and at shutdown, which flags it takes
(``sglang_source``), and our own settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifest_model import (
    DRAIN_ANNOTATION,
    DRAIN_POLL,
    FROM_OPERATOR,
    GPU,
    HEALTH_DEADLINE,
    HEALTH_MARGIN,
    LWS_VARIABLES,
    PROBE,
    REFERENCE,
    REVISION_LABEL,
    SCHEDULER_EXIT,
    SECURITY_ANNOTATION,
    VOLUMES,
    WRITTEN,
    Context,
    Doc,
    Workload,
    arguments,
    environment,
    expand,
    matches,
    serves,
)
from manifest_network import router_faults, routes, unreachable
from sglang_source import Arity

from dspark_sglang.config import read_settings
from dspark_sglang.errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """One fault: which rule, in which object, and what is wrong."""

    rule: str
    where: str
    message: str


# --- The rules ------------------------------------------------------------------------------

Fault = tuple[str, str]
Rule = Callable[[Context], Iterator[Fault]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    RULES[function.__name__.replace("_", "-")] = function
    return function


def lint(
    docs: Sequence[Doc], *, flags: Mapping[str, Arity], sglang_env: frozenset[str]
) -> list[Finding]:
    """Every fault of one rendering, in the order of the rules."""
    context = Context(docs, flags, sglang_env)
    return [
        Finding(name, where, message)
        for name, check in RULES.items()
        for where, message in check(context)
    ]


@rule
def selectors(context: Context) -> Iterator[Fault]:
    """Every selector is specific and matches pods of a workload in the same rendering."""
    workloads = context.workloads()
    for work in workloads:
        selector = work.doc["spec"].get("selector")
        own = [selector] if selector else []
        own += [t["labelSelector"] for t in work.pod.get("topologySpreadConstraints", [])]
        if not all(s.get("matchLabels") and matches(s, work.labels) for s in own):
            yield work.where, "a selector does not match the pod labels"
    others = [(d, {"matchLabels": d["spec"].get("selector")}) for d in context.of_kind("Service")]
    others += [(d, d["spec"]["selector"]) for d in context.of_kind("PodDisruptionBudget")]
    others += [(d, d["spec"]["podSelector"]) for d in context.of_kind("NetworkPolicy")]
    others += [(d, d["spec"]["selector"]) for d in context.of_kind("PodMonitor")]
    for doc, selector in others:
        where = f"{doc['kind']}/{doc['metadata']['name']}"
        if not selector.get("matchLabels"):
            yield where, "its selector is empty: it would select every pod or none"
        elif not any(matches(selector, work.labels) for work in workloads):
            yield where, f"{selector['matchLabels']} matches no pod"


@rule
def ports(context: Context) -> Iterator[Fault]:
    """Every port names its protocol, and every port that is asked for is declared."""
    for work in context.workloads():
        for port in work.ports:
            if "protocol" not in port:
                yield work.where, f"port {port['containerPort']} names no protocol"
        for container in work.pod["containers"]:
            for name, probe in _probes(container):
                if not work.has_port(probe["httpGet"]["port"]):
                    yield work.where, f"{name} asks the undeclared port {probe['httpGet']['port']}"
        scraped = work.annotations.get("prometheus.io/port")
        if scraped and not work.has_port(int(scraped)):
            yield work.where, f"prometheus.io/port {scraped} is not declared"
    for doc in context.of_kind("Service", "NetworkPolicy"):
        where = f"{doc['kind']}/{doc['metadata']['name']}"
        spec = doc["spec"]
        selector = spec.get("podSelector", {"matchLabels": spec.get("selector", {})})
        chosen = [work for work in context.workloads() if matches(selector, work.labels)]
        asked = [(p.get("targetPort", p["port"]), p) for p in spec.get("ports", [])]
        asked += [(p["port"], p) for r in spec.get("ingress", []) for p in r.get("ports", [])]
        outward = [p for r in spec.get("egress", []) for p in r.get("ports", [])]
        for target, _ in asked:
            if not all(work.has_port(target) for work in chosen):
                yield where, f"no container declares the port {target}"
        if any("protocol" not in p for p in [p for _, p in asked] + outward):
            yield where, "a port names no protocol"


@rule
def volumes(context: Context) -> Iterator[Fault]:
    """Volumes and mounts belong together; memory volumes are bounded; no host volume."""
    for work in context.workloads():
        declared = {v["name"]: v for v in work.pod.get("volumes", [])}
        declared |= {c["metadata"]["name"]: {"name": c["metadata"]["name"]} for c in work.claims}
        mounted = {m["name"] for c in work.containers for m in c.get("volumeMounts", [])}
        for name in sorted(mounted - set(declared)):
            yield work.where, f"volumeMount {name} has no volume"
        for name in sorted(set(declared) - mounted):
            yield work.where, f"volume {name} is never mounted"
        for name, volume in declared.items():
            if not set(volume) - {"name"} <= VOLUMES:
                yield work.where, f"volume {name} is of a type the restricted level forbids"
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield work.where, f"emptyDir {name} has no sizeLimit"


@rule
def writable_paths(context: Context) -> Iterator[Fault]:
    """What the process writes lies on a writable volume, for its root is read-only."""
    for work in context.workloads():
        for container in work.containers:
            mounts = container.get("volumeMounts", [])
            targets = [m["mountPath"] for m in mounts if not m.get("readOnly")]
            values = environment(container, context)
            wanted = {"/tmp"} | {values[name] for name in WRITTEN if values.get(name)}
            if "HOME" not in values:
                yield work.where, f"{container['name']}: HOME is not set"
            for path in sorted(wanted):
                if not any(Path(path).is_relative_to(target) for target in targets):
                    yield work.where, f"{container['name']}: {path} is not writable"


@rule
def addresses(context: Context) -> Iterator[Fault]:
    """A URL in a container's command names a Service of the rendering, and its port."""
    for work in context.workloads():
        for container in work.containers:
            values = environment(container, context)
            for word in container.get("args", []):
                match = re.fullmatch(r"http://([a-z0-9.-]+):(\d+)", expand(word, values))
                service = context.named("Service", match[1]) if match else None
                if match and service is None:
                    yield work.where, f"{container['name']}: no Service {match[1]}"
                elif (
                    match
                    and service
                    and int(match[2]) not in [port["port"] for port in service["spec"]["ports"]]
                ):
                    yield work.where, f"{container['name']}: {match[1]} has no port {match[2]}"


@rule
def references(context: Context) -> Iterator[Fault]:
    """ConfigMaps, claims, the ServiceAccount and every $(NAME) exist."""
    for work in context.workloads():
        asked = [("ServiceAccount", work.pod.get("serviceAccountName", "default"))]
        for volume in work.pod.get("volumes", []):
            asked += [
                ("ConfigMap", v["name"])
                for k, v in volume.items()
                if k == "configMap" and not v.get("optional") and v["name"] not in FROM_OPERATOR
            ]
            claim = volume.get("persistentVolumeClaim")
            asked += [("PersistentVolumeClaim", claim["claimName"])] if claim else []
        for container in work.containers:
            sources = container.get("envFrom", []) + [
                {"configMapRef": e["valueFrom"]["configMapKeyRef"]}
                for e in container.get("env", [])
                if "configMapKeyRef" in e.get("valueFrom", {})
            ]
            asked += [
                ("ConfigMap", s["configMapRef"]["name"]) for s in sources if "configMapRef" in s
            ]
            known = environment(container, context)
            words = container.get("command", []) + container.get("args", [])
            for word in words + [e.get("value", "") for e in container.get("env", [])]:
                for match in REFERENCE.finditer(word):
                    if match[2] and match[2] not in known and not _injected(work, match[2]):
                        yield work.where, f"{container['name']}: {match[0]} has no value"
        for kind, name in asked:
            if context.named(kind, name) is None:
                yield work.where, f"{kind} {name} does not exist"


def _injected(work: Workload, name: str) -> bool:
    return work.doc["kind"] == "LeaderWorkerSet" and name in LWS_VARIABLES


def _probes(container: Doc) -> list[tuple[str, Doc]]:
    names = ("startupProbe", "readinessProbe", "livenessProbe")
    return [(n, container[n]) for n in names if "httpGet" in container.get(n, {})]


@rule
def probes(context: Context) -> Iterator[Fault]:
    """A server has all three probes, each on the path and with the timeout SGLang needs."""
    for work in context.workloads():
        for container in filter(serves, work.pod["containers"]):
            found = dict(_probes(container))
            asked = set(found) | ({"startupProbe"} if "startupProbe" in container else set())
            for missing in {"startupProbe", "readinessProbe", "livenessProbe"} - asked:
                yield work.where, f"{missing} is missing"
            if work.role == "worker":
                for name, probe in found.items():
                    if probe["httpGet"]["path"] != "/health":
                        yield work.where, f"{name}: a rank above 0 answers /health only"
                continue
            command = container.get("startupProbe", {}).get("exec", {}).get("command", [])
            if command and PROBE not in command:
                yield work.where, "startupProbe runs something else than our probe"
            deadline = int(
                environment(container, context).get("SGLANG_HEALTH_CHECK_TIMEOUT", HEALTH_DEADLINE)
            )
            for name, probe in found.items():
                path, timeout = probe["httpGet"]["path"], probe.get("timeoutSeconds", 1)
                if path.startswith("/health"):
                    if name == "readinessProbe":
                        yield work.where, "readiness must ask /ready: /health generates a token"
                    if timeout < deadline + HEALTH_MARGIN:
                        yield (
                            work.where,
                            f"{name}: {path} may take {deadline} s, so timeoutSeconds must be "
                            f"{deadline + HEALTH_MARGIN} or more, not {timeout}",
                        )
                elif path != "/ready":
                    yield work.where, f"{name} asks {path}, neither /ready nor /health"
                elif name == "livenessProbe":
                    yield work.where, "liveness must ask /health: /ready is 503 when paused"
                if probe.get("periodSeconds", 10) < timeout:
                    yield work.where, f"{name}: periodSeconds is below timeoutSeconds"
            startup = _budget(container.get("startupProbe", {}))
            if startup < 120:
                yield work.where, f"startupProbe allows {startup} s; loading takes longer"
            rolls = work.doc["kind"] == "Deployment"
            if rolls and work.doc["spec"].get("progressDeadlineSeconds", 600) <= startup:
                yield work.where, f"progressDeadlineSeconds does not exceed start-up's {startup} s"


def _budget(probe: Doc) -> int:
    return probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10)


@rule
def shutdown(context: Context) -> Iterator[Fault]:
    """The grace period covers preStop, the drain and the schedulers' exit."""
    for work in context.workloads():
        for container in filter(serves, work.pod["containers"]):
            hook = container.get("lifecycle", {}).get("preStop", {})
            pause = hook.get("sleep", {}).get("seconds", 0)
            if pause < 5:
                yield work.where, "no preStop sleep of 5 s: SGLang takes requests after SIGTERM"
            drain = int(work.annotations.get(DRAIN_ANNOTATION, -1))
            if drain < 0:
                yield work.where, f"the annotation {DRAIN_ANNOTATION} is missing"
            need = pause + DRAIN_POLL + max(drain, 0) + DRAIN_POLL + SCHEDULER_EXIT
            grace = work.pod.get("terminationGracePeriodSeconds", 30)
            if grace <= need:
                yield work.where, f"terminationGracePeriodSeconds {grace} does not exceed {need}"


@rule
def restricted(context: Context) -> Iterator[Fault]:
    """The restricted Pod Security level, a read-only root and no API token."""
    for work in context.workloads():
        pod, security = work.pod, work.pod.get("securityContext", {})
        # More than restricted has to be said, and why.
        stated = work.annotations.get(SECURITY_ANNOTATION, "")
        more = {"IPC_LOCK"} if stated.startswith("privileged: ") else set()
        calls_api = work.labels.get("app.kubernetes.io/component") == "router"
        account = context.named("ServiceAccount", pod.get("serviceAccountName", "")) or {}
        wanted = {
            "runAsNonRoot": security.get("runAsNonRoot") is True,
            "a runAsUser other than 0": security.get("runAsUser", 0) > 0,
            "seccomp RuntimeDefault": security.get("seccompProfile", {}).get("type")
            == "RuntimeDefault",
            "no host namespace": not any(pod.get(k) for k in ("hostNetwork", "hostPID", "hostIPC")),
            "automountServiceAccountToken false on the pod": calls_api
            or pod.get("automountServiceAccountToken") is False,
            "automountServiceAccountToken false on the ServiceAccount": account.get(
                "automountServiceAccountToken"
            )
            is False,
        }
        for container in work.containers:
            own, name = container.get("securityContext", {}), container["name"]
            capabilities = own.get("capabilities", {})
            wanted |= {
                f"{name}: privileged unset": not own.get("privileged"),
                f"{name}: runAsUser other than 0": own.get("runAsUser", 1) > 0,
                f"{name}: runAsNonRoot kept": own.get("runAsNonRoot", True),
                f"{name}: allowPrivilegeEscalation false": own.get("allowPrivilegeEscalation")
                is False,
                f"{name}: readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
                f"{name}: drop ALL": capabilities.get("drop") == ["ALL"]
                and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"} | more,
                f"{name}: no hostPort": not any(
                    "hostPort" in p for p in container.get("ports", [])
                ),
            }
        for what, holds in wanted.items():
            if not holds:
                yield work.where, f"the restricted level wants {what}"


@rule
def resources(context: Context) -> Iterator[Fault]:
    """CPU and memory are requested, and memory is limited to what is requested."""
    for work in context.workloads():
        for container in work.containers:
            asked = container.get("resources", {})
            requests, limits = asked.get("requests", {}), asked.get("limits", {})
            if not {"cpu", "memory"} <= set(requests) or "memory" not in limits:
                yield work.where, f"{container['name']}: cpu and memory requests or memory limit"
            elif requests["memory"] != limits["memory"]:
                yield work.where, f"{container['name']}: memory request and limit differ"
            if requests.get(GPU) != limits.get(GPU):
                yield work.where, f"{container['name']}: {GPU} request and limit differ"
        for container in filter(serves, work.pod["containers"]):
            yield from ((work.where, message) for message in _gpu_faults(container, context))


def _gpu_faults(container: Doc, context: Context) -> Iterator[str]:
    """Ranks and GPUs of a server are as many."""
    chosen = {name: values[0] for name, values in arguments(container, context) if values}
    gpus = int(container.get("resources", {}).get("limits", {}).get(GPU, 0))
    ranks = int(chosen.get("--tp-size", 1)) * int(chosen.get("--pp-size", 1))
    if chosen.get("--device") == "cpu":
        if gpus:
            yield "a server on the CPU takes GPUs"
    elif gpus * int(chosen.get("--nnodes", 1)) != ranks:
        yield f"{ranks} ranks on {chosen.get('--nnodes', 1)} nodes of {gpus} GPUs"


@rule
def images(context: Context) -> Iterator[Fault]:
    """Images name a release or a digest."""
    for work in context.workloads():
        for name in [container["image"] for container in work.containers]:
            if "@sha256:" not in name and ":" not in name.rsplit("/", 1)[-1]:
                yield work.where, f"image {name} has neither a tag nor a digest"
            elif name.endswith(":latest"):
                yield work.where, f"image {name} is not a release"


@rule
def settings(context: Context) -> Iterator[Fault]:
    """Every DSPARK_* is one of our settings with a usable value, every SGLANG_* is read."""
    for work in context.workloads():
        if work.pod.get("enableServiceLinks", True):
            yield work.where, "enableServiceLinks must be false: a Service dspark-* sets DSPARK_*"
        for container in work.containers:
            values = environment(container, context)
            try:
                read_settings(values)
            except ConfigError as error:
                yield work.where, f"{container['name']}: {error}"
            for name in values:
                if name.startswith("SGLANG_") and name not in context.sglang_env:
                    yield work.where, f"{container['name']}: SGLang does not read {name}"


@rule
def serve_arguments(context: Context) -> Iterator[Fault]:
    """The server's flags exist in SGLang, have their values, and ask for DSPARK."""
    for work in context.workloads():
        for container in filter(serves, work.containers):
            given = [(n, v) for n, v in arguments(container, context) if n not in ("--rdma",)]
            for name, values in given:
                yield from ((work.where, m) for m in _flag_faults(name, values, context))
            chosen = dict(given)
            if len(chosen) < len(given):
                yield work.where, "a flag is given twice"
            if chosen.get("--speculative-algorithm") != ["DSPARK"]:
                yield work.where, "--speculative-algorithm DSPARK is missing"
            for name in ("--model-path", "--speculative-draft-model-path"):
                if name not in chosen:
                    yield work.where, f"{name} is missing"
            if chosen.get("--host") != ["0.0.0.0"]:
                yield work.where, "--host 0.0.0.0 is missing: SGLang listens on 127.0.0.1 only"
            port = chosen.get("--port", ["30000"])[:1]
            if not port or not port[0].isdigit() or not work.has_port(int(port[0])):
                yield work.where, f"--port {port} is not a declared port"
            if "prometheus.io/scrape" in work.annotations and "--enable-metrics" not in chosen:
                yield work.where, "it is scraped but --enable-metrics is missing"
            if chosen.get("--weight-version") != [work.labels.get(REVISION_LABEL)]:
                yield work.where, f"--weight-version and the label {REVISION_LABEL} differ"


def _flag_faults(name: str, values: Sequence[str], context: Context) -> Iterator[str]:
    arity = context.flags.get(name)
    if arity is None:
        yield f"SGLang has no flag {name}"
    elif arity == "none" and values:
        yield f"{name} takes no value, got {values}"
    elif arity == "one" and len(values) != 1:
        yield f"{name} takes one value, got {values}"
    elif arity == "some" and not values:
        yield f"{name} takes a value"


@rule
def disruption(context: Context) -> Iterator[Fault]:
    """A PodDisruptionBudget lets at least one pod be evicted."""
    for doc in context.of_kind("PodDisruptionBudget"):
        spec = doc["spec"]
        chosen = [w for w in context.workloads() if matches(spec["selector"], w.labels)]
        replicas = sum(w.doc["spec"].get("replicas", 1) for w in chosen)
        kept = spec.get("minAvailable", 0)
        if spec.get("maxUnavailable") in (0, "0%") or kept == "100%":
            yield f"{doc['kind']}/{doc['metadata']['name']}", "no pod may ever be evicted"
        elif isinstance(kept, int) and chosen and kept >= replicas:
            yield f"{doc['kind']}/{doc['metadata']['name']}", f"keeps all {replicas} replicas"


@rule
def reachable(context: Context) -> Iterator[Fault]:
    """NetworkPolicies let every container reach what it needs, and be reached by who needs it."""
    for need in unreachable(context):
        yield need.work.where, need.message


@rule
def routers(context: Context) -> Iterator[Fault]:
    """A router has the servers' key, and no worker outside the cluster can be registered."""
    for work in context.workloads():
        for container in filter(routes, work.pod["containers"]):
            yield from (
                (work.where, message) for message in router_faults(context, work, container)
            )
