"""``limit.py SECONDS COMMAND...``: run a command; after a timeout end it and all its children, with exit code 124."""

import os
import signal
import subprocess
import sys


def main() -> int:
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, _: object) -> None:
        os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"limit: {' '.join(command)} took longer than {seconds:g} s and was ended", file=sys.stderr)
    # SIGTERM first: mpirun then ends its ranks, which have process groups of their own.
    for number, grace in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        try:
            process.wait(grace)
            break
        except subprocess.TimeoutExpired:
            continue
    return 124


if __name__ == "__main__":
    sys.exit(main())
