"""Reinforcement learning of a trained pipeline on a black-box reward: the run.

A round draws groups of images, compares the rewards within each group, and changes the network by what its method makes
of that: ``policy_gradient`` or ``forward_process``. The network stays in evaluation mode: with dropout, the ratio of
densities would not be 1 where nothing has changed.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from ..basics.files import saving, write_whole
from ..basics.networks import describe_network
from ..evaluation.generate import fingerprint
from ..evaluation.samplers import as_sde_pipeline, load_pipeline
from ..images.arrays import to_bytes
from ..images.pictures import sheet
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline, TextSDEPipeline
from ..pipelines.runs import own_scheduler
from .adapters import (
    adapter_identity,
    add_adapter,
    describe_adapter,
    has_adapter,
    keep_adapter_alone,
    merged,
    trained_parameters,
)
from .averaging import averaged_weights
from .checkpoints import (
    check_output_dir,
    read_state,
    save_model,
)
from .experience import Experience, Rows, deal
from .forward_process import ForwardProcess
from .identity import as_recorded, check_same_run, log_changes
from .logs import due, log_pictures, progress_bar, start_trackers
from .optimisation import build_average, build_optimizer
from .policy_configuration import PolicyTrainingConfig
from .policy_gradient import PolicyGradient, group_advantages, path_kl
from .reward_methods import Reference, RewardMethod, arguments_of_images
from .rewards import Reward, load_reward
from .saved_run import SavedRun
from .sharding import is_sharded
from .signals import StopSignal

logger = logging.getLogger(__name__)

METHOD_CLASSES: dict[str, type[RewardMethod]] = {"grpo": PolicyGradient, "nft": ForwardProcess}

# Options with which a run is another one; the others count from where it is resumed.
_OF_THE_RUN = (
    *("reward", "policy", "stochasticity", "stochastic_indices", "stochastic_sigmas", "num_inference_steps"),
    *("guidance_scale", "use_ema", "seed"),
)
_CHANGING = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "trained_steps", "group_size", "num_groups", "updates_per_round", "clip_range"),
    *("kl_weight", "nft_beta", "log_prob_reduction", "rollout_storage", "ema_inv_gamma", "ema_power", "ema_max_decay"),
)
_SHEETS = 2**40  # numbers of the noise of sample grids, apart from those of the noise of rollouts


class PolicyTrainer(SavedRun):
    """One run of reinforcement learning. Building it checks everything and changes nothing on disk; ``run`` works.

    Args:
        config: What is rewarded, and how the network learns.
        reward: A function to be maximised instead of the reward that ``config`` names: (images in [0, 1] of shape
            (B, C, H, W), classes, or numbers of prompts, or None) -> rewards, float32, shape (B,).

    Raises:
        ValueError: Anything wrong with the configuration, the model, the reward or the output folder.
    """

    def __init__(self, config: PolicyTrainingConfig, reward: Reward | None = None) -> None:
        if Path(config.output_dir).resolve() == Path(config.model).resolve():
            raise ValueError(f"output_dir must be another folder than model, got {config.output_dir!r} for both.")
        super().__init__(config)
        if is_sharded(self.accelerator):
            raise ValueError("Reinforcement learning draws images with the whole network: launch it without FSDP.")
        with self.accelerator.main_process_first():
            pipe = as_sde_pipeline(load_pipeline(config.model))
        if type(pipe) not in (SDEPipeline, ClassConditionalSDEPipeline, TextSDEPipeline):
            raise ValueError(
                "model must be an SDEPipeline, a ClassConditionalSDEPipeline or a TextSDEPipeline, got "
                f"{type(pipe).__name__}."
            )
        own_scheduler(pipe)
        self.pipe = pipe.to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.network = self.pipe.unet.to(torch.float32).eval().requires_grad_(True)
        self._reference_hash = fingerprint(self.network)
        original = self.network
        if config.lora_rank is None:
            original = copy.deepcopy(self.network).requires_grad_(False)
        add_adapter(self.network, config, config.seed)
        self.reference = Reference(self._pipeline(original), self.accelerator, has_adapter(self.network))
        names = (config.reward_classifier, config.reward_input, config.prompts)
        self.reward = reward or load_reward(config.reward, self.pipe, *names)

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
        scheduler = self._policy()
        scheduler.set_timesteps(self.config.num_inference_steps)
        if not scheduler.stochastic_steps:
            raise ValueError("stochastic_indices and stochastic_sigmas leave no step with noise to train on.")
        steps, wanted = self._method().count_steps(), self.config.trained_steps
        if wanted is not None and wanted > steps:
            raise ValueError(
                f"trained_steps must be at most {steps}, the steps to train on of a rollout, got {wanted}."
            )
        most = (wanted or steps) + self.images_per_round - 1
        if self.config.updates_per_round > most:
            raise ValueError(
                f"updates_per_round must be at most {most} for so few images and steps, got "
                f"{self.config.updates_per_round}."
            )

    def _method(self) -> RewardMethod:
        """What the network learns by, from samples of the network as it is now."""
        kind = METHOD_CLASSES[self.config.method]
        scheduler = self._policy() if kind is PolicyGradient else None
        return kind(self.config, self._pipeline(self.network, scheduler), self.reference)

    def _policy(self) -> Any:
        """The scheduler with the policy as its sampler, and the rest as in the model's own."""
        config, scheduler = self.config, self.pipe.scheduler
        changes: dict[str, Any] = {"predictor": "exponential", "corrector": None, "probability_flow": False}
        for name in ("policy", "stochasticity", "stochastic_indices", "stochastic_sigmas"):
            value = getattr(config, name)
            changes[name] = list(value) if isinstance(value, tuple) else value
        return type(scheduler).from_config(scheduler.config, **changes)

    def _classes(self) -> list[int]:
        """The classes that groups are drawn from, or the numbers of the prompts; none for a model without both."""
        prompts = self.config.prompts
        if isinstance(self.pipe, TextSDEPipeline) is not (prompts is not None):
            raise ValueError(
                f"prompts are for a model that is told captions, and it needs them: got prompts={prompts!r} for a "
                f"{type(self.pipe).__name__}."
            )
        if isinstance(self.pipe, TextSDEPipeline) and prompts is not None:
            self.pipe.denoiser(prompts, self.config.guidance_scale)  # refuses what the network cannot serve
            return list(range(len(prompts)))
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

    def _work(self) -> SDEPipeline:
        config, accelerator = self.config, self.accelerator
        self._prepare()
        logger.info("Network: %s.", describe_network(self.network))
        if has_adapter(self.network):
            logger.info("Trained: %s.", describe_adapter(self.network))
        logger.info(
            "Method: %s, %d levels, %d images a round in %d group(s), %d updates; rounds %d to %d.",
            f"grpo, policy {config.policy}" if config.method == "grpo" else config.method,
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
        optimizer, self.lr_scheduler = build_optimizer(
            config, trained_parameters(self.network), updates, accelerator.device
        )
        # Gradients are averaged by hand: rollouts and replay call the network itself, which DDP would not see.
        self.network = accelerator.prepare_model(self.network, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        keep_adapter_alone(accelerator, self.network)
        self.method = self._method()
        self.ema = build_average(config, trained_parameters(self.network), 0.5, foreach=True)
        start_trackers(accelerator, config)
        if self.resume_from is not None:
            self._load(self.resume_from)

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
                    self._stop(progress, checkpoint)
            if due(self.step, config.sample_every, last):
                self._observe()
        progress.close()

    def round(self) -> dict[str, float]:
        """Draw and reward the images of a round, and take its optimiser steps; returns what is logged."""
        experience, values = self.explore()
        for part in deal(experience, self.config, self.step * self.images_per_round):
            values |= self._update(experience, part)
        self.step += 1
        return values

    # ------------------------------------------------------------------ exploring

    def explore(self) -> tuple[list[Experience], dict[str, float]]:
        """Draw and reward the images of this round: those of this process, and what is logged of all."""
        config, accelerator = self.config, self.accelerator
        own = range(accelerator.process_index, self.images_per_round, accelerator.num_processes)
        parts = [own[i : i + config.sample_batch_size] for i in range(0, len(own), config.sample_batch_size)]
        drawn, rewards = [], []
        averaged = self._averaged() if self.method.learns_from_average else nullcontext()
        with averaged:
            for numbers in parts:
                one, images = self.method.draw(numbers, self.step * self.images_per_round, self._labels(numbers))
                drawn.append(one)
                rewards.append(self._rewards(images, numbers))
        everything = accelerator.gather(torch.cat(rewards).to(accelerator.device))
        groups = accelerator.gather(self._groups(list(own)))
        advantages = group_advantages(everything, groups)
        mine = advantages[accelerator.process_index * len(own) :][: len(own)]
        split = mine.split([len(numbers) for numbers in parts])
        values = {"reward": float(everything.mean()), "reward_std": float(everything.std())}
        return [Experience(*each) for each in zip(drawn, split, parts, strict=True)], values

    def _groups(self, numbers: list[int]) -> Tensor:
        """The group of each image of a round."""
        return torch.tensor(numbers, device=self.accelerator.device) // self.config.group_size

    def _labels(self, numbers: range) -> list[int] | None:
        """The class of each image of a round, or the number of its prompt: groups take turns."""
        if not self.classes:
            return None
        first = self.step * self.num_groups
        return [self.classes[(first + n // self.config.group_size) % len(self.classes)] for n in numbers]

    def _rewards(self, images: Tensor, numbers: range) -> Tensor:
        labels = self._labels(numbers)
        return self.reward(images, None if labels is None else torch.tensor(labels, device=images.device)).float()

    # ------------------------------------------------------------------ learning

    def _update(self, experience: list[Experience], part: Rows) -> dict[str, float]:
        """One optimiser step."""
        config, accelerator = self.config, self.accelerator
        count = int(accelerator.reduce(torch.tensor(sum(len(k) for _, k, _ in part), device=accelerator.device)))
        sums = torch.zeros(len(self.method.statistics), device=accelerator.device)
        for r, steps, images in part:
            if not len(steps):
                continue
            advantages = experience[r].advantages[images.to(accelerator.device)]
            losses, statistics = self.method.losses(experience[r].drawn, steps, images, advantages)
            accelerator.backward(losses.sum() / count)
            sums += statistics
        parameters = trained_parameters(self.network)
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
                self.ema.step(parameters)
        means = (accelerator.reduce(sums, "sum") / count).tolist()
        values = {"gradient_norm": float(norm), "lr": rate}
        logged = zip(self.method.statistics, means, strict=True)
        return values | {name: value for name, value in logged if name != "kl" or config.kl_weight}

    # ------------------------------------------------------------------ along the way

    def path_kl(self, network: Any) -> tuple[float, float]:
        """KL of the paths of a network to those of the reference in nats, and the mean reward at their ends.

        The images are fresh ones, the same noise every time; see ``policy_gradient.path_kl``.
        """
        policy, numbers = self._pipeline(network, self._policy()), range(self.config.num_sample_images)
        kl, images = path_kl(self.config, policy, self.reference, numbers, _SHEETS, self._labels(numbers))
        return kl, float(self._rewards(images, numbers).mean())

    def _observe(self) -> None:
        """Draw, reward and save a grid of samples of the averaged weights, the same noise every time."""
        config, accelerator = self.config, self.accelerator
        with self._averaged() as network:
            if accelerator.is_main_process:
                kl, reward = self.path_kl(network)
                pipe, numbers = self._pipeline(network), range(config.num_sample_images)
                arguments = arguments_of_images(config, numbers, _SHEETS, self._labels(numbers))
                images: Tensor = pipe(**arguments, output_type="pt", return_dict=False)[0]
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

    @property
    def samples_seen(self) -> int:  # type: ignore[override]
        """Images that have been rewarded."""
        return self.step * self.images_per_round

    def _save_result(self) -> SDEPipeline:
        with self._averaged() as network:
            if has_adapter(network):
                averaged = merged(network)
            else:
                averaged = copy.deepcopy(self.reference.network)
                averaged.load_state_dict(network.state_dict())
            pipeline = self._pipeline(averaged.requires_grad_(True))
            if self.accelerator.is_main_process:
                save_model(pipeline, self.output_dir, network)
        self.accelerator.wait_for_everyone()
        return pipeline

    def _identity(self) -> dict[str, Any]:
        own = {name: getattr(self.config, name) for name in _OF_THE_RUN}
        if self.config.method != "grpo":  # which the first checkpoints do not say
            own["method"] = self.config.method
        own |= {} if self.config.prompts is None else {"prompts": self.config.prompts}
        own |= adapter_identity(self.config, None)
        return as_recorded({"task": "policy", "model": self._reference_hash, **own})

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in _CHANGING}


def train_policy(config: PolicyTrainingConfig, reward: Reward | None = None) -> SDEPipeline:
    """Let a trained pipeline learn to draw what is rewarded; arguments as in ``PolicyTrainer``.

    Returns:
        The pipeline, as it was saved in ``config.output_dir``.
    """
    return PolicyTrainer(config, reward).run()
