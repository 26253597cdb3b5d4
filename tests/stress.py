"""Kill training runs at random moments, resume them with the same command, compare them with runs left alone.

    python tests/stress.py --kills 50 --seed 0    # make stress

For each of both scripts, all weights and LoRAs: a run on the tests' tiny models, with a checkpoint at every
step, is killed (SIGKILL) `--kills` times, every second time inside the write of a checkpoint, and then goes
on to its end. No whole checkpoint may be lost on the way, and weights and logs must equal the other run's to
the bit. The run is forked from a process that has imported the libraries, all that it does not repeat.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from conftest import assert_same, load_script, metrics, tiny_clip, tiny_pipeline, tiny_unet  # noqa: E402


LIMIT = 3  # checkpoints that a run keeps
VARIANTS = {"full": ["--use_ema"],
            "lora": ["--generator_lora_rank=3", "--assistant_lora_rank=2", "--shared_base"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--families", nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    return parser.parse_args()


def start(script, flags, log):
    """A training run in a forked process; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            script.main(script.FAMILY, script.parse_args(script.FAMILY, flags))
            code = 0
        finally:
            file.flush()
            os._exit(code)


def ended(process):
    return os.waitpid(process, os.WNOHANG)[0] == process


def whole(folder):
    """The steps of the whole checkpoints."""
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/state.json"))


def writing(folder):
    """Checkpoints being written, by name and inode."""
    with os.scandir(folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith("unfinished-")}


def kill_at_random(process, folder, inside, moments):
    """Kill a run after a random time, or within the write of one of its next checkpoints.

    False if it ended by itself.
    """
    before = writing(folder)
    if inside:
        for _ in range(moments.randint(1, 3)):
            while not writing(folder) - before:
                if ended(process):
                    return False
            before |= writing(folder)
        time.sleep(moments.uniform(0, 0.004))
    else:
        until = time.monotonic() + moments.uniform(0.05, 1.5)
        while time.monotonic() < until:
            if ended(process):
                return False
            time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def stress(script, flags, folder, kills, moments):
    """Returns how many of the kills left a checkpoint half written."""
    done, inside = 0, 0
    log = folder.with_suffix(".log")
    folder.mkdir()
    while done < kills:
        found, begun = whole(folder), writing(folder)
        process = start(script, flags, log)
        assert kill_at_random(process, folder, done % 2, moments), (
            f"the run ended by itself after {done} kills, see the end of its log: {log.read_text()[-1500:]}")
        done += 1
        inside += bool(writing(folder) - begun)
        after = whole(folder)
        kept = min(len(found), LIMIT)  # killed before it dropped the oldest, a run has one more for a time
        assert after[-1:] >= found[-1:] and len(after) >= kept, f"{found} became {after}"
    process = start(script, flags, log)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, log.read_text()[-1500:]
    return inside


def main():
    args = parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        clip = tiny_clip(root / "clip")
        (root / "prompts.txt").write_text("\n".join(f"prompt number {index}" for index in range(13)))
        for family, variant in itertools.product(args.families, args.variants):
            script = load_script(f"train_diff_instruct_star_{family}")
            models = root / family
            if not models.exists():
                tiny_unet(family).save_pretrained(models / "unet")
                tiny_pipeline(models / "pipeline", clip, family=family)
            given = [f"--pretrained_model_name_or_path={models / 'pipeline'}", "--resolution=16",
                     f"--reward_model_name_or_path={clip}", f"--prompts_file={root / 'prompts.txt'}",
                     "--train_batch_size=1", "--learning_rate=1e-3", "--logging_steps=1",
                     "--checkpointing_steps=1", f"--checkpoints_total_limit={LIMIT}", "--mixed_precision=no",
                     "--generator_init=" + ("reference" if variant == "lora" else str(models / "unet")),
                     f"--max_train_steps={25 * args.kills}", "--resume_from_checkpoint=latest",
                     *VARIANTS[variant]]
            folders = [root / f"{family}-{variant}-{kind}" for kind in ("killed", "alone")]
            inside = stress(script, [*given, f"--output_dir={folders[0]}"], folders[0], args.kills, moments)
            process = start(script, [*given, f"--output_dir={folders[1]}"], folders[1].with_suffix(".log"))
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
            compare(*folders)
            print(f"{family} {variant}: killed {args.kills} times, {inside} of them inside a checkpoint's"
                  " write; equal to the run left alone", flush=True)
            assert inside >= args.kills // 5, "too few kills inside a write"


def compare(killed, alone):
    from safetensors.torch import load_file

    files = sorted(path.relative_to(alone) for path in alone.rglob("*.safetensors"))
    others = sorted(path.relative_to(killed) for path in killed.rglob("*.safetensors"))
    assert files and files == others, f"{files} and {others}"
    for path in files:
        assert_same(load_file(killed / path), load_file(alone / path))
    assert metrics(killed) == metrics(alone)


if __name__ == "__main__":
    main()
