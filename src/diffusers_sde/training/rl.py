"""Reinforcement learning of a trained pipeline on a black-box reward: group-relative policy optimisation.

The policy is a stochastic sampler, whose steps are Gaussians with known densities. A round draws groups of images by
it, compares the rewards within each group, and makes the steps towards better images likelier:

    maximise  E min(rho A, clip(rho, 1 - c, 1 + c) A) - kl_weight KL(p(x_s | x_t) || p_ref(x_s | x_t)),

with rho the ratio of the densities of a step under the new and the old weights, and A the reward less its group's mean,
in standard deviations of the group (Black et al. 2024, arXiv:2305.13301; Liu et al. 2025, arXiv:2505.05470). The
network stays in evaluation mode: with dropout, rho would not be 1 where nothing has changed.

The file is long because a round, its checkpoints and its resumption are read in one place.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor

from ..basics.files import check_unlocked, saving, write_whole
from ..basics.networks import describe_network
from ..basics.processes import lock_for_all
from ..evaluation.generate import fingerprint
from ..evaluation.samplers import as_sde_pipeline, generator_of, load_pipeline
from ..images.arrays import to_bytes
from ..images.pictures import sheet
from ..pipelines import ClassConditionalSDEPipeline, Rollout, RolloutSteps, SDEPipeline, collect_rollout, rollout_model
from ..pipelines.runs import own_scheduler
from ..sampling.transitions import Transition
from .averaging import averaged_weights
from .checkpoints import (
    CONFIG_FILE,
    check_output_dir,
    clear_run,
    find_checkpoint,
    load_checkpoint,
    read_state,
    remove_leftovers,
    remove_surplus,
    save_checkpoint,
    save_model,
    set_aside_later,
)
from .identity import as_recorded, check_same_run, log_changes
from .logs import due, log_pictures, progress_bar, start_trackers
from .optimisation import apply_options, build_average, build_optimizer
from .policy_configuration import STORAGE, PolicyTrainingConfig
from .policy_gradient import clipped_objective, group_advantages
from .precision import default_precision
from .rewards import Reward, load_reward
from .sharding import check_launch, is_sharded
from .signals import EXIT_CODE, StopSignal

logger = logging.getLogger(__name__)

# Options with which a run is another one; the others count from where it is resumed.
_OF_THE_RUN = (
    *("reward", "policy", "stochasticity", "stochastic_indices", "stochastic_sigmas", "num_inference_steps"),
    *("guidance_scale", "use_ema", "seed"),
)
_CHANGING = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "trained_steps", "group_size", "num_groups", "updates_per_round", "clip_range"),
    *("kl_weight", "log_prob_reduction", "rollout_storage", "ema_inv_gamma", "ema_power", "ema_max_decay"),
)
# Numbers of the noise of sample grids, and of the choice of steps, apart from those of the noise of rollouts.
_SHEETS, _DEALING = 2**40, 2**41


@dataclass(frozen=True)
class Experience:
    """A part of the images of a round on one process.

    Attributes:
        rollout: The images, and the steps to them.
        advantages: Of each image, shape (B,).
        numbers: Of each image in the round.
    """

    rollout: Rollout
    advantages: Tensor
    numbers: range


class PolicyTrainer:
    """One run of reinforcement learning. Building it checks everything and changes nothing on disk; ``run`` works.

    Args:
        config: What is rewarded, and how the network learns.
        reward: A function to be maximised instead of the reward that ``config`` names: (images in [0, 1] of shape
            (B, C, H, W), classes or None) -> rewards, float32, shape (B,).

    Raises:
        ValueError: Anything wrong with the configuration, the model, the reward or the output folder.
    """

    def __init__(self, config: PolicyTrainingConfig, reward: Reward | None = None) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        if self.output_dir.resolve() == Path(config.model).resolve():
            raise ValueError(f"output_dir must be another folder than model, got {config.output_dir!r} for both.")
        check_unlocked(self.output_dir)
        self.resume_from = find_checkpoint(self.output_dir, config.resume_from_checkpoint, config.overwrite_output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision or default_precision(),
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / config.logging_dir)
            ),
        )
        check_launch(self.accelerator)
        if is_sharded(self.accelerator):
            raise ValueError("Reinforcement learning draws images with the whole network: launch it without FSDP.")
        with self.accelerator.main_process_first():
            pipe = as_sde_pipeline(load_pipeline(config.model))
        if type(pipe) not in (SDEPipeline, ClassConditionalSDEPipeline):
            raise ValueError(
                f"model must be an SDEPipeline or a ClassConditionalSDEPipeline, got {type(pipe).__name__}."
            )
        own_scheduler(pipe)
        self.pipe = pipe.to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.network = self.pipe.unet.to(torch.float32).eval().requires_grad_(True)
        self._reference_hash = fingerprint(self.network)
        self.reference = self._pipeline(copy.deepcopy(self.network).requires_grad_(False), self._policy())
        self.reward = reward or load_reward(config.reward, self.pipe, config.reward_classifier, config.reward_input)

        self.classes = self._classes()
        self.num_groups = config.num_groups or max(1, len(self.classes))
        self.images_per_round = self.num_groups * config.group_size
        if self.images_per_round % self.accelerator.num_processes:
            raise ValueError(
                f"num_groups x group_size must be a multiple of the {self.accelerator.num_processes} processes, got "
                f"{self.num_groups} x {config.group_size}."
            )
        self._check_steps()
        if self.accelerator.is_main_process:
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            check_output_dir(self.output_dir, 5 * weights)
        self.step = 0
        if self.resume_from is not None:
            state = read_state(self.resume_from)
            check_same_run(state["identity"], self._identity())
            if self.accelerator.is_main_process:
                log_changes(state.get("options"), self._options())
            self.step = state["step"]

    def _check_steps(self) -> None:
        """Refuse steps that are not there, before anything is drawn."""
        scheduler = self.reference.scheduler
        scheduler.set_timesteps(self.config.num_inference_steps)
        steps = len(scheduler.stochastic_steps)
        if steps == 0:
            raise ValueError("stochastic_indices and stochastic_sigmas leave no step with noise to train on.")
        wanted = self.config.trained_steps
        if wanted is not None and wanted > steps:
            raise ValueError(f"trained_steps must be at most {steps}, the steps with noise of a rollout, got {wanted}.")
        most = (wanted or steps) + self.images_per_round - 1
        if self.config.updates_per_round > most:
            raise ValueError(
                f"updates_per_round must be at most {most} for so few images and steps, got "
                f"{self.config.updates_per_round}."
            )

    def _policy(self) -> Any:
        """The scheduler by which rollouts are drawn: that of the model, with the policy as its sampler."""
        config, scheduler = self.config, self.pipe.scheduler
        changes: dict[str, Any] = {"predictor": "exponential", "corrector": None, "probability_flow": False}
        for name in ("policy", "stochasticity", "stochastic_indices", "stochastic_sigmas"):
            value = getattr(config, name)
            changes[name] = list(value) if isinstance(value, tuple) else value
        return type(scheduler).from_config(scheduler.config, **changes)

    def _classes(self) -> list[int]:
        """The classes that groups are drawn from; none for a model without."""
        if not isinstance(self.pipe, ClassConditionalSDEPipeline):
            if self.config.guidance_scale != 1.0:
                raise ValueError(
                    f"guidance_scale must be 1 for a model without classes, got {self.config.guidance_scale!r}."
                )
            return []
        self.pipe.denoiser(self.config.guidance_scale)  # refuses what the network cannot serve
        return [number for number in range(self.pipe.num_classes) if number != self.pipe.config.null_class]

    def _pipeline(self, network: Any, scheduler: Any = None) -> SDEPipeline:
        """The model's pipeline with another network, and a scheduler of its own."""
        parts = {**self.pipe.components, "unet": network}
        own = self.pipe.scheduler
        parts["scheduler"] = type(own).from_config(own.config) if scheduler is None else scheduler
        settings = {k: v for k, v in self.pipe.config.items() if k not in parts and not k.startswith("_")}
        pipe: SDEPipeline = type(self.pipe)(**parts, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # ------------------------------------------------------------------ the run

    def run(self) -> SDEPipeline:
        """Train, and save the pipeline with the averaged weights and the model's own scheduler.

        Raises:
            FolderInUse: Another run is writing to ``output_dir``; nothing has been changed.
            SaveError: The disk is full, or the like; earlier checkpoints are whole.
            RuntimeError: The objective is not finite any more; the last checkpoint is kept.
            SystemExit: SIGTERM has ended the run; a checkpoint is saved.
        """
        self.accelerator.wait_for_everyone()
        with lock_for_all(self.output_dir, PartialState()):
            return self._run()

    def _run(self) -> SDEPipeline:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            if config.overwrite_output_dir:
                clear_run(self.output_dir)
            if self.resume_from is None:
                self._save_configuration()
        accelerator.wait_for_everyone()
        self._prepare()
        logger.info("Network: %s.", describe_network(self.network))
        logger.info(
            "Policy: %s, %d levels, %d images a round in %d group(s), %d updates; rounds %d to %d.",
            config.policy,
            config.num_inference_steps,
            self.images_per_round,
            self.num_groups,
            config.updates_per_round,
            self.step,
            config.max_train_steps,
        )
        if self.step == 0 and config.sample_every:
            self._observe()
        with StopSignal(accelerator) as stop:
            self._loop(stop)
        result = self._save_result()
        accelerator.end_training()
        return result

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        set_seed(config.seed, device_specific=True)
        updates = config.max_train_steps * config.updates_per_round
        parameters = list(self.network.parameters())
        optimizer, self.lr_scheduler = build_optimizer(config, parameters, updates, accelerator.device)
        # Gradients are averaged by hand: rollouts and replay call the network itself, which DDP would not see.
        self.network = accelerator.prepare_model(self.network, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.policy = self._pipeline(self.network, self._policy())
        self.ema = build_average(config, list(self.network.parameters()), 0.9, foreach=True)
        start_trackers(accelerator, config)
        if self.resume_from is not None:
            self._load(self.resume_from)

    def _load(self, checkpoint: Path) -> None:
        accelerator = self.accelerator
        self.lr_scheduler.load_state_dict(load_checkpoint(accelerator, checkpoint, self.ema)["lr_scheduler"])
        apply_options(self.config, self.optimizer, self.lr_scheduler)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            set_aside_later(self.output_dir, checkpoint, self.step)
            remove_leftovers(self.output_dir)
            remove_surplus(self.output_dir, self.config.checkpoints_total_limit)
            self._save_configuration()

    def _loop(self, stop: StopSignal) -> None:
        config, accelerator = self.config, self.accelerator
        progress = progress_bar(accelerator, config.max_train_steps, self.step, "Learning", "round")
        while self.step < config.max_train_steps:
            start = time.perf_counter()
            values = self.round()
            values["images_per_second"] = self.images_per_round / (time.perf_counter() - start)
            progress.update()
            progress.set_postfix({"reward": f"{values['reward']:.4f}"})
            last = self.step == config.max_train_steps
            if due(self.step, config.logging_steps, last):
                accelerator.log(values, step=self.step)
            stopped = stop.on_any_process() and not last
            if stopped or due(self.step, config.checkpointing_steps, last):
                checkpoint = self._save_checkpoint()
                if stopped:
                    progress.close()
                    accelerator.end_training()
                    logger.info("Stopped after round %d; saved %s.", self.step, checkpoint)
                    raise SystemExit(EXIT_CODE)
            if due(self.step, config.sample_every, last):
                self._observe()
        progress.close()

    def round(self) -> dict[str, float]:
        """Draw and reward the images of a round, and take its optimiser steps; returns what is logged."""
        experience, values = self.explore()
        for part in self._parts(experience):
            values |= self._update(experience, part)
        self.step += 1
        return values

    # ------------------------------------------------------------------ exploring

    def explore(self) -> tuple[list[Experience], dict[str, float]]:
        """Draw and reward the images of this round: those of this process, and what is logged of all."""
        config, accelerator = self.config, self.accelerator
        own = range(accelerator.process_index, self.images_per_round, accelerator.num_processes)
        parts = [own[i : i + config.sample_batch_size] for i in range(0, len(own), config.sample_batch_size)]
        rollouts, rewards = [], []
        for numbers in parts:
            rollout, images = self._draw(self.policy, numbers, self.step * self.images_per_round)
            rollouts.append(rollout)
            rewards.append(self._rewards(images, numbers))
        everything = accelerator.gather(torch.cat(rewards).to(accelerator.device))
        groups = accelerator.gather(self._groups(list(own)))
        advantages = group_advantages(everything, groups)
        mine = advantages[accelerator.process_index * len(own) :][: len(own)]
        split = mine.split([len(numbers) for numbers in parts])
        values = {"reward": float(everything.mean()), "reward_std": float(everything.std())}
        return [Experience(*each) for each in zip(rollouts, split, parts, strict=True)], values

    def _groups(self, numbers: list[int]) -> Tensor:
        """The group of each image of a round."""
        return torch.tensor(numbers, device=self.accelerator.device) // self.config.group_size

    def _labels(self, numbers: range) -> list[int] | None:
        """The class of each image of a round: groups take turns."""
        if not self.classes:
            return None
        first = self.step * self.num_groups
        return [self.classes[(first + n // self.config.group_size) % len(self.classes)] for n in numbers]

    def _draw(self, pipe: SDEPipeline, numbers: range, first: int) -> tuple[Rollout, Tensor]:
        """A rollout of images by their numbers, and the images in [0, 1]."""
        config = self.config
        arguments: dict[str, Any] = {"batch_size": len(numbers)}
        if self.classes:
            arguments = {"class_labels": self._labels(numbers), "guidance_scale": config.guidance_scale}
        rollout = collect_rollout(
            pipe,
            STORAGE[config.rollout_storage],
            config.log_prob_reduction,
            **arguments,
            num_inference_steps=config.num_inference_steps,
            generator=[generator_of(config.seed, first + number) for number in numbers],
            output_type="pt",
        )
        return rollout, rollout.output.images

    def _rewards(self, images: Tensor, numbers: range) -> Tensor:
        labels = self._labels(numbers)
        return self.reward(images, None if labels is None else torch.tensor(labels, device=images.device)).float()

    # ------------------------------------------------------------------ learning

    def _parts(self, experience: list[Experience]) -> list[list[tuple[int, Tensor, Tensor]]]:
        """The steps that each update is made of: (number of the rollout, numbers of steps, numbers of images).

        The steps of an image are drawn and dealt out by its number, so that they do not depend on the processes.
        """
        config, updates = self.config, self.config.updates_per_round
        parts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(updates)]
        for r, part in enumerate(experience):
            dealt: list[list[tuple[int, int]]] = [[] for _ in range(updates)]
            for image, number in enumerate(part.numbers):
                generator = generator_of(config.seed, _DEALING + self.step * self.images_per_round + number)
                chosen = torch.randperm(len(part.rollout), generator=generator)[: config.trained_steps]
                for j, k in enumerate(chosen.tolist()):
                    dealt[(j + number) % updates].append((k, image))
            for update, rows in enumerate(dealt):
                pairs = torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, 2)  # of one step, one after the other
                parts[update] += [(r, chunk[:, 0], chunk[:, 1]) for chunk in pairs.split(config.train_batch_size)]
        return parts

    def _update(self, experience: list[Experience], part: list[tuple[int, Tensor, Tensor]]) -> dict[str, float]:
        """One optimiser step."""
        config, accelerator = self.config, self.accelerator
        count = int(accelerator.reduce(torch.tensor(sum(len(k) for _, k, _ in part), device=accelerator.device)))
        sums = torch.zeros(3, device=accelerator.device)
        for r, k, b in part:
            if not len(k):
                continue
            rollout, advantages = experience[r].rollout, experience[r].advantages[b.to(accelerator.device)]
            steps = rollout.steps(k, b)
            law = rollout.transition(steps, rollout_model(self.policy, rollout)(steps))
            ratio = torch.exp(law.log_prob(steps.x_s, config.log_prob_reduction) - steps.log_prob)
            objective = clipped_objective(ratio, advantages, config.clip_range)
            kl = torch.zeros_like(ratio)
            if config.kl_weight:
                kl = law.kl(self._reference_law(rollout, steps), config.log_prob_reduction)
            accelerator.backward((config.kl_weight * kl - objective).sum() / count)
            with torch.no_grad():
                off = (ratio - 1.0).abs()
                sums += torch.stack([off.sum(), (off > config.clip_range).float().sum(), kl.sum()])
        parameters = list(self.network.parameters())
        if accelerator.num_processes > 1:
            for p in parameters:
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
        if accelerator.scaler is None and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"The gradient is not finite in round {self.step}: lower learning_rate, or train in another precision. "
                f"The last checkpoint in {str(self.output_dir)!r} is kept."
            )
        rate = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.network.parameters())
        off, clipped, kl_mean = (accelerator.reduce(sums, "sum") / count).tolist()
        values = {"ratio_deviation": off, "clipped": clipped, "gradient_norm": float(norm), "lr": rate}
        return values | ({"kl": kl_mean} if config.kl_weight else {})

    @torch.no_grad()
    def _reference_law(self, rollout: Rollout, steps: RolloutSteps) -> Transition:
        """The law of steps under the weights that the run started from."""
        with self.accelerator.autocast():
            return rollout.transition(steps, rollout_model(self.reference, rollout)(steps))

    # ------------------------------------------------------------------ along the way

    @torch.no_grad()
    def path_kl(self, network: Any) -> tuple[float, float]:
        """KL of the paths of a network to those of the reference in nats, and the mean reward at their ends.

        The KL is the sum over the steps of a rollout of KL(p(x_s | x_t) || p_ref(x_s | x_t)), summed over the entries
        and averaged over fresh images. That of the images is at most this.
        """
        policy = self._pipeline(network, self._policy())
        numbers = range(self.config.num_sample_images)
        rollout, images = self._draw(policy, numbers, _SHEETS)
        total = torch.zeros((), device=self.accelerator.device)
        for k in range(len(rollout)):
            steps = rollout.steps(k)
            law = rollout.transition(steps, rollout_model(policy, rollout)(steps))
            total += law.kl(self._reference_law(rollout, steps), "sum").mean()
        return float(total), float(self._rewards(images, numbers).mean())

    def _observe(self) -> None:
        """Draw, reward and save a grid of samples of the averaged weights, the same noise every time."""
        config, accelerator = self.config, self.accelerator
        with self._averaged() as network:
            if accelerator.is_main_process:
                kl, reward = self.path_kl(network)
                pipe, numbers = self._pipeline(network), range(config.num_sample_images)
                labels = self._labels(numbers)
                arguments: dict[str, Any] = {"batch_size": len(numbers)}
                if labels is not None:
                    arguments = {"class_labels": labels, "guidance_scale": config.guidance_scale}
                images: Tensor = pipe(
                    **arguments,
                    num_inference_steps=config.num_inference_steps,
                    generator=[generator_of(config.seed, _SHEETS + number) for number in numbers],
                    output_type="pt",
                    return_dict=False,
                )[0]
                own = float(self._rewards(images, numbers).mean())
                values = {"eval/reward_policy": reward, "eval/reward": own, "eval/kl_path": kl}
                logger.info("Round %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
                accelerator.log(values, step=self.step)
                pictures = to_bytes(images.cpu(), 0.0)
                path = self.output_dir / "samples" / f"step-{self.step:07d}.png"
                with saving("Samples", self.output_dir):
                    write_whole(path, partial(sheet(pictures, len(pictures)).save, format="PNG"))
                log_pictures(accelerator.trackers, "samples", pictures, self.step)
        accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[Any]:
        """The network with its averaged weights for a while; it stays in evaluation mode."""
        with averaged_weights(self.accelerator, self.network, self.ema, None, False) as network:
            yield network
        self.network.eval()

    # ------------------------------------------------------------------ what is saved

    def _save_configuration(self) -> None:
        text = json.dumps(self.config.public(), indent=2) + "\n"
        with saving("The configuration", self.output_dir):
            write_whole(self.output_dir / CONFIG_FILE, lambda file: file.write_text(text))

    def _save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "samples_seen": self.step * self.images_per_round,
            "processes": self.accelerator.num_processes,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "identity": self._identity(),
            "options": self._options(),
        }
        limit = self.config.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, state, self.ema, limit)

    def _save_result(self) -> SDEPipeline:
        with self._averaged() as network:
            averaged = copy.deepcopy(self.reference.unet)
            averaged.load_state_dict(network.state_dict())
        pipeline = self._pipeline(averaged.requires_grad_(True))
        if self.accelerator.is_main_process:
            save_model(pipeline, self.output_dir)
        self.accelerator.wait_for_everyone()
        return pipeline

    def _identity(self) -> dict[str, Any]:
        own = {name: getattr(self.config, name) for name in _OF_THE_RUN}
        return as_recorded({"task": "policy", "model": self._reference_hash, **own})

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in _CHANGING}


def train_policy(config: PolicyTrainingConfig, reward: Reward | None = None) -> SDEPipeline:
    """Let a trained pipeline learn to draw what is rewarded; arguments as in ``PolicyTrainer``.

    Returns:
        The pipeline, as it was saved in ``config.output_dir``.
    """
    return PolicyTrainer(config, reward).run()
