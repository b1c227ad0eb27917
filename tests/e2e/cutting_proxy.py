"""A TCP proxy whose connections a test cuts: at once, or when a reply is on its way."""

import contextlib
import socket
import threading


class CuttingProxy:
    def __init__(self, host, port):
        self.server = (host, port)  # may be changed: for connections from then on
        self.lose_after = None  # bytes of a request whose reply is lost, with its connection
        self.skip = 0  # how many such requests are answered first
        self.lost = 0  # replies
        self.sockets = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                try:
                    server = socket.create_connection(self.server, timeout=5)
                    server.settimeout(None)
                except OSError:
                    client.close()
                    continue
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.sockets.add(end)
                lose = threading.Event()
                threading.Thread(target=self.pump, args=(client, server, lose, True), daemon=True).start()
                threading.Thread(target=self.pump, args=(server, client, lose, False), daemon=True).start()

    def pump(self, source, target, lose, request):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if request and self.lose_after is not None and self.lose_after in data:
                    self.skip -= 1
                    if self.skip < 0:
                        self.lose_after, self.skip = None, 0
                        lose.set()
                elif not request and lose.is_set():
                    self.lost += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self.sockets.discard(end)

    def cut(self):
        """All connections, as they are."""
        for end in list(self.sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()
        self.cut()
