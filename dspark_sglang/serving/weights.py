"""Weights replaced in a running server: what was made of them is renewed, and whether the drafter still fits is looked at.

SGLang loads an update into the target and then into every draft model. A drafter takes tensors by its own names
alone. Files are the target's: a dense drafter is a checkpoint of its own and is left as it is, one in the target's
checkpoint is loaded with it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel

from dspark_sglang.checkpoint import read_headers, weight_files
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.layouts.base import layout_of
from dspark_sglang.serving.sglang_types import UpdaterManager, WeightUpdater

if TYPE_CHECKING:
    from dspark_sglang.serving.worker import DSparkWorker

logger = logging.getLogger(__name__)

#: Tensors up to this size stand for the whole target, as in a package's fingerprint: norms and biases.
SMALL_BYTES = 64 * 1024
#: What a drafter may hold a copy of, and does not load.
_SHARED = ("embed_tokens.", "lm_head.")
_KEPT = "Succeeded to update model weights; the drafter is kept."
Loaded = tuple[bool, str]


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and values of a model's small parameters."""
    found = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if value.nbytes <= SMALL_BYTES:
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def unsound(model: torch.nn.Module) -> str | None:
    """The first parameter of a drafter that is NaN or infinite somewhere; None where all are sound."""
    for name, value in model.named_parameters():
        if name.startswith(_SHARED) or not value.is_floating_point():
            continue
        # One byte a number has no test of its own.
        values = value.detach() if value.element_size() > 1 else value.detach().to(torch.bfloat16)
        if not bool(values.isfinite().all()):
            return name
    return None


