"""How the linter reads a pod: values as the kubelet expands them."""

from __future__ import annotations

from manifest_lint import Context, environment, expand


def test_expansion_is_the_kubelets() -> None:
    values = {"A": "1", "B_C": "2"}
    assert expand("$(A)/$(B_C) $$(A) $(NO) $A", values) == "1/2 $(A) $(NO) $A"
    docs = [{"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"A": "map"}}]
    container = {
        "envFrom": [{"configMapRef": {"name": "m"}}],
        "env": [{"name": "B", "value": "$(A)-$(LATER)"}, {"name": "LATER", "value": "x"}],
    }
    assert environment(container, Context(docs, {}, frozenset())) == {
        "A": "map",
        "B": "map-$(LATER)",
        "LATER": "x",
    }
