"""MaskCallback: mask training with Hugging Face's Trainer."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_kernels.optim import MaskAdamW

from .masking import MaskSet
from .training.files import save_tensors

FILE = "masks.safetensors"  # in each checkpoint folder: the scores, and MaskSet.state_dict() as json


class MaskCallback(TrainerCallback):
    """What Trainer does not know about masks: ``Trainer(..., optimizers=(masks.adamw(lam=...), None),
    callbacks=[MaskCallback(masks)])``. Penalty and schedule are the optimizer's business; the callback

    - keeps masks soft in training steps and hard everywhere else: in evaluations, in predictions, after training;
    - adds beta, density and undecided to what Trainer logs, and writes all of it to ``<output_dir>/metrics.csv``;
    - saves scores, beta and schedule with each checkpoint (``masks.safetensors``) and takes them back when training is
      resumed and where ``load_best_model_at_end`` goes back to an earlier checkpoint. Trainer alone brings no beta
      back, and no scores either for models whose files have other names than their modules (ViT);
    - refuses what would train something else in silence.

    Args:
        masks: of the model that the Trainer trains.
        resume_from: the checkpoint folder, where training is resumed from one outside of ``output_dir``.

    Raises:
        ValueError: at the start of training: the optimizer is not ``masks.adamw(...)``, or was made with
            ``in_backward=True``; reentrant checkpointing, nn.DataParallel, FSDP or DeepSpeed is asked for; the
            checkpoint to resume from holds no masks, or those of other layers.
        RuntimeError: an evaluation in training runs with soft masks, because a callback behind this one asked for it.

    Warns:
        UserWarning: BatchNorm's running statistics would change in training, though no weight does; beta does not reach
            its end within ``max_steps``, so that the hard masks are not those that were trained.
    """

    def __init__(self, masks: MaskSet, *, resume_from: str | Path | None = None) -> None:
        if not isinstance(masks, MaskSet):
            raise TypeError(f"MaskCallback: masks must be what mask_model gave, got {type(masks).__name__}")
        self.masks = masks
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._columns: list[str] = []  # of metrics.csv, once this run has begun it

    # --- soft in training steps, hard elsewhere ----------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.masks.harden()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.masks.is_hard:
            self.masks.soften()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_evaluate:
            self.masks.harden()

    on_epoch_end = on_step_end

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self.masks.is_hard:
            raise RuntimeError(
                "MaskCallback: an evaluation runs with soft masks, because a callback behind this one asked for it; "
                "make MaskCallback the last of Trainer(callbacks=[...])"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))
        self.masks.harden()

    # --- start and resume --------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_optimizer(kwargs.get("optimizer"), self.masks)
        _check_arguments(args)
        _warn_of_batch_norm(self.masks.model)
        _warn_of_schedule(self.masks, state.max_steps)
        self._columns = []
        if state.global_step > 0:
            self._load(self.resume_from or _checkpoint(args, state))
        if not args.eval_on_start:
            self.masks.soften()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        scores = {name: values.detach().cpu() for name, values in self.masks.scores().items()}
        save_tensors(_checkpoint(args, state) / FILE, scores, {"masks": json.dumps(self.masks.state_dict())})

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        """Scores, beta and schedule of a checkpoint; hard or soft stays as it is."""
        own = self.masks.scores()
        if not (folder / FILE).is_file():
            raise ValueError(
                f"MaskCallback: {folder} has no {FILE}; resume from a checkpoint that was written with this callback, "
                "and name its folder with MaskCallback(masks, resume_from=...) where it is not in output_dir"
            )
        try:
            with safe_open(folder / FILE, "pt") as file:
                state = json.loads((file.metadata() or {})["masks"])
                scores = {name: file.get_tensor(name) for name in file.keys()}  # no mapping
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"MaskCallback: {folder / FILE} is damaged, nothing was loaded: {error}") from None
        shapes = [{name: list(s.shape) for name, s in found.items()} for found in (scores, own)]
        if shapes[0] != shapes[1]:
            differ = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            raise ValueError(
                f"MaskCallback: {folder / FILE} holds masks of other layers or shapes than the model: "
                f"{', '.join(differ[:5])}; mask the model as it was masked then"
            )
        self.masks.load_state_dict({**state, "is_hard": self.masks.is_hard})
        for name, values in scores.items():
            own[name].copy_(values)

    # --- logging -----------------------------------------------------------------------------------------------------

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        masks = self.masks
        own = {"beta": masks.beta, "density": masks.density(), "undecided": masks.undecided()}
        if logs is not None:
            logs.update(own)  # for the callbacks behind this one
        if state.log_history:
            state.log_history[-1].update(own)
            if state.is_world_process_zero:
                self._write(Path(str(args.output_dir)) / "metrics.csv", state.log_history)

    def _write(self, path: Path, history: list[dict[str, Any]]) -> None:
        """The last row, or all of them anew where it brings a new column, or is the first that this run writes."""
        is_begun = bool(self._columns) and set(history[-1]) <= set(self._columns)
        if not is_begun:
            self._columns = ["step", *dict.fromkeys(name for row in history for name in row if name != "step")]
        with path.open("a" if is_begun else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if not is_begun:
                writer.writeheader()
            writer.writerows(history[-1:] if is_begun else history)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _check_optimizer(optimizer: Any, masks: MaskSet) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    own = {id(scores) for scores in masks.scores().values()}
    if not isinstance(optimizer, MaskAdamW) or optimizer.advance is None or not any(
        id(p) in own for group in optimizer.param_groups for p in group["params"]
    ):
        raise ValueError(
            f"MaskCallback: the optimizer must be masks.adamw(...), which adds the penalty and advances beta, got "
            f"{type(optimizer).__name__}; pass Trainer(..., optimizers=(masks.adamw(lr=..., lam=...), None))"
        )
    if optimizer.in_backward:
        raise ValueError(
            "MaskCallback: Trainer reads the norm of the gradients after each backward pass, and in_backward=True "
            "keeps none; use masks.adamw(in_backward=False)"
        )


def _check_arguments(args: TrainingArguments) -> None:
    settings = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant"):
        raise ValueError(
            "MaskCallback: reentrant checkpointing gives scores no gradient, in silence, where a block's input needs "
            "none; use activation_checkpointing_kwargs={'use_reentrant': False}, Trainer's default"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"MaskCallback: one process with {args.n_gpu} GPUs means nn.DataParallel, whose copies of a layer do not "
            "share its mask's state; start with torchrun --nproc-per-node, or show one GPU by CUDA_VISIBLE_DEVICES=0"
        )
    if args.fsdp or args.deepspeed:
        raise ValueError("MaskCallback: FSDP and DeepSpeed through Trainer are not built; use DDP (torchrun)")


def _warn_of_batch_norm(model: nn.Module) -> None:
    kinds = nn.modules.batchnorm._BatchNorm
    moving = [n for n, m in model.named_modules() if isinstance(m, kinds) and m.track_running_stats and m.momentum != 0]
    if moving:
        warnings.warn(
            f"MaskCallback: Trainer trains in train mode, which changes the running statistics of {moving[0]} and "
            f"{len(moving) - 1} other BatchNorm layers, and with them the network under the masks; set their momentum "
            "to 0.0 to keep them",
            stacklevel=2,
        )


def _warn_of_schedule(masks: MaskSet, max_steps: int) -> None:
    schedule = masks._state.schedule
    if schedule is None or schedule.steps > max_steps:
        found = "there is no schedule" if schedule is None else f"masks.anneal was given steps={schedule.steps}"
        warnings.warn(
            f"MaskCallback: {found} and training takes {max_steps} optimizer steps, so beta does not reach its end and "
            f"the hard masks are not those that are trained; call masks.anneal(to=200, steps={max_steps})",
            stacklevel=2,
        )
