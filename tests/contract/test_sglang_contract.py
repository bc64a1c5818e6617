"""The installed SGLang is the one this plugin was written against."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import pkgutil
import re
import textwrap
from typing import Any, Protocol

import msgspec
import pytest
import torch

from dspark_sglang.errors import CompatibilityError
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.tensors import dense_tensors
from dspark_sglang.serving import compat, hooks, sglang_types
from dspark_sglang.serving.compat import Symbol, check, differences

SYMBOLS = compat.ALGORITHM_SYMBOLS + compat.CPU_SYMBOLS
WORKER = "sglang.srt.speculative.dspark_components.dspark_worker_v2"


def short(symbol: Symbol) -> str:
    return ".".join(symbol.name.split(".")[-2:])


# --- symbols -----------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", SYMBOLS, ids=short)
def test_symbol_exists_with_the_expected_parameters(symbol: Symbol) -> None:
    assert list(differences((symbol,))) == []


def test_no_symbol_is_listed_twice() -> None:
    names = [symbol.name for symbol in SYMBOLS]
    assert sorted(names) == sorted(set(names))


def test_every_hook_is_a_listed_symbol_with_known_parameters_or_an_init() -> None:
    listed = {symbol.name: symbol for symbol in SYMBOLS}
    for target in (compat.HOOKS | compat.CPU_HOOKS).values():
        assert target in listed
        assert listed[target].parameters is not None or target.endswith(".__init__")


def test_every_function_that_a_hook_names_is_there() -> None:
    for path in hooks.AROUND.values():
        assert callable(pkgutil.resolve_name(f"dspark_sglang.serving.{path}"))


def test_version_is_the_pinned_one() -> None:
    assert compat.installed_version() == compat.SGLANG_VERSION
    check(SYMBOLS, allow_other=False)


EXTRAS = importlib.metadata.requires("dspark-sglang") or []


def test_the_distribution_pins_the_same_version() -> None:
    (pinned,) = [line for line in EXTRAS if line.startswith("sglang")]
    assert re.match(rf"sglang=={re.escape(compat.SGLANG_VERSION)}\b", pinned)


@pytest.mark.parametrize(
    ("symbol", "said"),
    [
        (Symbol("sglang.srt.no_such_module.x"), "does not exist"),
        (Symbol(f"{WORKER}.DSparkWorkerV2.no_such_method"), "does not exist"),
        (Symbol(f"{WORKER}.NoSuchClass"), "does not exist"),
        (Symbol(compat.HOOKS["arguments"], ("args",)), "takes (server_args), expected (args)"),
        (Symbol(compat.HOOKS["arguments"], ()), "takes (server_args), expected ()"),
        (
            Symbol("sglang.srt.speculative.spec_tp_sync.SpecTpSync.sync", ("tensor", "site")),
            "takes",
        ),
    ],
    ids=["module", "method", "class", "renamed", "extra", "reordered"],
)
def test_a_difference_is_reported(symbol: Symbol, said: str) -> None:
    (line,) = differences((symbol,))
    assert line.startswith(symbol.name) and said in line
    with pytest.raises(CompatibilityError) as caught:
        check((symbol,), allow_other=False)
    assert line in caught.value.found
    assert compat.SGLANG_VERSION in caught.value.expected
    assert "DSPARK_PLUGIN=off" in caught.value.fix


def test_another_version_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SGLANG_VERSION", "0.0.1")
    with pytest.raises(CompatibilityError) as caught:
        check((), allow_other=False)
    assert importlib.metadata.version("sglang") in caught.value.found
    assert "0.0.1" in caught.value.expected
    assert "DSPARK_ALLOW_OTHER_SGLANG=1" in caught.value.fix
    check(compat.ALGORITHM_SYMBOLS[:2], allow_other=True)


def test_a_hook_that_does_not_take_is_an_error() -> None:
    """SGLang logs and goes on; we look again."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = "dspark_sglang.errors.DSparkError"  # SGLang refuses to wrap a class
    try:
        with pytest.raises(CompatibilityError) as caught:
            hooks._apply([("name", target, lambda original: original, "AROUND")])
    finally:
        HookRegistry._hooks.pop(target)
    assert target in caught.value.found
    assert "name" not in hooks.installed()


