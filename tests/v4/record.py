"""Write ``docs/results/v4.json``: what was measured of DeepSeek-V4 served by our algorithm.

``python -m tests.v4.record``: every part starts the servers that it needs, one pair at a time, on the tiny bundle.
``--only greedy/tp2,reference`` measures some parts, and one way of a part, and keeps the others as the file has them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dspark_sglang.checkpoint import Tensor
from dspark_sglang.layouts.base import compare
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.drafter import load as load_drafter
from dspark_sglang.layouts.v4.drafter import load_tensors
from dspark_sglang.layouts.v4.reference import Reference
from dspark_sglang.layouts.v4.tensors import expected, plain_bundle, published_bundle
from dspark_sglang.planning import published
from dspark_sglang.provenance import machine, versions
from dspark_sglang.server import Server
from tests.deploy.v4_flags import FLAGS
from tests.v4 import overlays, recorder
from tests.v4.planted import BEYOND_TOP_K, MISTAKES, gaps
from tests.v4.servers import (
    LENGTHS,
    NEAR,
    clear_prompts,
    generate,
    greedy,
    prompt,
    scored,
    server,
)

ROOT = Path(__file__).resolve().parents[2]
#: Tokens of each answer; prompts; requests at a time.
NEW, PROMPTS, AT_ONCE = 24, 200, (1, 8)
#: Prompts in bfloat16.
FEW = 40
#: Positions up to which every ended block is attended to, and a prompt well beyond.
ALL_BLOCKS, LONG = 2048, 3900
#: For the long prompt: with the tiny bundle's four, every product is often negative, and blocks tie at a score of 0.
INDEX_HEADS = 16
#: The dense proof's groups of options; each is judged with its mutant.
OPTIONS = (
    "temperature",
    "all_filters",
    "frequency_penalty",
    "min_new_tokens",
    "logit_bias",
    "grammar",
)
#: Tokens of a prompt, and a server's log-probabilities of all but the first.
Given = tuple[list[int], list[float]]


class Way(NamedTuple):
    """How DSPARK is served. Plain decoding has as many ranks: other sums round latents another way."""

    ranks: int = 1
    flags: tuple[str, ...] = ()
    variables: Mapping[str, str] = MappingProxyType({})


WAYS: Mapping[str, Way] = {
    "synchronous": Way(),
    "overlapped": Way(variables={"DSPARK_CPU_OVERLAP": "1"}),
    "tp2": Way(ranks=2),
    "chunked": Way(flags=("--chunked-prefill-size", "256")),
}


def prompts() -> list[list[int]]:
    """Prompts that end around every border, and of any length up to 600."""
    chosen = torch.Generator().manual_seed(25)
    more = torch.randint(3, 600, (PROMPTS - len(LENGTHS),), generator=chosen).tolist()
    return [prompt(length, seed=index) for index, length in enumerate([*LENGTHS, *more])]


def near_tie(of: Server, tokens: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the log-probabilities are of the first two tokens that differ."""
    at = next(k for k, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    both = [scored(of, [*tokens, *one[:at], answer[at]])[0][-1] for answer in (one, other)]
    return abs(both[0] - both[1])


def measure_greedy(folder: Path, ways: Mapping[str, Way] = WAYS) -> dict[str, Any]:
    """Greedy text of every way of serving against plain decoding's."""
    return compared(folder, "float32", prompts(), ways)


def measure_bfloat16(folder: Path) -> dict[str, Any]:
    """The same in bfloat16, in which plain decoding alone differs from itself in a batch."""
    return summed(compared(folder, "bfloat16", prompts()[:FEW], {"synchronous": Way()}))


def summed(ways: dict[str, Any]) -> dict[str, Any]:
    """The same with sums over all ways of serving."""
    every = [way[f"{n} at once"] for way in ways.values() for n in AT_ONCE]
    return {
        "equal": sum(one["equal"] for one in every),
        "total": sum(one["total"] for one in every),
        "near_ties": sum(sum(gap < NEAR for gap in one["gaps"]) for one in every),
        "ways": ways,
    }


def compared(
    folder: Path, dtype: str, given: list[list[int]], ways: Mapping[str, Way]
) -> dict[str, Any]:
    """Texts of plain decoding and of DSPARK, and how close the tokens were where they differ."""
    bundle, total, found = folder / "plain", len(given), dict[str, Any]()
    tiny.write(bundle, dtype=getattr(torch, dtype))
    for ranks in sorted({way.ranks for way in ways.values()}):
        several = ("--tp", str(ranks))
        with server(
            bundle, folder / f"plain{ranks}.log", dspark=False, dtype=dtype, extra=several
        ) as plain:
            plain.wait_ready()
            wanted = {n: greedy(plain, given, NEW, at_once=n) for n in AT_ONCE}
            alone, batched = (wanted[n] for n in AT_ONCE)
            own = sum(a == b for a, b in zip(alone, batched, strict=True))
            for name, way in ways.items():
                if way.ranks != ranks:
                    continue
                plain.pause()  # its idle loop polls
                ours = server(
                    bundle,
                    folder / f"{name}.log",
                    dspark=True,
                    dtype=dtype,
                    extra=(*several, *way.flags),
                    environment=way.variables,
                )
                with ours:
                    ours.wait_ready()
                    ours.update(dspark_speculation=1)
                    texts = {n: greedy(ours, given, NEW, at_once=n) for n in AT_ONCE}
                    accepted = float(ours.record()["accept_length"])
                plain.resume()
                found[name] = {
                    "accepted_length": round(accepted, 3),
                    "plain_alone_as_in_a_batch": own,
                }
                for n in AT_ONCE:
                    differ = [k for k in range(total) if texts[n][k] != wanted[n][k]]
                    gaps = [near_tie(plain, given[k], wanted[n][k], texts[n][k]) for k in differ]
                    found[name][f"{n} at once"] = {
                        "equal": total - len(differ),
                        "total": total,
                        "gaps": [round(gap, 6) for gap in gaps],
                    }
                print(name, found[name], flush=True)
    return found


def measure_retracted(folder: Path) -> dict[str, Any]:
    """Greedy text where KV runs out and requests are retracted and prefilled again."""
    bundle = folder / "plain"
    tiny.write(bundle, dtype=torch.float32)
    given = [prompt(length, seed=length) for length in range(100, 420, 20)]
    few = ("--max-total-tokens", "3072", "--schedule-conservativeness", "0.01")
    # Not ``ignore_eos``: SGLang reserves the whole answer of such requests and never retracts them.
    params = {"sampling_params": {"ignore_eos": False, "min_new_tokens": 0}}
    with server(bundle, folder / "plain.log", dspark=False) as plain:
        plain.wait_ready()
        wanted = [a["output_ids"] for a in generate(plain, given, 300, **params)]
    with server(bundle, folder / "few.log", dspark=True, extra=few) as ours:
        ours.wait_ready()
        ours.update(dspark_speculation=1)
        found = [a["output_ids"] for a in generate(ours, given, 300, **params)]
        seen = ours.log.read_text(errors="replace").count("Retract requests")
    equal = sum(a == b for a, b in zip(found, wanted, strict=True))
    result = {"equal": equal, "total": len(given), "retractions": seen}
    print(result, flush=True)
    return result


def measure_reference(folder: Path) -> dict[str, Any]:
    """Log-probabilities of the published form's server against the reference, exact and with mistakes."""
    bundle, long = folder / "published", folder / "long"
    tiny.write(bundle, published=True)
    reference, double = Reference.load(bundle), Reference.load(bundle, torch.float64)
    found: dict[str, Any] = {}
    planted: dict[str, float] = {}

    def plant(reference: Reference, given: Given, names: Iterable[str], first: int = 0) -> None:
        tokens, logprobs = given
        noise = gaps(reference, tokens, logprobs, first=first).mean
        for name in names:
            with MISTAKES[name](reference):
                moved = gaps(reference, tokens, logprobs, first=first).mean
            planted[name] = round(moved / noise, 1)

    with server(bundle, folder / "reference.log", dspark=True) as ours:
        ours.wait_ready()
        for length in (140, 300, 600):
            rows = []
            for tokens in clear_prompts(reference, length, 7):
                logprobs, best = scored(ours, tokens)
                exact = gaps(reference, tokens, logprobs, best)
                own = reference(tokens).logprobs()[:-1].double() - double(tokens).logprobs()[:-1]
                noise = float(own.gather(1, torch.tensor(tokens[1:])[:, None]).abs().max())
                rows.append((exact, noise, (tokens, logprobs)))
            rows.sort(key=lambda row: row[0].mean)
            found[str(length)] = [
                exact._asdict() | {"reference_float32_to_float64": noise}
                for exact, noise, _ in rows
            ]
            print(length, found[str(length)], flush=True)
        plant(reference, rows[0][2], MISTAKES.keys() - BEYOND_TOP_K)
    tiny.write(long, published=True, changes={"index_n_heads": INDEX_HEADS})
    reference = Reference.load(long)
    with server(long, folder / "long.log", dspark=True) as ours:
        ours.wait_ready()
        tokens = prompt(LONG)
        logprobs, best = scored(ours, tokens)
        ties = reference(tokens).near_ties(NEAR)
        found[str(LONG)] = gaps(reference, tokens, logprobs, best)._asdict() | {
            "near_ties": {k: sum(tie.what == k for tie in ties) for k in ("blocks", "experts")}
        }
        print(LONG, found[str(LONG)], flush=True)
    plant(reference, (tokens, logprobs), BEYOND_TOP_K, ALL_BLOCKS)  # from where it chooses
    every = [row for length in ("140", "300", "600") for row in found[length]]
    return {
        "largest_gap": max(row["largest"] for row in every),
        "median_largest_gap": sorted(row["largest"] for row in every)[len(every) // 2],
        "median_mean_gap": sorted(row["mean"] for row in every)[len(every) // 2],
        "by_length": found,
        "planted": {"found": sum(f > 50 for f in planted.values()), "of": len(MISTAKES)},
        "planted_over_noise": planted,
    }


def measure_drafter(folder: Path) -> dict[str, Any]:
    """Every drafted block's states and base logits against the drafter's reference."""
    bundle, recording = folder / "drafter", folder / "drafts.pt"
    tiny.write(bundle, dtype=torch.float32)
    with recorder.environment(folder / "plugin", recording) as variables:
        ours = server(bundle, folder / "drafter.log", dspark=True, environment=variables)
        with ours:
            ours.wait_ready()
            ours.update(dspark_speculation=1)
            greedy(ours, [prompt(length) for length in LENGTHS], NEW, at_once=4)
    drafter = load_drafter(bundle, torch.float32)
    tensors = load_tensors(bundle)[1]
    head, embedding = tensors["head.weight"], tensors["embed.weight"]
    first, second = (tensors[f"mtp.2.markov_head.markov_w{n}.weight"] for n in (1, 2))
    held: dict[int, torch.Tensor] = {}
    apart, logits_apart, same, rows = [], [], 0, 0
    lists: dict[str, list[torch.Tensor]] = {}
    for event in torch.load(recording):
        if "context" in event:
            held |= dict(zip(event["slots"].tolist(), event["context"], strict=True))
            continue
        for index, (anchor, slots) in enumerate(zip(event["lens"], event["slots"], strict=True)):
            if any(slot not in held for slot in slots.tolist()):
                continue  # of the measurement at start, before the recording
            own = slice(index * drafter.gamma, (index + 1) * drafter.gamma)
            window = torch.stack([held[slot] for slot in slots.tolist()])
            before = window.new_zeros((anchor - len(window), window.shape[1]))
            with torch.inference_mode():
                states = drafter.hidden(
                    drafter.context(torch.cat([before, window])),
                    torch.tensor([anchor]),
                    embedding[event["anchors"][index : index + 1]],
                )[0]
                logits = drafter.base_logits(states, head)
            theirs = event["states"][own].float()
            apart.append(float((states - theirs).abs().max() / states.abs().max()))
            logits_apart.append(float((logits - event["logits"][own].float()).abs().max()))
            same += int((logits.argmax(-1) == event["logits"][own].argmax(-1)).sum())
            rows += drafter.gamma
            anchor_token = int(event["anchors"][index])
            for name, kept in listed(event["logits"][own].float(), first @ second.T, anchor_token):
                lists.setdefault(name, []).append(kept)
    found = {
        "largest_gap": max(apart),
        "largest_logit_gap": max(logits_apart),
        "blocks": len(apart),
        "argmax_equal": same,
        "rows": rows,
        # Of the tokens that the whole vocabulary would draft, by position.
        "share_in_list": {
            name: [round(float(s), 4) for s in torch.stack(kept).double().mean(0)]
            for name, kept in lists.items()
        },
    }
    print(found, flush=True)
    return found


def listed(
    base: torch.Tensor, bias: torch.Tensor, anchor: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whether lists of an eighth of the vocabulary hold the tokens that are drafted greedily from all of it.

    Args:
        base: ``[gamma, V]`` base logits of a block.
        bias: ``[V, V]`` the Markov head's, by the token before.
        anchor: the token before the block.

    Yields:
        What a list is chosen by, and ``[gamma]`` bool.
    """
    size, before, rows = base.shape[1] // 8, anchor, []
    for row in base:
        chosen = int((row + bias[before]).argmax())
        best, follow = row.argsort(descending=True), bias[before].argsort(descending=True)
        rows.append(
            (chosen in best[:size], chosen in best[: size // 2] or chosen in follow[: size // 2])
        )
        before = chosen
    both = torch.tensor(rows)
    yield f"base logits ({size})", both[:, 0]
    yield f"base logits ({size // 2}) and bias ({size // 2})", both[:, 1]


def measure_names(folder: Path) -> dict[str, Any]:
    """The published name lists, mapped."""
    found = {}
    for short, name in (("flash", "deepseek-v4-flash-dspark"), ("pro", "deepseek-v4-pro-dspark")):
        known = published.find(name)
        assert known is not None
        held = {
            name: Tensor(*stored, (0, 0)) for name, stored in published_bundle(known.config).items()
        }
        compare(held, expected(held, plain_bundle(known.config), known.config), where=name)
        found[short] = {"mapped": len(held), "of": len(held)}
    return found


def measure_options(folder: Path) -> dict[str, Any]:
    """The distribution of the served text against the reference's, with mutants; resumes."""
    out = ROOT / "runs" / "exactness-v4"
    command = [sys.executable, "-m", "tests.exactness", "--family", "v4"]
    # Few texts of five tokens repeat one, which a penalty frozen at the anchor needs to show.
    command += ["--mutant-samples", "16000", "--out", str(out)]
    command += ["--parts", "options,mutants", "--options", ",".join(OPTIONS)]
    subprocess.run(command, check=True, cwd=ROOT)
    summary = json.loads((out / "summary.json").read_text())
    return {
        name: {
            "p": entry["p_value"],
            "samples": entry["samples"],
            "mutant": entry["mutant"],
            "mutant_rejected": entry["mutant_rejected"],
        }
        for name, entry in summary["options"].items()
    }


def measure_overlays(folder: Path) -> dict[str, Any]:
    """Greedy answers of a server with every overlay's flags, against the reference."""
    bundle = folder / "published"
    tiny.write(bundle, published=True)
    reference, found = Reference.load(bundle), {}
    for overlay in FLAGS:
        with overlays.server(overlay, bundle, folder / f"{overlay}.log") as of:
            began = time.monotonic()
            of.wait_ready()
            took = time.monotonic() - began
            answer = overlays.ask(of, reference)._asdict()
        found[overlay] = answer | {
            "start_seconds": round(took, 1),
            "not_started_here": sorted(FLAGS[overlay].needs),
        }
        print(overlay, found[overlay], flush=True)
    return found


def measure_builtin(folder: Path) -> int:
    """Overlays that run SGLang's builtin."""
    files = [p for p in (ROOT / "deploy" / "overlays").rglob("*") if p.is_file()]
    return len({p.parent for p in files if "DSPARK_PLUGIN=off" in p.read_text()})


PARTS: Mapping[str, Callable[[Path], Any]] = {
    "greedy": measure_greedy,
    "bfloat16": measure_bfloat16,
    "retracted": measure_retracted,
    "reference": measure_reference,
    "drafter": measure_drafter,
    "published_names": measure_names,
    "overlays": measure_overlays,
    "overlays_on_builtin": measure_builtin,
    "options": measure_options,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "v4.json")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for wanted in given.only.split(","):
        part, _, way = wanted.partition("/")
        if part not in PARTS or (way and (part != "greedy" or way not in WAYS)):
            parser.error(
                f"--only names {wanted!r}: expected some of {', '.join([*PARTS, *(f'greedy/{w}' for w in WAYS)])}"
            )
        with tempfile.TemporaryDirectory() as folder:
            if part == "greedy":
                known = result.get(part, {}).get("ways", {})
                new = measure_greedy(Path(folder), {way: WAYS[way]} if way else WAYS)
                result[part] = summed(known | new)
            else:
                result[part] = PARTS[part](Path(folder))
        result |= {"machine": machine(), "versions": versions()}
        if "tp2" in result.get("greedy", {}).get("ways", {}):
            one = summed({"tp2": result["greedy"]["ways"]["tp2"]})
            result["tp2_equal"] = one["equal"] == one["total"]
        given.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
