"""A process of a training run in float64, watched: `double.py FAMILY flags`. Runs then compare to 1e-6.

It writes `rank-N.json` into the working directory, also where the run is interrupted: the prompts and the
noise that this process sampled, how many batches, and how much of each network it holds. WATCH_KILL_AT is the
step before which it is killed, WATCH_SIGNAL_AT the number of the batch in which the first process alone gets
a SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path

import diffusers.training_utils
import torch


sys.path.insert(0, str(Path(__file__).parent))
from conftest import load_family  # noqa: E402


def main():
    torch.set_default_dtype(torch.float64)
    script, family = load_family(sys.argv[1])
    seen = {"prompts": [], "noise": [], "batches": 0, "held": {}}

    def watch(owner, name):
        """The owner's function is replaced by what decorates it."""
        return lambda make: setattr(owner, name, make(getattr(owner, name)))

    @watch(script, "cast")
    def wide(cast):
        return lambda module, dtype: cast(module, torch.float64 if dtype == torch.float32 else dtype)

    @watch(diffusers.training_utils, "cast_training_params")  # before utils/lora.py is read
    def wide_loras(cast):
        return lambda base, dtype: cast(base, dtype=torch.float64)

    @watch(script, "sample_noise")
    def noted(sample_noise):
        def sample(seed, stream, *given):
            noise = sample_noise(seed, stream, *given)
            if stream != "validation":  # which is padded to whole batches
                seen["noise"] += [[name, *one.flatten()[:2].tolist()]
                                  for name, batch in zip("zn", noise) for one in batch]
            return noise
        return sample

    @watch(script, "encode")
    def signalled(encode):
        def run(*given, **more):
            seen["batches"] += 1
            if seen["batches"] == int(os.environ.get("WATCH_SIGNAL_AT", 0)) and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            return encode(*given, **more)
        return run

    @watch(script.Prompts, "at")
    def read(at):
        def read(prompts, position):
            seen["prompts"].append([position, at(prompts, position)])
            return seen["prompts"][-1][1]
        return read

    @watch(script, "train_step")
    def killed(train_step):
        def step(run):
            for name in ("reference", "assistant", "generator"):
                parameters = list(getattr(run.models, name).parameters())
                local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
                seen["held"][name] = [type(parameters[0].data).__name__, sum(p.numel() for p in local),
                                      sum(p.numel() for p in parameters)]
            if run.step + 1 == int(os.environ.get("WATCH_KILL_AT", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(run)
        return step

    try:
        script.main(family, script.parse_args(family, sys.argv[2:]))
    finally:
        Path(f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
