"""The verbs that use a trained model, for the table of verbs."""

from megatrain.cli.verb import Verb

AVERAGE = (
    "--[no-]average",
    "use the moving average of the weights, or the weights themselves; default: the average, if the run keeps one "
    "(train.ema_decay)",
)

LAYOUT = (
    ("--tp N", "load the model into N tensor-parallel processes; default: 1"),
    ("--pp N", "load the model into N pipeline stages; default: 1"),
)

GENERATE = Verb(
    name="generate",
    summary="continue texts with the model of a run, or of a Hugging Face directory",
    usage="RUN [PROMPT...] [flags]",
    examples=(
        (
            'megatrain generate runs/default "def main("',
            "continue a prompt with the run's latest checkpoint",
        ),
        (
            'megatrain generate runs/default "import " "class " --temperature 0 --json',
            "greedy decoding of two prompts in one batch, as JSON",
        ),
        (
            "megatrain generate runs/default --tokens 500 --seed 7 --top-p 0.9 --lookup",
            "without a prompt, longer, with another seed, guessing tokens from the text so far",
        ),
    ),
    takes_config=False,
    flags=(
        ("--prompts FILE", "prompts of a file: one a line, or of a .jsonl file each line's `prompt`"),
        ("--tokens N", "maximum number of tokens to generate; default: 200"),
        ("--temperature T", "sampling temperature; 0: greedy decoding; default: 0.8"),
        ("--top-k K", "sample from the K most likely tokens; default: all"),
        ("--top-p P", "sample from the fewest most likely tokens with total probability P; default: all"),
        (
            "--min-p P",
            "sample from tokens with at least P times the most likely one's probability; default: all",
        ),
        (
            "--repetition-penalty R",
            "make tokens that the text has already less likely; default: 1, no penalty",
        ),
        ("--stop TEXT", "end before this text; may be given several times"),
        ("--seed N", "sampling seed of each prompt; default: 0"),
        (
            "--logprobs N",
            "with --json: log-probabilities of the tokens, and of the N most likely ones beside each",
        ),
        ("--json", "print one JSON object instead of text"),
        ("--batch N", "how many prompts are continued at a time; default: 8"),
        ("--lookup", "speculative decoding: guess that the text goes on as after the same words before"),
        ("--draft RUN", "speculative decoding: guess with a smaller model of the same tokenizer"),
        ("--draft-tokens N", "number of tokens to guess at a time; default: 4"),
        *LAYOUT,
        AVERAGE,
    ),
)

FEDERATE = Verb(
    name="federate",
    summary="bring together the weights of runs that train apart: federated averaging, DiLoCo",
    usage="start BASE SERVER | round SERVER WORKER ... [flags]",
    examples=(
        ("megatrain federate start runs/base runs/server", "a server whose round 0 has the weights of a run"),
        (
            "megatrain train data.path=a.txt run.name=a checkpoint.adopt=runs/server train.stop_at=500",
            "a worker, which starts from the newest round; the same command with stop_at=1000 goes on",
        ),
        ("megatrain federate round runs/server runs/a runs/b", "the mean of the workers, by their tokens"),
        (
            "megatrain federate round runs/server runs/a runs/b --outer nesterov",
            "DiLoCo: a step of an outer optimizer with momentum, which the server keeps",
        ),
    ),
    takes_config=False,
    flags=(
        ("--outer KIND", "average (default), or nesterov: momentum on the mean change of the weights"),
        ("--lr LR", "outer learning rate; default: 1 for average, 0.7 for nesterov"),
        ("--momentum M", "outer momentum; default: 0 for average, 0.9 for nesterov"),
        (
            "--weights KIND",
            "tokens or equal: how workers count; default: tokens for average, equal for nesterov",
        ),
    ),
    actions=(
        ("start", "make a server, a run directory, of the weights of a run"),
        ("round", "make the next round of the newest checkpoints of the workers"),
    ),
)

EVALUATE = Verb(
    name="evaluate",
    summary="measure how good a model is: perplexity, labelled tasks, generated answers, the EleutherAI harness",
    usage="RUN [flags]",
    examples=(
        (
            "megatrain evaluate runs/default --text my.txt",
            "perplexity and bits per byte of a file, or of anything that data.path takes",
        ),
        (
            "megatrain evaluate runs/default --choices reviews.jsonl --json result.json",
            "accuracy, F1, confusion matrix and calibration on lines with prompt and answer",
        ),
        (
            "megatrain evaluate exported --tasks hellaswag,arc_easy --shots 5",
            "tasks of lm-eval, on a Hugging Face directory",
        ),
        (
            "torchrun --nproc-per-node=8 -m megatrain evaluate runs/large --choices reviews.jsonl --tp 2 --dp 4",
            "on eight GPUs, in four copies of the model that share the lines",
        ),
    ),
    takes_config=False,
    flags=(
        ("--text PATH", "perplexity and bits per byte of its documents; may be given several times"),
        ("--text-field NAME", "--text, --labels: field of rows that holds the text; default: text"),
        (
            "--stride N",
            "--text: tokens that are predicted at a time beyond the first context; default: the whole context, so that "
            "each token is read once",
        ),
        (
            "--labels PATH",
            "of a classifier: rows with text and label, in any form that data.path takes; accuracy, F1, confusion, "
            "calibration",
        ),
        ("--label-field NAME", "--labels: field that holds the label, or the labels; default: label"),
        ("--template TEXT", "--labels: text made from several fields, as data.template"),
        ("--predictions FILE", "--labels: write each row's label, prediction and probabilities as JSONL"),
        (
            "--choices FILE",
            "JSONL with prompt, answer and choices (default: all answers of the file): the likeliest choice",
        ),
        (
            "--answers FILE",
            "JSONL with prompt and reference: generate an answer; exact match, BLEU, chrF, ROUGE",
        ),
        ("--tokens N", "--answers: most tokens of an answer; default: 128"),
        ("--stop TEXT", "--answers: end before this text; may be given several times"),
        ("--tasks A,B", "tasks of lm-eval, by their names there"),
        ("--task-dir DIR", "--tasks: a directory with task files of your own"),
        ("--limit N", "--tasks: most examples of each task; default: all"),
        ("--shots N", "--tasks: solved examples in each prompt; default: as the task says"),
        ("--batch N", "how many answers are generated at a time; default: 8"),
        ("--json FILE", "write the results as JSON, too; -: to standard output, and the table to stderr"),
        (
            "--dp N",
            "load N copies of the model, which share the texts; each has tp times pp processes; default: 1",
        ),
        *LAYOUT,
        AVERAGE,
    ),
)