# --- structures we build or read -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "sglang.srt.speculative.dspark_components.dspark_verify.AcceptOuts",
            "correct_len bonus cap_trim_lens commit_lens new_seq_lens out_tokens",
        ),
        (
            "sglang.srt.speculative.dspark_components.dspark_draft.DraftBlockResult",
            "draft_tokens corrected_logits greedy_mask temperatures greedy_draft",
        ),
        (
            "sglang.srt.speculative.dspark_components.dspark_draft.DraftProposal",
            "draft_block_ids draft_block confidence confidence_raw folded verify_ids",
        ),
        (
            "sglang.kernels.ops.speculative.dspark.dspark_verify_window.RaggedVerifyWindow",
            "positions verify_cache_loc verify_ids window_index",
        ),
    ],
    ids=lambda value: value.rsplit(".", 1)[-1] if "." in value else "",
)
def test_fields(path: str, names: str) -> None:
    found = [field.name for field in msgspec.structs.fields(pkgutil.resolve_name(path))]
    assert found == names.split()


def test_a_budget_decision_needs_only_its_budget() -> None:
    from sglang.srt.speculative.dspark_components.dspark_planner import VerifyBudgetDecision

    assert VerifyBudgetDecision(budget=3).budget == 3


# --- classes we take the place of -----------------------------------------------------------------


def calls_of(function: Any) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def accepts(ours: Any, theirs: Any) -> None:
    """Whatever a caller may pass to ``theirs`` (all of it by name) fits ``ours``."""
    positional, named = [], {}
    for name, parameter in calls_of(theirs).items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(name)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = None
    signature = inspect.signature(ours)
    signature.bind("self", *positional, **named)
    if not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature.bind("self", **dict.fromkeys(positional), **named)


def test_our_observers_answer_every_call_of_sglangs() -> None:
    from sglang.srt.speculative.dspark_components.dspark_observability import DsparkStepObservers

    from dspark_sglang.serving.telemetry import StepObservers

    public = {n: f for n, f in vars(DsparkStepObservers).items() if not n.startswith("_")}
    assert len(public) >= 9
    for name, function in public.items():
        assert hasattr(StepObservers, name), name
        accepts(getattr(StepObservers, name), function)


@pytest.mark.parametrize(
    "statement",
    [
        "self._verify_planner =",
        "self._proposer =",
        "self._verify_executor =",
        "self._observers =",
        "self._verify_epilogue",
        "self._sampling_accept_graph",
        "self._rejection_noise",
        "capture_tail_hooks.append",
    ],
)
def test_the_worker_builds_what_we_replace(statement: str) -> None:
    from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

    assert statement in inspect.getsource(DSparkWorkerV2.__init__)


def our_classes() -> list[type]:
    from dspark_sglang.serving.cpu.attention import CpuAttentionBackend
    from dspark_sglang.serving.cpu.platform import CpuPlatform, _kv_pool_cls
    from dspark_sglang.serving.planner import Planner
    from dspark_sglang.serving.proposer import Proposer
    from dspark_sglang.serving.verifier import Verifier
    from dspark_sglang.serving.worker import DSparkWorker

    classes = [Proposer, Planner, Verifier, DSparkWorker, CpuAttentionBackend]
    return [*classes, CpuPlatform, _kv_pool_cls()]


SUBCLASSES = (
    *("Proposer", "Planner", "Verifier", "DSparkWorker"),
    *("CpuAttentionBackend", "CpuPlatform", "CpuKVPool"),
)


def ours(name: str) -> type:
    (found,) = [cls for cls in our_classes() if cls.__name__ == name]
    return found


@functools.cache
def own_attributes(cls: type) -> tuple[set[str], set[str]]:
    """Attributes of ``self`` that a class stores and those it reads, from its own source."""
    stored: set[str] = set()
    read: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            (stored if isinstance(node.ctx, ast.Store) else read).add(node.attr)
    return stored, read


@pytest.mark.parametrize("name", SUBCLASSES)
def test_overridden_methods_take_what_sglang_passes(name: str) -> None:
    cls, checked = ours(name), 0
    for method, function in vars(cls).items():
        inherited = next((vars(b)[method] for b in cls.__mro__[1:] if method in vars(b)), None)
        if not inspect.isfunction(function) or not inspect.isfunction(inherited):
            continue
        if method == "__init__" and name != "DSparkWorker":
            continue  # built by our own worker or factory
        accepts(function, inherited)
        checked += 1
    assert checked


