"""A real server, and a channel of a Python client to it, over stubs made from the protos.

Importing it exits with 77 (skipped) where grpcio-tools is not installed.
"""

import argparse
import contextlib
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

try:
    import grpc
    from grpc_tools import protoc
except ImportError as error:
    print(f"SKIPPED: needs grpcio and grpcio-tools: {error}")
    sys.exit(77)

PROTOS = [
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
    "grpc/health/v1/health.proto",
    "mmfree/v1/inference.proto",
    "mmfree/v1/model.proto",
    "mmfree/v1/session.proto",
]


def _make_stubs(protos, out):
    # The well-known types of protobuf come with grpcio-tools.
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{protos}", f"-I{include}", f"--python_out={out}"]
    assert protoc.main(arguments + PROTOS) == 0
    # gRPC's Python packages own the names google.* and grpc.*; only ours get stubs.
    ours = [name for name in PROTOS if name.startswith("mmfree/")]
    assert protoc.main(arguments + [f"--grpc_python_out={out}"] + ours) == 0
    # Generated modules live in packages that exist already; look there too.
    import google
    google.__path__.append(str(pathlib.Path(out) / "google"))
    grpc.__path__.append(str(pathlib.Path(out) / "grpc"))
    sys.path.insert(0, str(out))


def _start_server(program, model, directory, more):
    ports = pathlib.Path(directory) / "ports"
    process = subprocess.Popen([
        program, f"--model={model}", "--backend=cpu", "--listen=127.0.0.1:0",
        "--metrics_listen=127.0.0.1:0", f"--port_file={ports}", *more
    ])
    deadline = time.monotonic() + 240
    while not ports.exists():
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server does not serve"
        time.sleep(0.01)
    return process, dict(line.split("=") for line in ports.read_text().split())


class Server:
    """A running server: its channel, its command line's flags, its metrics."""

    def __init__(self, channel, flags, metrics_port):
        self.channel = channel
        self.flags = flags
        self._metrics_port = metrics_port

    def metric(self, name):
        """The sum of a metric's series."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics") as page:
            lines = page.read().decode().splitlines()
        series = [line for line in lines if re.match(re.escape(name) + r"[ {]", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in series)


@contextlib.contextmanager
def start(description, add_arguments=lambda parser: None):
    """A server started as the command line says; it must end well on SIGTERM."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the mmfree-server program")
    parser.add_argument("--protos", required=True, help="the folder of the protos")
    parser.add_argument("--model", required=True, help="the model's directory")
    parser.add_argument("--server_flag", action="append", default=[], help="for it; may be repeated")
    add_arguments(parser)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        _make_stubs(flags.protos, directory)
        server, ports = _start_server(flags.server, flags.model, directory, flags.server_flag)
        try:
            with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel:
                yield Server(channel, flags, ports["metrics"])
            server.send_signal(signal.SIGTERM)
            assert server.wait(240) == 0
        finally:
            server.kill()
            server.wait()


@contextlib.contextmanager
def connect(description):
    """The channel alone."""
    with start(description) as server:
        yield server.channel
