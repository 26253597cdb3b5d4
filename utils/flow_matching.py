"""Flow matching: the forward process of Stable Diffusion 3 and FLUX.2 in examples/families/."""

from dataclasses import dataclass

import diffusers


@dataclass(frozen=True)
class FlowMatching:
    """The forward process x_t = (1 - sigma) x0 + sigma noise, t = 1000 sigma, of networks that predict v.

    Latents are (batch, C, H, W), timesteps (batch,), a = 1 - sigma and s = sigma (batch, 1, 1, 1).
    """

    last_timestep = 1000
    fractional_timesteps = True

    @classmethod
    def from_scheduler(cls, config):
        """The process of a scheduler's configuration; raises ValueError if the method cannot use it."""
        if "FlowMatch" not in config["_class_name"]:
            raise ValueError(f"{config['_class_name']} is not a flow-matching scheduler")
        return cls()

    def has_clean_prediction(self, timestep):
        """True, also for pure noise: x0 = z - v(z)."""
        return True

    def coefficients(self, timesteps):
        """a and s."""
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def clean_prediction(self, output, x_t, a, s):
        """D(x_t), the clean latents implied by a network's output."""
        return x_t - s * output

    def target(self, x0, noise, a, s):
        """The regression target v of a network's output; its squared error is that of x0 over sigma^2."""
        return noise - x0

    def next_input(self, x_t, x0, noise, timesteps, next_timesteps):
        """Take the stock scheduler's Euler step to the next timesteps of a rollout, without new noise."""
        return x0 + (x_t - x0) * (next_timesteps / timesteps).view(-1, 1, 1, 1)

    def exported_scheduler(self, scheduler):
        """A scheduler that uses the sigmas of the pipeline's call unchanged."""
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            scheduler.config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None,
            use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
            stochastic_sampling=False)

    def call_arguments(self, timesteps):
        """Arguments of the pipeline's call that reproduce these steps."""
        return {"sigmas": [timestep / 1000 for timestep in timesteps]}

    def to(self, device):
        return self
