"""Fit and use from Python: the vector of the harness, from examples in a list."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from lmms_eval.tasks import get_task_dict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_mtv import TaskVector, applied, fit_vector, stacked
from lmms_mtv.errors import ArgumentError, DataError, HookError
from lmms_mtv.models.examples import ExampleList
from lmms_mtv.shapes import CHECKPOINT
from lmms_mtv.vectors.library import Library
from support import matrix
from support.evaluations import task_manager
from support.shape_tasks import evaluate

SHORT = {"iterations": 4, "fit_shots": 2, "steps": 8, "samples": 4, "examples": 6, "candidates": 2}
TASK = "shapes_color_es"


@pytest.fixture(scope="module")
def loaded():
    processor = AutoProcessor.from_pretrained(CHECKPOINT, do_image_splitting=False)
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval(), processor


@pytest.fixture(scope="module")
def examples():
    task = get_task_dict([TASK], task_manager(), "chat")[TASK]
    return [(task.doc_to_text(doc), task.doc_to_visual(doc), task.doc_to_target(doc)) for doc in task.training_docs()]


def fitted(loaded, examples, **more) -> TaskVector:
    given = {"fewshot_delimiter": "\n", "task": TASK, "progress": False} | SHORT | more
    return fit_vector(*loaded, examples, **given)


@pytest.mark.parametrize("method", matrix.members(["mtv", "m2iv"], "mtv"))
def test_a_vector_is_that_of_the_harness_to_the_last_bit(loaded, examples, method, tmp_path):
    settings = SHORT if method == "mtv" else {"examples": 3, "epochs": 1}
    listed = ",".join(f"{name}={value}" for name, value in settings.items())
    evaluate(f"pretrained=tiny,method={method},library={tmp_path},seed=3,{listed}", [TASK], limit=1)
    (entry,) = Library(tmp_path).entries()
    expected = TaskVector.load(entry.path)
    vector = fit_vector(
        *loaded, examples, method, seed=3, fewshot_delimiter="\n", task=TASK, progress=False, **settings
    )
    assert vector.edits.keys() == expected.edits.keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(vector.tensors()[name], tensor), name
    assert vector.card.losses == expected.card.losses
    assert vector.card.accuracy == expected.card.accuracy
    assert vector.card.prompt == expected.card.prompt
    assert (vector.card.model, vector.card.revision) == (expected.card.model, expected.card.revision)
    assert vector.card.weights == expected.card.weights is not None


def test_rows_of_a_dataset_and_files_are_the_same_examples(loaded, examples, tmp_path):
    import datasets

    few = examples[:8]
    paths = []
    for number, (_, (picture,), _) in enumerate(few):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    rows = [{"text": text, "image": images[0], "answer": answer} for text, images, answer in few]
    files = [(text, [str(path)], answer) for (text, _, answer), path in zip(few, paths, strict=True)]
    known = ExampleList(few).digest()
    assert ExampleList(rows).digest() == known
    assert ExampleList(files).digest() == known
    dataset = datasets.Dataset.from_list([{"text": t, "image": p[0], "answer": a} for t, p, a in files])
    dataset = dataset.cast_column("image", datasets.Image())
    assert ExampleList(dataset).digest() == known
    assert ExampleList([(few[0][0], few[0][1], "otro"), *few[1:]]).digest() != known
    assert ExampleList(few, fewshot_delimiter="\n").digest() == known


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "there are no examples"),
        (["blue", "red"], "example 0 is str: expected"),
        ([{"question": "?", "answer": "red"}] * 9, "example 0 has question, answer: expected"),
        ([("What?", (), 3)] * 9, "expected two texts"),
        ([("What?", "red")], "has 1 examples, but prompts of 2 demonstrations .*: pass more examples [^0]*$"),
        ([("What?", "red")] * 2, "pass more examples .*, or fit_shots= .* of at most 1$"),
        ({"a": "b"}, "examples is a dict, expected a list of"),
        (iter([("What?", "red")]), "examples is a list_iterator, expected a list of"),
        ("train.jsonl", "examples='train.jsonl': a path is no list of examples"),
        (Path("train.jsonl"), "examples='train.jsonl': a path is no list of examples"),
        ([("What?", "red"), ("What?", " ")] * 9, "example 1 has an empty answer"),
        ([("What?", "no.png", "red")] * 9, "example 0: there is no image at no.png"),
        ([("What?", [__file__], "red")] * 9, "example 0: the image .*test_python.py cannot be read"),
        ([("What?", numpy.zeros((8, 8, 3)), "red")] * 9, "example 0: an image is .* or a path, found ndarray"),
        ([("What?", [numpy.zeros((8, 8, 3))], "red")] * 9, "example 0: an image is .* or a path, found ndarray"),
        ([("What?", b"PNG", "red")] * 9, "example 0: an image is .* or a path, found bytes"),
        ([("<image>What?", Image.new("RGB", (8, 8)), "red")] * 9, "example 0: its text already has <image>: leave it"),
        ([("<image>What?", "red")] * 9, "example 0: its text already has <image>: leave it"),
        ([("What?", "<image>")] * 9, "example 0: its answer already has <image>: leave it"),
    ],
)
def test_examples_of_no_known_form_are_one_error(loaded, wrong, said):
    with pytest.raises(DataError, match=said):
        fit_vector(*loaded, wrong, progress=False, **SHORT)


def test_unknown_names_are_one_error_before_anything_runs(loaded, examples):
    with pytest.raises(ArgumentError, match="unknown method 'mtvv'"):
        fit_vector(*loaded, examples, "mtvv")
    with pytest.raises(ArgumentError, match="unknown setting of method mtv 'itertions'"):
        fit_vector(*loaded, examples, itertions=3)
    with pytest.raises(ArgumentError, match="unknown prompt_style 'chatty'"):
        fit_vector(*loaded, examples, prompt_style="chatty")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": -1}, "^seed=-1, expected an integer, 0 or more$"),
        ({"seed": True}, "^seed=True, expected an integer, 0 or more$"),
        ({"shots": -1}, "^shots=-1, expected an integer, 0 or more$"),
        ({"shots": "2"}, "^shots='2', expected an integer, 0 or more$"),
        ({"batch_size": 0}, "^batch_size=0, expected an integer, 1 or more$"),
        ({"task": ""}, "^task='', expected a name"),
        ({"steps": 0}, "^steps=0, expected at least 1$"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_error(loaded, examples, wrong, said):
    with pytest.raises(ArgumentError, match=said):
        fit_vector(*loaded, examples, progress=False, **SHORT | wrong)


def test_a_name_or_a_tokenizer_in_the_wrong_place_is_one_error(loaded, examples):
    model, processor = loaded
    with pytest.raises(ArgumentError, match=r"^model is a str: pass a loaded model"):
        fit_vector("tiny", processor, examples)
    with pytest.raises(ArgumentError, match=r"pass the processor of .*, not its tokenizer"):
        fit_vector(model, processor.tokenizer, examples, progress=False, **SHORT)


class TestUse:
    @pytest.fixture(scope="class")
    def vector(self, loaded, examples):
        return fitted(loaded, examples[:40], steps=2, iterations=2)

    @pytest.fixture(scope="class")
    def other(self, loaded, examples):
        return fitted(loaded, examples[:40], steps=2, iterations=2, seed=1)

    @pytest.fixture
    def logits(self, loaded):
        model, processor = loaded
        pictures = [Image.new("RGB", (128, 128), color) for color in ("red", "blue", "green")]
        inputs = processor(
            text=["<image>What is it? Answer:"] * 3, images=[[picture] for picture in pictures], return_tensors="pt"
        )

        @torch.no_grad()
        def of(context=None) -> torch.Tensor:
            if context is None:
                return model(**inputs).logits[:, -1]
            with context:
                return model(**inputs).logits[:, -1]

        return of

    def test_apply_is_the_context_of_an_edit(self, loaded, vector, logits):
        plain, edited = logits(), logits(vector.apply(loaded[0]))
        assert torch.equal(edited, logits(applied(loaded[0], vector)))
        assert not torch.equal(edited, plain)
        assert torch.equal(logits(), plain)

    def test_a_strength_moves_activations_so_far(self, loaded, vector, logits):
        edit, half = vector.edits["heads"], (0.5 * vector).edits["heads"]
        x = torch.randn(edit.value.shape, generator=torch.Generator().manual_seed(0))
        moved = edit.keep[..., None] * x + edit.gain[..., None] * edit.value
        torch.testing.assert_close(half.keep[..., None] * x + half.gain[..., None] * half.value, (x + moved) / 2)
        assert torch.equal(logits((vector * 0).apply(loaded[0])), logits())
        assert torch.equal(logits((vector * 1).apply(loaded[0])), logits(vector.apply(loaded[0])))
        assert (vector * 0.5).card.parents == {vector.id: 0.5}
        assert len({vector.id, (vector * 0.5).id, (vector * 0.25).id}) == 3
        assert (vector / 2).id == (0.5 * vector).id
        assert (-vector).card.parents == {vector.id: -1.0}

    def test_a_sum_moves_by_both_changes(self, vector, other):
        x = torch.randn(vector.edits["heads"].value.shape, generator=torch.Generator().manual_seed(0))

        def change(each: TaskVector) -> torch.Tensor:
            edit = each.edits["heads"]
            return (edit.keep[..., None] - 1) * x + edit.gain[..., None] * edit.value

        torch.testing.assert_close(change(vector + other), change(vector) + change(other))
        torch.testing.assert_close(change(vector - other), change(vector) - change(other))
        assert sum([vector, other]).id == (vector + other).id
        mean = 0.5 * vector + 0.5 * other
        torch.testing.assert_close(change(mean), (change(vector) + change(other)) / 2)
        with pytest.raises(ArgumentError, match="given twice"):
            vector + vector

    def test_rows_of_a_batch_have_vectors_of_their_own(self, loaded, vector, other, logits):
        rows = logits(applied(loaded[0], stacked([vector, None, other])))
        for row, context in enumerate((vector.apply(loaded[0]), None, other.apply(loaded[0]))):
            torch.testing.assert_close(rows[row], logits(context)[row], rtol=1e-5, atol=1e-5)
        with pytest.raises(ArgumentError, match="at least one row"):
            stacked([None, None])
        with pytest.raises(ArgumentError, match=r"a row is str, expected a TaskVector or None"):
            stacked(["colors/mtv", vector])  # type: ignore[list-item]
        with pytest.raises(
            HookError, match=r"2 rows met a batch of 3 rows: stack one vector for each row \(with num_beams"
        ):
            logits(applied(loaded[0], stacked([vector, None])))

    def test_a_context_can_be_entered_again(self, loaded, vector, logits):
        context = vector.apply(loaded[0])
        assert torch.equal(logits(context), logits(context))
        with context:
            once = logits()
        assert torch.equal(once, logits(context))
        assert not any(module._forward_pre_hooks for module in loaded[0].modules())

    @pytest.mark.parametrize("wrong", ["tiny", None])
    def test_what_is_no_model_or_no_vector_is_one_line(self, loaded, vector, wrong):
        with pytest.raises(ArgumentError, match=r"the model is (str|NoneType): pass a loaded model"):
            vector.apply(wrong)
        for no_vector in (wrong, [vector, None]):
            with pytest.raises(ArgumentError, match=r"expected a TaskVector.*stacked"), applied(loaded[0], no_vector):
                pass

    def test_other_weights_are_told(self, loaded, vector, caplog):
        model = loaded[0]
        vector.apply(model)
        vector.apply(copy.deepcopy(model).to(torch.bfloat16))
        assert not caplog.records
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in other.named_parameters():
                if "o_proj" in name:
                    weight.mul_(1.5)
        vector.apply(other)
        assert "was fitted for other weights (lmms-mtv/tiny, revision sha256:" in caplog.text

    def test_prompts_padded_on_the_right_do_not_generate(self, loaded, vector):
        model, processor = loaded
        pictures = [[Image.new("RGB", (128, 128), color)] for color in ("red", "blue")]
        texts = ["<image>What is it? Answer:", "<image>What color is it? What is it? Answer:"]

        def answers(side: str) -> torch.Tensor:
            inputs = processor(text=texts, images=pictures, padding=True, padding_side=side, return_tensors="pt")
            with vector.apply(model):
                return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, -3:]

        assert answers("left").shape == (2, 3)
        with pytest.raises(HookError, match=r"padded on the right.*tokenizer\.padding_side='left'"):
            answers("right")

    def test_it_is_shown_in_a_few_lines(self, vector):
        shown = repr(vector)
        assert len(shown.splitlines()) <= 4
        assert len(shown) < 400
        assert all(part in shown for part in (vector.id, TASK, vector.described()))

    def test_it_is_loaded_by_whatever_names_it(self, vector, other, tmp_path):
        library = Library(tmp_path / "library")
        folder = library.add(vector)
        for name in (vector.id, vector.id[:8], f"{TASK}/mtv"):
            assert TaskVector.load(name, library=library.root).checksum == vector.checksum
        path = vector.save(tmp_path / "vector.safetensors")
        for place in (path, str(path), tmp_path, str(tmp_path), TaskVector.load(path).save(tmp_path / "b.safetensors")):
            assert TaskVector.load(place).checksum == vector.checksum
        assert TaskVector.from_pretrained(tmp_path).id == vector.id
        library.add(other)
        with pytest.raises(ArgumentError, match="give seed or an id"):
            TaskVector.load(f"{TASK}/mtv", library=library.root)
        assert TaskVector.load(f"{TASK}/mtv", library=library.root, seed=1).id == other.id
        with pytest.raises(ArgumentError, match="no vector 'shapes_color_es/live' in the library"):
            TaskVector.load(f"{TASK}/live", library=library.root)
        assert folder.exists()
