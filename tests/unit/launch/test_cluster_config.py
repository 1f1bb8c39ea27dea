"""Descriptions of clusters, their files, and the flags of the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.cli.launch_flags import flags_of, read_cluster
from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.config.schema import ConfigError
from megatrain.launch.config import CLUSTERS, SlurmCluster, limit_minutes

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("1:30", 1.5), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-0:0:30", 1440.5),
        ("soon", None), ("1:2:3:4", None), ("", None),
    ],
)  # fmt: skip
def test_time_limits(text: str, minutes: float | None) -> None:
    assert limit_minutes(text) == minutes


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf" / "cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_loads(path: Path) -> None:
    given: dict[str, object] = {}
    assert read_cluster(path.stem, path.stem, given, None).kind == path.stem
    with pytest.raises(UserError, match="but this is"):
        read_cluster("local", str(path), given, None)


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("slurm", {"time": "4", "signal_s": 300}, "signal_s=300: must be less than the time limit"),
        ("slurm", {"gpus_per_node": 2, "processes_per_node": 4}, "two processes can't share"),
        ("slurm", {"env": ["lower case"]}, "must be NAME=VALUE"),
        ("slurm", {"venv": "/a", "container": "b"}, "has a Python of its own"),
        ("slurm", {"partitions": "x"}, "Nearest legal: partition"),
        ("torchrun", {"nodes": 2}, "master_addr=null: must be given"),
        ("ssh", {}, "must name the hosts"),
        ("ssh", {"hosts": "a,b,a"}, "must not name a host twice"),
        ("k8s", {}, "must name the image"),
    ],
)
def test_mistakes(kind: str, data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + says.replace("(", r"\(")):
        load(CLUSTERS[kind], data | {"kind": kind})


def test_a_flag_wins_over_the_file_and_lists_are_added(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("kind: slurm\npartition: a\nenv: [A=1]\nnodes: 3\n")
    words = (
        "--cluster mine --partition b --env B=2 --env C=3,4 --no-exclusive --gpus-per-node 4 optim.lr=1 -m"
    )
    flags, given, rest = flags_of("slurm", words.split())
    found = read_cluster("slurm", flags.cluster, given, str(tmp_path))
    assert found == SlurmCluster(
        partition="b", env=("A=1", "B=2", "C=3,4"), nodes=3, exclusive=False, gpus_per_node=4
    )
    assert rest == ["optim.lr=1", "-m"]


def test_a_missing_file_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"no such file. Did you mean slurm\? Known: k8s, slurm, ssh, torchrun"
    ):
        read_cluster("slurm", "slurn", {}, None)


def test_clusters_are_no_part_of_a_runs_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cluster=slurm", "--cfg", "job"]) == 2
    assert "cluster" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "cluster" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train.stepz=3",), "there is no such key"),
        (("parallel.tp=3",), "parallel.tp=3"),
        (("parallel.dp_shard=2",), "start 8, but the layout (dp_shard=2) needs 2"),
        (("parallel.dp_shard=-1", "global_batch_size=3", "micro_batch_size=1"), "global_batch_size=3"),
        (("--time", "soon"), "time=soon: must be minutes"),
        (("--tyme", "1"), "unrecognized arguments: --tyme"),
        (("--chain", "0"), "must be an integer of at least 1"),
        (("-m", "train.seed=0,1", "--chain", "2"), "--chain is for one run"),
        (
            ("train.resume=must", "parallel.dp_shard=8", "global_batch_size=8"),
            "has no checkpoint to resume from",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", "--nodes", "1", *words]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from megatrain.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("slurm", ("--nodes", "2")),
        ("slurm", ("--nodes", "2", "-m", "train.seed=0,1")),
        ("ssh", ("--hosts", "a,b")),
        ("torchrun", ("--nodes", "2", "--master-addr", "a")),
        ("k8s", ("--nodes", "2", "--container", "image", "--volume", "claim")),
    ],
)
def test_a_login_node_needs_no_torch(kind: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    words = ("--dry-run", "parallel.dp_shard=-1", "global_batch_size=32")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "launch", kind, *flags, *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "parallel.dp_shard=-1" in done.stdout
    assert list(tmp_path.iterdir()) == []
