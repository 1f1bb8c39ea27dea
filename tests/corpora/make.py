"""Make the small corpora beside this file with the programs that people use.

    pip install pandas datasets && python tests/corpora/make.py

Needs also jq, gzip, bzip2, xz, zstd, tar and zip. The files are committed: the tests read what these programs
wrote and need none of them.
"""

import json
import shutil
import subprocess
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather

HERE = Path(__file__).parent
LINES = [f'Entry {n}: the "square" of {n} is {n * n},\nand its cube {n**3} — größer.' for n in range(1, 41)]
QUESTIONS = [
    {"instruction": f"Square the number {n}.", "input": str(n) if n % 2 else "", "output": f"It is {n * n}."}
    for n in range(1, 41)
]


def shell(command: str) -> None:
    subprocess.run(["bash", "-euc", command], cwd=HERE, check=True)


def main() -> None:
    for old in HERE.iterdir():
        if old.suffix not in (".py", ".sh"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    frame = pd.DataFrame({"id": range(1, 41), "text": LINES, "stars": [n % 5 for n in range(40)]})
    frame.loc[7, "text"] = None
    named = frame.rename(columns={"text": "review"})
    named.to_csv(HERE / "reviews.csv", index=False)
    named.to_csv(HERE / "reviews.tsv.bz2", sep="\t", index=False)
    named.to_csv(HERE / "semicolons.csv.gz", sep=";", index=False)
    frame.to_parquet(HERE / "articles.parquet", compression="zstd")
    frame.to_json(HERE / "c4.json.gz", orient="records", lines=True)
    frame.to_json(HERE / "records.json", orient="records", indent=1)
    frame.to_json(HERE / "columns.json")
    feather.write_feather(pa.Table.from_pandas(frame), HERE / "articles.feather")
    (HERE / "alpaca.json").write_text(json.dumps(QUESTIONS, indent=1))
    chats = [
        {
            "id": n,
            "conversations": [
                {"from": "human", "value": q["instruction"]},
                {"from": "gpt", "value": q["output"]},
            ],
        }
        for n, q in enumerate(QUESTIONS)
    ]
    (HERE / "sharegpt.json").write_text(json.dumps(chats))
    shell(
        r"""jq -c '.[] | {messages: [{role: "system", content: "Answer."}, {role: "user", content: .instruction},
                                     {role: "assistant", content: .output}]}' alpaca.json > messages.jsonl
            jq -c '.[] | {text: .text, id: .id}' records.json | zstd -q -19 -o articles.jsonl.zst
            jq -r '.[].text | select(. != null)' records.json > book.txt
            gzip -9 -n < book.txt > book.txt.gz"""
    )
    book = (HERE / "book.txt").read_text(encoding="utf-8")
    (HERE / "utf16.txt").write_text(book, encoding="utf-16")
    (HERE / "latin1.txt").write_text(book.replace("—", "-"), encoding="latin-1")
    shell(
        r"""xz -k latin1.txt
            mkdir shard && for n in 1 2 3; do
              sed -n "${n}0,${n}9p" book.txt > shard/00$n.txt; echo "{\"url\": \"x/$n\"}" > shard/00$n.json
            done
            tar --sort=name --mtime=2024-01-01 -cf shard-000000.tar -C shard . && tar -czf shard-000001.tgz -C shard .
            zip -q -r books.zip shard && rm -r shard book.txt"""
    )
    rows = datasets.Dataset.from_pandas(frame)
    rows.save_to_disk(HERE / "saved")
    datasets.DatasetDict(rows.train_test_split(0.25, seed=0)).save_to_disk(HERE / "saved_dict")


if __name__ == "__main__":
    main()
