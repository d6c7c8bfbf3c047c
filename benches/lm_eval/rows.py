"""Writes LLM-Adapters' test files as rows of the data sets that they were made of, so that tasks in
lm-evaluation-harness' form can be run on them: questions and choices are taken from the
instructions.

    python benches/lm_eval/rows.py LLM_ADAPTERS_DATASET_FOLDER rows [WIKI_TOKENS STORIES]

BoolQ's instructions have no passage, so its passages are empty here, and its scores are not those of
BoolQ. A file of WikiText (`wiki.valid.tokens`) is cut into its pages. A text with a story in each
paragraph becomes rows in HellaSwag's form, of which each has three endings of other stories, to
compare programs on: their scores say nothing about models.
"""

import json
import random
import re
import sys
from pathlib import Path


def choices(text):
    """Splits `question ... Answer1: a Answer2: b ... Answer format: ...`."""
    body, _ = re.split(r"\n\nAnswer format:|\s*Answer format:", text, maxsplit=1)
    question, options = re.split(r"\n\n(?=(?:Answer|Solution|Option|Ending)1:)", body, maxsplit=1)
    question = question.split(": ", 1)[1]
    parts = re.split(r"(?:Answer|Solution|Option|Ending)\d+:", options)[1:]
    return question, [part.strip() for part in parts]


def arc(row):
    question, texts = choices(row["instruction"])
    labels = [chr(65 + i) for i in range(len(texts))]
    key = labels[int(row["answer"][-1]) - 1]
    return {"question": question, "question_stem": question,
            "choices": {"text": texts, "label": labels}, "answerKey": key}


def piqa(row):
    question, (one, two) = choices(row["instruction"])
    return {"goal": question, "sol1": one, "sol2": two, "label": int(row["answer"][-1]) - 1}


def siqa(row):
    text, (a, b, c) = choices(row["instruction"])
    # The question is the last sentence.
    context, question = re.match(r"(?s)(.*?[.!?\"'])?\s*([^.!?]*\?)\s*$", text).groups()
    return {"context": context or "", "question": question, "answerA": a, "answerB": b,
            "answerC": c, "label": row["answer"][-1]}


def winogrande(row):
    sentence, (one, two) = choices(row["instruction"])
    return {"sentence": sentence, "option1": one, "option2": two, "answer": row["answer"][-1]}


def boolq(row):
    question = re.search(r"question: (.*?)\??\n\nAnswer format", row["instruction"], re.S).group(1)
    return {"passage": "", "question": question, "label": int(row["answer"] == "true")}


SETS = {
    "boolq": ("boolq", "validation", boolq),
    "piqa": ("piqa", "validation", piqa),
    "social_iqa": ("social_i_qa", "validation", siqa),
    "winogrande": ("winogrande", "validation", winogrande),
    "arc_easy": ("ARC-Easy", "test", arc),
    "arc_challenge": ("ARC-Challenge", "test", arc),
    "openbookqa": ("openbookqa", "test", arc),
}


def pages(text):
    """Splits WikiText at its headings of the first level."""
    starts = [m.start() for m in re.finditer(r"(?m)^ = [^=\n]+ = *$", text)] + [len(text)]
    return [{"page": text[start:end]} for start, end in zip(starts, starts[1:])]


def stories(text, n=200):
    """Makes rows in HellaSwag's form of stories of at least four sentences."""
    choose = random.Random(0)
    split = [re.split(r"(?<=[.!?]) +", " ".join(story.split()))
             for story in re.split(r"\n\s*\n|<\|endoftext\|>", text)]
    split = [story for story in split if len(story) >= 4][:n]
    rows = []
    for story in split:
        gold = choose.randrange(4)
        endings = [choose.choice(split)[-1] for _ in range(4)]
        endings[gold] = story[3]
        rows.append({"activity_label": "Telling stories", "ctx_a": " ".join(story[:2]),
                     "ctx_b": story[2].lower(), "endings": endings, "label": str(gold)})
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main(source, target, wiki=None, tales=None):
    if wiki:
        write(Path(target, "wikitext", "test.jsonl"), pages(Path(wiki).read_text()))
    if tales:
        write(Path(target, "hellaswag", "validation.jsonl"), stories(Path(tales).read_text()))
    for name, (folder, split, convert) in SETS.items():
        for own, file in ((split, "test.json"), ("train", "train.json")):
            path = Path(source, folder, file)
            if path.is_file():
                rows = [convert(row) for row in json.loads(path.read_text())]
                write(Path(target, name, f"{own}.jsonl"), rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
