"""Composition: Hydra's overrides and files in, one checked config or all mistakes out."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from megatrain.cli.compose import Source, compose
from megatrain.config.errors import UserError
from megatrain.config.schema import ConfigError
from megatrain.optim.config import AdamWConfig, SGDConfig
from megatrain.train.config import Config

SHIPPED = Source()


def mistakes(*overrides: str, source: Source = SHIPPED) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides), source)
    return {problem.field: str(problem) for problem in caught.value.problems}


def own(directory: Path, **files: str) -> Source:
    """A user's config directory; `model__mine` is the file model/mine.yaml."""
    for name, text in files.items():
        path = directory / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Source(str(directory))


def test_no_override_gives_the_default_run() -> None:
    cfg = compose([])
    assert isinstance(cfg, Config)
    assert (cfg.model.vocab_size, cfg.data.tokenizer.vocab_size) == (2048, "auto")


def test_the_tokenizer_follows_the_model() -> None:
    assert compose(["model.vocab_size=777"]).data.tokenizer.vocab_size == "auto"
    assert compose(["model.vocab_size=777", "data.tokenizer.vocab_size=777"]).model.vocab_size == 777
    found = mistakes("data.tokenizer.vocab_size=777")
    assert "differs from model.vocab_size (2048)" in found["data.tokenizer.vocab_size"]
    found = mistakes("data.tokenizer.vocab_size=7777")
    assert "must be at least data.tokenizer.vocab_size (7777)" in found["model.vocab_size"]
    for kind in ("bytes", "huggingface"):  # ready-made tokenizers may be smaller
        compose([f"data.tokenizer.kind={kind}", "data.tokenizer.path=x", "data.tokenizer.vocab_size=777"])


def test_groups_values_lists_and_null() -> None:
    cfg = compose(
        [
            *(
                "optim=sgd",
                "optim.lr=1e-3",
                "schedule=wsd",
                "train.stop_at=null",
                "train.allow_changes=[model.*,'x']",
            ),
            *("++train.steps=2000", "optim.clip_norm=null", "model.rope_scaling={kind:yarn,factor:4}"),
        ]
    )
    assert cfg.optim == SGDConfig(lr=1e-3, clip_norm=None)
    assert (cfg.schedule.kind, cfg.train.steps, cfg.train.stop_at) == ("wsd", 2000, None)
    assert cfg.train.allow_changes == ("model.*", "x")
    assert cfg.model.rope_scaling is not None
    assert cfg.model.rope_scaling.factor == 4.0


def test_plain_gradient_descent_is_an_option() -> None:
    assert compose(["optim=gd"]).optim == SGDConfig(momentum=0.0)


