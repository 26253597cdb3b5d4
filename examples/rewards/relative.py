# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
"""Relative reward: a reward's score for a praised version of the prompt, against a blamed version.

    accelerate launch train_diff_instruct_star_sdxl.py --reward examples.rewards.relative:build=500 ...

Equation (10) of SRPO (arXiv 2509.06942), for any reward r that reads a prompt c: k r(x, praise + c) + (1 - k)
r(x, blame + c). At k = 1 the blamed prompt has no effect; above 1 the image moves away from it, as with
guidance, while the part of r that ignores the prompt counts once. `build` uses HPSv2.1 with that paper's
words at k = 2; your own module with other words needs one function:

    def build():
        return Relative(load_reward("pickscore"), praise="A photo of {}", blame="A sketch of {}", k=2)
"""

import sys
from pathlib import Path

import torch


sys.path.append(str(Path(__file__).resolve().parents[2]))
from utils.rewards import load_reward


class Relative(torch.nn.Module):
    """Compute k r(x, praise) + (1 - k) r(x, blame); `praise` and `blame` contain {} for the prompt."""

    def __init__(self, reward, praise, blame, k):
        super().__init__()
        self.reward, self.praise, self.blame, self.k = reward, praise, blame, k

    def forward(self, images, prompts):
        """Score images (batch, 3, H, W) in [0, 1] with their prompts, differentiably; returns (batch,)."""
        praised, blamed = (self.reward(images, [words.format(prompt) for prompt in prompts])
                           for words in (self.praise, self.blame))
        return self.k * praised + (1 - self.k) * blamed


def build():
    return Relative(load_reward("hpsv2.1"), praise="Realistic photo. {}", blame="CG Render. {}", k=2)
