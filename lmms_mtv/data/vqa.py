"""VizWiz and OK-VQA: questions about one image, each with ten answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmms_mtv.data import hub
from lmms_mtv.data.official import File, Official, json_in
from lmms_mtv.data.source import Row, Source

_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final/"
_OKVQA = "https://okvqa.allenai.org/static/data/"
_COCO = "http://images.cocodataset.org/zips/"

VIZWIZ_ANNOTATIONS = File("Annotations.zip", f"{_VIZWIZ}vqa_data/Annotations.zip", unpacked="Annotations")


def modal(answers: Sequence[str]) -> str:
    """Return the most frequent answer; among equally frequent answers, the first."""
    return Counter(answers).most_common(1)[0][0]


COPIES: dict[str, hub.Copy] = {
    "vizwiz/train": hub.Copy(
        "vizwiz",
        "Multimodal-Fatima/VizWiz_train",
        "train",
        ("filename", "image", "question", "answers"),
        "0398414ffdf6ca445b9e90204ce5d0def5d73da2",
    ),
    "vizwiz/val": hub.Copy(
        "vizwiz", "lmms-lab-encoder/VizWiz-VQA", "val", ("question_id", "image", "question", "answers")
    ),
    "okvqa/train": hub.Copy(
        "okvqa",
        "Multimodal-Fatima/OK-VQA_train",
        "train",
        ("question_id", "image", "question", "answers_original"),
        "78e937b0afc333cfe8fee21c4d56aa405b4d0682",
    ),
    "okvqa/val2014": hub.Copy(
        "okvqa", "lmms-lab-encoder/OK-VQA", "val2014", ("question_id", "image", "question", "answers")
    ),
}


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in the order of their ids, so that a seed draws the same rows from the hub and from the files."""
    return sorted(rows, key=lambda row: str(row["question_id"]))


def _vizwiz_row(name: str, image: str, question: str, answers: Sequence[str]) -> Row:
    return {
        "question_id": name.removesuffix(".jpg"),
        "image": image,
        "question": question,
        "answers": list(answers),
        "answer": modal(answers),
    }


def _vizwiz_fetch(split: str) -> list[Row]:
    copy = COPIES[f"vizwiz/{split}"]
    return _sorted(
        _vizwiz_row(row[copy.columns[0]], hub.reference(copy, index), row["question"], row["answers"])
        for index, row in enumerate(hub.texts(copy))
    )


def _vizwiz_prepare(official: Official) -> Mapping[str, list[Row]]:
    splits = {}
    for split in ("train", "val"):
        items = official.json(VIZWIZ_ANNOTATIONS, f"{split}.json")
        images = File(f"{split}.zip", f"{_VIZWIZ}images/{split}.zip", unpacked=split)
        paths = official.images(images, (item["image"] for item in items))
        splits[split] = _sorted(
            _vizwiz_row(
                item["image"], paths[item["image"]], item["question"], [entry["answer"] for entry in item["answers"]]
            )
            for item in items
        )
    return splits


def _okvqa_annotations(split: str) -> File:
    name = f"mscoco_{split}_annotations.json"
    return File(f"{name}.zip", f"{_OKVQA}{name}.zip", unpacked=name)


def _okvqa_row(question_id: int, image: str, question: str, answers: Sequence[Mapping[str, Any]]) -> Row:
    # The scorer of the paper compares with the stemmed answers, so demonstrations show stemmed answers.
    stemmed = [entry["answer"] for entry in answers]
    return {
        "question_id": str(question_id),
        "image": image,
        "question": question,
        "answers": [entry["raw_answer"] for entry in answers],
        "answers_stemmed": stemmed,
        "answer": modal(stemmed),
    }


def _okvqa_fetch(split: str) -> list[Row]:
    copy = COPIES[f"okvqa/{split}"]
    table = hub.texts(copy)
    if split == "train":
        answers = {row["question_id"]: row["answers_original"] for row in table}
    else:
        # This copy has only raw answers; the official annotations have the stemmed answers.
        file = _okvqa_annotations(split)
        items = json_in(hub.downloaded(file, "okvqa"), file.unpacked, file.url)["annotations"]
        annotated = {str(item["question_id"]): item["answers"] for item in items}
        answers = {row["question_id"]: annotated[str(row["question_id"])] for row in table}
    return _sorted(
        _okvqa_row(row["question_id"], hub.reference(copy, index), row["question"], answers[row["question_id"]])
        for index, row in enumerate(table)
    )


def _okvqa_prepare(official: Official) -> Mapping[str, list[Row]]:
    splits = {}
    for split in ("train2014", "val2014"):
        name = f"OpenEnded_mscoco_{split}_questions.json"
        questions = official.json(File(f"{name}.zip", f"{_OKVQA}{name}.zip", unpacked=name), name)["questions"]
        question_of = {item["question_id"]: item["question"] for item in questions}
        annotations = _okvqa_annotations(split)
        items = official.json(annotations, annotations.unpacked)["annotations"]
        images = {item["question_id"]: f"COCO_{split}_{item['image_id']:012d}.jpg" for item in items}
        archive = File(f"{split}.zip", f"{_COCO}{split}.zip", unpacked=split)
        paths = official.images(archive, images.values())
        splits["train" if split == "train2014" else split] = _sorted(
            _okvqa_row(key, paths[images[key]], question_of[key], item["answers"])
            for item in items
            for key in (item["question_id"],)
        )
    return splits


SOURCES: Sequence[Source] = (
    Source("vizwiz", {"train": 20_523, "val": 4_319}, _vizwiz_fetch, _vizwiz_prepare),
    Source("okvqa", {"train": 9_009, "val2014": 5_046}, _okvqa_fetch, _okvqa_prepare),
)
