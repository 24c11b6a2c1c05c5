"""The host's Trainer, with the loss of every exit in its logs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput

from .args import FamilialTrainingArguments
from .budget import flops_per_token
from .callbacks import FlopCounterCallback, RunRecordCallback
from .progress import ExitProgressCallback


class FamilialTrainer(Trainer):
    """[`~transformers.Trainer`] for families; arguments as there, or [`FamilialTrainingArguments`].

    Training makes no logits, so memory does not grow with the number of exits.
    Adds to the logs `exit_0_loss`, `exit_1_loss`, ... (nats per token, averaged over the optimiser
    steps since the last log and over processes), and to every evaluation `eval_exit_0_loss`, ...;
    the last is the deepest exit's, the one to compare with a dense run. A loss that is not finite
    is logged as it is, so that the exit that broke shows; `logging_nan_inf_filter` keeps it from
    `loss` alone.

    Raises:
        ValueError: If label smoothing is asked for, which would bypass the loss of all exits but
            one, or if `exit_weights` does not hold one number for each exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0 for a family: the host would smooth one exit "
                f"and leave the others out of the loss, got {self.args.label_smoothing_factor}."
            )
        if isinstance(self.args, FamilialTrainingArguments):
            self.args.schedule(self.model.config.exits, 0)  # one weight for each exit
        # `None` where progress bars are switched off
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ExitProgressCallback)
        self._exit_losses: torch.Tensor | None = None
        self._steps_kept: set[int] = set()
        self._eval_exit_losses: list[torch.Tensor] = []
        # by sequence length: asked for at every step, while the config stays the same
        self._flops_per_token: dict[int, float] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The host's loss of the exits' objective; keeps the loss of every exit for the logs.

        Raises:
            ValueError: If rows to train on have no `labels`.
        """
        if self.model.training and self.compute_loss_func is None:
            if "labels" not in inputs:
                raise ValueError(
                    "rows to train on must have `labels`: token ids, -100 where there is no target "
                    "(`DataCollatorForLanguageModeling(tokenizer, mlm=False)` makes them of "
                    f"`input_ids`); got {', '.join(inputs)}."
                )
            inputs = inputs | self._objective()
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        exit_losses = outputs["exit_losses"] if "exit_losses" in outputs else None
        if exit_losses is not None:
            self._keep(exit_losses, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _objective(self) -> dict[str, Any]:
        """What the model is told about the loss of this optimiser step."""
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
        if not self.model.training:
            # repeated as the host repeats its own loss, to be averaged with the same weights
            rows = exit_losses.repeat(self.args.eval_batch_size, 1)
            self._eval_exit_losses.append(self.gather_function(rows).cpu())
            return
        self._steps_kept.add(self.state.global_step)
        kept = self._exit_losses
        self._exit_losses = exit_losses if kept is None else kept + exit_losses

    def _host_scale(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """What the host multiplies a model's loss by before it logs it."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps if self.model.training else 1.0
        if not self.args.average_tokens_across_devices:
            return 1.0
        # each process, or replica, holds its share of a sum over all
        processes = self.accelerator.num_processes // self.get_tp_size()
        return self.args.n_gpu if self.args.n_gpu > 1 else processes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the host."""
        self._forget()
        self._flops_per_token.clear()  # something else may learn than before
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            for callback in self._callbacks(RunRecordCallback):
                try:
                    callback.on_failure(self.args, self.state)
                except OSError as second:  # a full disk fails both; the first says where
                    error.add_note(f"its row could not be written either: {second}")
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the host; the losses of the last evaluation go along, in `trainer_state.json`."""
        super().save_model(output_dir, _internal_call)
        # a checkpoint gets its state from the host
        measured = any("eval_exit_0_loss" in row for row in self.state.log_history)
        if measured and self.args.should_save and not _internal_call:
            folder = Path(output_dir or self.args.output_dir)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of forward and backward, every exit and head counted, of what learns."""
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
        length = ids.shape[1]
        if length not in self._flops_per_token:
            model = self.accelerator.unwrap_model(self.model)
            self._flops_per_token[length] = flops_per_token(model, length)
        return self._flops_per_token[length] * ids.numel()

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

    def _callbacks(self, kind: type) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, kind)]

    def _forget(self) -> None:
        self._exit_losses = None
        self._steps_kept = set()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in the host, with `<prefix>_exit_<k>_loss` among the metrics."""
        self._eval_exit_losses = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._eval_exit_losses:
            prefix = kwargs.get("metric_key_prefix", "eval")
            means = torch.cat(self._eval_exit_losses).mean(0).tolist()
            output.metrics.update({f"{prefix}_exit_{k}_loss": x for k, x in enumerate(means)})
        return output
