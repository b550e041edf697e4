"""``nas`` in two processes with the environment that torchrun gives them, which import the libraries once together.

    python tests/two_processes.py train …

In this way they start in half the time that torchrun takes. Where one fails, the other is killed.
"""

import importlib
import os
import signal
import socket
import sys

LIBRARIES = ("pandas", "scipy.stats", "torch.distributed.checkpoint", "torch.distributed.fsdp")


def main(words: list[str]) -> int:
    for library in LIBRARIES:
        importlib.import_module(library)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = set[int]()
    for rank in ("0", "1"):
        if process := os.fork():
            processes.add(process)
            continue
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        from nas import cli  # asks for its rank when it is imported

        return cli.main(words)
    while processes:
        ended, status = os.wait()
        processes.remove(ended)
        if status:
            for other in processes:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
