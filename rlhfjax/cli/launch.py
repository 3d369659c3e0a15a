"""Several processes on one machine, as if each had a machine of its own.

python -m rlhfjax.cli.launch --processes 2 --devices 4 -- experiments/sentiment.py --out runs/x
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from rlhfjax.cli.processes import ADDRESS, COUNT, INDEX

HOST = "127.0.0.1"


def launch(command: Sequence[str], *, processes: int, devices: int) -> int:
    """Runs a Python script in several processes that know of one another.

    SIGTERM and SIGINT are handed on as SIGTERM, at which a run saves. When a process dies the
    others are left to find out, as they would on machines of their own.

    Args:
      command: the script with its arguments.
      processes: how many.
      devices: virtual CPU devices of each.

    Returns:
      0, or the exit status of the first process that did not end with 0; negative for a signal.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = f"{HOST}:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    common = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, ADDRESS: address, COUNT: str(processes)}
    running: list[subprocess.Popen[bytes]] = []

    def hand_on(*_: object) -> None:
        for process in running:
            process.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for index in range(processes):
            environment = os.environ | common | {INDEX: str(index)}
            running.append(
                subprocess.Popen(
                    [sys.executable, *command], env=environment, start_new_session=True
                )
            )
        statuses = [process.wait() for process in running]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return next((status for status in statuses if status), 0)


def main() -> None:
    """The command line of `launch`."""
    parser = argparse.ArgumentParser(
        description="Runs a Python script in several processes that know of one another."
    )
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices of each")
    parser.add_argument("command", nargs="+", help="a Python script and its arguments, after --")
    args = parser.parse_args()
    status = launch(args.command, processes=args.processes, devices=args.devices)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
