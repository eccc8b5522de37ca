"""Reinforcement learning with different stochastic steps, measured.

    python benchmarks/rl.py --models flow=outputs/flow vp=outputs/vp --classifier outputs/digits-classifier

Every policy learns with the same optimiser from the same start to draw digits of one class; the reward is the
probability of the class by the classifier. The table has the reward of 256 samples of the policy after so many network
calls, the KL of its paths to those of the start in nats, and at the end the Frechet distance of 512 samples of the
model's own sampler to the digits of that class, in features of another classifier, and the share of them that this one
takes for the class.

Excess noise is what a step adds by itself: for data in one point, whose denoiser is known, the standard deviation of
the states divided by what it should be. The largest over the levels and the last one are printed; without excess noise
they are 1.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch

from diffusers_sde import SDEPipeline
from diffusers_sde.evaluation.samplers import generator_of
from diffusers_sde.images.arrays import to_bytes
from diffusers_sde.images.loading import load_digits
from diffusers_sde.metrics import make_extractor
from diffusers_sde.metrics.distances import frechet_distance
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.rl import PolicyTrainer


def excess_noise(scheduler, policy, levels):
    """The standard deviation of the states over the true one at each level, for data that are 0."""
    config = {"predictor": "exponential", "corrector": None, "probability_flow": False, "stochasticity": None}
    one = type(scheduler).from_config(scheduler.config, policy=policy, prediction_type="sample", **config)
    one.set_timesteps(levels)
    variance, ratios = float(one.sde.sigma(one.rows[0].t)) ** 2, []
    for row in one.rows[:-1]:
        variance = row.x**2 * variance + row.noise**2
        ratios.append(math.sqrt(variance) / float(one.sde.sigma(row.s)))
    return ratios


class Distance:
    """Frechet distance of samples to the digits of a class, and the share that the judge takes for it."""

    def __init__(self, number, path):
        digits = load_digits()
        images = torch.tensor(np.stack(digits["image"]))[:, None]
        labels = torch.tensor(digits["label"])
        self.extractor = make_extractor("classifier", images, labels, path)
        self.reference, self.number = self.extractor(images[labels == number])[0], number

    def __call__(self, pipe, levels, count=512):
        pipe.set_progress_bar_config(disable=True)
        generator = [generator_of(7, i) for i in range(count)]
        images = pipe(count, levels, generator, output_type="pt", return_dict=False)[0]
        features, logits = self.extractor(to_bytes(images, 0.0))
        share = float((logits.argmax(1) == self.number).float().mean())
        return {"fd": frechet_distance(features, self.reference), "share": share}


def learn(args, model, policy, seed, distance):
    """One run: what is measured every few rounds, and at the end."""
    config = PolicyTrainingConfig(
        model=model,
        reward=f"classifier:{args.digit}",
        reward_classifier=args.classifier,
        output_dir=str(Path(args.output) / f"{Path(model).name}-{policy}-{seed}"),
        overwrite_output_dir=True,
        policy=policy,
        num_inference_steps=args.levels,
        stochastic_indices=args.stochastic_indices,
        group_size=args.group_size,
        learning_rate=args.learning_rate,
        max_train_steps=args.rounds,
        updates_per_round=args.updates,
        clip_range=args.clip_range,
        log_prob_reduction=args.reduction,
        sample_every=0,
        num_sample_images=256,
        checkpointing_steps=0,
        logger="none",
        mixed_precision="no",
        seed=seed,
    )
    trainer, curve = PolicyTrainer(config), []
    trainer._prepare()
    steps = len(trainer.reference.scheduler.stochastic_steps)
    calls, start = trainer.images_per_round * (args.levels + steps), time.perf_counter()

    def measure():
        with trainer._averaged() as network:
            kl, reward = trainer.path_kl(network)
        curve.append({"calls": trainer.step * calls, "reward": reward, "kl": kl})

    measure()
    for _ in range(args.rounds):
        trainer.round()
        if trainer.step % args.every == 0 or trainer.step == args.rounds:
            measure()
    with trainer._averaged() as network:
        quality = distance(trainer._pipeline(network), args.levels)
    return {"curve": curve, **quality, "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="name=folder of trained, unconditional pipelines")
    parser.add_argument("--classifier", required=True, help="folder of a classifier by scripts/train_classifier.py")
    parser.add_argument("--policies", nargs="+", default=["exact", "flow_grpo", "flow_cps"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--digit", type=int, default=3)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--stochastic_indices", type=int, nargs=2, default=None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--clip_range", type=float, default=0.2)
    parser.add_argument("--reduction", default="sum", choices=("sum", "mean"))
    parser.add_argument("--output", default="outputs/rl-benchmark")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    distance, results = Distance(args.digit, Path(args.output) / "classifier.safetensors"), []
    for name, model in (word.split("=", 1) for word in args.models):
        pipe = SDEPipeline.from_pretrained(model)
        print("\n{}: start, FD {fd:.1f}, share of the class {share:.1%}".format(name, **distance(pipe, args.levels)))
        for policy in args.policies:
            noise = excess_noise(pipe.scheduler, policy, args.levels)
            runs = [learn(args, model, policy, seed, distance) for seed in range(args.seeds)]
            results.append({"model": name, "policy": policy, "excess_noise": noise, "runs": runs})
            print(f"{policy}: excess noise at most {max(noise):.3f}, at the end {noise[-1]:.3f}", flush=True)
            for points in zip(*(run["curve"] for run in runs), strict=True):
                rewards = torch.tensor([point["reward"] for point in points])
                spread = f" +- {rewards.std():.3f}" if len(runs) > 1 else ""
                kl = sum(point["kl"] for point in points) / len(points)
                print(f"  {points[0]['calls']:>8} calls: reward {rewards.mean():.3f}{spread}, KL {kl:.1f}")
            fd, share, seconds = (sum(run[key] for run in runs) / len(runs) for key in ("fd", "share", "seconds"))
            print(f"  model's own sampler: FD {fd:.1f}, share of the class {share:.1%}; {seconds:.0f} s", flush=True)
            (Path(args.output) / "results.json").write_text(json.dumps({"options": vars(args), "results": results}))


if __name__ == "__main__":
    main()
