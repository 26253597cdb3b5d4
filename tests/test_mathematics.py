"""The losses against known truths: Gaussians by quadrature, finite differences, stock diffusers."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import load_script
from diffusers import DDPMScheduler

from utils.flow_matching import FlowMatching


VP = load_script("train_diff_instruct_star_sd15")
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
TIMESTEPS = [40, 300, 650, 979]
TIMES = [*TIMESTEPS, 0.04, 0.3, 0.7, 0.98]  # of both forward processes: timesteps, and a flow's sigma
METHODS = {"full": {"divergence": "score", "score_gradient": "full"},
           "detached": {"divergence": "score", "score_gradient": "detached"},
           "kl": {"divergence": "kl"}}


def settings(**changes):
    """The method's settings: the theorem's own units, squared distance, no guidance."""
    plain = {"distance": "l2", "pseudo_huber_c": 0.5, "weighting": "score", "cfg_scale": 0.0}
    return VP.Method(**(plain | changes))


def gradients_at(script, x0, noise, a, s, assistant, reference, method):
    """Gradients by term, of networks that are functions of x_t; the reference returns (conditional, null)."""
    x_t = (a * x0 + s * noise).requires_grad_(method.full)
    with torch.set_grad_enabled(method.full):
        d_assistant, (d_conditional, d_null) = assistant(x_t), reference(x_t)
    predictions = script.Predictions(x0, x_t, a, s, d_assistant, d_conditional, d_null, int(method.full))
    terms = [script.Divergence(method)]
    if method.guided and method.cfg_mode == "out":
        terms.append(script.GuidanceReward(method))
    return {term.name: term.gradient(None, predictions, None)[0] for term in terms}


def coefficients(times, batch):
    """a and s (batch, 1, 1, 1) of one time or `batch` times, as the processes have them."""
    times = torch.tensor(times).expand(batch)
    if times.is_floating_point():
        return FlowMatching().coefficients(1000 * times.double())
    return VP.VariancePreserving(ALPHAS_CUMPROD, "epsilon").coefficients(times)



def quadrature(nodes):
    """Gauss-Hermite points (batch, variables) and weights (batch,) of independent standard normals.

    `nodes` lists how many each variable gets.
    """
    rules = [numpy.polynomial.hermite_e.hermegauss(count) for count in nodes]
    points = torch.cartesian_prod(*[torch.tensor(point) for point, _ in rules]).view(-1, len(nodes))
    weights = torch.cartesian_prod(*[torch.tensor(weight / weight.sum()) for _, weight in rules])
    return points, weights.view(-1, len(nodes)).prod(1)


class Gaussians:
    """x0 = theta z and a reference N(0, spread^2), independent in each latent entry; optimal networks."""

    def __init__(self, theta, spread, timestep, nodes=5):
        self.theta, self.spread = [torch.tensor(v, dtype=torch.float64) for v in (theta, spread)]
        entries = len(self.theta)
        points, self.weights = quadrature([nodes] * entries + [3] * entries)
        self.a, self.s = coefficients(timestep, len(points))
        self.alpha, self.sigma2 = self.a[0].item() ** 2, self.s[0].item() ** 2
        self.v_p = self.alpha * self.theta**2 + self.sigma2
        self.v_q = self.alpha * self.spread**2 + self.sigma2
        self.kappa = 1 / self.v_p - 1 / self.v_q
        # The many nodes go along x_t: across it every integrand is a polynomial of second degree.
        along, across = points.split(entries, 1)
        signal, sigma = self.alpha**0.5 * self.theta / self.v_p.sqrt(), (self.sigma2 / self.v_p).sqrt()
        self.z, self.noise = [value[:, :, None, None] for value in (
            signal * along + sigma * across, sigma * along - signal * across)]

    def denoiser(self, variance):
        """The optimal clean prediction for latents of this variance."""
        gain = (self.a * variance.view(1, -1, 1, 1)) / (self.alpha * variance.view(1, -1, 1, 1) + self.sigma2)
        return lambda x_t: gain * x_t

    def gradient(self, script, **changes):
        """The loop's expected gradient in theta, (entries,)."""
        assistant, reference = self.denoiser(self.theta**2), self.denoiser(self.spread**2)
        gradients = gradients_at(
            script, self.theta.view(1, -1, 1, 1) * self.z, self.noise, self.a, self.s, assistant,
            lambda x_t: (reference(x_t), None), settings(**changes))
        per_point = sum(gradients.values()) * self.z
        return (self.weights[:, None] * per_point.flatten(1)).sum(0)


