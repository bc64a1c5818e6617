"""Rules and dashboard: every metric exists, every selector is a variable, generated copies are fresh."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dspark_sglang.serving import telemetry
from tests.deploy import generate

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "observability/rules.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((DEPLOY / "observability/dashboard.json").read_text(encoding="utf-8"))
#: Also recorded names, which the rules make themselves.
_NAME = re.compile(r"\b(?:sglang:|dspark_|dspark:)[a-z0-9_]+(?::[a-z0-9_]+)?")


def _expressions() -> list[str]:
    found = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    scaled = yaml.safe_load((DEPLOY / "components/keda/scaledobject.yaml").read_text())
    found += [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    found += [t["expr"] for p in DASHBOARD["panels"] for t in p.get("targets", [])]
    found += [v["definition"] for v in DASHBOARD["templating"]["list"] if "definition" in v]
    return found


@pytest.fixture(scope="module")
def known() -> set[str]:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed: its metrics cannot be read")
    source = Path(spec.origin).parent / "srt/observability/metrics_collector.py"
    names = set(re.findall(r'"(sglang:[a-z0-9_]+)"', source.read_text(encoding="utf-8")))
    names |= {f"{name}_bucket" for name in names}
    names |= {f"dspark_{name}_total" for name in telemetry._COUNTERS}
    names |= {f"dspark_{name}" for name in telemetry._GAUGES} | {"dspark_faults_total"}
    names |= set(re.findall(r'"(dspark_[a-z_]+)",', Path(telemetry.__file__).read_text()))
    return names | {r["record"] for g in RULES["groups"] for r in g["rules"] if "record" in r}


def test_every_metric_exists(known: set[str]) -> None:
    asked = {name for expr in _expressions() for name in _NAME.findall(expr)}
    assert len(asked) > 25
    assert asked <= known, sorted(asked - known)


def test_no_gauge_is_summed_over_ranks() -> None:
    gauges = ("num_running_reqs", "num_queue_reqs", "token_usage", "cache_hit_rate")
    for expr in _expressions():
        for gauge in gauges:
            assert not re.search(rf"\b(sum|avg)( by \([^)]*\))? ?\(sglang:{gauge}", expr), expr


def test_the_dashboard_is_portable() -> None:
    assert DASHBOARD["id"] is None and DASHBOARD["uid"] is None
    panels: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]
        for target in panel["targets"]:
            assert 'namespace=~"$namespace", pod=~"$pod"' in target["expr"], panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_every_alert_says_what_to_do() -> None:
    alerts = [r for g in RULES["groups"] for r in g["rules"] if "alert" in r]
    assert {a["labels"]["severity"] for a in alerts} <= {"warning", "critical"}
    assert all(
        a["annotations"]["summary"] and "{{ $labels.pod }}" in a["annotations"]["description"]
        for a in alerts
    )


def test_generated_files_are_fresh() -> None:
    operator = (DEPLOY / "components/podmonitor/rules.yaml").read_bytes()
    assert operator == generate.operator_rules(RULES), "make deploy-rendered"
    for overlay in generate.overlays(DEPLOY):
        text = (DEPLOY / "rendered" / f"{overlay.name}.yaml").read_text(encoding="utf-8")
        assert text.split("\n", 1)[1] == generate.render(overlay), "make deploy-rendered"


@pytest.mark.costly
@pytest.mark.parametrize(
    "overlay", [o.name for o in generate.overlays(DEPLOY) if (o / "plan.env").exists()]
)
def test_flags_of_gpu_overlays_are_the_plans(overlay: str) -> None:
    for name, content in generate.arguments(DEPLOY / "overlays" / overlay).items():
        assert (DEPLOY / "overlays" / overlay / name).read_bytes() == content, (
            "make deploy-arguments"
        )
