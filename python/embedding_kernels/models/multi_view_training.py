"""`MultiViewTrainer`: multi-view rerankers trained with transformers' `Trainer` (needs the extra "training")."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..nn.ranking_losses import PUBLISHED_TEMPERATURE, listnet, listnet_double, orthogonality, rank_targets
from .loading import load_config
from .multi_view import load_multi_view, write_multi_view
from .multi_view_reranker import MultiViewReranker

logger = logging.getLogger(__name__)

# what a checkpoint ends with
_STATE = "trainer_state.json"
#: names of the losses of a list
LIST_LOSSES = {"listnet": listnet, "listnet_double": listnet_double}

_COLUMNS = ("query", "passages", "ranks")


class RankedListCollator:
    """Packs lists of passages as the reranker reads them, with the rank of each passage.

    Args:
        reranker: tokenises, with its sentinels and its ``max_length``.
    """

    def __init__(self, reranker: MultiViewReranker) -> None:
        self.reranker = reranker

    def __call__(self, lists: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of `MultiViewModel.forward`, and "ranks", float32 ``[P]``.

        Args:
            lists: mappings with "query"; "passages", best first; and, if it is not 1, 2, 3, ..., "ranks": a number of
                1 or more for each passage, equal ones allowed.

        Raises:
            ValueError: a list is not as above.
        """
        ranks: list[float] = []
        for one in lists:
            if not isinstance(one, Mapping) or "query" not in one or "passages" not in one:
                got = ", ".join(map(repr, one)) if isinstance(one, Mapping) else type(one).__name__
                raise ValueError(f'RankedListCollator: a list must have "query" and "passages", got {got or "nothing"}')
            count, given = len(one["passages"]), one.get("ranks")
            if given is not None and len(given) != count:
                raise ValueError(
                    f'RankedListCollator: "ranks" must be as many as "passages" ({count}), got {len(given)}'
                )
            ranks += range(1, count + 1) if given is None else given
        ids, cu_seqlens, longest, cu_passages = self.reranker.tokenize(
            [one["query"] for one in lists], [one["passages"] for one in lists]
        )
        return {
            "input_ids": ids,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": longest,
            "cu_passages": cu_passages,
            "ranks": torch.tensor(ranks, dtype=torch.float32),
        }