CASES = [([0.7], [1.3]), ([1.6], [0.4]), ([0.5, 2.0], [1.1, 0.6])]


@pytest.mark.parametrize("timestep", TIMES)
@pytest.mark.parametrize("theta, spread", CASES)
class TestGaussianCase:
    def test_full_score_gradient_is_that_of_the_divergence(self, script, theta, spread, timestep):
        case = Gaussians(theta, spread, timestep)
        expected = -4 * case.kappa * case.alpha * case.theta / case.v_p
        torch.testing.assert_close(case.gradient(script), expected, rtol=1e-5, atol=0)

    def test_detached_score_gradient(self, script, theta, spread, timestep):
        case = Gaussians(theta, spread, timestep)
        expected = -2 * case.kappa * case.alpha * case.theta / case.sigma2
        torch.testing.assert_close(case.gradient(script, **METHODS["detached"]), expected, rtol=1e-5, atol=0)

    def test_kl_gradient(self, script, theta, spread, timestep):
        case = Gaussians(theta, spread, timestep)
        expected = -case.kappa * case.alpha * case.theta
        torch.testing.assert_close(case.gradient(script, **METHODS["kl"]), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("weighting", ["clean", "score"])
    def test_a_step_against_the_gradient_lowers_the_true_divergences(self, script, theta, spread, timestep,
                                                                     weighting, method):
        """Fisher and KL divergence of the two noised Gaussians, in closed form."""
        case = Gaussians(theta, spread, timestep)
        gradient = case.gradient(script, weighting=weighting, **METHODS[method])
        moved = (case.theta - 1e-3 * gradient / gradient.norm()).tolist()
        before, after = case, Gaussians(moved, spread, timestep)
        fisher, kl = [[(g.v_p * g.kappa**2).sum() for g in (before, after)],
                      [(g.v_p / g.v_q - (g.v_p / g.v_q).log()).sum() / 2 for g in (before, after)]]
        assert fisher[1] < fisher[0]
        assert kl[1] < kl[0]


@pytest.mark.parametrize("timestep", TIMES)
@pytest.mark.parametrize("weighting", ["clean", "score"])
@pytest.mark.parametrize("distance, c", [("l2", 0.0), ("pseudo_huber", 1.0), ("pseudo_huber", 3.0)])
def test_full_gradient_is_that_of_the_divergence_for_any_distance(script, distance, c, weighting, timestep):
    """Theorem 3.1 in two latent entries: d/dtheta of E d(y_theta(x_t)), the law of x_t held fixed.

    c is in root mean squares of y, which is several hundred times as large in scores at small t.
    """
    case = Gaussians([0.8, 1.5], [1.2, 0.9], timestep, nodes=90)
    points, weights = quadrature([90, 90])
    x_t = points * case.v_p.sqrt()
    unit = 1.0 if weighting == "score" else case.sigma2 / case.alpha**0.5  # from scores to clean predictions
    theta = case.theta.clone().requires_grad_()
    y = unit * x_t * (1 / case.v_q - 1 / (case.alpha * theta**2 + case.sigma2))
    square = y.square().sum(1)
    c *= (weights * square).sum().sqrt().item()
    divergence = (weights * (square if distance == "l2" else (square + c**2).sqrt() - c)).sum()
    (expected,) = torch.autograd.grad(divergence, theta)
    gradient = case.gradient(script, distance=distance, pseudo_huber_c=c, weighting=weighting)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["clean", "score", "dmd"])
