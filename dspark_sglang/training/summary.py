"""``python -m dspark_sglang.training.summary``: the figures of a drafter in one file.

Everything is copied from files that measurements wrote; what was not measured is null.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import write_json
from dspark_sglang.checkpoint import weight_files, weights_digest
from dspark_sglang.errors import DataError
from dspark_sglang.training import curves
from dspark_sglang.training.ablation import gain_over_dflash, read_results

_FROM_EVALUATION = (
    "accept_length_greedy",
    "accept_length_t1",
    "per_position",
    "ece_before",
    "ece_after",
    "accept_length_greedy_drafted",
)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def summarise(
    artifact: Path,
    evaluation: Path,
    *,
    ablations: Path | None,
    context: Path | None,
    demo: Path | None,
    run: Path | None,
) -> dict[str, object]:
    """Collect the figures.

    Raises:
        DataError: the evaluation is of other weights than the artifact's.
    """
    judged = _read(evaluation)
    digest = weights_digest(artifact)
    if judged.get("drafter_sha256") != digest:
        raise DataError(
            f"{evaluation} is of drafter {str(judged.get('drafter_sha256'))[:12]}.",
            expected=f"{digest[:12]}, the weights in {artifact}",
            fix="Measure again with `dspark eval --artifact ... --out ...`.",
        )
    results = read_results(ablations) if ablations else None
    outcomes = results.outcomes if results else []
    seen = None
    if run is not None and (run / "corpus.json").exists():
        corpus = _read(run / "corpus.json")
        epochs = float(curves.read(run / curves.STEPS)[-1]["epoch"])
        seen = round(epochs * corpus["written_tokens"])
    size = sum(path.stat().st_size for path in weight_files(artifact))
    return {
        **{name: judged.get(name) for name in _FROM_EVALUATION},
        "gain_over_dflash_pct": gain_over_dflash(outcomes),
        "context_cost_growth_pct": _read(context).get("context_cost_growth_pct"),
        "artifact_mb": round(size / 1e6, 2),
        "demo_speedup": _read(demo).get("speedup"),
        "tokens_seen": seen,
        "drafter_sha256": digest,
        "ablations": [msgspec.to_builtins(outcome) for outcome in outcomes],
    }


def main() -> None:
    """Write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = Path("docs/results")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument(
        "--evaluation", type=Path, default=results / "evaluation" / "evaluation.json"
    )
    parser.add_argument("--ablations", type=Path, default=results / "ablations.json")
    parser.add_argument("--context", type=Path, default=results / "training-context.json")
    parser.add_argument("--demo", type=Path, default=results / "demo.json")
    parser.add_argument("--run", type=Path, help="folder of the training run")
    parser.add_argument("--out", type=Path, default=results / "training.json")
    args = parser.parse_args()
    found = summarise(
        args.artifact,
        args.evaluation,
        ablations=args.ablations,
        context=args.context,
        demo=args.demo,
        run=args.run,
    )
    write_json(args.out, found)
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
