"""The Trainer of families: it logs and evaluates the loss of every exit."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ..flops import prepare_training_flops
from ..models.familial.losses import IGNORE_INDEX
from ._each_exit import EachExitMixin
from ._exit_losses import ExitLosses
from ._pass_flops import PassMeter
from .args import FamilialTrainingArguments, check_label_smoothing
from .budget import flops_per_token
from .callbacks import (
    ExitProgressCallback,
    FlopBudgetCallback,
    FlopCounterCallback,
    RunRecordCallback,
)
from .checkpoints import checkpoint_to_resume
from .run_record import TokenCounts, add_counts, count_targets, count_tokens, main_input
from .tuning import what_learns


logger = logging.getLogger(__name__)


class MultiExitTrainer(EachExitMixin):
    """The base class that [`multi_exit`] adds to a trainer class.

    It adds losses, logs, FLOPs and evaluations by exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_options()
        adapters = (getattr(self.model, "peft_config", None) or {}).values()
        if any(not adapter.base_model_name_or_path for adapter in adapters):
            logger.warning(
                "The family was never saved, so its adapters do not name the base model that they "
                "belong to. Save the family, load it from that folder, then add the adapters."
            )
        if isinstance(self.args, FamilialTrainingArguments):
            self.args.schedule(self.model.config.exits, 0)  # one weight for each exit
        # `None` when progress bars are switched off
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ExitProgressCallback)
        self._exit_losses = ExitLosses(self.model.config.num_exits)
        self._meter = PassMeter(self.accelerator.unwrap_model(self.model))
        self._evaluated: list[torch.Tensor] = []
        # key: sequence length; every step needs the value, and the config does not change
        self._flops_per_token: dict[int, float] = {}
        self._tokens: list[torch.Tensor] = []

    def _check_options(self) -> None:
        """Raise if the model is not a family, or if two options contradict each other."""
        self._family()
        given = self.multi_exit_options.exit_weights
        if self._host_computes_loss():
            check_label_smoothing(self.args)
        self._step_weights()  # one weight for each exit
        if is_deepspeed_zero3_enabled() and (self._draws() or not self._has_host_loss()):
            # its weights are partitioned again before the summed gradients arrive, and a parameter
            # without a gradient would keep that of an earlier step
            raise ValueError(
                'DeepSpeed ZeRO-3 works neither with `exits="sample"` nor with a trainer that has '
                f"a loss of its own, got {type(self).__name__}. Use ZeRO-2, FSDP2 or DDP."
            )
        if not isinstance(self.args, FamilialTrainingArguments):
            return
        if given != "uniform":
            raise ValueError(
                "`exit_weights` was passed to `multi_exit` and is also an option of "
                "`FamilialTrainingArguments`: set it in one of the two."
            )
        if self.args.distillation() is not None and not self._has_host_loss():
            raise ValueError(
                f"distillation needs the loss of `Trainer`, but {type(self).__name__} has a loss "
                "of its own: set `distillation_weight` to 0."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the weighted loss of all exits, and keep each exit's loss for the logs."""
        training = self.model.training
        if self._has_host_loss() and not (training and self._draws()):
            return self._host_loss(model, inputs, return_outputs, num_items_in_batch)
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        compute = functools.partial(super().compute_loss, **kwargs)
        loss, losses, outputs = self._loss_by_exit(compute, model, inputs, return_outputs)
        if training:
            self._exit_losses.add(losses, self._log_scale(num_items_in_batch), self.state)
        else:
            rows = find_batch_size(inputs) or 1
            values = [losses[k].float().reshape(()) * rows for k in sorted(losses)]
            self._evaluated.append(torch.stack([*values, torch.full_like(values[0], rows)]))
        return (loss, outputs) if return_outputs else loss

    def _log_scale(self, num_items_in_batch: Any) -> float:
        """Return the factor by which `Trainer` multiplies a computed loss before it logs it."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1.0 if scaled else 1 / self.current_gradient_accumulation_steps

    def _host_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss of all exits that the family computes in one call."""
        if self.model.training:
            if "labels" not in inputs:
                raise ValueError(
                    "The training rows must have `labels` (token ids, -100 where there is no "
                    f"target), got {', '.join(inputs)}. "
                    "`DataCollatorForLanguageModeling(tokenizer, mlm=False)` creates them from "
                    "`input_ids`."
                )
            inputs = inputs | self._objective()
        targets = None
        if not self.model.training and "labels" in inputs:
            inputs, targets = self._without_repeats(inputs)
            num_items_in_batch = targets.expand(self.args.n_gpu, 1) if self.args.n_gpu > 1 else None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        exit_losses = outputs["exit_losses"] if "exit_losses" in outputs else None
        if exit_losses is not None and targets is not None:
            # under DataParallel: one row per replica, each its share of the mean
            means = exit_losses.float().view(max(1, self.args.n_gpu), -1).sum(0)
            sums = torch.where(targets > 0, means * targets, 0.0)
            self._evaluated.append(torch.cat((sums, targets.to(sums).view(1))))
        elif exit_losses is not None:
            # DataParallel returns one row per replica, in one vector. FSDP2 may have cast the
            # losses to half precision.
            means = exit_losses.float().view(max(1, self.args.n_gpu), -1).mean(0)
            scale = self._host_scale(num_items_in_batch)
            self._exit_losses.add(dict(enumerate(means)), scale, self.state)
        return (loss, outputs) if return_outputs else loss

    def _without_repeats(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """Remove the targets of repeated rows and return the inputs and the number of targets.

        With several processes, the dataloader repeats rows to fill the last batch.
        """
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

    def _step_weights(self) -> tuple[float, ...]:
        """Return the weight of each exit in the loss of this optimiser step. The sum is 1."""
        if not isinstance(self.args, FamilialTrainingArguments):
            return super()._step_weights()
        schedule = self.args.schedule(self.model.config.exits, self.state.max_steps)
        return schedule.at(self.state.global_step)

    def _objective(self) -> dict[str, Any]:
        """Return the arguments of `model.forward` that set the loss of this optimiser step."""
        objective: dict[str, Any] = {"skip_logits": True, "exit_weights": self._step_weights()}
        if isinstance(self.args, FamilialTrainingArguments):
            objective["distillation"] = self.args.distillation()
        return objective

    def _host_scale(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """Return the factor by which `Trainer` multiplies a model's loss before it logs it."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        if not self.args.average_tokens_across_devices:
            return 1.0
        # each process or replica has its share of a sum over all of them
        processes = self.accelerator.num_processes // self.get_tp_size()
        return self.args.n_gpu if self.args.n_gpu > 1 else processes

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train like `Trainer.train`. A checkpoint to resume from must have the same exits.

        `resume_from_checkpoint=True` means the newest complete checkpoint in `output_dir`.
        """
        if resume_from_checkpoint:
            given, folder = resume_from_checkpoint, self.args.output_dir
            resume_from_checkpoint = checkpoint_to_resume(given, folder, self.model.config)
        self._exit_losses.clear()
        self._meter.clear()
        self._tokens.clear()
        self._flops_per_token.clear()  # other parameters may learn than in the last call
        if self.model is not None:
            model = self.accelerator.unwrap_model(self.model)
            prepare_training_flops(model.config, what_learns(model))
        for budget in self._callbacks(FlopBudgetCallback):
            budget.store = self.store_flos
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if self.args.world_size == 1:  # with others, this collective call could wait for ever
                self.store_flos()
            for callback in self._callbacks(RunRecordCallback):
                try:
                    callback.on_failure(self.args, self.state)
                except OSError as second:  # a full disk makes both writes fail
                    error.add_note(f"The row of runs.jsonl could not be written either: {second}")
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and the losses of the last evaluation in `trainer_state.json`."""
        super().save_model(output_dir, _internal_call)
        # for a checkpoint, `Trainer` itself saves the state
        measured = any("eval_exit_0_loss" in row for row in self.state.log_history)
        if measured and self.args.should_save and not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return the FLOPs of one forward and backward pass on this batch, with all heads."""
        if not self._has_host_loss() or self._draws():
            flops, tokens = self._meter.take()
            self._tokens += tokens if self._callbacks(RunRecordCallback) else []
            return flops / self.get_tp_size()
        ids = main_input(inputs)
        length = ids.shape[1]
        if length not in self._flops_per_token:
            model = self.accelerator.unwrap_model(self.model)
            self._flops_per_token[length] = flops_per_token(model, length)
        if self._callbacks(RunRecordCallback):
            self._tokens.append(count_tokens(inputs))
        # processes of one tensor-parallel group share a batch and run it once together
        return self._flops_per_token[length] * ids.numel() / self.get_tp_size()

    def store_flos(self) -> None:
        """Add the FLOPs of all processes to the state, and pass token counts to the callbacks."""
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
        """Write the model card. `finetuned_from` defaults to the family's pretrained decoder."""
        name = self.model.config.name_or_path or self.model.config.text_config.name_or_path
        takes_name = "finetuned_from" in signature(super().create_model_card).parameters
        if takes_name and not args and name and not Path(name).is_dir():
            kwargs.setdefault("finetuned_from", name)
        super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values. To a training `loss`, add `exit_<k>_loss` and the FLOPs of callbacks."""
        if "loss" in logs:
            logs |= self._exit_losses.means(self.args.parallel_mode)
        if "loss" in logs:
            for callback in self._callbacks(FlopCounterCallback):
                logs |= callback.measure(self.args, self.state)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Delete the trainer state of an older run in the checkpoint's folder, then save.

        An interrupted save then never combines new weights with an old state.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # `Trainer` writes this file last and reads it first
            older = Path(self._get_output_dir(trial=trial), name, TRAINER_STATE_NAME)
            older.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _callbacks(self, kind: type) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, kind)]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return a dataloader that reads every row, even with `dataloader_drop_last=True`."""
        with self._dropping_no_row():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return a dataloader that reads every row, even with `dataloader_drop_last=True`."""
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
        """Evaluate. The metrics have `<prefix>_exit_<k>_loss` and their mean `<prefix>_loss`."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.pop(f"{prefix}_loss", None)
            output.metrics.update(self._evaluation_losses(prefix))
        return output

    def _evaluation_losses(self, prefix: str) -> dict[str, float]:
        """Return each exit's loss over the targets of all processes, and the mean over exits."""
        sums = torch.stack(self._evaluated).cpu().double().sum(0)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device)).cpu()
        *losses, targets = sums.tolist()
        if not targets:
            logger.warning(
                "The evaluation `%s` has no loss, because all of its labels are %d. Pass labels "
                "that contain the tokens to predict.",
                prefix,
                IGNORE_INDEX,
            )
            return {}
        means = [loss / targets for loss in losses]
        named = {f"{prefix}_exit_{k}_loss": mean for k, mean in enumerate(means)}
        return {f"{prefix}_loss": sum(means) / len(means)} | named


class FamilialTrainer(MultiExitTrainer, Trainer):
    """A [`~transformers.Trainer`] that trains all exits of a family at once.

    Its arguments are those of [`~transformers.Trainer`]. Pass [`FamilialTrainingArguments`] as
    `args` to weight the exits or to distil them from the deepest one.

    Every training log has `exit_0_loss`, `exit_1_loss` and so on, in nats per token. Each is a mean
    over the optimiser steps since the last log and over all processes. Every evaluation has
    `eval_exit_0_loss` and so on. The last of them is the loss of the deepest exit, the one to
    compare with an ordinary model. A loss of an exit that is NaN or infinite appears in the log.
    `logging_nan_inf_filter` hides such values in `loss` only.

    An evaluation reads every row once. `dataloader_drop_last` applies to training only. The loss of
    an exit is its sum over all targets, divided by the number of targets. It therefore depends on
    neither the batch size nor the number of processes. `eval_loss` is the mean over the exits. If
    the labels contain no target, the evaluation has no loss and logs a warning.

    Training does not keep the logits of all exits, so the memory for logits does not grow with the
    number of exits.

    `multi_exit` makes such a class from any other trainer.

    Raises:
        TypeError: If the model is not a family.
        ValueError: If `label_smoothing_factor` is not 0, or if `exit_weights` does not have one
            number for each exit.

    Example:
        >>> args = FamilialTrainingArguments("outputs", max_steps=1000)
        >>> FamilialTrainer(model, args, train_dataset=rows).train()
    """
