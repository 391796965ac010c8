"""A switch in user space that delays every Ethernet frame: ``switch.py SECONDS PORT...``

It ends with its standard input. Large frames cross whole (PACKET_VNET_HDR), as the sending TCP made them, so that a few
thousand a second fill a gigabit.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
ETH_P_ALL = 3
HEADER = 10  # bytes of struct virtio_net_hdr before the frame
BUFFER = 32 * 2**20
LONGEST = 70_000


def open_port(port: str) -> socket.socket:
    port_socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port_socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port_socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port_socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    port_socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    port_socket.setblocking(False)
    port_socket.bind((port, ETH_P_ALL))
    return port_socket


def switch(delay_s: float, ports: list[socket.socket], until: int) -> None:
    """Carry frames between the ports until something can be read from the file ``until``."""
    by_number = {port.fileno(): port for port in ports}
    behind: dict[bytes, socket.socket] = {}  # the port of each address that was seen
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([until, *by_number], [], [], patience)
        if until in readable:
            return
        for port in (by_number[number] for number in readable):
            with contextlib.suppress(OSError):  # nothing more to read, or the host is gone
                for _ in range(8):  # then the other ports have their turn
                    frame = port.recv(LONGEST)
                    due = time.monotonic() + delay_s
                    to, sender = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
                    behind[sender] = port
                    targets = [behind[to]] if to in behind else [other for other in ports if other is not port]
                    waiting.extend((due, target, frame) for target in targets)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # a full queue or a host that is gone: the frame is lost
                target.send(frame)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # so that ranks that compute do not delay frames
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    sockets = [open_port(port) for port in sys.argv[2:]]
    print("ready", flush=True)
    switch(float(sys.argv[1]), sockets, sys.stdin.fileno())
