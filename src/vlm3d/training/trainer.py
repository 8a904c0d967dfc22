"""From a prepared store to a checkpoint: the phases, one after the other, each step the same after a kill.

```
RUN/
├── config.json                every setting of the run
├── metrics.jsonl, samples/    what training tells (vlm3d.training.tracking)
├── last/                      the point that a run resumes from (vlm3d.training.run_state)
├── top/PHASE_000500/          best checkpoints of the running and earlier phases
├── PHASE/                     each finished phase's best checkpoint: the moving average's weights
└── final/                     the last finished phase's, enough alone to predict
```
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm3d.config import Config, GrpoPhase, PhaseConfig
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError, TrainingError
from vlm3d.extras import require
from vlm3d.io import settle_folder, write_atomically
from vlm3d.losses import MultiTaskLoss
from vlm3d.model import checkpoint
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.data import Batch, ScanStream, batches
from vlm3d.training.grpo import GrpoLearner
from vlm3d.training.optimizer import WeightAverage, build_optimizer, lr_share, set_learning_rate
from vlm3d.training.phases import (
    PHASES,
    check_precision,
    check_sharding,
    check_splits,
    check_start,
    check_torch_shards_bytes,
    learnable_phases,
    phase_config,
    phase_number,
    status_of,
)
from vlm3d.training.reward_comparison import validate_rewards
from vlm3d.training.run_state import (
    CHECKPOINT_FOLDER,
    RunState,
    optimizer_tensors,
    read_state,
    refuse_other_settings,
    restore_optimizer,
    with_prefix,
    without_prefix,
    write_state,
)
from vlm3d.training.step import StepPlan, TrainingStep, plan_step, seed_step, shared_parameters, spread
from vlm3d.training.tracking import METRICS_FILE, Tracker
from vlm3d.training.unfreezing import GradualUnfreezing
from vlm3d.training.validation import Validation, track_samples, validate
from vlm3d.version import VERSION

logger = logging.getLogger(__name__)

CONFIG_FILE, LAST, TOP, FINAL = "config.json", "last", "top", "final"
_LONGEST_WAIT = timedelta(hours=6)
"""Of one process for another: one validates alone."""


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on what, into where.

    Attributes:
        config: Every setting.
        store: Folder of ``vlm3d prepare``, with the splits ``train`` and ``valid``.
        run: Folder of the run; one that holds an unfinished run of the same settings is resumed.
        phases: Numbers or names; by default all but those of `phases.ON_REQUEST`.
        start_from: Checkpoint to start from instead of random weights, as `checkpoint.locate_checkpoint` takes it.
        stop_after: Stop after so many steps of this call, to be resumed later; for schedulers and tests.
    """

    config: Config
    store: Path
    run: Path
    phases: Sequence[str] | None = None
    start_from: Path | None = None
    stop_after: int | None = None


def train(request: TrainingRequest) -> Path:
    """Train, or go on training; returns the folder of the last checkpoint.

    Raises:
        ConfigError: Settings contradict each other, the store or the run that is there.
        DataError: The data cannot train what is asked for.
        TrainingError: A loss is no number; the message names the batch's cases.
        OutputError: The run's folder cannot be written.
    """
    return Trainer(request).run()


