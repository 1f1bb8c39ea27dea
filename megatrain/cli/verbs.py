"""The table of verbs. A verb is one file, `cli/<name>.py`, with `run(argv) -> exit code`."""

from megatrain.cli.verb import Verb
from megatrain.cli.verbs_of_models import AVERAGE, COMPRESS, EVALUATE, FEDERATE, GENERATE, SERVE
from megatrain.cli.verbs_tuning import FINETUNE
from megatrain.train.candidates import PROCESSES
from megatrain.train.faults import FAULTS

VERBS = (
    Verb(
        name="train",
        summary="train a model; alone, a small GPT on the Python source found on this machine",
        usage="[group=option] [key=value] [flags]",
        examples=(
            (
                "megatrain train data.path=my.txt run.name=mine train.steps=2000",
                "train on your own text; run it again to resume",
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
    FINETUNE,
    GENERATE,
    EVALUATE,
    FEDERATE,
    SERVE,
    COMPRESS,
    Verb(
        name="report",
        summary="write one HTML page with a run's curves, samples of text, events and config, or compare several runs",
        usage="RUN... [--out FILE] [--open]",
        examples=(
            (
                "megatrain report runs/default",
                "write runs/default/report.html, which needs no network; also while it trains",
            ),
            (
                "megatrain report runs/lr-* --out lr.html",
                "several runs in the same curves, and where their configs differ",
            ),
            ("megatrain report runs/default --open", "and open it in the browser"),
        ),
        takes_config=False,
        flags=(
            (
                "--out FILE",
                "the page; default: report.html in the run's directory, or here if there are several runs",
            ),
            ("--open", "open the page in the default browser"),
        ),
    ),
    Verb(
        name="export",
        summary="export a run's model as a Hugging Face directory (config.json, safetensors, tokenizer)",
        usage="RUN DIRECTORY [flags]",
        examples=(
            (
                "megatrain export runs/default exported",
                "config, weights and tokenizer of the latest checkpoint",
            ),
            ("megatrain export runs/default exported --check", "and compare logits with transformers"),
            (
                "megatrain export runs/mine mine-bf16 --dtype bf16 --shard-gb 2",
                "in bf16, split into files of 2 GB",
            ),
        ),
        takes_config=False,
        flags=(
            ("--dtype TYPE", "fp32, bf16 or fp16; default: fp32"),
            AVERAGE,
            ("--shard-gb GB", "maximum file size in GB; default: 5"),
            (
                "--merge",
                "of a run of adapters: the whole model with them added; else the adapters alone, in PEFT's format",
            ),
            ("--check", "load it with transformers and print the largest difference of logits"),
            ("--encrypt", "encrypt the weights; `megatrain checkpoint decrypt` makes them readable"),
        ),
    ),
    Verb(
        name="import",
        summary="import a Hugging Face directory, or a checkpoint of Megatron-LM or DeepSpeed, as a run",
        usage="DIRECTORY run.name=NAME [run.dir=DIR] [--like DIRECTORY] [--check]",
        examples=(
            (
                "megatrain import Llama-3.2-1B run.name=llama",
                "config.json, safetensors and tokenizer of a directory",
            ),
            ("megatrain import gpt2 run.name=gpt2 --check", "and compare logits with transformers"),
            (
                "megatrain import gpt2 run.name=tuned && megatrain train run.name=tuned data.path=my.txt seq_len=512",
                "continue training, with the recipe `imported` (recipe=... for another)",
            ),
        ),
        takes_config=False,
        flags=(
            (
                "--like DIR",
                "of a Megatron-LM or DeepSpeed checkpoint: a Hugging Face directory with its config.json and tokenizer",
            ),
            ("--check", "load it with transformers and print the largest difference of logits"),
        ),
    ),
    Verb(
        name="bench",
        summary="measure how fast a config trains on this machine, and where a step's time goes",
        usage="[group=option] [key=value] [flags]",
        examples=(
            (
                "megatrain bench data=synthetic model=gpt2_124m seq_len=512 --steps 5",
                "a model preset on random tokens",
            ),
            (
                "megatrain bench -m data=synthetic parallel.tp=1,2 micro_batch_size=2,4 --steps 10",
                "a sweep: four measurements, and a table that compares them",
            ),
            (
                "megatrain bench --trace traces --json > result.json",
                "a profile to open in https://ui.perfetto.dev, and everything needed to repeat the measurement",
            ),
        ),
        takes_config=True,
        flags=(
            ("--steps N", "number of steps to measure, after the warm-up; default: 20"),
            (
                "--tune",
                "on a GPU: time all block sizes of attention's kernels first and keep the fastest for later runs, in "
                "~/.cache/megatrain or where MEGATRAIN_TUNED says",
            ),
            ("--json", "print one JSON object instead of a table; progress goes to stderr"),
            (
                "--trace DIR",
                "write a Chrome trace of each process to DIR, and on a GPU a snapshot of its memory",
            ),
            ("--force", "measure although the memory is estimated not to suffice"),
        ),
    ),
    Verb(
        name="verify",
        summary="check on the CPU that your layout, and a list of others, match a single process",
        usage="[group=option] [key=value] [flags]",
        examples=(
            (
                "megatrain verify model=llama3_70b parallel.tp=4 parallel.pp=2",
                "your layout, shrunk, in float64 and in its own precision, and a list of others",
            ),
            (
                "megatrain verify model=mixtral_8x7b parallel.dp_shard=4 parallel.ep=4 --layouts mine --fault all",
                "your layout only, and every error that could be in it: is each one seen?",
            ),
            (
                "megatrain verify --layouts layouts.txt --json result.json",
                "layouts of a file, a line each (parallel.tp=2 parallel.dp_shard=2), with a result for programs",
            ),
        ),
        takes_config=True,
        flags=(
            (
                "--layouts LIST",
                "all: your layout and a list of others; axes: yours and one for each axis; mine: yours only; a file: "
                "yours and a line for each layout, of overrides of parallel; default: all",
            ),
            (
                "--fault NAME",
                "plant an error, or all one after another, in each layout that it can reach: exit code 0 only if it is "
                f"caught in every one. {', '.join(FAULTS)}",
            ),
            (
                "--processes N",
                f"try layouts of at most N processes, of about 0.1 GB each; default: {PROCESSES}",
            ),
            ("--json FILE", "write the result as JSON, too; -: to standard output, and the table to stderr"),
        ),
    ),
    Verb(
        name="data",
        summary="prepare the tokens of a config, look at them, check them, and keep the token caches in order",
        usage="ACTION [NAME] [group=option] [key=value] [flags]",
        examples=(
            (
                "megatrain data prepare data.path=my.txt",
                "tokenize before the run, on a machine without GPUs, say",
            ),
            (
                "megatrain data show data.path=my.txt --documents 3",
                "documents, tokens, lengths, and how three documents begin",
            ),
            (
                "megatrain data prune --unused-days 30 --dry-run",
                "which caches of this machine may go; without --dry-run they do",
            ),
        ),
        takes_config=True,
        flags=(
            ("--json", "print one JSON object instead of text; progress goes to stderr"),
            ("--documents N", "show: print how N documents begin, spread evenly over the training data"),
            ("--sample", "show: print the first sample that a run of this config trains on"),
            ("--all", "verify: check all caches"),
            ("--unused-days N", "prune: also remove caches that were not used for N days"),
            ("--dry-run", "prune: only say what would be removed"),
        ),
        actions=(
            ("prepare", "tokenize the data of a config into its cache, unless that was done before"),
            ("show", "say what the cache NAME, or that of a config, contains"),
            (
                "verify",
                "read the cache NAME, or that of a config, again and check every byte; exit code 2 if damaged",
            ),
            ("ls", "list the caches: origin, size, last use, and whether their sources have changed"),
            (
                "prune",
                "remove caches that nothing can use: unfinished, damaged, outdated, of changed sources",
            ),
        ),
    ),
    Verb(
        name="checkpoint",
        summary="look into checkpoints, check them, compare, prune, copy, and write them as safetensors",
        usage="ACTION RUN|CHECKPOINT|URL ... [flags]",
        examples=(
            (
                "megatrain checkpoint ls runs/default",
                "steps, sizes, layouts, and which are damaged or unfinished",
            ),
            (
                "megatrain checkpoint diff runs/default runs/mine",
                "which tensors of their newest checkpoints differ, where, and by how much",
            ),
            (
                "megatrain checkpoint consolidate runs/default weights.safetensors --only weights",
                "one file of whole tensors, whatever the layout that wrote them",
            ),
        ),
        takes_config=False,
        flags=(
            ("--json", "print one JSON object instead of text; progress goes to stderr"),
            ("--only KIND", "diff, consolidate: weights, optimizer or average alone; default: all tensors"),
            (
                "--rtol R",
                "diff: ignore differences of up to R of the tensor's largest element; default: 0, bitwise equal",
            ),
            ("--keep N", "prune: how many of the newest good checkpoints stay"),
            ("--dry-run", "prune: only say what would be removed"),
            ("--shard-gb GB", "consolidate: maximum size of a file in a directory, in GB; default: 5"),
        ),
        actions=(
            ("ls", "list the checkpoints of a run, unfinished ones and those in quarantine too"),
            ("show", "say what a checkpoint holds: tensors, sizes, layout, digests, versions"),
            (
                "verify",
                "check every hash of one checkpoint, or of all of a run; exit code 3 if one is damaged",
            ),
            ("diff", "compare two checkpoints tensor by tensor; exit code 0 if equal, 1 if not"),
            ("prune", "remove old checkpoints of a run that is not training"),
            ("copy", "copy a checkpoint into another directory or run, verified"),
            (
                "consolidate",
                "write whole tensors as safetensors: one file, or a directory of files with an index",
            ),
            ("decrypt", "write a plain copy of an encrypted checkpoint or export into another directory"),
        ),
    ),
    Verb(
        name="diff",
        summary="say at which step and in which quantity two runs part: config, data, samples, loss, weights",
        usage="RUN_A RUN_B [flags]",
        examples=(
            ("megatrain diff runs/default runs/mine", "exit code 0 if they are equal, 1 if not"),
            (
                "megatrain diff runs/one-gpu runs/sharded --rtol 1e-5",
                "two layouts of the same run: ignore rounding",
            ),
            ("megatrain diff runs/default runs/mine --no-tensors --json", "the records alone, for programs"),
        ),
        takes_config=False,
        flags=(
            ("--rtol R", "ignore relative differences of up to R; default: 0, exactly equal"),
            ("--no-tensors", "leave out the tensors of the newest checkpoint that both have"),
            ("--json", "print one JSON object instead of text; progress goes to stderr"),
        ),
    ),
    Verb(
        name="launch",
        summary="start a run on this machine or on many: torchrun, SLURM, ssh, Kubernetes",
        usage="KIND [flags] [group=option] [key=value]",
        examples=(
            (
                "megatrain launch slurm --nodes 2 --time 12:00:00 run.name=mine model=llama3_1b parallel.dp_shard=-1 "
                "global_batch_size=256",
                "check the config, submit a job that requeues itself until the run is done, and follow it",
            ),
            (
                "megatrain launch slurm --nodes 2 --dry-run run.name=mine parallel.dp_shard=-1 global_batch_size=256",
                "print the script and submit nothing; --status and --cancel ask for a job that was submitted",
            ),
            (
                "megatrain launch ssh --hosts node1,node2 run.name=mine parallel.dp_shard=-1 global_batch_size=256",
                "start the processes on two machines without a scheduler",
            ),
        ),
        takes_config=True,
        flags=(
            ("--cluster NAME", "description of the site: conf/cluster/NAME.yaml; a flag wins over it"),
            ("--dry-run", "print the script or manifest, and start nothing"),
            ("--nodes N", "number of nodes; every other key of the cluster's description is a flag, too"),
            (
                "--gpus-per-node N",
                "GPUs of each node, one process each; 0: CPUs, --processes-per-node N; default: 8",
            ),
            ("--container IMAGE", "slurm, k8s: run in a container; --venv DIR: in a Python environment"),
            ("--time LIMIT", "slurm: time limit of a job; the run saves before, and the job is queued again"),
            ("--partition NAME", "slurm: also --account, --qos, --reservation, --constraint, --exclude"),
            ("--detach", "slurm: do not follow the job's messages"),
            ("--status", "slurm: how the jobs and the run are"),
            ("--cancel", "slurm: have the run save and end, and start it no more"),
            (
                "--chain N",
                "slurm: submit N jobs that go on one after another, where jobs may not queue themselves",
            ),
            (
                "--array N",
                "slurm, with --multirun: how many jobs of the sweep run at the same time; default: all",
            ),
            (
                "--master-addr ADDRESS",
                "torchrun, ssh: the first node, as the others reach it; --master-port N",
            ),
            (
                "--node-rank N",
                "torchrun: start the processes of this node; without it, print the script of all",
            ),
            ("--hosts A,B,...", "ssh: the hosts"),
        ),
        actions=(
            ("local", "start the processes on this machine, as `train` does"),
            ("torchrun", "start the processes of one node with torchrun, or print the script that does"),
            ("slurm", "submit a job, or a sweep as an array of jobs (--multirun)"),
            ("k8s", "write a JobSet manifest for Kubernetes"),
            ("ssh", "start every host's processes over ssh, show what they print, and end all when one ends"),
        ),
    ),
    Verb(
        name="doctor",
        summary="report this machine's hardware and software, what is missing for which feature, and how to get it",
        usage="[--cluster [--unfit FILE]] [--json]",
        examples=(
            ("megatrain doctor", "a table of versions, devices, memory, compiler, network, paths, features"),
            ("megatrain doctor --json", "the same for programs"),
            (
                "megatrain doctor --cluster",
                "under torchrun or srun: compare the machines of a job, and measure the network between them",
            ),
        ),
        takes_config=False,
        flags=(
            (
                "--cluster",
                "compare the machines on which a launcher has started it; exit code 1 if one is unfit",
            ),
            (
                "--unfit FILE",
                "write the names of unfit machines there, one a line, for a launcher that has others",
            ),
            ("--json", "print one JSON object instead of a table"),
        ),
    ),
)


def find_verb(name: str) -> Verb | None:
    """Return the verb of that name, if there is one."""
    return next((verb for verb in VERBS if verb.name == name), None)
