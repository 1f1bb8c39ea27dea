"""The table of verbs. A verb is one file, `cli/<name>.py`, with `run(argv) -> exit code`."""

from dataclasses import dataclass
from importlib import import_module
from keyword import iskeyword


@dataclass(frozen=True, slots=True)
class Verb:
    """What `megatrain <name>` does."""

    name: str
    summary: str
    """One line for the list of verbs."""
    usage: str
    """What follows the verb on the command line."""
    examples: tuple[tuple[str, str], ...]
    """Three command lines, each with what it does."""
    takes_config: bool
    """It takes Hydra overrides, and the flags of `cli/options.py`."""
    flags: tuple[tuple[str, str], ...] = ()
    """Its own flags, each with what it does."""

    def run(self, argv: list[str]) -> int:
        """Run the verb; returns the process's exit code."""
        module = f"{self.name}_" if iskeyword(self.name) else self.name
        return int(import_module(f"megatrain.cli.{module}").run(argv))


VERBS = (
    Verb(
        name="train",
        summary="train a model; alone, a small GPT on the Python source found on this machine",
        usage="[group=option] [key=value] [flags]",
        examples=(
            (
                "megatrain train data.path=my.txt run.name=mine train.steps=2000",
                "your own text; again: resume it",
            ),
            (
                "megatrain train parallel.dp_shard=2 parallel.tp=2",
                "four processes on this machine; on several: torchrun ... -m megatrain train ...",
            ),
            (
                "megatrain train -m run.name=lr optim.lr=1e-3,3e-3 train.seed=0,1",
                "a sweep: four runs, one after another",
            ),
        ),
        takes_config=True,
    ),
    Verb(
        name="generate",
        summary="continue a text with the model of a run",
        usage="RUN [PROMPT] [flags]",
        examples=(
            (
                'megatrain generate runs/default "def main("',
                "go on from a prompt with the run's last checkpoint",
            ),
            ('megatrain generate runs/default "import " --temperature 0', "the likeliest token every time"),
            (
                "megatrain generate runs/default --tokens 500 --seed 7",
                "without a prompt, longer, with another seed",
            ),
        ),
        takes_config=False,
        flags=(
            ("--tokens N", "most tokens to generate; default: 200"),
            ("--temperature T", "sampling temperature; 0: always the likeliest token; default: 0.8"),
            ("--top-k K", "sample from the K likeliest tokens; default: all"),
            ("--seed N", "seed of the sampling; default: 0"),
        ),
    ),
    Verb(
        name="export",
        summary="export a run's model as a Hugging Face directory (config.json, safetensors, tokenizer)",
        usage="RUN DIRECTORY [flags]",
        examples=(
            (
                "megatrain export runs/default exported",
                "config, weights and tokenizer of the last checkpoint",
            ),
            ("megatrain export runs/default exported --check", "and compare logits with transformers"),
            ("megatrain export runs/mine mine-bf16 --dtype bf16 --shard-gb 2", "smaller, in several files"),
        ),
        takes_config=False,
        flags=(
            ("--dtype TYPE", "fp32, bf16 or fp16; default: fp32"),
            ("--average", "export the moving average of the weights (train.ema_decay)"),
            ("--shard-gb GB", "size of a file; default: 5"),
            ("--check", "load it with transformers and print the largest difference of logits"),
        ),
    ),
    Verb(
        name="import",
        summary="import a Hugging Face directory as a run, to generate from, train on and export",
        usage="DIRECTORY run.name=NAME [run.dir=DIR] [--check]",
        examples=(
            (
                "megatrain import Llama-3.2-1B run.name=llama",
                "config.json, safetensors and tokenizer of a directory",
            ),
            ("megatrain import gpt2 run.name=gpt2 --check", "and compare logits with transformers"),
            (
                "megatrain import gpt2 run.name=tuned && megatrain train run.name=tuned data.path=my.txt seq_len=512",
                "and train on, with the recipe `imported` (recipe=... for another)",
            ),
        ),
        takes_config=False,
        flags=(("--check", "load it with transformers and print the largest difference of logits"),),
    ),
    Verb(
        name="bench",
        summary="measure how fast a config trains on this machine, and where a step's time goes",
        usage="[group=option] [key=value] [flags]",
        examples=(
            ("megatrain bench", "the default config on its own data"),
            (
                "megatrain bench data=synthetic model=gpt2_124m seq_len=512 --steps 5",
                "a model preset on random tokens",
            ),
            ("megatrain bench train.precision=fp32 --json", "float32, for programs"),
        ),
        takes_config=True,
        flags=(
            ("--steps N", "steps to measure, after three of warm-up; default: 20"),
            ("--json", "print one JSON object instead of a table"),
        ),
    ),
    Verb(
        name="verify",
        summary="check on the CPU that your layout, and a list of others, match a single process",
        usage="[group=option] [key=value] [flags]",
        examples=(
            ("megatrain verify", "the default config, made small, in a list of layouts"),
            (
                "megatrain verify model=llama3_70b parallel.tp=4 parallel.pp=2",
                "your layout as well, up to 8 processes",
            ),
            ("megatrain verify --fault dropped_reduction", "inject an error and see that it is caught"),
        ),
        takes_config=True,
        flags=(("--fault NAME", "inject an error: dropped_reduction or doubled_tokens"),),
    ),
    Verb(
        name="doctor",
        summary="report this machine's hardware and software, what is missing for which feature, and how to get it",
        usage="[--json]",
        examples=(
            ("megatrain doctor", "a table of versions, devices, memory, compiler, network, paths, features"),
            ("megatrain doctor --json", "the same for programs"),
            ("megatrain doctor --json | grep -A9 cuda", "look for one part"),
        ),
        takes_config=False,
        flags=(("--json", "print one JSON object instead of a table"),),
    ),
)


def find_verb(name: str) -> Verb | None:
    """Return the verb of that name, if there is one."""
    return next((verb for verb in VERBS if verb.name == name), None)
