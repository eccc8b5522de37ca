"""Score-SDE checkpoints made for diffusers' ScoreSdeVePipeline: the same images from ``SDEPipeline``.

Such a pipeline holds a UNet2DModel with a Fourier embedding, which takes sigma and returns the score (it divides its
output by sigma itself), for data in [0, 1]. What the swap needs, and what differs from the stock pipeline:

* ``data_min=0.0``: the data are not in [-1, 1];
* ``VESDEScheduler.from_config(config)`` is the stock sampler: reverse diffusion, ``correct_steps`` Langevin steps;
* ``langevin_norm="batch"``: the stock corrector averages both norms over the batch, so an image depends on its
  batch mates. For a single image it makes no difference;
* the stock predictor takes its sigmas from a second table, of times i/(n - 1), while the network is called with
  sigma(t) on linspace(1, sampling_eps, n). Ours uses the second for both; the two agree up to a factor
  (sigma_max/sigma_min)^sampling_eps, which is 1.0001 at the usual sampling_eps = 1e-5.

The order of the noise is the same: start, then per level one draw per corrector call and one for the predictor.
"""

import diffusers
import numpy as np
import pytest
import torch

from diffusers_sde import SDEPipeline, VESDEScheduler

# Levels for which every stock timestep is a binary fraction: elsewhere the stock predictor, which finds its sigma by
# truncating t (n - 1), may be off by a level.
LEVELS = 9


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            time_embedding_type="fourier",
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        ).eval()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock(**arguments):
    # sampling_eps -> 0 makes the two sigma tables of the stock scheduler agree.
    return diffusers.ScoreSdeVeScheduler(**{"sigma_max": 50.0, "sampling_eps": 1e-9, **arguments})


def stock_run(unet, scheduler, batch, seed=1):
    """The images, and what they were before clamping: a network with random weights leaves little in [0, 1]."""
    pipe = diffusers.ScoreSdeVePipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    means, step_pred = [], scheduler.step_pred

    def record(*arguments, **keywords):
        output = step_pred(*arguments, **keywords)
        means.append(output.prev_sample_mean)
        return output

    scheduler.step_pred = record
    generator = torch.Generator().manual_seed(seed)
    images = pipe(batch, num_inference_steps=LEVELS, generator=generator, output_type="numpy").images
    return images, means[-1]


def our_run(unet, config, batch, seed=1, **arguments):
    pipe = SDEPipeline(unet, VESDEScheduler.from_config(config, **arguments), data_min=0.0)
    pipe.set_progress_bar_config(disable=True)
    x = pipe(
        batch,
        num_inference_steps=LEVELS,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return pipe.postprocess(x, "np"), x


def assert_reproduced(ours, theirs, relative=2e-6):
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-3)
    scale = float(theirs[1].abs().max())
    torch.testing.assert_close(ours[1], theirs[1], rtol=0.0, atol=relative * scale)


@pytest.mark.parametrize("correct_steps", [0, 1, 2])
@pytest.mark.parametrize("sigma_max", [50.0, 1348.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_stock_pipeline_is_reproduced(unet, correct_steps, sigma_max, batch):
    scheduler = stock(correct_steps=correct_steps, sigma_max=sigma_max)
    theirs = stock_run(unet, scheduler, batch)
    assert theirs[1].std() > 0.5  # there is something to compare
    assert_reproduced(our_run(unet, scheduler.config, batch, langevin_norm="batch"), theirs)


def test_one_image_needs_no_batch_norm(unet):
    scheduler = stock()
    assert_reproduced(our_run(unet, scheduler.config, 1), stock_run(unet, scheduler, 1))


def test_without_batch_norms_an_image_does_not_depend_on_its_batch_mates(unet):
    scheduler = stock()
    theirs = stock_run(unet, scheduler, 3)
    difference = (our_run(unet, scheduler.config, 3)[1] - theirs[1]).abs().max()
    assert difference > 0.01 * theirs[1].abs().max()


def test_the_published_sampling_eps_changes_the_result_by_its_sigma_ratio_only(unet):
    scheduler = stock(sampling_eps=1e-5)
    theirs = stock_run(unet, scheduler, 2)
    ours = our_run(unet, scheduler.config, 2, langevin_norm="batch")
    # (50 / 0.01)^1e-5 - 1 = 9e-5, once per level.
    assert_reproduced(ours, theirs, relative=LEVELS * 1e-4)
    # The cause is the second table, nothing else: with the same sampling_eps in both roles it is gone.
    assert_reproduced(our_run(unet, scheduler.config, 2, langevin_norm="batch", sampling_eps=1e-9), theirs, 1e-2)


def test_a_saved_checkpoint_runs_from_its_folder(unet, tmp_path):
    # As google/ncsnpp-* are stored: model_index.json of a ScoreSdeVePipeline with both parts beside it.
    scheduler = stock()
    diffusers.ScoreSdeVePipeline(unet, scheduler).save_pretrained(tmp_path)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    ours = VESDEScheduler.from_pretrained(tmp_path, subfolder="scheduler", langevin_norm="batch")
    assert ours.config.predictor == "reverse_diffusion"
    assert ours.order == 2
    assert_reproduced(our_run(loaded, ours.config, 2), stock_run(unet, scheduler, 2))


def test_the_network_is_called_with_sigma_and_its_output_is_the_score(unet):
    scheduler = VESDEScheduler.from_config(stock(sampling_eps=1e-5).config)
    scheduler.set_timesteps(LEVELS)
    table = stock(sampling_eps=1e-5)
    table.set_timesteps(LEVELS)
    table.set_sigmas(LEVELS)
    torch.testing.assert_close(scheduler.timesteps, table.sigmas.repeat_interleave(2), rtol=1e-5, atol=0.0)
    x = torch.rand(1, 3, 8, 8)
    sigma = scheduler.timesteps[-1]
    score = unet(x, sigma).sample
    result = scheduler.step(score, sigma, x)
    torch.testing.assert_close(result.pred_original_sample, x + sigma**2 * score, rtol=1e-5, atol=1e-6)


def test_every_predictor_and_corrector_is_open_to_an_old_checkpoint(unet):
    for swap in (
        {"predictor": "ancestral"},
        {"predictor": "euler_maruyama", "corrector": None},
        {"predictor": "heun", "probability_flow": True, "corrector": None},
        {"predictor": "exponential", "solver_order": 2, "time_grid": "karras"},
        {"corrector": "annealed_langevin"},
    ):
        _, x = our_run(unet, stock(sampling_eps=1e-5).config, 1, **swap)
        assert torch.isfinite(x).all()
