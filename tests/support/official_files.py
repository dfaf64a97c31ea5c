"""Small data sets in the layout of the official archives: drawn images, made-up words."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image
from scipy.io import savemat

WORDS = ("blee", "fram", "dosk", "tild", "wern", "plov", "guth", "sarn", "mipe", "jorl", "quab", "nurd")
TASKS = ("vizwiz", "okvqa", "flowers", "cub", "dtd", "english_spanish", "antonyms", "words_capitalize")


def picture(name: str) -> bytes:
    """A JPEG of one colour with a darker square, both fixed by the name without its folders."""
    drawn = random.Random(Path(name).name)
    image = Image.new("RGB", (32, 32), tuple(drawn.randrange(100, 256) for _ in range(3)))
    image.paste(tuple(drawn.randrange(100) for _ in range(3)), (8, 8, 20, 20))
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return stream.getvalue()


def zipped(path: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def tarred(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def members(path: Path, ending: str) -> list[str]:
    """Names inside a tar."""
    with tarfile.open(path) as archive:
        return [name for name in archive.getnames() if name.endswith(ending)]


def build(task: str, folder: Path) -> Path:
    """The official files of ``task``, small, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    builders: dict[str, Callable[[Path], None]] = {
        "vizwiz": vizwiz,
        "okvqa": okvqa,
        "flowers": flowers,
        "cub": cub,
        "dtd": dtd,
        "english_spanish": lambda where: pairs(where / "english-spanish.json"),
        "antonyms": lambda where: pairs(where / "antonym.json", reverse=True),
        "words_capitalize": lambda where: pairs(where / "capitalize.json"),
    }
    builders[task](folder)
    return folder


def _answers(drawn: random.Random) -> list[str]:
    first, second = drawn.sample(WORDS, 2)
    return [first] * 6 + [second] * 4


def vizwiz(folder: Path) -> None:
    annotations = {}
    for split, count in (("train", 24), ("val", 5)):
        drawn, items = random.Random(split), []
        for number in range(count):
            answers = [{"answer": answer, "answer_confidence": "yes"} for answer in _answers(drawn)]
            items.append(
                {
                    "image": f"VizWiz_{split}_{number:08d}.jpg",
                    "question": f"What is the {drawn.choice(WORDS)}?",
                    "answers": answers,
                    "answer_type": "other",
                    "answerable": 1,
                }
            )
        annotations[f"Annotations/{split}.json"] = json.dumps(items).encode()
        zipped(folder / f"{split}.zip", {f"{split}/{item['image']}": picture(str(item["image"])) for item in items})
    zipped(folder / "Annotations.zip", annotations)


def okvqa(folder: Path) -> None:
    for split, count in (("train2014", 24), ("val2014", 5)):
        drawn, questions, annotations, images = random.Random(split), [], [], {}
        for number in range(count):
            image_id = 100 + number // 2
            question_id = image_id * 10 + number % 2
            questions.append(
                {
                    "image_id": image_id,
                    "question_id": question_id,
                    "question": f"What does the {drawn.choice(WORDS)} do?",
                }
            )
            answers = [
                {"answer_id": k + 1, "raw_answer": f"{word}ing", "answer": word, "answer_confidence": "yes"}
                for k, word in enumerate(_answers(drawn))
            ]
            annotations.append({"image_id": image_id, "question_id": question_id, "answers": answers})
            name = f"COCO_{split}_{image_id:012d}.jpg"
            images[f"{split}/{name}"] = picture(name)
        for name, content in (
            (f"mscoco_{split}_annotations.json", {"annotations": annotations}),
            (f"OpenEnded_mscoco_{split}_questions.json", {"questions": questions}),
        ):
            zipped(folder / f"{name}.zip", {name: json.dumps(content).encode()})
        zipped(folder / f"{split}.zip", images)