class DraftUpdater:
    """In the place of SGLang's updater of the draft model."""

    def __init__(
        self, own: WeightUpdater, names: Iterable[str], *, whole: bool, bundled: bool = False
    ) -> None:
        """Args:
        own: SGLang's ``WeightUpdater`` of the draft's runner.
        names: tensors of the drafter's checkpoint.
        whole: whether this rank holds all of them.
        bundled: whether they lie in the target's checkpoint.
        """
        self._own = own
        self._names = {name for name in names if not name.startswith(_SHARED)}
        self._whole = whole
        self._bundled = bundled
        #: Whether the drafter has been changed since that was last asked.
        self.loaded = False

    def _load(self, names: Iterable[str], load: Callable[[set[str]], Loaded]) -> Loaded:
        chosen = self._names & set(names)
        if not chosen:
            return True, _KEPT
        if not self._whole:
            return False, (
                "The drafter's heads are spread over ranks, which an update at run time cannot do. Expected a "
                "drafter that is whole on every rank. Restart with DSPARK_PLACEMENT=replicate, or with the new drafter."
            )
        self.loaded = True
        return load(chosen)

    def update_weights_from_disk(self, model_path: str, load_format: str, **more: Any) -> Loaded:
        """Load the drafter of the target's new files, if there is one.

        Args:
            model_path: folder of the target.
            load_format: SGLang's, as all that follows.
        """
        folder = Path(model_path)
        names = read_headers(folder) if self._bundled and weight_files(folder) else ()
        return self._load(
            names, lambda _: self._own.update_weights_from_disk(model_path, load_format, **more)
        )

    def update_weights_from_ipc(self, recv_req: object) -> Loaded:
        """Nothing: the tensors are the target's."""
        return True, _KEPT

    def update_weights_from_tensor(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]] | dict[str, Any],
        load_format: str | None = None,
    ) -> Loaded:
        """Load those tensors that are the drafter's.

        Args:
            named_tensors: pairs of name and tensor, or SGLang's flattened bucket.
            load_format: SGLang's.
        """
        given: Any = named_tensors
        if load_format == "flattened_bucket":
            names = [entry.name for entry in given["metadata"]]
            return self._load(
                names,
                lambda chosen: self._own.update_weights_from_tensor(
                    named_tensors=given
                    | {"metadata": [e for e in given["metadata"] if e.name in chosen]},
                    load_format=load_format,
                ),
            )
        return self._load(
            [name for name, _ in given],
            lambda chosen: self._own.update_weights_from_tensor(
                named_tensors=[pair for pair in given if pair[0] in chosen], load_format=load_format
            ),
        )

    def load_weights_from_distributed(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Loaded:
        """Load those received tensors that are the drafter's."""
        given = list(named_tensors)
        return self._load(
            [name for name, _ in given],
            lambda chosen: self._own.load_weights_from_distributed(
                [pair for pair in given if pair[0] in chosen]
            ),
        )

    def begin_weight_update(self) -> None:
        """See SGLang."""
        self._own.begin_weight_update()

    def end_weight_update(self, *, run_post_load: bool) -> None:
        """See SGLang."""
        self._own.end_weight_update(run_post_load=run_post_load)


class DraftRunner:
    """What SGLang's manager of updates sees of the draft's runner."""

    def __init__(self, updater: DraftUpdater) -> None:
        self.weight_updater = updater


class Weights:
    """The weights of one worker's target and drafter, as they were when the two fitted."""

    def __init__(self, worker: DSparkWorker, drafter: Path) -> None:
        """Args:
        worker: ours, with its parts in place.
        drafter: folder of the drafter's checkpoint.
        """
        self._worker = worker
        sharding, runner = worker._sharding, worker.draft_model_runner
        here = drafter.is_dir()
        layout = layout_of(drafter) if here else None
        names = layout.own(read_headers(drafter)) if layout else set()
        whole = sharding.drafts and (sharding.vocabulary is None or sharding.head is not None)
        sharding.draft.take_parts()
        self._updater = DraftUpdater(
            runner.weight_updater, names, whole=whole, bundled=layout is not None and layout.bundled
        )
        self._target = digest(self._model)
        self._check_drafter()

    @property
    def _model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._worker.model_runner.model
        return model

    def runners(self) -> list[tuple[str, Any]]:
        """In the place of SGLang's ``weight_update_runners``."""
        return [("draft", DraftRunner(self._updater))]

    def changed(self) -> None:
        """Renew what was made of weights, and stop drafting where the drafter no longer fits the target."""
        worker, faults = self._worker, self._worker.faults
        worker.catch_up()
        worker._sharding.renew()
        found = digest(self._model)
        if self._updater.loaded:
            self._updater.loaded = False
            self._target = found  # whoever sends a drafter sends the one that fits
            self._renew_drafter()
            faults.resume()
            self._check_drafter()
        if found == self._target:
            faults.resume("target")
        else:
            faults.stop(
                "target",
                "the target was updated to weights that the drafter was not made for (its norms and biases differ)",
            )

    def _renew_drafter(self) -> None:
        """Make again what was made of the drafter's weights; it is not calibrated."""
        worker, model = self._worker, self._worker.draft_model
        ones = torch.ones(worker.gamma)
        worker._ops.renew(
            MarkovHead.from_module(model.markov_head),
            ConfidenceHead.from_module(model.confidence_head, ones),
        )
        worker._sharding.draft.forget_copies()
        worker._verify_executor.renew()
        worker.drafter_sha256 = None
        worker.set_temperatures(ones, "none: the drafter was updated")

    def _check_drafter(self) -> None:
        """Draft nothing with weights that are not finite, on any rank."""
        worker, ranks = self._worker, self._worker._sharding.ranks
        name = unsound(worker.draft_model)
        if ranks.count > 1:
            found = ranks.gather(
                torch.tensor([int(name is not None)], device=worker.device), "start"
            )
            name = name or ("another rank" if int(found.sum()) else None)
        if name is not None:
            reason = f"the drafter's weights are NaN or infinite (first found in {name})"
            worker.faults.stop("weights", reason)


def contained(original: Callable[..., Any], manager: UpdaterManager, recv_req: object) -> Any:
    """SGLang's ``update_weights_from_tensor``, whose loaders raise on a wrong shape: here the update fails."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    try:
        return original(manager, recv_req)
    except Exception as error:  # the boundary of a request; with ranks, others would wait
        if get_parallel().tp_size > 1:
            raise
        message = f"The update failed: {type(error).__name__}: {error}. Weights may be partly replaced: update again."
        logger.error("%s", message, exc_info=error)
        return UpdateWeightsFromTensorReqOutput(success=False, message=message)


def followed(original: Callable[..., Any], manager: UpdaterManager, recv_req: object) -> Any:
    """An update of SGLang's manager that ends with new weights in place."""
    result = original(manager, recv_req)
    weights = getattr(manager.draft_worker, "weights", None)
    if weights is not None:
        weights.changed()
    return result