@pytest.mark.parametrize("distance, known", [("l2", [6.0, 8.0]), ("pseudo_huber", [3 / 13, 4 / 13])])
def test_the_loss_takes_the_derivative_of_its_distance(script, distance, known, weighting):
    """(3.4) by hand: y = (3, 0, 4, 0), so d'(y) = 2y or y / 13 for c = 12, times D_assistant - x0."""
    x0, d_reference = torch.randn(2, 2, 1, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    a, s = (torch.tensor(values).double().view(2, 1, 1, 1) for values in ([0.6, 0.8], [0.8, 0.6]))
    unit, _, weight = script.divergence_units(x0, d_reference, a, s, weighting)
    d_assistant = d_reference + torch.tensor([3.0, 0, 4, 0]).view(1, 1, 4, 1) / unit
    method = settings(distance=distance, pseudo_huber_c=12.0, weighting=weighting)
    loss = script.score_divergence_loss(x0, d_assistant, d_reference, a, s, method)
    difference = (weight * unit * (d_assistant - x0)).flatten(1)
    torch.testing.assert_close(loss, -(known[0] * difference[:, 0] + known[1] * difference[:, 2]))


def test_diversity_over_noise_and_over_prompts_are_apart(script):
    """Images that differ between prompts only; then also 0.2 and 0.6 in one value of 3 x 2 x 2."""
    images = torch.zeros(2, 2, 3, 2, 2)
    images[1] = 1
    assert script.diversity(images) == {"over_noise": 0, "over_prompts": pytest.approx(0.5**0.5)}
    images[0, :, 0, 0, 0] = torch.tensor([0.2, 0.6])
    assert script.diversity(images) == {"over_noise": pytest.approx(0.08**0.5 / (2 * 12)),
                                        "over_prompts": pytest.approx((11 + 0.6) / 12 * 0.5**0.5)}
    assert script.diversity(images[:1]).keys() == {"over_noise"}
    assert script.diversity(images[:, :1]).keys() == {"over_prompts"}


@pytest.mark.parametrize("timestep", TIMES)
def test_guidance_loss_is_the_negative_implicit_reward(script, timestep):
    """(3.6) by central differences in place and spread: - alpha E log p(x_t | c) / p(x_t), both Gaussian."""
    points, weights = quadrature([5, 5])
    z, noise = [part.view(-1, 1, 1, 1) for part in points.unbind(1)]
    a, s = coefficients(timestep, len(points))
    laws = {"conditional": (1.5, 0.4), "null": (0.2, 1.1)}  # mean and standard deviation of the clean latents
    scale = 7.5

    def law(x_t, name):
        mean, spread = laws[name]
        return torch.distributions.Normal(a * mean, (a**2 * spread**2 + s**2).sqrt()).log_prob(x_t)

    def denoised(x_t, name):
        mean, spread = laws[name]
        return mean + a * spread**2 / (a**2 * spread**2 + s**2) * (x_t - a * mean)

    def negative_reward(place, spread):
        x_t = a * (place + spread * z) + s * noise
        return -scale * (weights.view(-1, 1, 1, 1) * (law(x_t, "conditional") - law(x_t, "null"))).sum()

    place, spread, h = 0.7, 0.9, 1e-4
    expected = torch.stack([
        (negative_reward(place + h, spread) - negative_reward(place - h, spread)) / (2 * h),
        (negative_reward(place, spread + h) - negative_reward(place, spread - h)) / (2 * h)])
    parameters = torch.tensor([place, spread], dtype=torch.float64, requires_grad=True)
    x0 = parameters[0] + parameters[1] * z
    x_t = a * x0.detach() + s * noise
    predictions = denoised(x_t, "conditional"), denoised(x_t, "null")
    direction = predictions[0] - predictions[1]
    loss = script.implicit_reward_loss(x0, direction, predictions[0], a, s, scale, settings())
    (gradient,) = torch.autograd.grad((weights * loss).sum(), parameters)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------- random networks


EARLY, SIGMAS = [40, 150, 300, 450, 600], [0.05, 0.2, 0.4, 0.7, 0.95]


def random_networks(times):
    """Latents, noise and coefficients of five samples, and smooth random networks of float64."""
    generator = torch.Generator().manual_seed(3)

    def network():
        first, second = [torch.randn(*shape, generator=generator, dtype=torch.float64) / 3
                         for shape in ((12, 3, 3, 3), (3, 12, 3, 3))]
        return lambda x_t: torch.nn.functional.conv2d(
            torch.nn.functional.conv2d(x_t, first, padding=1).tanh(), second, padding=1)

    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    (a, s), conditional, null = coefficients(times, 5), network(), network()
    return SimpleNamespace(
        x0=x0, noise=noise, a=a, s=s, assistant=network(),
        conditional=conditional, null=null, reference=lambda x_t: (conditional(x_t), null(x_t)))


@pytest.fixture(params=[EARLY, SIGMAS], ids=["vp", "flow"])
def networks(request):
    return random_networks(request.param)


def gradients_of(script, networks, **changes):
    return gradients_at(script, networks.x0, networks.noise, networks.a, networks.s, networks.assistant,
                        networks.reference, settings(**changes))


@pytest.mark.parametrize("weighting", ["clean", "score", "dmd"])
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("cfg", [("in", 0.0), ("in", 4.5), ("out", 4.5)])
def test_gradient_taken_apart_is_that_of_one_joint_backward(script, networks, cfg, distance, weighting):
    mode, scale = cfg
    x0 = networks.x0.clone().requires_grad_()
    x_t = networks.a * x0 + networks.s * networks.noise
    d_reference = networks.conditional(x_t)
    if mode == "in" and scale > 1:
        d_reference = networks.null(x_t) + scale * (d_reference - networks.null(x_t))
    loss = script.score_divergence_loss(x0, networks.assistant(x_t), d_reference, networks.a, networks.s,
                                        settings(distance=distance, weighting=weighting))
    (expected,) = torch.autograd.grad(loss.sum(), x0)
    gradients = gradients_of(script, networks, weighting=weighting, distance=distance, cfg_mode=mode,
                             cfg_scale=scale)
    torch.testing.assert_close(gradients["divergence"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighting", ["clean", "score", "dmd"])
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_detached_is_kl_up_to_a_positive_weight_per_sample(script, networks, distance, weighting):
    given = {"weighting": weighting, "distance": distance}
    detached = gradients_of(script, networks, **METHODS["detached"], **given)["divergence"].flatten(1)
    kl = gradients_of(script, networks, **METHODS["kl"], **given)["divergence"].flatten(1)
    ratio = (detached * kl).sum(1, keepdim=True) / kl.square().sum(1, keepdim=True)
    assert (ratio > 0).all()
    torch.testing.assert_close(detached, ratio * kl, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_full_points_elsewhere_than_detached(script, networks, distance):
    full, detached = [gradients_of(script, networks, weighting="clean", distance=distance, **METHODS[name])
                      ["divergence"].flatten(1) for name in ("full", "detached")]
    differing = networks.a.flatten() > 0.2  # what passes through the networks is times a
    assert differing.sum() > 3
    assert (torch.cosine_similarity(full, detached)[differing].abs() < 0.9).all()


@pytest.mark.parametrize("weighting", ["clean", "score"])
def test_kl_with_guidance_out_at_alpha_is_in_at_one_plus_alpha(script, networks, weighting):
    """Not with dmd, whose weight sees the guided reference in the one and the plain one in the other."""
    kl = {"weighting": weighting, **METHODS["kl"]}
    out = gradients_of(script, networks, cfg_mode="out", cfg_scale=3.5, **kl)
    assert set(out) == {"divergence", "cfg"}
    into = gradients_of(script, networks, cfg_mode="in", cfg_scale=4.5, **kl)
    assert set(into) == {"divergence"}
    torch.testing.assert_close(out["divergence"] + out["cfg"], into["divergence"], rtol=1e-10, atol=1e-12)


def test_with_dmd_weighting_out_and_in_agree_up_to_the_weight(script, networks):
    kl = {"weighting": "dmd", **METHODS["kl"]}
    out = sum(gradients_of(script, networks, cfg_mode="out", cfg_scale=3.5, **kl).values()).flatten(1)
    into = gradients_of(script, networks, cfg_mode="in", cfg_scale=4.5, **kl)["divergence"].flatten(1)
    x_t = networks.a * networks.x0 + networks.s * networks.noise
    conditional, null = networks.reference(x_t)
    plain, guided = [(networks.x0 - d).abs().mean((1, 2, 3))[:, None]
                     for d in (conditional, null + 4.5 * (conditional - null))]
    torch.testing.assert_close(out * plain, into * guided, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_in_at_most_one_is_none(script, networks, scale, method):
    plain = settings(cfg_mode="in", cfg_scale=scale, **METHODS[method])
    expected = gradients_at(
        script, networks.x0, networks.noise, networks.a, networks.s, networks.assistant,
        lambda x_t: (networks.conditional(x_t), None), plain)
    gradients = gradients_of(script, networks, cfg_mode="in", cfg_scale=scale, **METHODS[method])
    assert torch.equal(gradients["divergence"], expected["divergence"])


def test_guidance_is_as_in_diffusers(script):
    conditional, null = torch.randn(2, 3, 4, 2, 2)
    guided = script.guided_prediction(conditional, null, 7.5)
    torch.testing.assert_close(guided, 7.5 * conditional - 6.5 * null)


def test_weights_of_dmd_are_detached_and_per_sample(script, networks):
    """dmd is clean divided by mean |x0 - D_reference| of the sample."""
    x_t = networks.a * networks.x0 + networks.s * networks.noise
    distance = (networks.x0 - networks.conditional(x_t)).abs().mean((1, 2, 3), keepdim=True)
    for method in METHODS.values():
        clean, dmd = [gradients_of(script, networks, weighting=weighting, **method)["divergence"]
                      for weighting in ("clean", "dmd")]
        torch.testing.assert_close(dmd * distance, clean, rtol=1e-10, atol=1e-12)


def test_reward_gradient_is_minus_alpha_times_that_of_one_scalar(script):
    """Two samples of three channels of 4 x 4: each gets the reward's own gradient, not C H W times it."""
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def decode(latents):
        return 0.5 + 0.2 * latents.tanh()

    def reward(images, prompts):
        return images.square().mean((1, 2, 3)) * torch.tensor([float(prompt) for prompt in prompts])

    gradient, logs = script.reward_gradient(x0, ["2", "-3"], decode, {"own": (100.0, reward)})
    expected = -100 * torch.tensor([2.0, -3.0]).view(-1, 1, 1, 1) * (
        2 * decode(x0) * 0.2 * (1 - x0.tanh() ** 2)) / (3 * 4 * 4)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logs["reward"], reward(decode(x0), ["2", "-3"]).float())
    torch.testing.assert_close(logs["reward_own"], logs["reward"])
    assert logs["clamped"].tolist() == [0, 0]


def test_clamped_pixels_have_no_reward_gradient_and_are_counted(script):
    x0 = torch.tensor([[-0.1, 0.5, 1.5, 0.9]]).view(1, 1, 2, 2)
    rewards = {"sum": (3.0, lambda x, _: x.sum((1, 2, 3)))}
    gradient, logs = script.reward_gradient(x0, ["p"], lambda x: x, rewards)
    assert gradient.flatten().tolist() == [0, -3, 0, -3]
    assert logs["clamped"].tolist() == [0.5]


def test_rewards_are_summed_each_with_its_own_scale(script):
    """r = 2 sum x + 5 x_1 x_2 at x = 0.4 everywhere, of a decoder that halves: by hand."""
    x0 = torch.full((1, 1, 1, 2), 0.8)
    rewards = {"sum": (2.0, lambda x, _: x.sum((1, 2, 3))),
               "product": (5.0, lambda x, _: x[:, 0, 0].prod(-1))}
    gradient, logs = script.reward_gradient(x0, ["p"], lambda x: x / 2, rewards)
    torch.testing.assert_close(gradient, torch.full_like(x0, -(2 + 5 * 0.4) / 2))
    expected = {"reward_sum": 0.8, "reward_product": 0.16, "reward": (2 * 0.8 + 5 * 0.16) / 7, "clamped": 0,
                "grad_image_sum": 2 * 2**0.5, "grad_image_product": 5 * 0.4 * 2**0.5}
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(expected)


# ----------------------------------------------------------------------------------- prediction types


KINDS = ["epsilon", "v_prediction", "sample"]
TARGETS = {  # what a network of each prediction type must return to mean these clean latents
    "epsilon": lambda clean, x_t, a, s: (x_t - a * clean) / s,
    "v_prediction": lambda clean, x_t, a, s: (a * x_t - clean) / s,
    "sample": lambda clean, x_t, a, s: clean,
    "flow": lambda clean, x_t, a, s: (x_t - clean) / s}


def of_kind(kind):
    """A prediction type's process, and networks at times of its own schedule."""
    if kind == "flow":
        return FlowMatching(), random_networks(SIGMAS)
    return VP.VariancePreserving(ALPHAS_CUMPROD, kind), random_networks(EARLY)


@pytest.mark.parametrize("kind", TARGETS)
def test_one_denoiser_in_any_prediction_type_gives_its_gradients(script, kind):
    """Each on its own schedule, its output made by its own target's definition."""
    diffusion, networks = of_kind(kind)
    a, s = networks.a, networks.s

    def dressed(denoiser):
        return lambda x_t: diffusion.clean_prediction(TARGETS[kind](denoiser(x_t), x_t, a, s), x_t, a, s)

    x_t = a * networks.x0 + s * networks.noise
    torch.testing.assert_close(diffusion.target(networks.x0, networks.noise, a, s),
                               TARGETS[kind](networks.x0, x_t, a, s), rtol=1e-10, atol=1e-10)
    clean = dressed(networks.assistant)(x_t)
    torch.testing.assert_close(clean, networks.assistant(x_t), rtol=1e-10, atol=1e-10)
    for distance in ("l2", "pseudo_huber"):
        given = {"weighting": "clean", "cfg_scale": 3.0, "distance": distance}
        gradients = gradients_at(
            script, networks.x0, networks.noise, a, s, dressed(networks.assistant),
            lambda x_t: (dressed(networks.conditional)(x_t), dressed(networks.null)(x_t)), settings(**given))
        expected = gradients_of(script, networks, **given)
        torch.testing.assert_close(gradients["divergence"], expected["divergence"], rtol=1e-8, atol=1e-8)


def test_the_clean_prediction_of_a_flow_at_pure_noise_is_noise_minus_v():
    """At sigma = 1, where a is 0 and the score is -x_t."""
    diffusion, z, v = FlowMatching(), *torch.randn(2, 3, 16, 4, 4).double()
    a, s = diffusion.coefficients(torch.tensor([1000.0] * 3).double())
    clean = diffusion.clean_prediction(v, z, a, s)
    assert torch.equal(clean, z - v) and a.eq(0).all() and s.eq(1).all()
    torch.testing.assert_close((a * clean - z) / s**2, -z)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.95])
def test_the_score_of_a_flow_matches_a_gaussian(sigma):
    """S = - (x_t + (1 - sigma) v) / sigma, of the v that is optimal for clean latents N(0.3, 0.7^2)."""
    x_t = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    a, s = coefficients(sigma, 4)
    variance = a**2 * 0.7**2 + s**2
    clean = 0.3 + a * 0.7**2 / variance * (x_t - a * 0.3)  # E(x0 | x_t)
    v = (x_t - a * clean) / s - clean  # E(noise - x0 | x_t)
    score = -(x_t - a * 0.3) / variance
    torch.testing.assert_close(-(x_t + (1 - sigma) * v) / sigma, score)
    torch.testing.assert_close((a * FlowMatching().clean_prediction(v, x_t, a, s) - x_t) / s**2, score)


@pytest.mark.parametrize("kind", KINDS)
def test_clean_prediction_is_that_of_diffusers(kind):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = ALPHAS_CUMPROD
    diffusion, networks = of_kind(kind)
    for timestep in TIMESTEPS:
        a, s = diffusion.coefficients(torch.tensor([timestep] * 5))
        stock = scheduler.step(networks.x0, timestep, networks.noise).pred_original_sample
        torch.testing.assert_close(diffusion.clean_prediction(networks.x0, networks.noise, a, s), stock,
                                   rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TARGETS)
def test_assistant_loss_is_zero_only_at_the_exact_output(script, kind):
    diffusion, networks = of_kind(kind)
    x0, noise, a, s = networks.x0, networks.noise, networks.a, networks.s
    exact = TARGETS[kind](x0, a * x0 + s * noise, a, s)
    loss = script.assistant_loss(exact, x0, noise, a, s, diffusion)
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-20)
    moved = script.assistant_loss(exact + 0.1, x0, noise, a, s, diffusion)
    torch.testing.assert_close(moved, torch.full((5,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("left_out", [["beta_schedule"], ["beta_start", "beta_end", "beta_schedule"]])
def test_what_a_configuration_leaves_to_its_class_is_trained_and_exported(script, left_out):
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    reference = DDPMScheduler.from_config({key: value for key, value in given.items() if key not in left_out})
    process = script.VariancePreserving(reference.alphas_cumprod, "epsilon")
    exported = process.exported_scheduler(reference)
    torch.testing.assert_close(exported.alphas_cumprod, reference.alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("timestep", [399, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_that_of_the_stock_scheduler_without_clipping(script, kind, timestep):
    trained = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            prediction_type=kind, clip_sample=True)
    diffusion = script.VariancePreserving(trained.alphas_cumprod, kind)
    scheduler = diffusion.exported_scheduler(trained)
    scheduler.set_timesteps(timesteps=[timestep])
    z, output = 5 * torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def generator(latents, timesteps, **conditioning):
        assert torch.equal(latents, z) and timesteps.tolist() == [timestep] * 3
        return SimpleNamespace(sample=output)

    x0 = script.generate(generator, script.FAMILY, diffusion, z[:, None], [timestep], {})
    assert x0.abs().max() > 5
    torch.testing.assert_close(scheduler.step(output, timestep, z).prev_sample, x0, rtol=1e-5, atol=1e-5)
