"""Rendered Kubernetes documents: their pods, environment and arguments, as the kubelet would see them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_source import Arity

from dspark_sglang.config import PREFIX

Doc = dict[str, Any]

#: ``/health`` waits in whole seconds around its own deadline, so it can answer a bit after it.
HEALTH_MARGIN = 5
HEALTH_DEADLINE = 20
#: SGLang looks for SIGTERM, and for the last request's end, once in this many seconds.
DRAIN_POLL = 5
#: SGLang then waits this long for its schedulers to exit.
SCHEDULER_EXIT = 15
DRAIN_ANNOTATION = "dspark-sglang/drain-seconds"
REVISION_LABEL = "dspark-sglang/revision"
#: Objects that the operator makes (deploy/README.md); pods wait for them.
FROM_OPERATOR = {"dspark-sglang-checksums", "dspark-sglang-calibration"}
#: LeaderWorkerSet's controller sets these in every container.
LWS_VARIABLES = {"LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE"}
SECURITY_ANNOTATION = "dspark-sglang/pod-security"
GPU = "nvidia.com/gpu"
PROBE = "dspark_sglang.probe"
REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")
#: Volume types that the restricted Pod Security level allows.
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
WRITTEN = ("HOME", "TMPDIR", "XDG_CACHE_HOME", PREFIX + "CACHE_DIR")


@dataclass(frozen=True)
class Context:
    """The documents of one rendering and what the server in them understands."""

    docs: Sequence[Doc]
    flags: Mapping[str, Arity]
    sglang_env: frozenset[str]

    def of_kind(self, *kinds: str) -> list[Doc]:
        return [doc for doc in self.docs if doc["kind"] in kinds]

    def named(self, kind: str, name: str) -> Doc | None:
        found = [doc for doc in self.of_kind(kind) if doc["metadata"]["name"] == name]
        return found[0] if found else None

    def workloads(self) -> list[Workload]:
        """Every pod template: a LeaderWorkerSet has two."""
        found = [
            Workload(doc, doc["spec"]["template"])
            for doc in self.of_kind("Deployment", "StatefulSet", "Job")
        ]
        found += [
            Workload(doc, doc["spec"]["jobTemplate"]["spec"]["template"])
            for doc in self.of_kind("CronJob")
        ]
        for doc in self.of_kind("LeaderWorkerSet"):
            parts = doc["spec"]["leaderWorkerTemplate"]
            found += [Workload(doc, parts[name]) for name in ("leaderTemplate", "workerTemplate")]
        return found


@dataclass(frozen=True)
class Workload:
    """A pod template of a workload, with the parts that the rules ask for."""

    doc: Doc
    template: Doc
    pod: Doc = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pod", self.template["spec"])

    @property
    def where(self) -> str:
        name = f"{self.doc['kind']}/{self.doc['metadata']['name']}"
        return f"{name} ({self.role})" if self.doc["kind"] == "LeaderWorkerSet" else name

    @property
    def labels(self) -> Mapping[str, str]:
        return self.template["metadata"].get("labels", {})

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.template["metadata"].get("annotations", {})

    @property
    def role(self) -> str:
        """``worker``: a rank above 0, where SGLang answers /health only, and always with 200."""
        return self.labels.get("dspark-sglang/role", "head")

    @property
    def claims(self) -> list[Doc]:
        return self.doc["spec"].get("volumeClaimTemplates", [])

    @property
    def containers(self) -> list[Doc]:
        return self.pod["containers"] + self.pod.get("initContainers", [])

    @property
    def ports(self) -> list[Doc]:
        return [port for c in self.pod["containers"] for port in c.get("ports", [])]

    def has_port(self, wanted: str | int) -> bool:
        return any(wanted in (port.get("name"), port["containerPort"]) for port in self.ports)


# --- What a container is started with -------------------------------------------------------


def environment(container: Doc, context: Context) -> dict[str, str]:
    """The container's variables as the kubelet would set them; secrets and fields as ``1``."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found = context.named("ConfigMap", source.get("configMapRef", {}).get("name", ""))
        prefix = source.get("prefix", "")
        values |= {prefix + k: v for k, v in (found or {}).get("data", {}).items()}
    for entry in container.get("env", []):
        reference = entry.get("valueFrom", {}).get("configMapKeyRef")
        if reference:
            found = context.named("ConfigMap", reference["name"]) or {}
            values[entry["name"]] = found.get("data", {}).get(reference["key"], "")
        elif "valueFrom" in entry:
            values[entry["name"]] = "1"
        else:
            values[entry["name"]] = expand(entry.get("value", ""), values)
    return values


def expand(text: str, values: Mapping[str, str]) -> str:
    """``$(NAME)`` replaced as Kubernetes does: an unknown name stays as it is written."""
    return REFERENCE.sub(
        lambda m: "$" if m[1] == "$" else values.get(m[2], m[0]),
        text,
    )


def arguments(container: Doc, context: Context) -> list[tuple[str, list[str]]]:
    """The container's flags in order, each with its values, after expansion."""
    values = environment(container, context)
    words = [expand(w, values) for w in container.get("command", []) + container.get("args", [])]
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
    return flags


def serves(container: Doc) -> bool:
    words = container.get("command", [])
    return words[:2] == ["dspark", "serve"] or "sglang.launch_server" in words


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector, with its expressions, selects these labels."""
    wanted = selector.get("matchLabels", {})
    tests = {
        "In": lambda e: labels.get(e["key"]) in e["values"],
        "NotIn": lambda e: labels.get(e["key"]) not in e["values"],
        "Exists": lambda e: e["key"] in labels,
        "DoesNotExist": lambda e: e["key"] not in labels,
    }
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        tests[e["operator"]](e) for e in selector.get("matchExpressions", [])
    )
