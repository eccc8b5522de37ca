"""DiffusionNFT: the loss by its formula, its minimum in closed form, and the direction in which rewards move."""

import pytest
import torch
from accelerate import Accelerator
from tiny_networks import tiny_unet
from torch import nn

from diffusers_sde import ClassConditionalSDEPipeline, FlowSDEScheduler, SDEPipeline, VESDEScheduler, VPSDEScheduler
from diffusers_sde.training.forward_process import ForwardProcess, NoisedImages, contrastive_loss, optimality
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.reward_methods import Reference
from diffusers_sde.training.rl import PolicyTrainer


def config(**options):
    return PolicyTrainingConfig(model="m", reward="x:y", method="nft", mixed_precision="no", **options)


def method(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return ForwardProcess(config(**options), pipe, Reference(pipe, Accelerator(cpu=True), False))


class Shift(nn.Module):
    """A network that predicts x0_hat = theta, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.2, -0.3]))

    def forward(self, x, timestep):
        return self.theta.reshape(1, 2, 1, 1).expand_as(x)


# ---------------------------------------------------------------------- the loss


def test_the_loss_is_the_formula():
    """One row of two numbers, by hand, with beta = 1/2."""
    estimate, old, x0 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[0.0, 1.0]])
    # x0_plus = (0.75, 0.125), x0_minus = (0.25, 0.375); errors (0.75, -0.875) and (0.25, -0.625).
    good, bad = (0.75**2 + 0.875**2) / 2, (0.25**2 + 0.625**2) / 2
    r = torch.tensor([0.7])
    expected = torch.tensor([(0.7 * good + 0.3 * bad) / 0.5])
    torch.testing.assert_close(contrastive_loss(estimate, old, x0, r, 0.5, normalised=False), expected)
    expected = torch.tensor([(0.7 * good / ((0.75 + 0.875) / 2) + 0.3 * bad / ((0.25 + 0.625) / 2)) / 0.5])
    torch.testing.assert_close(contrastive_loss(estimate, old, x0, r, 0.5), expected)


def test_the_reward_as_a_probability():
    torch.testing.assert_close(
        optimality(torch.tensor([-9.0, -5.0, 0.0, 1.0, 7.0])), torch.tensor([0.0, 0.0, 0.5, 0.6, 1.0])
    )


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_minimum_is_that_of_the_theorem(beta):
    """Three images may have led to x_t, with probabilities p: theorem 3.2 says the minimum. The loss is quadratic."""
    x0, p = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    r = torch.tensor([0.1, 0.9, 0.6], dtype=torch.float64)
    old = (p * x0).sum()
    good = (p * r).sum()  # P(good | x_t)
    closed_form = old + 2.0 / beta * good * ((p * r * x0).sum() / good - old)
    guess = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

    def gradient(at):
        rows = [value.expand(3)[:, None] for value in (at, old)]
        loss = (p * contrastive_loss(*rows, x0[:, None], r, beta, normalised=False)).sum()
        return torch.autograd.grad(loss, at, create_graph=True)[0]

    slope = torch.autograd.grad(gradient(guess), guess)[0]
    minimum = guess - gradient(guess) / slope
    assert slope > 0.0
    torch.testing.assert_close(minimum.detach(), closed_form)
    assert (closed_form - old).abs() > 0.1


def test_the_gradient_is_the_typed_one_and_moves_the_mean_reward():
    """The images are N(theta, 1), the reward is -|x_0 - a|^2, whose mean has the gradient 2 (a - theta)."""
    pipe = SDEPipeline(Shift(), VPSDEScheduler(prediction_type="sample"), sample_shape=(2, 1, 1))
    theta, wanted, n = pipe.unet.network.theta, torch.tensor([1.2, 0.7]), 20_000
    x0 = theta.detach().reshape(1, 2, 1, 1) + torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    rewards = -(x0[:, :, 0, 0] - wanted).square().sum(1)
    advantages = (rewards - rewards.mean()) / rewards.std()
    old = theta.detach().reshape(1, 1, 2, 1, 1).expand(1, n, 2, 1, 1)
    drawn = NoisedImages(x0, torch.full((1, n), 0.5, dtype=torch.float64), torch.zeros(1, n, 2, 1, 1), old, None)
    losses, sums = method(pipe).losses(drawn, torch.zeros(n, dtype=torch.int64), torch.arange(n), advantages)
    losses.mean().backward()
    r = 0.5 + 0.5 * (advantages / 5.0).clamp(-1.0, 1.0)
    error = (theta.detach() - x0[:, :, 0, 0]) / (theta.detach() - x0[:, :, 0, 0]).abs().mean(1, keepdim=True)
    torch.testing.assert_close(theta.grad, ((2.0 * r - 1.0)[:, None] * error).mean(0), rtol=1e-4, atol=1e-6)
    assert sums[1] == 0.0  # nothing has changed yet
    exact = 2.0 * (wanted - theta.detach())
    cosine = torch.nn.functional.cosine_similarity(-theta.grad, exact, dim=0)
    assert cosine > 0.99  # the noise of the gradient is a hundredth of it


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("scheduler", [FlowSDEScheduler(), VPSDEScheduler(), VESDEScheduler(prediction_type="edm")])
def test_images_are_those_of_the_pipeline_and_are_noised_by_the_sde(scheduler):
    pipe = SDEPipeline(tiny_unet(1.0), scheduler)
    own = method(pipe, num_inference_steps=5, trained_steps=3)
    drawn, images = own.draw(range(4, 400), 0, None)
    two, _ = own.draw(range(6, 8), 0, None)
    torch.testing.assert_close(drawn.x_t[:, 2:4], two.x_t, rtol=1e-3, atol=1e-3)  # by number, whatever the batch
    assert len(drawn) == 3 and own.count_steps() == 5 and torch.equal(images, pipe.postprocess(drawn.x0, "pt"))
    levels = torch.tensor([row.t for row in pipe.scheduler.rows], dtype=torch.float64)
    assert torch.isin(drawn.t, levels).all()
    assert (drawn.t.sort(0).values.diff(dim=0) > 0).all()  # each level once
    sde = scheduler.sde
    alpha, sigma = (value[..., None, None, None].float() for value in (sde.alpha(drawn.t), sde.sigma(drawn.t)))
    eps = (drawn.x_t - alpha * drawn.x0) / sigma
    # 76032 numbers: their mean and variance deviate by more than 5 standard errors once in a million runs.
    assert eps.mean().abs() < 5.0 / eps.numel() ** 0.5 and (eps.var() - 1.0).abs() < 5.0 * (2.0 / eps.numel()) ** 0.5
    k, b = torch.tensor([2, 0]), torch.tensor([1, 3])
    losses, sums = own.losses(drawn, k, b, torch.zeros(2))
    again = own._denoiser(pipe)(drawn.x_t[k, b], drawn.t[k, b], None)
    torch.testing.assert_close(drawn.old[k, b], again, rtol=1e-4, atol=1e-4)
    assert losses.requires_grad and sums[1] < 1e-6


def test_the_kl_weight_pulls_to_the_reference():
    """With r = 1/2 the loss is least at the old estimate; the reference is another network, whose outputs are known."""
    pipe = SDEPipeline(tiny_unet(1.0), FlowSDEScheduler())
    own = method(pipe, num_inference_steps=4, kl_weight=2.0)
    drawn, _ = own.draw(range(3), 0, None)
    k, b = torch.tensor([1, 2, 0]), torch.arange(3)
    same = own.losses(drawn, k, b, torch.zeros(3))[0]
    own.reference = Reference(SDEPipeline(tiny_unet(2.0), FlowSDEScheduler()), Accelerator(cpu=True), False)
    other, sums = own.losses(drawn, k, b, torch.zeros(3))
    outputs = [net(drawn.x_t[k, b], 1000.0 * drawn.t[k, b]).sample for net in (pipe.unet, own.reference.network)]
    change = (outputs[0] - outputs[1]).square().mean((1, 2, 3)).detach()
    torch.testing.assert_close((other - same).detach(), 2.0 * change, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sums[2], change.sum(), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- runs


def trainer(tmp_path, pipe, **options):
    pipe.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"), "logger": "none"}
    settings |= {"num_inference_steps": 4, "sample_every": 0, "checkpointing_steps": 0, "mixed_precision": "no"}
    wanted = PolicyTrainingConfig(reward="x:y", method="nft", **(settings | options))
    return PolicyTrainer(wanted, lambda images, labels: images.mean((1, 2, 3)))


@pytest.mark.parametrize("scheduler", [FlowSDEScheduler(), VPSDEScheduler(prediction_type="v_prediction")])
def test_a_run_raises_the_reward(tmp_path, scheduler):
    """Noise alone changes the mean brightness of 256 images by 0.005 here."""
    options = {"max_train_steps": 5, "group_size": 64, "learning_rate": 1e-3, "trained_steps": 2}
    before = SDEPipeline(tiny_unet(1.0), scheduler)
    means = []
    for pipe in (before, trainer(tmp_path, before, **options).run()):
        pipe.set_progress_bar_config(disable=True)
        means.append(float(pipe(256, 4, torch.Generator().manual_seed(1), output_type="pt").images.mean()))
    assert means[1] > means[0] + 0.03


def test_images_are_drawn_by_the_averaged_weights(tmp_path):
    """After one update the average is another network than the one that learns."""
    run = trainer(tmp_path, SDEPipeline(tiny_unet(1.0), FlowSDEScheduler()), group_size=4, learning_rate=1e-2)
    run._prepare()
    for _ in range(2):
        run.round()
    assert run.ema.decay == 0.5
    own = run.network.state_dict()
    experience, _ = run.explore()
    drawn = experience[0].drawn
    assert all(torch.equal(value, own[name]) for name, value in run.network.state_dict().items())
    assert not run.network.training
    denoiser = run.method._denoiser(run.method.pipe)
    differences = []
    for average in (run.ema.shadow_params, list(run.network.parameters())):
        run.ema.store(run.network.parameters())
        with torch.no_grad():
            for parameter, value in zip(run.network.parameters(), average, strict=True):
                parameter.copy_(value)
            differences.append(float((denoiser(drawn.x_t[0], drawn.t[0], None) - drawn.old[0]).abs().max()))
        run.ema.restore(run.network.parameters())
    assert differences[0] == 0.0 < differences[1]


def test_classes_are_learnt_with_their_own_estimates(tmp_path):
    pipe = ClassConditionalSDEPipeline(tiny_unet(1.0, num_class_embeds=3), VPSDEScheduler(), null_class=2)
    run = trainer(tmp_path, pipe, group_size=4, num_groups=2, guidance_scale=1.5, max_train_steps=1)
    run._prepare()
    experience, _ = run.explore()
    drawn = experience[0].drawn
    assert drawn.labels.tolist() == [0] * 4 + [1] * 4
    with torch.no_grad():
        expected = run.method.pipe.denoiser(1.5)(drawn.x_t[0], drawn.t[0], class_labels=drawn.labels)
    assert torch.equal(expected, drawn.old[0])
    assert torch.isfinite(torch.tensor(list(run.round().values()))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "nft", "clip_range": 0.1}, "clip_range has no effect with method 'nft'"),
        ({"nft_beta": 0.1}, "nft_beta has no effect with method 'grpo'"),
        ({"method": "dpo"}, "method must be one of grpo, nft"),
    ],
)
def test_options_of_the_other_method_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PolicyTrainingConfig(model="m", reward="x:y", **options)
