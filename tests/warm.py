"""A process that has imported the libraries and forks for each command, so that a test need not import them.

It is started once by `conftest.warm` and reads one JSON line for each request: a list of commands, which it
runs beside each other, {"argv": [...], "cwd": ..., "env": {...}, "stdout": path, "stderr": path}. It answers
with the list of exit statuses. It never runs autograd itself, which PyTorch does not take along into a fork.
"""

import json
import os
import runpy
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent)]
import conftest  # noqa: E402, F401


def run(command):
    """One command in a forked process; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(command["cwd"])
        os.environ |= command["env"]
        sys.argv = command["argv"]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    for name in ("train_diff_instruct_star_sd15", "eval_benchmarks"):
        conftest.load_script(name)
    for line in sys.stdin:
        processes = [run(command) for command in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main()
