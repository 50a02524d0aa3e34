"""`python -m tbrm_trl.actor OUTPUT_DIR`: see the package."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tbrm_trl.actor", description="Draw rollouts beside a run.")
    parser.add_argument("output_dir", type=Path, help="Output directory of the run.")
    parser.add_argument("--server", help="Address of the server; by default the run's async_server.")
    parser.add_argument("--concurrency", type=int, default=64, help="Requests at the server at once.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = command_line()
    given = parser.parse_args(arguments)
    if given.concurrency < 1:
        parser.error(f"--concurrency {given.concurrency}: it must be 1 or more.")
    from .child import PARENT

    if PARENT in os.environ:
        threading.Thread(target=end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    import torch

    from ..resume.folder_lock import FolderLock
    from .plan import FOLDER
    from .work import Actor, describe

    torch.set_num_threads(1)
    lock = FolderLock(given.output_dir / FOLDER)
    actor = None
    try:
        lock.acquire()
        actor = Actor(given.output_dir, given.server, given.concurrency, say)
        actor.run()
    except (Exception, SystemExit) as error:  # a function of the user's may have called sys.exit
        say(describe(error, draws=actor is not None))
        return 1
    finally:
        lock.release()
    return 0


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def end_with(parent: int) -> None:
    """Kill this process and the processes it started as soon as `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)  # the run made this process the leader of its own group


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # does not wait for threads that are still in a request
