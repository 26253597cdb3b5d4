# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""A reward made of another: what it says of the prompt with words of praise, against words of blame.

    accelerate launch train_diff_instruct_star_sdxl.py --reward examples.rewards.relative:build=500 ...

(10) of SRPO (arXiv 2509.06942) for any reward that reads a prompt: k r(x, praise + c) + (1 - k) r(x, blame +
c). At k = 1 the blame has no say; above 1 it is what the image moves away from, as with guidance, and what r
says of an image whatever the prompt counts once. `build` is HPSv2.1 with words of that paper at k = 2; a
module of your own with other words needs one line:

    def build():
        return Relative(load_reward("pickscore"), praise="A photo of {}", blame="A sketch of {}", k=2)
"""

import sys
from pathlib import Path

import torch


sys.path.append(str(Path(__file__).resolve().parents[2]))
from utils.rewards import load_reward


class Relative(torch.nn.Module):
    """k r(x, praise) + (1 - k) r(x, blame) of a reward r; `praise` and `blame` hold {} for the prompt."""

    def __init__(self, reward, praise, blame, k):
        super().__init__()
        self.reward, self.praise, self.blame, self.k = reward, praise, blame, k

    def forward(self, images, prompts):
        """images (batch, 3, H, W) in [0, 1], prompts -> (batch,), differentiable in the images."""
        praised, blamed = (self.reward(images, [words.format(prompt) for prompt in prompts])
                           for words in (self.praise, self.blame))
        return self.k * praised + (1 - self.k) * blamed


def build():
    return Relative(load_reward("hpsv2.1"), praise="Realistic photo. {}", blame="CG Render. {}", k=2)
