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
