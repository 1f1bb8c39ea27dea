"""`megatrain evaluate`: how good the model of a run, or of a Hugging Face directory, is at text and tasks."""

import contextlib
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.cli.actions import progress_display, run_here, strict_json
from megatrain.cli.generate import add_layout, in_layout, load_model
from megatrain.cli.options import Parser
from megatrain.cli.prompts import check_numbers
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.runtime.packages import how_to_install
from megatrain.runtime.processes import Processes
from megatrain.train.files import TOKENIZER

if TYPE_CHECKING:
    from megatrain.train.scoring import Scorer

PACKAGES = {
    "choices": {"sklearn": "scikit-learn"},
    "labels": {"sklearn": "scikit-learn"},
    "answers": {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"},
    "tasks": {"lm_eval": "lm-eval"},
}
"""Flag -> module that it needs -> package that has it."""
Progress = Callable[[str, float], None]


def run(argv: list[str]) -> int:
    """Evaluate, print a table, and write the results as JSON if asked to; return the exit code."""
    options = _parser().parse_intermixed_args(argv)
    check_numbers("evaluate", options)
    asked = [name for name in ("text", "labels", "choices", "answers", "tasks") if getattr(options, name)]
    if not asked:
        raise UserError(
            "evaluate: say what to evaluate on: --text, --labels, --choices, --answers or --tasks; "
            "see `megatrain evaluate --help`"
        )
    for name in asked:
        for module, package in PACKAGES.get(name, {}).items():
            if find_spec(module) is None:
                raise UserError(f"evaluate: --{name} needs the package {package}: {how_to_install(package)}")
    return in_layout("evaluate", argv, options, partial(_evaluate, options))


def _parser() -> Parser:
    parser = Parser("evaluate")
    parser.add_argument("run")
    parser.add_argument("--text", action="append", default=[], metavar="PATH")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--stride", type=int)
    parser.add_argument("--labels", metavar="PATH")
    parser.add_argument("--label-field", default="label")
    parser.add_argument("--template")
    parser.add_argument("--predictions", metavar="FILE")
    parser.add_argument("--choices", metavar="FILE")
    parser.add_argument("--answers", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")
    parser.add_argument("--tasks", type=lambda text: [each for each in text.split(",") if each], default=[])
    parser.add_argument("--task-dir", metavar="DIR")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    add_layout(parser)
    parser.add_argument("--dp", type=int, default=1)
    return parser


def _evaluate(options: Namespace, processes: Processes) -> int:
    with processes.at_work():
        from megatrain.evaluate.answers import read_tasks
        from megatrain.evaluate.choices import read_questions
        from megatrain.train.scoring import Scorer

    # A mistake in a file comes to light before the model is loaded.
    for flag, file in (("--json", options.json), ("--predictions", options.predictions)):
        if file not in (None, "-") and not Path(expanded(file)).absolute().parent.is_dir():
            raise UserError(f"evaluate: {flag} {file}: there is no directory {Path(expanded(file)).parent}")
    questions = read_questions(Path(expanded(options.choices))) if options.choices else []
    tasks = read_tasks(Path(expanded(options.answers))) if options.answers else []
    trained = load_model(options, processes)
    _require_kind(options, is_classifier=trained.parallel.plan.has_classifier)
    scorer = Scorer(trained, processes)
    found: dict[str, Any] = {"model": options.run, "step": trained.step}
    output = io.StringIO() if not processes.is_first else sys.stderr
    with contextlib.redirect_stdout(output), progress_display(False, shows=processes.is_first) as display:
        if options.text:
            found["text"] = _on_text(options, scorer, display.phase)
        if options.labels:
            found["labels"] = _on_labels(options, scorer, display.phase)
        if questions:
            from megatrain.evaluate.choices import choose

            display.phase("choosing", 0.0)
            found["choices"] = choose(scorer, questions)
        if tasks:
            from megatrain.evaluate.answers import answer, compare

            display.phase("answering", 0.0)
            how = {"tokens": options.tokens, "stop": tuple(options.stop), "max_batch": options.batch}
            texts = scorer.copies.share(tasks, partial(answer, trained, **how))
            found["answers"] = compare(texts, tasks)
        if options.tasks:
            found["tasks"] = _on_tasks(options, scorer)
    if processes.is_first:
        _show(found, options)
    return 0


def _on_text(options: Namespace, scorer: "Scorer", progress: Progress) -> dict[str, Any]:
    from megatrain.evaluate.perplexity import perplexity

    context = scorer.trained.context
    stride = context if options.stride is None else options.stride
    if stride > context:
        raise UserError(
            f"evaluate: --stride {stride}: must be at most {context}, the tokens that the model sees"
        )
    paths = [expanded(each) for each in options.text]
    return perplexity(scorer, paths, field=options.text_field, stride=stride, progress=progress)


def _require_kind(options: Namespace, *, is_classifier: bool) -> None:
    """Refuse what a classifier, or what a language model, can't do."""
    if is_classifier and not options.labels:
        raise UserError(
            f"evaluate: {options.run} is a classifier, which predicts labels and no tokens: use --labels"
        )
    others = [name for name in ("text", "choices", "answers", "tasks") if getattr(options, name)]
    if is_classifier and others:
        raise UserError(
            f"evaluate: --{others[0]}: {options.run} is a classifier, which predicts labels and no tokens"
        )


def _on_labels(options: Namespace, scorer: "Scorer", progress: Progress) -> dict[str, Any]:
    from megatrain.data.sources.chat import Conversation, read_chat
    from megatrain.evaluate.labels import classify, judge, predictions, read_labelled

    directory = run_here(options.run)
    own = directory / TOKENIZER
    found = read_labelled(
        scorer.trained,
        expanded(options.labels),
        text_field=options.text_field,
        label_field=options.label_field,
        template=options.template,
        conversation=Conversation(*read_chat(own if own.is_dir() else directory)),
    )
    logits = classify(scorer, found.documents, progress=progress)
    if options.predictions and scorer.copies.processes.is_first:
        rows = (json.dumps(row, ensure_ascii=False) for row in predictions(found, logits))
        _write("--predictions", options.predictions, "".join(f"{row}\n" for row in rows))
    return judge(found, logits)


def _on_tasks(options: Namespace, scorer: "Scorer") -> dict[str, Any]:
    from megatrain.evaluate.harness import run_tasks

    folder = None if options.task_dir is None else Path(expanded(options.task_dir))
    if folder is not None and not folder.is_dir():
        raise UserError(f"evaluate: --task-dir {options.task_dir}: there is no such directory")
    return run_tasks(
        scorer,
        options.tasks,
        folder=folder,
        limit=options.limit,
        shots=options.shots,
        max_batch=options.batch,
    )


def _show(found: dict[str, Any], options: Namespace) -> None:
    """Print the table, and write the JSON file; with `--json -` to standard output, and the table to stderr."""
    text = json.dumps(strict_json(found), indent=1, ensure_ascii=False, allow_nan=False)
    print(as_table(found), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json == "-":
        print(text)
    elif options.json is not None:
        _write("--json", options.json, text + "\n")


def _write(flag: str, file: str, text: str) -> None:
    path = Path(expanded(file))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"evaluate: {flag} {path}: {error.strerror}") from None


def as_table(found: dict[str, Any]) -> str:
    """Return the results as text: a line for each figure, the confusion matrix as rows of the true labels."""
    step = "" if found["step"] is None else f", step {found['step']}"
    lines = [f"{found['model']}{step}"]
    for part in ("text", "labels", "choices", "answers"):
        if part in found:
            lines += [part, *_figures(found[part]), *_label_rows(found[part])]
    for task, values in found.get("tasks", {}).items():
        lines += [f"task {task}", *_figures(values)]
    return "\n".join(lines)


def _label_rows(choices: dict[str, Any]) -> list[str]:
    """Return the figures of each label and its row of the confusion matrix, if all questions have the same labels."""
    if "labels" not in choices:
        return []
    width = max(len(label) for label in choices["labels"])
    confusion = choices.get("confusion", {}).get("rows_are_true", [()] * len(choices["labels"]))
    last = "  predicted as" if "confusion" in choices else ""
    lines = [f"  {'label':<{width}}  precision  recall      f1  support{last}"]
    for label, row in zip(choices["labels"], confusion, strict=True):
        each = choices["labels"][label]
        figures = (
            f"{each['precision']:9.4f}  {each['recall']:6.4f}  {each['f1']:6.4f}  {each['support']:7.0f}"
        )
        lines.append(f"  {label:<{width}}  {figures}  {' '.join(map(str, row))}".rstrip())
    return lines


def _figures(values: dict[str, Any]) -> list[str]:
    """Return a line for each number of `values`."""
    numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
    shown = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.6g}" for name, value in numbers.items()
    }
    return [f"  {name:<20} {text}" for name, text in shown.items()]
