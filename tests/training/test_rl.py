"""Reinforcement learning: advantages, the clipped objective, the exact policy gradient of a toy, and whole runs."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from tiny_networks import tiny_unet
from torch import nn

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    NoiseConditionalClassifier,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    collect_rollout,
    rollout_model,
)
from diffusers_sde.training.cli import policy_main
from diffusers_sde.training.experience import deal
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.policy_gradient import clipped_objective, group_advantages
from diffusers_sde.training.rewards import load_reward
from diffusers_sde.training.rl import PolicyTrainer, train_policy

TINY = {
    "group_size": 6,
    "num_inference_steps": 4,
    "max_train_steps": 2,
    "sample_every": 0,
    "checkpointing_steps": 1,
    "num_sample_images": 4,
    "logger": "none",
    "mixed_precision": "no",
}


SMALL = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def brightness(images):
    """A reward of the tests."""
    return images.mean((1, 2, 3))


def darkness_of_class(images, class_labels):
    """A reward that sees PIL images and classes."""
    assert len(images) == len(class_labels)
    return [-np.asarray(image).mean() / 255.0 - 10.0 * label for image, label in zip(images, class_labels, strict=True)]


def nothing(images):
    return [float("nan")] * len(images)


BRIGHT = "test_rl:brightness"


@pytest.fixture(autouse=True)
def _here(monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    SDEPipeline(tiny_unet(1.0), FlowSDEScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def class_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    unet = tiny_unet(1.0, num_class_embeds=4)
    ClassConditionalSDEPipeline(unet, VPSDEScheduler(), null_class=3).save_pretrained(folder)
    return str(folder)


def config(model, output_dir, **options):
    return PolicyTrainingConfig(model=model, output_dir=str(output_dir), **({"reward": BRIGHT} | TINY | options))


def weights(pipe):
    return torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])


# ---------------------------------------------------------------------- the objective


def test_advantages_are_those_within_a_group():
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 9.0, 2.0]), torch.tensor([0, 1, 0, 1, 2])
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0])  # a group of one says nothing
    torch.testing.assert_close(group_advantages(rewards, groups), expected, rtol=0, atol=1e-5)
    assert not group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).any()


def test_the_objective_is_clipped_where_it_would_grow():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -2.0])
    objective = clipped_objective(ratio, advantages, 0.2)
    torch.testing.assert_close(objective, torch.tensor([0.5, -0.8, 1.2, -1.5, -2.2]))
    objective.sum().backward()
    torch.testing.assert_close(ratio.grad, torch.tensor([1.0, 0.0, 0.0, -1.0, -2.0]))


class Shift(nn.Module):
    """A network that predicts x0_hat = theta, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.2, -0.3]))

    def forward(self, x, timestep):
        return self.theta.reshape(1, 2, 1, 1).expand_as(x)


def test_the_policy_gradient_of_a_toy_is_the_exact_one():
    """The data are two numbers, x_0 ~ N(m theta, S^2): the mean of |x_0 - a|^2 has the gradient 2 m (m theta - a).

    The sampler ends with x0_hat, which is theta here, so the reward looks at the state before, whose mean is linear in
    theta. All of it follows from the rows of the plan, typed in here. 10,000 paths; a deviation of 5 standard errors is
    a false alarm once in a million runs.
    """
    scheduler = VPSDEScheduler(policy="exact", prediction_type="sample")
    pipe = SDEPipeline(Shift(), scheduler, sample_shape=(2, 1, 1))
    pipe.set_progress_bar_config(disable=True)
    n, wanted = 10_000, torch.tensor([1.0, 0.5])
    rollout = collect_rollout(
        pipe, reduction="sum", batch_size=n, num_inference_steps=4, generator=torch.Generator().manual_seed(3)
    )
    m = 0.0
    for row in rollout.scheduler.rows[:-1]:
        m = row.x * m + row.model
    theta = pipe.unet.network.theta
    exact = -2.0 * m * (m * theta.detach() - wanted)
    rewards = -(rollout.x_s[-1][:, :, 0, 0] - wanted).square().sum(1)
    model = rollout_model(pipe, rollout)
    centred = rewards - rewards.mean()
    log_prob = sum(rollout.replay(model, k) for k in range(len(rollout)))
    torch.testing.assert_close(log_prob, rollout.log_probs.sum(0))
    ratio = torch.exp(log_prob - rollout.log_probs.sum(0))
    (clipped_objective(ratio, centred, 0.2).mean()).backward()
    # The score of a path with respect to theta is a number for each path; its product with the reward is averaged.
    scores = torch.zeros(n, 2)
    for k, i in enumerate(rollout.indices):
        row = rollout.scheduler.rows[i]
        mean = row.x * rollout.x_t[k] + row.model * theta.detach().reshape(1, 2, 1, 1)
        scores += ((rollout.x_s[k] - mean) * row.model / row.noise**2)[:, :, 0, 0]
    each = scores * centred[:, None]
    torch.testing.assert_close(theta.grad, each.mean(0), rtol=1e-3, atol=1e-4)
    assert ((theta.grad - exact).abs() < 5.0 * each.std(0) / n**0.5).all()
    assert (exact.abs() > 20.0 * each.std(0) / n**0.5).all()  # the test has power: the sign is certain