@pytest.mark.parametrize("name", ["Proposer", "Planner", "Verifier"])
def test_our_worker_builds_them_as_sglangs_does(name: str) -> None:
    """What our worker passes beyond our own arguments is what SGLang's constructor takes, and its worker passes."""
    from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

    def passed(worker: type, built: str) -> set[str]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(worker)))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        (call,) = [node for node in calls if getattr(node.func, "id", None) == built]
        return {str(keyword.arg) for keyword in call.keywords}

    cls = ours(name)
    theirs = cls.__bases__[0]
    own = calls_of(cls.__init__).keys() - {"sglang"}
    given = passed(ours("DSparkWorker"), name)
    assert own <= given
    # SGLang also passes parts that are folded into its graphs; ours are not.
    assert given - own <= passed(DSparkWorkerV2, theirs.__name__)
    inspect.signature(theirs.__init__).bind(None, **dict.fromkeys(given - own))


@pytest.mark.parametrize("name", SUBCLASSES)
def test_inherited_attributes_we_read_are_set_by_sglang(name: str) -> None:
    cls = ours(name)
    stored, read = own_attributes(cls)
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("sglang.")]
    assert bases
    source = "\n".join(inspect.getsource(base) for base in bases)
    for attribute in sorted(read - stored - set(vars(cls)) - set(cls.__annotations__)):
        assigned = re.search(rf"self\.{attribute}\s*(:[^=\n]+)?=[^=]", source)
        declared = any(hasattr(base, attribute) for base in bases)
        assert assigned or declared, attribute


@pytest.mark.parametrize("name", ["sps_table", "cfg", "lag_steps", "carry_steps"])
def test_the_budget_planner_has_what_we_copy(name: str) -> None:
    from sglang.srt.speculative.dspark_components.dspark_planner import HostConfidenceBudgetPlanner

    source = inspect.getsource(HostConfidenceBudgetPlanner)
    assert hasattr(HostConfidenceBudgetPlanner, name) or f"self.{name}" in source


# --- protocols of what we read ---------------------------------------------------------------------

PROTOCOLS = {
    name: cls for name, cls in vars(sglang_types).items() if getattr(cls, "_is_protocol", False)
}
PROTOCOLS.pop("Protocol")
#: Attributes that another part of SGLang sets: where, and by which statement.
SET_ELSEWHERE = {
    ("VocabEmbedding", "weight"): (
        "sglang.srt.layers.quantization.unquant.UnquantizedEmbeddingMethod.create_weights",
        'register_parameter("weight"',
    ),
    **{
        ("TokenizerManager", f"{name}_memory_occupation_communicator"): (
            "sglang.srt.managers.tokenizer_control_mixin",
            f'("{name}_memory_occupation", ',
        )
        for name in ("release", "resume")
    },
}


def described(protocol: type) -> list[type]:
    """The classes of SGLang that a protocol names."""
    names = re.findall(r"``(sglang\.[\w.]+)``", str(protocol.__doc__))
    assert names, protocol
    return [pkgutil.resolve_name(name) for name in names]


