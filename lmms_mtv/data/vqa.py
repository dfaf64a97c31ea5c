"""VizWiz and OK-VQA: questions about one image, each with ten answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_mtv.data import hub
from lmms_mtv.data.official import File, Official, json_in
from lmms_mtv.data.source import Row, Source

_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final/"
_OKVQA = "https://okvqa.allenai.org/static/data/"
_COCO = "http://images.cocodataset.org/zips/"

VIZWIZ_ANNOTATIONS = File("Annotations.zip", f"{_VIZWIZ}vqa_data/Annotations.zip", unpacked="Annotations")


def modal(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of them where several are."""
    return Counter(answers).most_common(1)[0][0]


def _vizwiz_fetch(split: str) -> list[Row]:
    copy = {
        "train": hub.Copy(
            "vizwiz",
            "Multimodal-Fatima/VizWiz_train",
            "train",
            ("question", "answers"),
            "0398414ffdf6ca445b9e90204ce5d0def5d73da2",
        ),
        "val": hub.Copy("vizwiz", "lmms-lab-encoder/VizWiz-VQA", "val", ("question", "answers")),
    }[split]
    return [
        {
            "question_id": f"{split}/{index}",
            "image": hub.reference(copy, index),
            "question": row["question"],
            "answers": row["answers"],
            "answer": modal(row["answers"]),
        }
        for index, row in enumerate(hub.table(copy))
    ]


def _vizwiz_prepare(official: Official) -> Mapping[str, list[Row]]:
    splits = {}
    for split in ("train", "val"):
        items = official.json(VIZWIZ_ANNOTATIONS, f"{split}.json")
        images = File(f"{split}.zip", f"{_VIZWIZ}images/{split}.zip", unpacked=split)
        paths = official.images(images, (item["image"] for item in items))
        answers = [[given["answer"] for given in item["answers"]] for item in items]
        splits[split] = [
            {
                "question_id": item["image"].rpartition(".")[0],
                "image": paths[item["image"]],
                "question": item["question"],
                "answers": given,
                "answer": modal(given),
            }
            for item, given in zip(items, answers, strict=True)
        ]
    return splits


def _okvqa_annotations(split: str) -> File:
    name = f"mscoco_{split}_annotations.json"
    return File(f"{name}.zip", f"{_OKVQA}{name}.zip", unpacked=name)


def _okvqa_row(question_id: int, image: str, question: str, answers: Sequence[Mapping[str, Any]]) -> Row:
    # The paper's scorer compares with the stemmed answers, so they are what a demonstration shows.
    stemmed = [given["answer"] for given in answers]
    return {
        "question_id": str(question_id),
        "image": image,
        "question": question,
        "answers": [given["raw_answer"] for given in answers],
        "answers_stemmed": stemmed,
        "answer": modal(stemmed),
    }


def _okvqa_fetch(split: str) -> list[Row]:
    if split == "train":
        copy = hub.Copy(
            "okvqa",
            "Multimodal-Fatima/OK-VQA_train",
            "train",
            ("question_id", "question", "answers_original"),
            "78e937b0afc333cfe8fee21c4d56aa405b4d0682",
        )
        return [
            _okvqa_row(row["question_id"], hub.reference(copy, index), row["question"], row["answers_original"])
            for index, row in enumerate(hub.table(copy))
        ]
    copy = hub.Copy("okvqa", "lmms-lab-encoder/OK-VQA", "val2014", ("question_id", "question", "answers"))
    # That copy has the raw answers alone: the stemmed ones come with the official annotations.
    file = _okvqa_annotations("val2014")
    annotations = json_in(hub.downloaded(file, "okvqa"), file.unpacked, file.url)["annotations"]
    answers = {str(item["question_id"]): item["answers"] for item in annotations}
    return [
        _okvqa_row(row["question_id"], hub.reference(copy, index), row["question"], answers[str(row["question_id"])])
        for index, row in enumerate(hub.table(copy))
    ]


def _okvqa_prepare(official: Official) -> Mapping[str, list[Row]]:
    splits = {}
    for split in ("train2014", "val2014"):
        name = f"OpenEnded_mscoco_{split}_questions.json"
        questions = official.json(File(f"{name}.zip", f"{_OKVQA}{name}.zip", unpacked=name), name)["questions"]
        asked = {item["question_id"]: item["question"] for item in questions}
        annotations = _okvqa_annotations(split)
        items = official.json(annotations, annotations.unpacked)["annotations"]
        images = {item["question_id"]: f"COCO_{split}_{item['image_id']:012d}.jpg" for item in items}
        archive = File(f"{split}.zip", f"{_COCO}{split}.zip", unpacked=split)
        paths = official.images(archive, images.values())
        splits["train" if split == "train2014" else split] = [
            _okvqa_row(key, paths[images[key]], asked[key], item["answers"])
            for item in items
            for key in (item["question_id"],)
        ]
    return splits


SOURCES: Sequence[Source] = (
    Source("vizwiz", {"train": 20_523, "val": 4_319}, _vizwiz_fetch, _vizwiz_prepare),
    Source("okvqa", {"train": 9_009, "val2014": 5_046}, _okvqa_fetch, _okvqa_prepare),
)