@pytest.mark.parametrize("name", ["3", "1e3", "true", "007", "a=b", "x.y-z"])
def test_text_fields_take_what_looks_like_another_type(name: str) -> None:
    assert compose([f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    "path", ["my file (1).txt", "data/*.txt", "/tmp/it's.txt", "a{b}.txt", "C:\\x\\y.txt", "x~/y.txt"]
)
def test_paths_need_no_quoting_beyond_the_shells(path: str) -> None:
    assert compose(["data=text", f"data.path={path}"]).data.path == path


def test_four_mistakes_in_one_message() -> None:
    found = mistakes("train.stepz=3", "model=llama9", "model.n_heads=7", "model.head_dim=null", "+foo=1")
    assert set(found) == {"train.stepz", "model", "model.n_heads", "foo"}
    assert found["train.stepz"] == "train.stepz=3: there is no such key. Nearest legal: train.steps."
    assert "is not an option of the group model" in found["model"]
    assert "must divide hidden_size" in found["model.n_heads"]


@pytest.mark.parametrize(
    ("override", "field", "says"),
    [
        ("lr=3", "lr", "this key is called optim.lr"),
        ("optim.learning_rate=3", "optim.learning_rate", "this key is called optim.lr"),
        ("epochs=3", "epochs", "set train.steps"),
        ("optim.momentun=0.5", "optim.momentun", "there is no such key. Nearest legal: optim.momentum"),
        ("~optim", "~optim", "can't be removed"),
        ("~train.seed", "~train.seed", "can't be removed"),
        ("+recipe.lr=3", "+recipe.lr", "exists already; write recipe.lr=VALUE"),
        ("optim.clip_norm=0", "optim.clip_norm", "must be above 0. Nearest legal: null"),
        ("modle=small", "modle", "Nearest legal: model"),
        ("optim=adam", "optim", "Nearest legal: adamw"),
        ("+modle.x=3", "modle", "Nearest legal: model"),
        ("train.seed=1,2", "train.seed=1,2", "--multirun"),
        ("train.seed=range(3)", "train.seed=range(3)", "--multirun"),
        ("my.yaml", "my.yaml", "write key=value"),
        ("=3", "", "there is no such key"),
        ("hydra.run.dir=x", "hydra.run.dir=x", "run.dir"),
        ("hydra/launcher=basic", "hydra/launcher=basic", "--multirun"),
        (
            "model.rope_scaling.factor=4",
            "model.rope_scaling.factor",
            "write 'model.rope_scaling={factor:VALUE}'",
        ),
        ("schedule.decay_fraction=0.5", "schedule.decay_fraction", "schedule.kind is linear, which has no"),
        ("~train.stepz", "~train.stepz", "Nearest legal: train.steps"),
        ("+train.steps=3", "+train.steps", "exists already; write train.steps=VALUE"),
        ("train.steps=1e3", "train.steps", "must be an integer. Nearest legal: 1000"),
        ("train.precision=fp61", "train.precision", "one of auto, fp32, bf16, fp8, fp64"),
        ("parallel.tp=3", "parallel.tp", "must divide a rank"),
        ("log.project='x'", "log.project", "this key is called log.wandb_project"),
        ("data=text", "data.path", "must be given; write data.path=VALUE"),
        ("data.text_field=${data.nope}", "data.text_field", "'data.nope' not found"),
        ("train.seed=${oc.env:MEGATRAIN_NO_SUCH}", "train.seed", "MEGATRAIN_NO_SUCH"),
        ("train.seed=${train.steps", "train.seed=${train.steps", "write key=value"),
        ("model={n_headz:4}", "model.n_headz", "Nearest legal: model.n_heads"),
        ("recipe=null", "recipe", "to choose none, write ~recipe"),
        ("train.seed=-1", "train.seed", "must be at least 0. Nearest legal: 0"),
        (f"train.seed={2**63}", "train.seed", f"must fit in 63 bits. Nearest legal: {2**63 - 1}"),
        (f"train.steps={10**400}", "train.steps", "must fit in 63 bits"),
        (f"train.seed={'1' * 5000}", f"train.seed={'1' * 5000}", "write key=value"),
        (f"optim.lr={10**400}", "optim.lr", "must be finite"),
        ("train=3", "train", "is not an option of the group train. Nearest legal: default"),
        ("train.steps.more=3", "train.steps.more", "there is no such key"),
    ],
)
def test_each_kind_of_mistake_is_explained(override: str, field: str, says: str) -> None:
    found = mistakes(override)
    assert list(found) == [field]
    assert says in found[field]


def test_good_overrides_are_kept_beside_bad_ones() -> None:
    found = mistakes("optim=sgd", "optim.momentum=2", "train.stepz=1")
    assert set(found) == {"optim.momentum", "train.stepz"}
    assert "must be at least 0 and below 1" in found["optim.momentum"]


def test_hydras_global_state_is_restored() -> None:
    compose([])
    mistakes("x=1")
    assert not GlobalHydra.instance().is_initialized()


def test_own_directory_adds_options_and_wins_over_the_shipped(tmp_path: Path) -> None:
    source = own(
        tmp_path,
        model__mine="defaults: [base_llama3, _self_]\nn_layers: 2\nvocab_size: 5000\n",
        optim__adamw="defaults: [base_adamw, _self_]\nlr: 0.5\n",
        experiment__try="# @package _global_\ndefaults: [override /model: mine]\n"
        "train: {steps: 7}\nschedule: {warmup_steps: 1}\n",
    )
    cfg = compose(["experiment=try"], source)
    assert (cfg.model.kind, cfg.model.n_layers, cfg.train.steps) == ("llama3", 2, 7)
    assert cfg.optim == AdamWConfig(lr=0.5)


def test_another_primary_config(tmp_path: Path) -> None:
    own(tmp_path, alone="defaults: [base_run, {model: base_gpt2}, {optim: sgd}, _self_]\nseq_len: 32\n")
    cfg = compose([], Source(str(tmp_path), "alone"))
    assert (cfg.model.kind, cfg.optim.kind, cfg.seq_len) == ("gpt2", "sgd", 32)


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ("train: {stepz: 3}", "train.stepz", "Nearest legal: train.steps"),
        ("tarin: {steps: 3}", "tarin", "Nearest legal: train"),
        ("train: {steps: '3'}", "train.steps", "must be an integer"),
        ("train: [1", "experiment", "while parsing a flow sequence"),
        ("train: 3", "train", "must be a mapping"),
        ("defaults: [override /model: nope]", "experiment", "nope"),
    ],
)
def test_mistakes_in_a_users_file_are_named(tmp_path: Path, body: str, field: str, says: str) -> None:
    found = mistakes("experiment=bad", source=own(tmp_path, experiment__bad=f"# @package _global_\n{body}\n"))
    assert list(found) == [field]
    assert says in found[field]


@pytest.mark.parametrize("text", ["defaults: [base_run\n", "- 1\n", "defaults: [nothing_here]\n", "\x00"])
def test_a_broken_primary_config_is_one_message(tmp_path: Path, text: str) -> None:
    own(tmp_path, config=text)
    with pytest.raises(UserError, match="can't be composed") as caught:
        compose(["train.steps=3"], Source(str(tmp_path)))
    assert "Traceback" not in str(caught.value)


def test_missing_directory_or_config_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        compose([], Source(str(tmp_path / "none")))
    with pytest.raises(UserError, match="Cannot find primary config 'nope'"):
        compose([], Source(None, "nope"))


@pytest.mark.parametrize("text", ["{a}\\t{b}\\n", "it's", "\\'", "end\\", "a\\\\b", "'", "\\\\'x"])
def test_text_arrives_as_it_is_written(text: str) -> None:
    assert compose([f"data.cache_dir={{{text}"]).data.cache_dir == f"{{{text}"