# ---------------------------------------------------------------------- rewards


def test_rewards_by_name(model, class_model, tmp_path):
    pipe, by_class = SDEPipeline.from_pretrained(model), ClassConditionalSDEPipeline.from_pretrained(class_model)
    images = torch.rand(3, 1, 8, 8)
    labels = torch.tensor([2, 0, 1])
    assert torch.equal(load_reward(BRIGHT, pipe)(images, None), images.mean((1, 2, 3)))
    dark = load_reward("test_rl:darkness_of_class", by_class, images_as="pil")(images, labels)
    torch.testing.assert_close(dark, -images.mean((1, 2, 3)) - 10.0 * labels, rtol=0, atol=3e-3)
    with pytest.raises(ValueError, match="must return 3 finite numbers, got .nan"):
        load_reward("test_rl:nothing", pipe)(images, None)

    classifier = NoiseConditionalClassifier(8, 1, 3, attention_head_dim=4, **SMALL)
    classifier.eval().save_pretrained(tmp_path)
    seen = (images * 255.0).round() / 127.5 - 1.0
    wanted = classifier(seen, torch.full((3,), 20.0)).softmax(1)
    torch.testing.assert_close(load_reward("classifier:1", pipe, str(tmp_path))(images, None), wanted[:, 1])
    own = load_reward("classifier", by_class, str(tmp_path))(images, labels)
    torch.testing.assert_close(own, wanted[torch.arange(3), labels])


@pytest.mark.parametrize(
    ("name", "classifier", "words"),
    [
        ("brightness", None, "must be 'package.module:function'"),
        ("no_such_module:f", None, "cannot be imported: No module named"),
        ("test_rl:missing", None, "cannot be imported"),
        ("classifier:3", None, "needs reward_classifier"),
        ("classifier:3", "/nowhere", "cannot be loaded"),
        (BRIGHT, "/nowhere", "reward_classifier has no effect"),
    ],
)
def test_bad_rewards_are_named(model, name, classifier, words):
    with pytest.raises(ValueError, match=words):
        load_reward(name, SDEPipeline.from_pretrained(model), classifier)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("policy", ["exact", "flow_grpo"])