class Trainer:
    """One run; see `train`."""

    def __init__(self, request: TrainingRequest) -> None:
        accelerate = require("accelerate", extra="train", purpose="train")
        self.request = request
        self.folder = Path(request.run)
        self.train_set = PreparedDataset(request.store, ("train",), verify="sha256")
        self.valid_set = PreparedDataset(request.store, ("valid",), verify="sha256")
        check_splits(self.train_set, self.valid_set, request.config)
        self.config, self.phases = learnable_phases(request.config, request.phases, self.train_set)
        self.training = self.config.training
        self.valid_set = self.valid_set.some_of_patients(self.training.validation_cases)
        self.accelerator = accelerate.Accelerator(
            mixed_precision="bf16" if self.training.precision == "bf16" else "no",
            kwargs_handlers=[accelerate.utils.InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        )
        self._shards = self.training.shard_language_model and self.accelerator.num_processes > 1
        if self._shards:
            check_sharding(self.phases)
            check_torch_shards_bytes()
        check_precision(self.training.precision, self.accelerator.device)
        self.state, self._tensors = self._found_state()
        self._tell_other_data()
        self.thresholds: checkpoint.StoredThresholds | None = None  # beside the weights that were loaded last
        self.model = self._build_model()
        check_start(self.config, self.phases, self.model.untrained_tasks)
        loss = MultiTaskLoss.from_config(self.config.loss, self.config.model.classifier.class_weights)
        self.step_module = TrainingStep(self.model, loss).to(self.accelerator.device)
        self._gather = accelerate.utils.gather_object  # of all processes
        self._steps_here = 0
        self._damaged = Counter[str]()  # of this process since the last checkpoint

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Run all phases that are left."""
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / CONFIG_FILE, self.config.model_dump_json(indent=2))
        resumed = self.state.total_steps if self._tensors is not None else None
        with Tracker(
            self.folder,
            resumed_step=resumed,
            tensorboard=self.training.tensorboard,
            wandb=self.training.wandb,
            settings=self.config.model_dump(mode="json"),
            is_main=main,
        ) as self.tracker:
            for name in self.phases:
                if name not in self.state.finished and not self._stopped():
                    self._run_phase(name)
        return self.folder / FINAL

    def _run_phase(self, name: str) -> None:
        phase, number = phase_config(self.config, name), phase_number(name)
        if self.state.phase != name:
            self._enter(name)
        if "generation" in phase.tasks:
            self._load_llm()
        self.model.untrained_tasks = tuple(t for t in self.model.untrained_tasks if t not in phase.tasks)
        self._unfreezing = GradualUnfreezing(self.model, phase)
        self._unfreezing.at(self.state.step)
        self.step_module.train()
        names = self._parameter_names()
        loss_parameters = [p for p in self.step_module.loss.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.model, loss_parameters, phase, self.training)
        in_phase = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        average = WeightAverage(in_phase, self.training.ema_decay)
        self._grpo = None
        if isinstance(phase, GrpoPhase):
            self._grpo = GrpoLearner(
                self.model,
                self.config,
                self.train_set,
                number,
                self.accelerator,
                in_phase,
                thresholds=self.thresholds,
            )
        if self._tensors is not None:
            restore_optimizer(optimizer, names, self._tensors)
            average.load_state_dict(without_prefix("average", self._tensors))
            self.step_module.loss.load_state_dict(without_prefix("loss", self._tensors))
            if self._grpo is not None:
                self._grpo.load_state_tensors(self._tensors)
            self._tensors = None
        logger.info("phase %s: %d steps, %d of them done", name, phase.steps, self.state.step)
        self._loop(name, phase, number, optimizer, average, names)
        if self.state.step >= phase.steps:
            self._finish(name)

    def _loop(
        self,
        name: str,
        phase: PhaseConfig,
        number: int,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Steps until the phase is done or the call has had its share of them."""
        forward = self._wrapped()
        stream = iter(self._batches(phase, number))
        start = time.monotonic()
        window: list[dict[str, float]] = []
        while self.state.step < phase.steps and not self._stopped():
            if self._unfreezing.at(self.state.step):
                forward = self._wrapped()
            plan = plan_step(phase, self.training.seed, number, self.state.step)
            share = lr_share(self.state.step, phase, self.training.min_lr_share)
            set_learning_rate(optimizer, share)
            seed_step(self.training.seed, number, self.state.step, self.accelerator.process_index)
            losses, norm = self._optimize(forward, optimizer, stream, plan, phase)
            window.append(losses)
            average.update()
            self.state.step += 1
            self.state.total_steps += 1
            self._steps_here += 1
            self.state.seconds += time.monotonic() - start
            start = time.monotonic()
            last = self.state.step == phase.steps
            if last or self._grpo is not None or self.state.step % self.training.log_every == 0:
                self._log(name, phase, spread(window), norm, share)
                window = []
            if last or self.state.step % self.training.validate_every == 0:
                self._validate(name, phase, average)
                start = time.monotonic()
            if last or self._stopped() or self.state.step % self.training.checkpoint_every == 0:
                self._save(optimizer, average, names)

    def _optimize(
        self,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        stream: Iterator[Batch],
        plan: StepPlan,
        phase: PhaseConfig,
    ) -> tuple[dict[str, float], float]:
        """One step of the optimizer; losses are means over its forward passes on this process."""
        if self._grpo is not None:
            return self._grpo.learn(optimizer, stream, self.state.step, self._count_damaged, self._refuse_nan)
        told = []
        for micro in range(phase.accumulate):
            batch = next(stream).to(self.accelerator.device)
            self._count_damaged(batch)
            waits = micro < phase.accumulate - 1 and isinstance(forward, nn.parallel.DistributedDataParallel)
            with forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.accelerator.autocast():
                    losses = forward(batch, plan)
                self._refuse_nan(losses, batch)
                gradnorm = self.step_module.loss.gradnorm
                if gradnorm is not None:
                    gradnorm.update(losses, shared_parameters(self.model))
                    gradnorm.weights.data = self.accelerator.reduce(gradnorm.weights.data, reduction="mean")
                self.accelerator.backward(losses["total"] / phase.accumulate)
            told.append({task: float(loss.detach()) for task, loss in losses.items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.training.clip_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {self.state.step} is no number, though the losses {told} are: lower the rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return spread(told), norm

    def _count_damaged(self, batch: Batch) -> None:
        for case_id in batch.damaged:
            self._damaged[case_id] += 1

    def _refuse_nan(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        broken = [task for task, loss in losses.items() if not bool(torch.isfinite(loss))]
        if broken:
            raise TrainingError(
                f"the {broken[-1]} loss of step {self.state.step} ({self.state.phase}) is no number; the batch's cases: "
                f"{', '.join(batch.case_ids)}. The last checkpoint is in {self.folder / LAST}"
            )

    # --- what is told and kept -----------------------------------------------------------------------------------

    def _log(
        self,
        name: str,
        phase: PhaseConfig,
        losses: Mapping[str, float],
        norm: float,
        share: float,
    ) -> None:
        """Tell the mean losses since the last line."""
        values: dict[str, Any] = {f"train/{task}": value for task, value in losses.items()}
        values |= {
            "phase": name,
            "phase_step": self.state.step,
            "train/lr": phase.lr * share,
            "train/gradient_norm": norm,
            "seconds": round(self.state.seconds, 1),
            "damaged_cases": len({*self.state.damaged, *self._damaged}),
        }
        self.tracker.scalars(self.state.total_steps, values)
        words = " ".join(f"{task} {value:.4f}" for task, value in losses.items())
        logger.info("%s %d/%d: %s (%.0f s)", name, self.state.step, phase.steps, words, self.state.seconds)

    def _validate(self, name: str, phase: PhaseConfig, average: WeightAverage) -> None:
        """Judge the average's weights, keep them among the best, and keep samples."""
        llm = self.model.report_generator.llm
        if not self.accelerator.is_main_process:
            if llm is not None:
                llm.follow()
            self.accelerator.wait_for_everyone()
            return
        with average.applied(), nullcontext() if llm is None else llm.leading():
            found = (
                validate(self.step_module, self.valid_set, self.config, phase)
                if self._grpo is None
                else validate_rewards(self._grpo, self.valid_set)
            )
            track_samples(
                self.model,
                self.valid_set,
                self.config,
                phase,
                self.tracker,
                self.state.total_steps,
                None if self._grpo is None else self._grpo.thresholds,
            )
            self.tracker.scalars(
                self.state.total_steps, {"phase": name, "phase_step": self.state.step, **found.figures}
            )
            logger.info("%s %d: %s", name, self.state.step, _words(found.figures))
            self._keep_top(name, found)
        self.accelerator.wait_for_everyone()

    def _keep_top(self, name: str, found: Validation) -> None:
        keep, best = max(self.training.keep_top, 1), self.state.best
        if len(best) >= keep and found.score < min(best.values()):
            return
        label = f"{name}_{self.state.step:06d}"
        self.model.save_pretrained(
            self.folder / TOP / label, training=self._note(found.figures), thresholds=self.thresholds
        )
        best[label] = found.score
        while len(best) > keep:
            worst = min(best, key=lambda key: best[key])
            del best[worst]
            shutil.rmtree(self.folder / TOP / worst, ignore_errors=True)

    def _save(
        self, optimizer: torch.optim.Optimizer, average: WeightAverage, names: Mapping[nn.Parameter, str]
    ) -> None:
        for damaged in self._gather([dict(self._damaged)]):
            self.state.damaged = dict(Counter(self.state.damaged) + Counter(damaged))
        self._damaged.clear()
        if self.accelerator.is_main_process:
            tensors = {
                **optimizer_tensors(optimizer, names),
                **with_prefix("average", average.state_dict()),
                **with_prefix("loss", self.step_module.loss.state_dict()),
                **(self._grpo.state_tensors() if self._grpo is not None else {}),
            }
            self.tracker.sync()
            write_state(self.folder / LAST, self.model, self.state, tensors, self._note({}), self.thresholds)
        self.accelerator.wait_for_everyone()

    def _finish(self, name: str) -> None:
        """The phase's best weights become its result, and the start of the next phase."""
        if self.accelerator.is_main_process:
            newest_first = reversed(self.state.best)  # so that the newest of equals is taken
            best = max(newest_first, key=lambda key: self.state.best[key])
            note = json.loads((self.folder / TOP / best / "training.json").read_text(encoding="utf-8"))
            self._load(self.model, self.folder / TOP / best)
            for target in (name, FINAL):
                self.model.save_pretrained(self.folder / target, training=note, thresholds=self.thresholds)
        self.accelerator.wait_for_everyone()
        self._load(self.model, self.folder / name)
        self.state.finished.append(name)
        if self.accelerator.is_main_process:
            tensors = with_prefix("loss", self.step_module.loss.state_dict())
            write_state(self.folder / LAST, self.model, self.state, tensors, self._note({}), self.thresholds)
        self.accelerator.wait_for_everyone()

    def _note(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """``training.json`` of a checkpoint: what it was trained on, how long, how good."""
        sources = Counter(case.source for case in self.train_set.cases)
        return {
            "status": self.model.training_status,
            "untrained_tasks": list(self.model.untrained_tasks),
            "phase": self.state.phase,
            "phase_step": self.state.step,
            "total_steps": self.state.total_steps,
            "finished_phases": list(self.state.finished),
            "training_cases": dict(sources),
            "anatomy": list(self.model.learned_anatomy),
            "case_names": self.state.cases,
            "store": self.train_set.fingerprint.sha256,
            "started_from": self.state.origin,
            "seconds": round(self.state.seconds),
            "validation": {key: round(v, 4) for key, v in figures.items() if math.isfinite(v)},
            "version": VERSION,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.accelerator.device.type}",
        }

    # --- pieces --------------------------------------------------------------------------------------------------

    def _found_state(self) -> tuple[RunState, dict[str, Tensor] | None]:
        """The run that the folder holds, or a new one."""
        known = self.folder / CONFIG_FILE
        if known.is_file():
            refuse_other_settings(known, self.config)
        last = self.folder / LAST
        if self.accelerator.is_main_process:
            settle_folder(last)
            began = known.is_file()
            if began and not last.is_dir():  # killed before its first checkpoint: nothing to go on from
                (self.folder / METRICS_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return read_state(last) if last.is_dir() else (RunState(phase=""), None)

    def _tell_other_data(self) -> None:
        """A run may go on over other cases or processes than before; the scans that it sees then are others, so say it."""
        names = "\n".join(case.case_id for case in self.train_set.cases)
        cases, processes = hashlib.sha256(names.encode()).hexdigest()[:16], self.accelerator.num_processes
        if self._tensors is not None and self.accelerator.is_main_process:
            if self.state.cases not in ("", cases):
                logger.warning("training cases are others than those that %s began with", self.folder)
            if self.state.processes not in (0, processes):
                logger.warning(
                    "%d processes trained %s, now %d", self.state.processes, self.folder, processes
                )
        self.state.cases, self.state.processes = cases, processes

    def _build_model(self) -> VLM3DMultiTask:
        torch.manual_seed(self.training.seed)
        model = VLM3DMultiTask(self.config, load_llm=False)
        if self._tensors is not None:
            self._load(model, self.folder / LAST / CHECKPOINT_FOLDER)
        elif self.request.start_from is not None:
            origin = checkpoint.locate_checkpoint(self.request.start_from)
            self._load(model, origin, other_prompts=True)
            self.state.origin = {"fingerprint": model.fingerprint(), **checkpoint.read_training(origin)}
        model.training_status = status_of(self.train_set)
        learned = {case.regions_method or "none" for case in self.train_set.cases}
        model.learned_anatomy = tuple(sorted(learned.union((self.state.origin or {}).get("anatomy", ()))))
        return model

    def _load(self, model: VLM3DMultiTask, folder: Path, *, other_prompts: bool = False) -> None:
        """Take a checkpoint's weights, if allowed under more or fewer mask prompts: these are text, not weights.

        Masks may be read otherwise than before (``read_mirrored``); its thresholds then no longer fit.
        """
        found, state = checkpoint.read_config(folder).model, checkpoint.read_weights(folder)
        wanted = self.config.model.localizer
        allowed: dict[str, Any] = {"read_mirrored": wanted.read_mirrored}
        if other_prompts and found.localizer.num_lesion_diseases != wanted.num_lesion_diseases:
            allowed["num_lesion_diseases"] = wanted.num_lesion_diseases
            state["localizer.text_embedder.prompt_embedding"] = model.localizer.text_embedder.prompt_embedding
        found = found.model_copy(update={"localizer": found.localizer.model_copy(update=allowed)})
        if found != self.config.model:
            raise ConfigError(f"{folder} holds another model than the settings ask for")
        model.load_checkpoint_state_dict(state)
        model.untrained_tasks = tuple(checkpoint.read_training(folder).get("untrained_tasks", ()))
        self.thresholds = checkpoint.read_thresholds(folder)

    def _enter(self, name: str) -> None:
        """Start a phase: its own steps, its own best, random numbers that do not depend on what ran before."""
        if self._tensors is not None:  # resumed between two phases: only the loss goes on
            self.step_module.loss.load_state_dict(without_prefix("loss", self._tensors))
            self._tensors = None
        self.state.phase, self.state.step, self.state.best = name, 0, {}
        torch.manual_seed(self.training.seed * len(PHASES) + phase_number(name))

    def _load_llm(self) -> None:
        """The frozen language model, sharded over the processes where that is asked for."""
        generator = self.model.report_generator
        if generator.llm is None:
            generator.load_llm(self.accelerator.device)
            assert generator.llm is not None
            if self._shards:
                from vlm3d.model.sharded_language_model import ShardedLanguageModel

                generator.attach_llm(ShardedLanguageModel(generator.llm))
        if self.config.model.vision.gradient_checkpointing:
            generator.llm.enable_gradient_checkpointing()

    def _wrapped(self) -> nn.Module:
        """The step, in what many processes need; frozen weights of the language model need nothing."""
        if self.accelerator.num_processes == 1:
            return self.step_module
        inside = "model.report_generator.llm."
        frozen = [
            n for n, _ in self.step_module.named_parameters() if n.startswith(inside) and "lora_" not in n
        ]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.step_module, frozen
        )
        device = self.accelerator.device
        return nn.parallel.DistributedDataParallel(
            self.step_module,
            device_ids=None if device.type == "cpu" else [device.index],
            find_unused_parameters=True,
        )

    def _batches(self, phase: PhaseConfig, number: int) -> Any:
        return batches(
            ScanStream(self.train_set, self.config, phase, number),
            phase,
            first_step=self.state.step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self.training.loader_workers,
        )

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.step_module.named_parameters()}

    def _stopped(self) -> bool:
        return self.request.stop_after is not None and self._steps_here >= self.request.stop_after


def _words(figures: Mapping[str, float]) -> str:
    return " ".join(f"{name.removeprefix('valid/')} {value:.3f}" for name, value in figures.items())
