"""Cheaper decoding for the rewards: the extra of --reward_vae and --enable_vae_tiling."""

import diffusers


FLAGS = {
    "reward_vae": {"help": "VAE that decodes for the rewards only, such as madebyollin/taesdxl."},
    "enable_vae_tiling": {"action": "store_true",
        "help": "Decode in blended tiles of half the image's side."},
}


def reward_vae(args, pipeline, dtype, load):
    """The VAE that decodes for the rewards, loaded by the script's `load`."""
    vae = pipeline.vae
    if args.reward_vae:
        kind = getattr(diffusers, diffusers.AutoencoderKL.load_config(args.reward_vae)["_class_name"])
        vae = load(kind, args.reward_vae, dtype)
    if args.enable_vae_tiling:  # by default it tiles only sizes above those it was trained on
        vae.enable_tiling()
        side = args.resolution // pipeline.vae_scale_factor
        vae.tile_latent_min_size = max(side // 8 * 4, 4)  # the overlap, a quarter, must be whole
        vae.tile_sample_min_size = vae.tile_latent_min_size * pipeline.vae_scale_factor
    return vae