class MultiViewTrainer(Trainer):
    """transformers' `Trainer` for a `MultiViewReranker`: the loss of MVP (arXiv 2509.07485, 2025) on packed lists.

    ``L = L_list + λ L_orth``: ListNet over the passages of each query (`nn.listnet`, or `nn.listnet_double` as
    published) with targets from their ranks (`nn.rank_targets`), and the anchors' cosines (`nn.orthogonality`).
    Both parts are logged beside the sum. A batch is ``per_device_train_batch_size`` queries with all their passages.

    There is no dropout: the model's ``dropout_rate`` is set to 0. Under ``bf16=True`` products run in bfloat16 on
    float32 weights; on a CPU, set ``ONEDNN_PRIMITIVE_CACHE_CAPACITY=64``: by default oneDNN keeps gigabytes of
    primitives for batches of ever other sizes. Checkpoints are directories of the published layout, which
    `MultiViewReranker.from_pretrained` loads, with the state of training beside the weights. A run that is interrupted
    leaves whole checkpoints, and ``train(resume_from_checkpoint=True)`` goes on from the last one, on a CPU to the same
    bits as without interruption.

    Args:
        reranker: trained in place; in evaluation mode again when `train` ends.
        args: transformers' `TrainingArguments`.
        train_dataset: mappings as `RankedListCollator` takes them: "query", "passages" best first, perhaps "ranks".
        loss: "listnet", or "listnet_double" as the released checkpoints were trained with.
        orthogonal_weight: λ, at least 0; 1 as published.
        temperature: τ of the scores.
        target_temperature: τ of the targets; that of the scores by default, as published. A lower one asks for more of
            the first ranks.
        options: other arguments of `Trainer`: ``eval_dataset``, ``callbacks``, ``optimizers``, ...

    Raises:
        ValueError: an argument has a value that cannot be used, or several GPUs would be driven by one process.
    """

    #: the loss is a mean over the queries of a batch: `Trainer` divides it by the batches of a step
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        reranker: MultiViewReranker,
        args: TrainingArguments,
        train_dataset: Any = None,
        *,
        loss: str = "listnet",
        orthogonal_weight: float = 1.0,
        temperature: float = PUBLISHED_TEMPERATURE,
        target_temperature: float | None = None,
        **options: Any,
    ) -> None:
        if loss not in LIST_LOSSES:
            raise ValueError(f"MultiViewTrainer: loss must be one of {', '.join(LIST_LOSSES)}, got {loss!r}")
        target_temperature = temperature if target_temperature is None else target_temperature
        for name, value in (("temperature", temperature), ("target_temperature", target_temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"MultiViewTrainer: {name} must be a positive number, got {value}")
        if not 0 <= orthogonal_weight < float("inf"):
            raise ValueError(f"MultiViewTrainer: orthogonal_weight must be 0 or more, got {orthogonal_weight}")
        if args.n_gpu > 1:
            raise ValueError(
                f"MultiViewTrainer: one process must see one GPU, as packed batches cannot be split, got {args.n_gpu}"
            )
        for part in (reranker.model.t5, reranker.model.t5.encoder, reranker.model.t5.decoder):
            part.config.dropout_rate = 0.0
        self.reranker = reranker
        self.list_loss, self.orthogonal_weight = LIST_LOSSES[loss], orthogonal_weight
        self.temperature, self.target_temperature = temperature, target_temperature
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        options.setdefault("data_collator", RankedListCollator(reranker))
        super().__init__(reranker.model, args, train_dataset=train_dataset, **options)
        self._directory = Path(self.args.output_dir or "")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """`Trainer.train`; ``resume_from_checkpoint=True`` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            last = last_checkpoint(self._directory)
            if last is None:
                raise ValueError(f"train: {self._directory} must hold a checkpoint to resume from, got none")
            resume_from_checkpoint = str(last)
        try:
            return super().train(resume_from_checkpoint, *args, **options)
        finally:
            self.reranker.model.eval()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch of lists, float32; with the `MultiViewOutput` where asked for."""
        ranks = inputs["ranks"]
        output = model(**{name: value for name, value in inputs.items() if name != "ranks"})
        targets = rank_targets(ranks, inputs["cu_passages"], temperature=self.target_temperature)
        parts = {
            "list_loss": self.list_loss(output.scores, targets, inputs["cu_passages"], temperature=self.temperature),
            "orthogonal_loss": orthogonality(output.anchors),
        }
        if model.training:
            self._summed += 1
            for name, part in parts.items():
                self._sums[name] = self._sums.get(name, 0) + part.detach()
        loss = parts["list_loss"] + self.orthogonal_weight * parts["orthogonal_loss"]
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: lists of uneven length have no common array of predictions."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """`Trainer.log`, with the means of both parts of the loss since the last time."""
        if "loss" in logs and self._summed:
            logs = logs | {name: float(value) / self._summed for name, value in self._sums.items()}
            self._sums, self._summed = {}, 0
        super().log(logs, *args, **options)

    # ---- what Trainer calls ----

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **options)
        # fused optimizers change the weights without counting a version, so what was derived from them would stay
        optimizer.register_step_post_hook(lambda *_: self.reranker.model.forget())
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = [*_COLUMNS]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            directory = self._directory if output_dir is None else Path(output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            write_multi_view(self.reranker.model, self.reranker.tokenizer, directory)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # an interrupt too
            if not _is_whole(directory):
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        loaded = load_multi_view(path, load_config(path), torch.device("cpu"), None, None)
        self.reranker.model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        self._load_from_checkpoint(best)


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint of the most steps in a `Trainer`'s output directory; None where there is none."""
    steps = {}
    for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit() and _is_whole(path):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def _is_whole(checkpoint: Path) -> bool:
    """The trainer's state is what a checkpoint ends with."""
    try:
        TrainerState.load_from_json(str(checkpoint / _STATE))
    except (OSError, ValueError, TypeError):
        return False
    return True


__all__ = ["LIST_LOSSES", "MultiViewTrainer", "RankedListCollator", "last_checkpoint"]
