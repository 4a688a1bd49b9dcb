"""A slow link between two containers: link.py PID IP PID IP --mbit 100 --ms 25.

The network namespace of each of the two processes gets an interface with its IP and a
route to the other. This process forwards the packets, at up to --mbit each way and with
a delay of --ms. Like a router, it drops packets that do not fit its queue. (`tc netem`
would do the same, but not every kernel has it.)
"""

import argparse
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
QUEUE_BYTES = 2_000_000
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(pid: str) -> None:
    with open(f"/proc/{pid}/ns/net") as namespace:
        if _libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to that of {pid}")


def open_end(pid: str, ip: str, other: str) -> int:
    """Create an interface in a process's namespace; return its file descriptor."""
    # The name is unique, since one namespace may have several links.
    name = "link" + other.rpartition(".")[0].rpartition(".")[2]
    _enter(pid)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(device, TUNSETIFF, request)
    for command in (
        f"ip address add {ip} peer {other} dev {name}",
        f"ip link set dev {name} up",
    ):
        subprocess.run(command.split(), check=True)
    return device


def carry(one: int, other: int, rate: float, delay: float) -> None:
    """Forward packets between two devices, forever."""
    towards = {one: other, other: one}
    # For each source: packets with their time of arrival, and when its line is free.
    queues: dict[int, deque[tuple[float, bytes]]] = {one: deque(), other: deque()}
    free = {one: 0.0, other: 0.0}
    while True:
        due = min((q[0][0] for q in queues.values() if q), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([one, other], [], [], wait)
        now = time.monotonic()
        for source in ready:
            for _ in range(64):
                try:
                    packet = os.read(source, 65536)
                except BlockingIOError:
                    break
                begin = max(now, free[source])
                if (begin - now) * rate <= QUEUE_BYTES:
                    free[source] = begin + len(packet) / rate
                    queues[source].append((free[source] + delay, packet))
        now = time.monotonic()
        for source, queue in queues.items():
            while queue and queue[0][0] <= now:
                os.write(towards[source], queue.popleft()[1])


def main() -> None:
    """Parse the arguments, open both ends, and forward packets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", nargs=4, metavar="PID IP")
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--ms", type=float, default=25, help="one way")
    args = parser.parse_args()
    pid, ip, other_pid, other_ip = args.ends
    one = open_end(pid, ip, other_ip)
    other = open_end(other_pid, other_ip, ip)
    print("carrying", flush=True)
    carry(one, other, args.mbit * 1e6 / 8, args.ms / 1e3)


if __name__ == "__main__":
    main()
