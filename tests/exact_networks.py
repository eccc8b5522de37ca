"""Networks that give exact scores, and short runs with them."""

import diffusers
import torch

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

SIZE, STEPS = 8, 4


SCHEDULERS = {
    "vp": lambda **k: VPSDEScheduler(**k),
    "pc": lambda **k: VPSDEScheduler(**{"corrector": "langevin", "snr": 0.1, **k}),
    "ode": lambda **k: VPSDEScheduler(**{"probability_flow": True, **k}),
    "heun": lambda **k: VPSDEScheduler(**{"probability_flow": True, "predictor": "heun", **k}),
    "ve": lambda **k: VESDEScheduler(**{"prediction_type": "edm", "sigma_max": 20.0, **k}),
    "sub_vp": lambda **k: SubVPSDEScheduler(**k),
    "flow": lambda **k: FlowSDEScheduler(**k),
    "clipped": lambda **k: VPSDEScheduler(**{"clip_sample": True, **k}),
}


def unet(channels=1, **arguments):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        **arguments,
    ).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


class ExactUNet(diffusers.ModelMixin, diffusers.ConfigMixin):
    """What a perfect network returns for four-dimensional Gaussian data as images of 2 x 2 pixels."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=2, in_channels=1, out_channels=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, return_dict=False):
        scheduler = self.scheduler
        t = scheduler.sde_time(torch.as_tensor(timestep).double().flatten())
        alpha, sigma = scheduler.sde.alpha(t), scheduler.sde.sigma(t)
        x = x / scheduler.parametrization.input_scale(alpha, sigma).reshape(-1, 1, 1, 1).to(x)
        x0_hat = self.data.denoise(x.flatten(1), alpha, sigma).reshape(x.shape)
        return (scheduler.parametrization.from_x0(x0_hat, x, alpha, sigma),)