def has(cls: type, name: str) -> bool:
    """Whether a class declares an attribute, or assigns it to ``self`` in one of its methods."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
    return hasattr(cls, name) or any(
        name in vars(base).get("__annotations__", ()) or name in own_attributes(base)[0]
        for base in bases
    )


def lacking(protocol: type) -> list[str]:
    """What a protocol has and some class that it describes has not."""
    public = {n for n in vars(protocol) if inspect.isfunction(vars(protocol)[n]) or n[0] != "_"}
    names = (set(protocol.__annotations__) | public) - {"__init__", "__subclasshook__"}
    return [
        f"{cls.__name__}.{name}"
        for cls in described(protocol)
        for name in sorted(names)
        if (protocol.__name__, name) not in SET_ELSEWHERE and not has(cls, name)
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_what_a_protocol_has_is_sglangs(protocol: type) -> None:
    assert lacking(protocol) == []
    for name, function in vars(protocol).items():
        if inspect.isfunction(function) and name != "__init__" and name != "__subclasshook__":
            for cls in described(protocol):
                accepts(getattr(cls, name), function)


@pytest.mark.parametrize(
    ("where", "statement"), SET_ELSEWHERE.values(), ids=[".".join(key) for key in SET_ELSEWHERE]
)
def test_what_another_part_sets_is_set_there(where: str, statement: str) -> None:
    assert statement in inspect.getsource(pkgutil.resolve_name(where))


def test_an_attribute_that_sglang_has_not_is_found() -> None:
    class Changed(Protocol):
        """``sglang.srt.managers.schedule_batch.Req`` and ``sglang.srt.managers.schedule_batch.ReqKvInfo``."""

        sampling_params: object
        kv_committed_len: int
        gone: int

        def finished(self) -> bool: ...
        def ended(self) -> bool: ...

    assert lacking(Changed) == [
        *("Req.ended", "Req.gone", "Req.kv_committed_len"),
        *("ReqKvInfo.ended", "ReqKvInfo.finished", "ReqKvInfo.gone", "ReqKvInfo.sampling_params"),
    ]


# --- the drafter's modules ------------------------------------------------------------------------

DRAFTER = {
    "block_size": 3,
    "markov_rank": 2,
    "mask_token_id": 15,
    "target_layer_ids": [1, 3],
    "hidden_size": 8,
    "vocab_size": 16,
    "num_hidden_layers": 0,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("vanilla", "VanillaMarkov"), ("gated", "GatedMarkovHead"), ("rnn", "RNNHead")],
)
def test_our_heads_are_sglangs(kind: str, cls: str) -> None:
    """Same tensors, same bias, same state, from the same module."""
    from sglang.srt.models import dspark

    from dspark_sglang.core.heads import MarkovHead

    sizes = {"vocab_size": 16, "markov_rank": 2}
    module = getattr(dspark, cls)(**sizes, **({} if kind == "vanilla" else {"hidden_size": 8}))
    expected = dense_tensors(parse_drafter_config(DRAFTER | {"markov_head_type": kind}))
    shapes = {f"markov_head.{n}": tuple(p.shape) for n, p in module.named_parameters()}
    assert shapes == {n: s for n, s in expected.items() if n.startswith("markov_head.")}
    head = MarkovHead.from_module(module)
    assert head.kind == kind
    previous, state = torch.randint(16, (5,)), head.start(5)
    theirs = module.init_state(torch.zeros(5, 8))
    for _ in range(3):
        hidden = torch.randn(5, 8)
        latent, state = head.step(previous, hidden, state)
        bias, theirs = module.step_bias(previous, hidden_states=hidden, state=theirs)
        torch.testing.assert_close(latent @ head.w2.T, bias)
        previous = bias.argmax(-1)


@pytest.mark.parametrize("with_markov", [True, False], ids=["h+markov", "h-only"])
def test_our_confidence_is_sglangs(with_markov: bool) -> None:
    from sglang.srt.models.dspark import DSparkConfidenceHead, VanillaMarkov

    from dspark_sglang.core.heads import ConfidenceHead, MarkovHead

    module = DSparkConfidenceHead(hidden_size=8, markov_rank=2, with_markov=with_markov)
    config = DRAFTER | {"confidence_head_with_markov": with_markov}
    expected = dense_tensors(parse_drafter_config(config))
    shapes = {f"confidence_head.{n}": tuple(p.shape) for n, p in module.named_parameters()}
    assert shapes == {n: s for n, s in expected.items() if n.startswith("confidence_head.")}
    markov = VanillaMarkov(vocab_size=16, markov_rank=2)
    hidden, previous = torch.randn(3, 4, 8), torch.randint(16, (3, 4))
    wanted = module(hidden, markov.markov_w1(previous))
    head = ConfidenceHead.from_module(module, torch.ones(4))
    found = head.logits(hidden, previous, MarkovHead.from_module(markov))
    torch.testing.assert_close(found, wanted)


def test_requests_are_held_back_for_our_kind_of_drafter_unless_told_not_to() -> None:
    """Why ``arguments`` sets the delay to 1."""
    from sglang.srt.managers.min_free_slots_delayer import resolve_min_free_slots

    assert resolve_min_free_slots(None, 16, is_dflash_family=True) == 3
    assert resolve_min_free_slots(1, 16, is_dflash_family=True) is None


def test_what_a_grammar_refuses_ends_its_request() -> None:
    """``requests.advance_grammar`` knows by ``to_finish`` that it was refused, and by what is kept which token."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import (
        SchedulerBatchResultProcessor,
    )

    source = inspect.getsource(SchedulerBatchResultProcessor._accept_grammar_tokens)
    assert "req.to_finish = FINISH_ABORT(" in source and "retained.append(token_id)" in source