SERVE = Verb(
    name="serve",
    summary="answer requests of OpenAI's API over HTTP with the model of a run, or of a Hugging Face directory",
    usage="RUN [flags]",
    examples=(
        (
            "megatrain serve runs/default",
            "at http://127.0.0.1:8000, with a page to try it in the browser; Ctrl+C ends it",
        ),
        (
            "megatrain serve exported --host 0.0.0.0 --port 8080 --api-keys keys.txt",
            "for other machines, which need one of the keys in that file",
        ),
        (
            "megatrain serve runs/default --port 0 --batch 64 --queue 0 --cache-gib 4",
            "at a free port, which is printed; at most 64 texts at a time, and none that waits",
        ),
    ),
    takes_config=False,
    flags=(
        ("--host ADDRESS", "address to listen at; default: 127.0.0.1, which only this machine reaches"),
        ("--port N", "port to listen at; 0: a free one; default: 8000"),
        ("--name NAME", "the model's name in requests; default: that of the directory"),
        (
            "--api-keys FILE",
            "keys, one a line, of which requests need one; also in the variable MEGATRAIN_API_KEYS",
        ),
        ("--batch N", "texts that are generated at a time; default: 256"),
        ("--queue N", "texts that may wait beside them; more are refused (429); default: 256"),
        ("--max-tokens N", "most tokens of an answer; default: what the context has room for"),
        ("--cache-gib G", "most memory for keys and values, in GiB; default: 1"),
        ("--pooling HOW", "embeddings: the mean of the hidden states, or the last one; default: mean"),
        ("--body-mib M", "largest request, in MiB; default: 4"),
        ("--read-seconds S", "time in which a request must have arrived; default: 30"),
        ("--request-seconds S", "time after which a request is given up; default: 600"),
        ("--drain-seconds S", "time that requests under way have after SIGTERM; default: 60"),
        AVERAGE,
    ),
)

COMPRESS = Verb(
    name="compress",
    summary="make a model smaller: quantization, sparsity, pruning; measures what it costs",
    usage="RUN OUT --method METHOD [flags]",
    examples=(
        (
            "megatrain compress runs/default small --method int8",
            "8-bit weights, as a Hugging Face directory in the format of compressed-tensors",
        ),
        (
            "megatrain compress runs/default small --method int4-gptq --group 32 --json report.json",
            "4-bit weights fitted to text that the run has held out",
        ),
        (
            "megatrain compress exported pruned --method prune --ffn 4096 --calibration my.txt --text other.txt",
            "a smaller dense model from a Hugging Face directory; train it on to heal it",
        ),
    ),
    takes_config=False,
    flags=(
        (
            "--method METHOD",
            "int8, int8-dynamic, fp8, int4, int4-gptq, int4-awq; magnitude, wanda, magnitude-2:4, wanda-2:4; prune; "
            "none: another file format alone",
        ),
        (
            "--group N",
            "int4: inputs that share a scale; default: the largest of 128, 64 and 32 that divides every layer",
        ),
        ("--sparsity S", "magnitude, wanda: share of the weights that becomes zero; default: 0.5"),
        ("--heads N", "prune: query heads to keep in each layer; default: all"),
        ("--ffn N", "prune: feed-forward channels to keep in each layer; default: all"),
        ("--head", "quantize the output head, too; default: the linear layers of the blocks alone"),
        (
            "--calibration PATH",
            "text for int4-gptq, int4-awq, wanda and prune, as data.path takes it; default: a part of what the run has "
            "held out",
        ),
        ("--samples N", "number of sequences of calibration text; default: 128"),
        (
            "--format {hf,gguf}",
            "a Hugging Face directory (default), or a GGUF file for llama.cpp (package gguf)",
        ),
        ("--dtype TYPE", "type of what is not quantized, and of scales: fp16 (default), bf16, fp32"),
        (
            "--text PATH",
            "text to measure with; may be given several times; default: the rest of what the run has held out",
        ),
        ("--json FILE", "write the report as JSON, too; -: to standard output, and the table to stderr"),
        AVERAGE,
    ),
)
