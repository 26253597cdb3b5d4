"""Compare scoring speed: this repository's rewards in batches against the packages hpsv2 and image-reward.

    python examples/benchmark_rewards.py                    # official weights from the hub
    python examples/benchmark_rewards.py --random_weights   # random weights of the same size, without the hub

Four ways from PIL images to scores are timed: the package as in its README (hpsv2.score, which reads its
weights at every call), the package with its weights loaded once, ours image by image, and ours in batches.
They take turns for `--rounds` rounds; figures are medians. Our scores are compared with the package's.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from utils.cli import Parser, positive_int


CACHE = tempfile.TemporaryDirectory()  # hub cache of --random_weights


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--rewards", nargs="+", default=["hpsv2.1", "imagereward"], choices=["hpsv2.1", "imagereward"],
        help="Rewards to measure.")
    add("--images", type=positive_int, default=16, help="Number of images to score.")
    add("--size", type=positive_int, default=1024, help="Height and width of the images, in pixels.")
    add("--batch_size", type=positive_int, default=16, help="Images per batch of ours.")
    add("--rounds", type=positive_int, default=3, help="Rounds to measure.")
    add("--random_weights", action="store_true", help="Use models of the real size with random weights.")
    return parser.parse_args()


ARGS = parse_args()
if ARGS.random_weights:  # written where the hub's client looks for the official ones
    os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1"}

import hpsv2
import torch
import transformers
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from official_models import write_hps, write_imagereward
from utils.official import load_official
from utils.rewards import load_reward


def ways(name, args, device, dtype):
    """Return {name of a way: function of images and prompts that returns a list of scores}."""
    ours, package = load_reward(name, dtype).to(device), load_official(name)

    def batched(images, prompts, size=args.batch_size):
        scores = []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            tensors = torch.stack([pil_to_tensor(image) for image in images[part]]).to(device) / 255
            scores.append(ours(tensors, prompts[part]))
        return torch.cat(scores).tolist()

    def one_by_one(images, prompts):
        return [package.score(*pair) for pair in zip(images, prompts)]

    def as_in_its_readme(images, prompts):
        return [100 * hpsv2.score(image, prompt, hps_version=name.replace("hpsv", "v"))[0]
                for image, prompt in zip(images, prompts)]

    found = {"package as in its README": as_in_its_readme} if name.startswith("hps") else {}
    return found | {"package, weights loaded once": one_by_one,
                    "ours, image by image": lambda *given: batched(*given, size=1),
                    f"ours, batches of {args.batch_size}": batched}


def measure(name, args, images, prompts, device, dtype):
    functions = ways(name, args, device, dtype)
    seconds, scores = {way: [] for way in functions}, {}
    for function in functions.values():
        function(images[:args.batch_size], prompts[:args.batch_size])  # warm-up
    for _ in range(args.rounds):
        for way, function in functions.items():
            started = time.perf_counter()
            scores[way] = function(images, prompts)  # Python numbers, so the device has finished
            seconds[way].append(time.perf_counter() - started)
    once, batched = list(functions)[-3], list(functions)[-1]
    base = statistics.median(seconds[once])
    for way, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:12} {way:30} {args.images / median:8.2f} images/s {base / median:7.2f} x")
    apart = max(abs(one - other) for one, other in zip(scores[once], scores[batched]))
    print(f"{name:12} largest difference between our scores and the package's: {apart:.1e}")


@torch.no_grad()
def main(args):
    if args.random_weights:
        write_hps(0)
        write_imagereward(0)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)  # hpsv2 uses float16 on a GPU
    kind = torch.cuda.get_device_name() if cuda else f"CPU with {torch.get_num_threads()} threads"
    print(f"{kind}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__};"
          f" {args.images} images of {args.size} x {args.size}, medians of {args.rounds}")
    generator = torch.Generator().manual_seed(0)
    images = [to_pil_image(torch.rand(3, args.size, args.size, generator=generator))
              for _ in range(args.images)]
    prompts = [f"a photo of {index} red cats on a wooden table" for index in range(args.images)]
    for name in args.rewards:
        measure(name, args, images, prompts, device, dtype)


if __name__ == "__main__":
    main(ARGS)