def _episodes(classes: Mapping[str, list[str]], count: int, seed: str) -> list[dict[str, str]]:
    drawn, made = random.Random(seed), []
    for _ in range(count):
        label, other = drawn.sample(list(classes), 2)
        query, positive = drawn.sample(classes[label], 2)
        made.append(
            {
                "pos": positive,
                "neg": drawn.choice(classes[other]),
                "query": query,
                "pos_label": label,
                "neg_label": other,
            }
        )
    return made


def _with_episodes(folder: Path, name: str, train: Mapping[str, list[str]], test: Mapping[str, list[str]]) -> None:
    for split, classes, count in (("train", train, 24), ("test", test, 5)):
        (folder / f"{name}_{split}.json").write_text(json.dumps(_episodes(classes, count, split)))


def flowers(folder: Path) -> None:
    # 31 classes of the official order, so that the classes 30 and 31 are left to test.
    labels = [number % 31 + 1 for number in range(31 * 6)]
    names = [f"image_{number:05d}.jpg" for number in range(1, len(labels) + 1)]
    tarred(folder / "102flowers.tgz", {f"jpg/{name}": picture(name) for name in names})
    savemat(folder / "imagelabels.mat", {"labels": [labels]})
    ids = list(range(1, len(labels) + 1))
    savemat(folder / "setid.mat", {"trnid": [ids[: 31 * 2]], "valid": [ids[31 * 2 : 31 * 4]], "tstid": [ids[31 * 4 :]]})
    paths = {f"{WORDS[c]} flower": [f"./flowers-102/jpg/{n}" for n in names[c::31]] for c in range(6)}
    _with_episodes(folder, "flower", dict(list(paths.items())[:3]), dict(list(paths.items())[3:]))


def cub(folder: Path) -> None:
    classes: dict[str, list[str]] = {
        f"{number:03d}.Gray_{WORDS[number % 12].title()}_{number}": [] for number in range(1, 32)
    }
    for label, images in classes.items():
        images += [f"{label}/{label.partition('.')[2]}_{k:04d}_{len(label)}.jpg" for k in range(4)]
    flat = [image for images in classes.values() for image in images]
    members = {f"CUB_200_2011/images/{image}": picture(image) for image in flat}
    members["CUB_200_2011/images.txt"] = "".join(f"{i} {image}\n" for i, image in enumerate(flat, 1)).encode()
    members["CUB_200_2011/train_test_split.txt"] = "".join(f"{i} {i % 2}\n" for i in range(1, len(flat) + 1)).encode()
    tarred(folder / "CUB_200_2011.tgz", members)
    named = {
        label.partition(".")[2].replace("_", " "): [f"./CUB_200_2011/images/{image}" for image in images]
        for label, images in classes.items()
    }
    _with_episodes(folder, "cub", dict(list(named.items())[:29]), dict(list(named.items())[29:]))


def dtd(folder: Path) -> None:
    classes = {f"{word}ed": [f"{word}ed/{word}ed_{k:04d}.jpg" for k in range(4)] for word in sorted(WORDS)}
    members = {f"dtd/images/{image}": picture(image) for images in classes.values() for image in images}
    for split, part in (("train1", slice(0, 2)), ("val1", slice(2, 2)), ("test1", slice(2, 4))):
        lines = [image for images in classes.values() for image in images[part]]
        members[f"dtd/labels/{split}.txt"] = "\n".join(lines).encode()
    tarred(folder / "dtd-r1.0.1.tar.gz", members)
    paths = {label: [f"./dtd/images/{image}" for image in images] for label, images in classes.items()}
    _with_episodes(folder, "dtd", dict(list(paths.items())[:10]), dict(list(paths.items())[10:]))


def pairs(path: Path, reverse: bool = False) -> None:
    drawn = random.Random(path.name)
    inputs = [a + b for a in WORDS for b in WORDS if a != b][:60]
    made = [{"input": word, "output": word[::-1]} for word in inputs]
    if reverse:
        made += [{"input": pair["output"], "output": pair["input"]} for pair in made[::2]]
    drawn.shuffle(made)
    path.write_text(json.dumps(made))
