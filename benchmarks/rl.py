"""Reinforcement learning with different stochastic steps, measured.

    python benchmarks/rl.py --models flow=outputs/flow vp=outputs/vp --classifier outputs/digits-classifier

Every policy learns with the same optimiser from the same start to draw digits of one class; the reward is the
probability of the class by the classifier. The table has the reward of 256 samples of the policy after so many network
calls, the KL of its paths to those of the start in nats, and at the end the Frechet distance of 512 samples of the
model's own sampler to the digits of that class, in features of another classifier, and the share of them that this one
takes for the class. Images of the policy ``nft`` are drawn, while it learns, by the model's own sampler, and its loss
needs no densities; each image costs one call for each level of the sampler and two for each level that it learns from.
The others cost one call for each level and one for each step with noise. Rewards and KL of all are those of the policy,
for ``nft`` of the exact step. Numbers are the mean of the seeds +- their standard deviation.

Every run is in `results.json` of the output folder as soon as it is done, and is not repeated.

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
    """One run: what is measured every few rounds, and at the end.

    Rounds of nft cost other numbers of calls; it learns for as many as the policies may make.
    """
    noisy = args.levels - 1 if args.stochastic_indices is None else len(range(*args.stochastic_indices))
    of_method, calls_of_image = {"policy": policy, "clip_range": args.clip_range}, args.levels + noisy
    rounds, every = args.rounds, args.every
    if policy == "nft":
        of_method = {"method": "nft", "trained_steps": args.nft_levels}
        rounds = args.rounds * calls_of_image // (args.levels + 2 * args.nft_levels)
        every = max(1, rounds * args.every // args.rounds)
        calls_of_image = args.levels + 2 * args.nft_levels
    config = PolicyTrainingConfig(
        model=model,
        reward=f"classifier:{args.digit}",
        reward_classifier=args.classifier,
        output_dir=str(Path(args.output) / f"{Path(model).name}-{policy}-{seed}"),
        overwrite_output_dir=True,
        **of_method,
        num_inference_steps=args.levels,
        stochastic_indices=args.stochastic_indices,
        group_size=args.group_size,
        learning_rate=args.learning_rate,
        max_train_steps=rounds,
        updates_per_round=args.updates,
        log_prob_reduction="sum" if policy == "nft" else args.reduction,
        sample_every=0,
        num_sample_images=256,
        checkpointing_steps=0,
        logger="none",
        mixed_precision="no",
        ema_max_decay=args.ema_max_decay,
        seed=seed,
    )
    trainer, curve = PolicyTrainer(config), []
    trainer._prepare()
    calls, start = trainer.images_per_round * calls_of_image, time.perf_counter()

    def measure():
        with trainer._averaged() as network:
            kl, reward = trainer.path_kl(network)
        curve.append({"calls": trainer.step * calls, "reward": reward, "kl": kl})

    measure()
    for _ in range(rounds):
        trainer.round()
        if trainer.step % every == 0 or trainer.step == rounds:
            measure()
    with trainer._averaged() as network:
        quality = distance(trainer._pipeline(network), args.levels)
    return {"curve": curve, **quality, "seconds": time.perf_counter() - start}


# Options that say which runs there are, and where they go; all others say what a run is.
_WHICH = ("models", "policies", "seeds", "output")


def earlier_runs(path, options):
    """Runs of an earlier call with the same options: an interrupted benchmark goes on where it was."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    same = {key: value for key, value in before["options"].items() if key not in _WHICH}
    if same != {key: value for key, value in options.items() if key not in _WHICH}:
        raise ValueError(f"output has runs with other options, {same}: take another folder.")
    return before["runs"]


def spread(values):
    """The mean of seeds, and their standard deviation where there are several."""
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.3g}" + (f" +- {values.std():.2g}" if len(values) > 1 else "")


def report(name, policy, noise, runs):
    """Print what was measured of one policy on one network."""
    excess = "" if noise is None else f": excess noise at most {max(noise):.3f}, at the end {noise[-1]:.3f}"
    print(f"\n{name}, {policy}{excess}; {len(runs)} seeds")
    for points in zip(*(run["curve"] for run in runs), strict=True):
        reward, kl = (spread([point[key] for point in points]) for key in ("reward", "kl"))
        print(f"  {points[0]['calls']:>8} calls: reward {reward}, KL {kl}")
    fd, share = (spread([run[key] for run in runs]) for key in ("fd", "share"))
    print(f"  model's own sampler: FD {fd}, share of the class {share}; {spread([r['seconds'] for r in runs])} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="name=folder of trained, unconditional pipelines")
    parser.add_argument("--classifier", required=True, help="folder of a classifier by scripts/train_classifier.py")
    parser.add_argument("--policies", nargs="+", default=["exact", "flow_grpo", "flow_cps", "nft"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digit", type=int, default=3)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--stochastic_indices", type=int, nargs=2, default=None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--nft_levels", type=int, default=4, help="noise levels of each image that nft learns from")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--ema_max_decay", type=float, default=0.5)
    parser.add_argument("--clip_range", type=float, default=0.2)
    parser.add_argument("--reduction", default="sum", choices=("sum", "mean"))
    parser.add_argument("--output", default="outputs/rl-benchmark")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    path, options = Path(args.output) / "results.json", vars(args)
    results, distance = earlier_runs(path, options), Distance(args.digit, Path(args.output) / "classifier.safetensors")
    for name, model in (word.split("=", 1) for word in args.models):
        pipe = SDEPipeline.from_pretrained(model)
        print("\n{}: start, FD {fd:.1f}, share of the class {share:.1%}".format(name, **distance(pipe, args.levels)))
        stochastic = [policy for policy in args.policies if policy != "nft"]
        noise = {policy: excess_noise(pipe.scheduler, policy, args.levels) for policy in stochastic}
        for seed in range(
            args.seeds
        ):  # one seed of all policies before the next, so that every stop leaves a comparison
            for policy in args.policies:
                key = f"{name}, {policy}, {seed}"
                if key not in results:
                    results[key] = learn(args, model, policy, seed, distance)
                    path.write_text(json.dumps({"options": options, "runs": results}, indent=1))
                    print(f"{key}: reward {results[key]['curve'][-1]['reward']:.3f}", flush=True)
        for policy in args.policies:
            report(
                name, policy, noise.get(policy), [results[f"{name}, {policy}, {seed}"] for seed in range(args.seeds)]
            )


if __name__ == "__main__":
    main()