def test_a_run_raises_the_reward(model, tmp_path, policy):
    """Brightness is learnt in a few rounds; noise alone changes the mean of 256 images by 0.005 here."""
    options = {"max_train_steps": 6, "group_size": 64, "learning_rate": 1e-3, "checkpointing_steps": 0}
    before = SDEPipeline.from_pretrained(model)
    after = train_policy(config(model, tmp_path, policy=policy, **options))
    means = []
    for pipe in (before, after, SDEPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(256, 8, torch.Generator().manual_seed(1), output_type="pt").images
        means.append(float(images.mean()))
    assert means[1] > means[0] + 0.03
    assert means[2] == pytest.approx(means[1])
    assert after.scheduler.config.policy is None  # the pipeline keeps its own sampler


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"updates_per_round": 3, "trained_steps": 1, "kl_weight": 0.1, "stochastic_indices": (0, 2)},
        {"method": "nft"},
    ],
)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(model, tmp_path, options):
    whole = train_policy(config(model, tmp_path / "run", max_train_steps=3, **options))
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed = PolicyTrainer(
        config(model, tmp_path / "run", max_train_steps=3, resume_from_checkpoint="latest", **options)
    )
    assert resumed.step == 1
    assert torch.equal(weights(resumed.run()), weights(whole))
    with pytest.raises(ValueError, match="trained with policy='exact', this run has 'ddpo'"):
        PolicyTrainer(config(model, tmp_path / "run", policy="ddpo", resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="already holds a run"):
        PolicyTrainer(config(model, tmp_path / "run"))


def test_the_first_update_is_on_policy_and_the_kl_pulls_back(model, tmp_path):
    trainer = PolicyTrainer(config(model, tmp_path / "a", updates_per_round=1, kl_weight=1.0, learning_rate=1e-3))
    trainer._prepare()
    values = trainer.round()
    # A batch of steps rounds otherwise than the rollout, which drew one step of all images at a time.
    assert values["ratio_deviation"] < 1e-4 and values["kl"] == pytest.approx(0.0, abs=1e-4)
    assert trainer.path_kl(trainer.network)[0] > 0.0
    assert trainer.round()["kl"] > 0.0
    # Rewards that are all equal leave the KL alone, which leads back.
    trainer.reward = lambda images, labels: torch.ones(len(images))
    before = trainer.path_kl(trainer.network)[0]
    for _ in range(3):
        trainer.round()
    assert trainer.path_kl(trainer.network)[0] < before


def test_every_step_of_every_image_is_in_one_update(model, tmp_path):
    trainer = PolicyTrainer(config(model, tmp_path, updates_per_round=4, sample_batch_size=4, train_batch_size=3))
    trainer._prepare()
    experience, _ = trainer.explore()
    parts = deal(experience, trainer.config, 0)
    rows = [[(r, k, b) for r, ks, bs in part for k, b in zip(ks.tolist(), bs.tolist(), strict=True)] for part in parts]
    assert sorted(sum(rows, [])) == [(r, k, b) for r, n in ((0, 4), (1, 2)) for k in range(3) for b in range(n)]
    assert {len(part) for part in rows} <= {4, 5}
    assert all(len(k) <= 3 for part in parts for _, k, _ in part)


def test_classes_take_turns_in_groups(class_model, tmp_path):
    options = {"reward": "test_rl:darkness_of_class", "reward_input": "pil", "guidance_scale": 1.5, "num_groups": 2}
    trainer = PolicyTrainer(config(class_model, tmp_path, sample_every=1, sample_batch_size=5, **options))
    assert trainer._labels(range(12)) == [0] * 6 + [1] * 6
    trainer._prepare()
    experience, _ = trainer.explore()
    advantages = torch.cat([part.advantages for part in experience])
    # The classes differ by 10 in reward, and are not compared with each other.
    torch.testing.assert_close(advantages.reshape(2, 6).mean(1), torch.zeros(2), rtol=0, atol=1e-4)
    assert [part.drawn.batch_size for part in experience] == [5, 5, 2]
    trainer.step = 1
    assert trainer._labels(range(12)) == [2] * 6 + [0] * 6
    trainer.step = 0
    trainer.run()
    assert (tmp_path / "samples" / "step-0000002.png").is_file()


@pytest.mark.parametrize(
    "scheduler",
    [
        VESDEScheduler(prediction_type="edm"),
        SubVPSDEScheduler(),
        VPSDEScheduler(predictor="reverse_diffusion", corrector="langevin", snr=0.1),
    ],
)
def test_every_sde_learns_whatever_sampler_was_saved(tmp_path, scheduler):
    SDEPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "model")
    result = train_policy(config(str(tmp_path / "model"), tmp_path / "run", max_train_steps=1, checkpointing_steps=0))
    assert weights(result).isfinite().all()
    assert not torch.equal(weights(result), weights(SDEPipeline.from_pretrained(tmp_path / "model")))
    assert result.scheduler.config.predictor == scheduler.config.predictor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trained_steps": 9}, "trained_steps must be at most 3"),
        ({"updates_per_round": 100}, "updates_per_round must be at most 8"),
        ({"guidance_scale": 2.0}, "guidance_scale must be 1 for a model without classes"),
        ({"policy": "best"}, "policy must be one of exact"),
        ({"stochastic_indices": (7, 9)}, "leave no step with noise to train on"),
        ({"stochastic_indices": (0, 2), "trained_steps": 3}, "trained_steps must be at most 2"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(model, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        PolicyTrainer(config(model, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="output_dir must be another folder than model"):
        PolicyTrainer(config(model, model, overwrite_output_dir=True))


def test_an_adapter_needs_peft(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, found=importlib.util.find_spec: None if name == "peft" else found(name),
    )
    with pytest.raises(ValueError, match="lora_rank needs peft: pip install 'diffusers-sde\\[lora\\]'"):
        config(model, tmp_path, lora_rank=4)


def test_the_command_line(model, tmp_path, capsys):
    words = [f"--{name}={value}" for name, value in TINY.items()]
    policy_main(["--model", model, "--reward", BRIGHT, "--output_dir", str(tmp_path / "run"), *words])
    assert (tmp_path / "run" / "model_index.json").is_file()
    with pytest.raises(SystemExit) as stopped:
        policy_main(["--model", model, "--reward", "x:y", "--output_dir", str(tmp_path / "other")])
    assert stopped.value.code == 2 and "cannot be imported" in capsys.readouterr().err
