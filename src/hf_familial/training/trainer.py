"""The host's Trainer, with the loss of every exit in its logs and evaluations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint
from transformers.utils import CONFIG_NAME

from ..flops import prepare_training_flops
from ..models.familial import FamilialConfig
from ..models.familial.losses import IGNORE_INDEX
from .args import FamilialTrainingArguments, check_label_smoothing
from .budget import flops_per_token
from .callbacks import (
    ExitProgressCallback,
    FlopBudgetCallback,
    FlopCounterCallback,
    RunRecordCallback,
)
from .run_record import TokenCounts, add_counts, count_targets, count_tokens, main_input
from .tuning import what_learns


logger = logging.getLogger(__name__)


class FamilialTrainer(Trainer):
    """[`~transformers.Trainer`] for families; arguments as there, or [`FamilialTrainingArguments`].

    Training makes no logits, so memory does not grow with the number of exits.
    Adds to the logs `exit_0_loss`, `exit_1_loss`, ... (nats per token, averaged over the optimiser
    steps since the last log and over processes), and to every evaluation `eval_exit_0_loss`, ...;
    the last is the deepest exit's, the one to compare with a dense run. A loss that is not finite
    is logged as it is, so that the exit that broke shows; `logging_nan_inf_filter` keeps it from
    `loss` alone.

    An evaluation reads every row once, whatever `dataloader_drop_last` says of training. Its
    losses are sums over all targets divided by their number, so they do not depend on the batch
    size or on the number of processes; `eval_loss` is their mean. Without a target there are none,
    and a warning says so.

    Raises:
        ValueError: If label smoothing is asked for, which would bypass the loss of all exits but
            one, or if `exit_weights` does not hold one number for each exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_label_smoothing(self.args)
        adapters = (getattr(self.model, "peft_config", None) or {}).values()
        if any(not adapter.base_model_name_or_path for adapter in adapters):
            logger.warning(
                "The family was never saved, so its adapters do not name a base to load them on. "
                "To name it, save the family, load it from there and add the adapters to that."
            )
        if isinstance(self.args, FamilialTrainingArguments):
            self.args.schedule(self.model.config.exits, 0)  # one weight for each exit
        # `None` where progress bars are switched off
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ExitProgressCallback)
        self._exit_losses: torch.Tensor | None = None
        self._steps_kept: set[int] = set()
        self._evaluated: list[torch.Tensor] = []
        # by sequence length: asked for at every step, while the config stays the same
        self._flops_per_token: dict[int, float] = {}
        self._tokens: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the host's loss of the exits' objective; keep every exit's loss for the logs."""
        if self.model.training and self.compute_loss_func is None:
            if "labels" not in inputs:
                raise ValueError(
                    "rows to train on must have `labels`: token ids, -100 where there is no target "
                    "(`DataCollatorForLanguageModeling(tokenizer, mlm=False)` makes them of "
                    f"`input_ids`); got {', '.join(inputs)}."
                )
            inputs = inputs | self._objective()
        targets = None
        if not self.model.training and self.compute_loss_func is None and "labels" in inputs:
            inputs, targets = self._without_repeats(inputs)
            num_items_in_batch = targets.expand(self.args.n_gpu, 1) if self.args.n_gpu > 1 else None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        exit_losses = outputs["exit_losses"] if "exit_losses" in outputs else None
        if exit_losses is not None and targets is not None:
            # a row of its share of the mean per replica under DataParallel
            means = exit_losses.float().view(max(1, self.args.n_gpu), -1).sum(0)
            sums = torch.where(targets > 0, means * targets, 0.0)
            self._evaluated.append(torch.cat((sums, targets.to(sums).view(1))))
        elif exit_losses is not None:
            self._keep(exit_losses, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _without_repeats(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """Take the targets from rows that fill up the last batch of several processes; count."""
        state, name = self.accelerator.gradient_state, "labels"
        if inputs.get("shift_labels") is not None:
            name = "shift_labels"
        several = self.accelerator.num_processes > 1
        if several and state.end_of_dataloader and state.remainder > 0:
            labels = inputs[name].clone()
            share = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
            first = self.accelerator.process_index // share * len(labels)
            labels[max(0, state.remainder - first) :] = IGNORE_INDEX
            inputs = {**inputs, name: labels}
        return inputs, count_targets(inputs)

    def _objective(self) -> dict[str, Any]:
        """Return the model's arguments about the loss of this optimiser step."""
        objective: dict[str, Any] = {"skip_logits": True}
        if isinstance(self.args, FamilialTrainingArguments):
            exits = self.model.config.exits
            schedule = self.args.schedule(exits, self.state.max_steps)
            objective["exit_weights"] = schedule.at(self.state.global_step)
            objective["distillation"] = self.args.distillation()
        return objective

    def _keep(
        self, exit_losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> None:
        # one row per replica under DataParallel, in one vector; FSDP2 may have rounded them
        exit_losses = exit_losses.float().view(max(1, self.args.n_gpu), -1).mean(0)
        exit_losses = exit_losses * self._host_scale(num_items_in_batch)
        self._steps_kept.add(self.state.global_step)
        kept = self._exit_losses
        self._exit_losses = exit_losses if kept is None else kept + exit_losses

    def _host_scale(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """Return the factor that the host applies to a model's loss before it logs it."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        if not self.args.average_tokens_across_devices:
            return 1.0
        # each process, or replica, holds its share of a sum over all
        processes = self.accelerator.num_processes // self.get_tp_size()
        return self.args.n_gpu if self.args.n_gpu > 1 else processes

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the host; a checkpoint to resume from must be of a family with the same exits."""
        self._check_resumed(resume_from_checkpoint)
        self._forget()
        self._tokens.clear()
        self._flops_per_token.clear()  # something else may learn than before
        if self.model is not None:
            model = self.accelerator.unwrap_model(self.model)
            prepare_training_flops(model.config, what_learns(model))
        for budget in self._callbacks(FlopBudgetCallback):
            budget.store = self.store_flos
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if self.args.world_size == 1:  # others may wait elsewhere, for ever
                self.store_flos()
            for callback in self._callbacks(RunRecordCallback):
                try:
                    callback.on_failure(self.args, self.state)
                except OSError as second:  # a full disk fails both; the first says where
                    error.add_note(f"its row could not be written either: {second}")
            raise

    def _check_resumed(self, checkpoint: str | bool | None) -> None:
        """Compare the exits with a checkpoint's: the host would load weights of other exits."""
        if checkpoint is True:
            folder = self.args.output_dir
            checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if not checkpoint or not (Path(checkpoint) / CONFIG_NAME).is_file():
            return  # none, which the host says, or adapters alone
        stored, config = FamilialConfig.from_pretrained(checkpoint), self.model.config
        for name in ("exits", "num_exit_layers", "exit_norm", "exit_head"):
            before, now = getattr(stored, name), getattr(config, name)
            if before != now:
                raise ValueError(
                    f"`resume_from_checkpoint` ({checkpoint}) is of a family with `{name}` "
                    f"{before!r}; this model has {now!r}. Resume with the exits of the checkpoint, "
                    "or start a new training from its weights."
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the host; the losses of the last evaluation go along, in `trainer_state.json`."""
        super().save_model(output_dir, _internal_call)
        # a checkpoint gets its state from the host
        measured = any("eval_exit_0_loss" in row for row in self.state.log_history)
        if measured and self.args.should_save and not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return the FLOPs of forward and backward as the model learns, every head counted."""
        ids = main_input(inputs)
        length = ids.shape[1]
        if length not in self._flops_per_token:
            model = self.accelerator.unwrap_model(self.model)
            self._flops_per_token[length] = flops_per_token(model, length)
        if self._callbacks(RunRecordCallback):
            self._tokens.append(count_tokens(inputs))
        # processes that share a batch run it once between them
        return self._flops_per_token[length] * ids.numel() / self.get_tp_size()

    def store_flos(self) -> None:
        """As in the host, with the tokens beside the FLOPs."""
        super().store_flos()
        records = self._callbacks(RunRecordCallback)
        if not records:
            return
        none = torch.zeros(4, dtype=torch.int64, device=self.args.device)
        counts = add_counts(torch.stack([none, *(row.to(none) for row in self._tokens)]))
        self._tokens.clear()
        if self.args.world_size > 1:
            counts = add_counts(self.accelerator.gather(counts[None]))
            counts[:3] //= self.get_tp_size()
        for record in records:
            record.count(TokenCounts(*counts.tolist()))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in the host; the model that was fine-tuned defaults to the family's decoder."""
        name = self.model.config.name_or_path or self.model.config.text_config.name_or_path
        if not args and name and not Path(name).is_dir():
            kwargs.setdefault("finetuned_from", name)
        super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the host, with `exit_<k>_loss` beside every training `loss`."""
        if "loss" in logs and self._exit_losses is not None:
            gathered = nested_gather(self._exit_losses, self.args.parallel_mode)
            means = gathered.view(-1, len(self._exit_losses)).mean(0) / len(self._steps_kept)
            logs |= {f"exit_{k}_loss": loss for k, loss in enumerate(means.tolist())}
            self._forget()
        if "loss" in logs:
            for callback in self._callbacks(FlopCounterCallback):
                logs |= callback.measure(self.args, self.state)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in the host; an interrupted one cannot be resumed with an older run's state."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # the host writes it last, and asks for it first
            older = Path(self._get_output_dir(trial=trial), name, TRAINER_STATE_NAME)
            older.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _callbacks(self, kind: type) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, kind)]

    def _forget(self) -> None:
        self._exit_losses = None
        self._steps_kept = set()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As in the host, but every row is read: `dataloader_drop_last` is for training."""
        with self._dropping_no_row():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As in the host, but every row is read: `dataloader_drop_last` is for training."""
        with self._dropping_no_row():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _dropping_no_row(self) -> Iterator[None]:
        given: TrainingArguments = self.args
        self.args: TrainingArguments = copy.copy(given)
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args = given

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in the host, with `<prefix>_exit_<k>_loss` among the metrics."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.pop(f"{prefix}_loss", None)
            output.metrics.update(self._evaluation_losses(prefix))
        return output

    def _evaluation_losses(self, prefix: str) -> dict[str, float]:
        """Return the losses of the exits over all targets of all processes, and their mean."""
        sums = torch.stack(self._evaluated).cpu().double().sum(0)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device)).cpu()
        *losses, targets = sums.tolist()
        if not targets:
            logger.warning(
                "The evaluation `%s` has no loss: all of its labels are %d, so no row has a "
                "target. Give labels of the tokens to predict.",
                prefix,
                IGNORE_INDEX,
            )
            return {}
        means = [loss / targets for loss in losses]
        named = {f"{prefix}_exit_{k}_loss": mean for k, mean in enumerate(means)}
        return {f"{prefix}_loss": sum(means) / len(means)} | named
