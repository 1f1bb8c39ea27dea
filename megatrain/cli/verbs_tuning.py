"""The verbs of the life of a model after pre-training; part of the table in `verbs.py`."""

from megatrain.cli.verb import Verb

FINETUNE = Verb(
    name="finetune",
    summary="fine-tune a run of ours, or a Hugging Face model, on conversations, instructions or prompts with answers",
    usage="SOURCE [group=option] [key=value] [flags]",
    examples=(
        (
            "megatrain finetune runs/mine data.path=messages.jsonl run.name=tuned train.steps=200",
            "from the latest weights of a run; run it again to resume",
        ),
        (
            "megatrain finetune Llama-3.2-1B data.path=alpaca.json run.name=tuned parallel.dp_shard=4",
            "from a Hugging Face directory, which is imported once, on four processes",
        ),
        (
            "megatrain finetune runs/mine data.path=pairs.csv 'data.template={en}:' 'data.answer={de}' run.name=tuned",
            "prompts and answers from the columns of a table",
        ),
    ),
    takes_config=True,
)
