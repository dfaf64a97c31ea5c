"""Inputs as people have them: odd images, tokenizers, terminals, and answers that mean less than a loss says."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lmms_eval.evaluator import simple_evaluate
from loguru import logger
from PIL import Image

from lmms_mtv import TaskVector, methods
from lmms_mtv.commands.compare import ARMS
from lmms_mtv.data.pictures import opened, rgb
from lmms_mtv.errors import ArgumentError, ContextLengthError, DocumentError, ResultsError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import check, compare
from lmms_mtv.experiments.report import results
from lmms_mtv.harness import record
from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
from lmms_mtv.models.prompts import Demonstration, Prompt, blanks
from lmms_mtv.models.trial import Trial, doubts
from lmms_mtv.shapes import CHECKPOINT
from support import checkpoints, processes
from support.evaluations import own_tasks
from support.shape_tasks import SHORT, Arguments, records, task_file
from support.vectors import card

from support import grids  # isort: skip


@pytest.fixture
def said():
    """What the harness's logger says of warnings."""
    lines: list[str] = []
    handler = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(handler)


def question(text: str, *images: Image.Image) -> list[dict]:
    parts = [{"type": "image", "url": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class TestPictures:
    @pytest.mark.parametrize("mode", ["I;16", "I"])
    def test_sixteen_bit_grey_keeps_its_greys(self, mode):
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        deep = (ramp.astype(np.uint16) * 257) if mode == "I;16" else (ramp.astype(np.int32) * 257)
        shown = np.asarray(rgb(Image.fromarray(deep)))
        assert (shown == ramp[..., None]).all()

    def test_eight_bits_and_colours_are_as_pillow_has_them(self):
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        assert (np.asarray(rgb(Image.fromarray(ramp.astype(np.int32)))) == ramp[..., None]).all()
        picture = Image.new("RGBA", (2, 2), (1, 2, 3, 9))
        assert rgb(picture).tobytes() == picture.convert("RGB").tobytes()

    def test_a_file_is_turned_as_its_exif_data_say(self, tmp_path):
        picture = Image.new("RGB", (4, 2), "red")
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(tmp_path / "turned.jpg", exif=exif)
        assert Image.open(tmp_path / "turned.jpg").size == (4, 2)
        assert opened(tmp_path / "turned.jpg").size == (2, 4)


class TestDocuments:
    FAILING = (
        "\n\ndef some(doc):\n"
        "    import pathlib\n"
        "    if doc['position'] == 'left':\n        return [str(pathlib.Path(__file__).parent / 'absent.png')]\n"
        "    return draw(doc)\n"
    )

    def evaluated(self, folder: Path, arguments: str) -> tuple[dict, dict]:
        from lmms_eval.api.task import Task

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "args", None, raising=False)
            given = Arguments(folder / "out")
            found = simple_evaluate(
                "mtv", arguments, tasks=["custom"], task_manager=own_tasks(folder), limit=40, cli_args=given
            )
        (stored,) = records(folder / "out")
        return found, stored["tasks"]["custom"]["evaluation"]

    @pytest.mark.slow
    def test_a_picture_that_does_not_open_costs_no_other_document_its_answer(self, tmp_path, said):
        folder = task_file(tmp_path, doc_to_visual="some")
        with (folder / "utils.py").open("a", encoding="utf-8") as file:
            file.write(self.FAILING)
        found, stored = self.evaluated(folder, "pretrained=tiny,method=none,batch_size=8")
        documents = found["samples"]["custom"]
        lost = {sample["doc_id"] for sample in documents if sample["doc"]["position"] == "left"}
        assert 0 < len(lost) < 40
        assert stored["unreadable"] == len(lost)
        for sample in documents:
            assert bool(sample["filtered_resps"][0]) == (sample["doc_id"] not in lost)
            assert sample["doc_id"] not in lost or sample["exact_match"] == 0
        assert any(f"document {min(lost)} of task custom" in line and "absent.png" in line for line in said)
        assert any(line.startswith(f"{len(lost)} of 40 documents of task custom could not be shown") for line in said)

    @pytest.mark.slow
    def test_nor_where_a_base_reads_documents_itself(self, tmp_path, said):
        """The bases of lmms-eval end at the first picture that they cannot open."""
        folder = task_file(tmp_path, doc_to_visual="some")
        with (folder / "utils.py").open("a", encoding="utf-8") as file:
            file.write("\n\ndef some(doc):\n    return [Image.open('absent.png')] if doc['position'] == 'left' else ")
            file.write("draw(doc)\n")
        model = checkpoints.idefics2(tmp_path / "idefics2")
        given = f"base=idefics2,pretrained={model},device=cpu,device_map=cpu,dtype=float32,attn_implementation=eager"
        given += ",method=none"
        found, stored = self.evaluated(folder, given)
        lost = {sample["doc_id"] for sample in found["samples"]["custom"] if sample["doc"]["position"] == "left"}
        assert stored["unreadable"] == len(lost) > 0
        assert any(f"document {min(lost)} of task custom" in line and "absent.png" in line for line in said)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 8])
    def test_a_vector_is_applied_whichever_documents_open(self, size, tmp_path):
        """The first may be one that does not."""
        folder = task_file(tmp_path, doc_to_visual="some")
        with (folder / "utils.py").open("a", encoding="utf-8") as file:
            file.write(
                "\n\ndef some(doc):\n    return [Image.open('absent.png')] if doc['id'] == 'test-000' else draw(doc)\n"
            )
        _, stored = self.evaluated(folder, f"pretrained=tiny,{SHORT},batch_size={size}")
        assert stored["unreadable"] == 1

    def test_if_none_opens_the_run_ends(self, tmp_path):
        folder = task_file(tmp_path, doc_to_visual="broken")
        with pytest.raises(DocumentError, match="document 0 of task custom does not open"):
            self.evaluated(folder, "pretrained=tiny,method=none")

    def test_a_picture_that_the_processor_refuses_is_named_by_its_size(self, monkeypatch):
        base = HfBase(HfConfig(pretrained="tiny", batch_size=2))
        processor = base._processor

        def refusing(text, images, **options):
            if any(image.width > 100 for row in images for image in row):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return processor(text=text, images=images, **options)

        monkeypatch.setattr(base, "_processor", refusing)
        base._placeholder = "<image>"
        with pytest.raises(DocumentError, match=r"refuses an image of 300 x 1: absolute aspect ratio"):
            base.generate([Prompt(question("What is it?", Image.new("RGB", (300, 1))))], {"max_new_tokens": 1})


def test_prompts_with_and_without_images_go_into_one_batch(tmp_path):
    base = HfBase(HfConfig(pretrained=str(checkpoints.mllama(tmp_path)), batch_size=3))
    picture = Image.new("RGB", (32, 32), "red")
    prompts = [Prompt(question("What is it?", *images)) for images in ([picture], [], [picture])]
    together, tokens = base.generate(prompts, {"max_new_tokens": 3})
    alone = [base.generate([prompt], {"max_new_tokens": 3}) for prompt in prompts]
    assert [answer.text for answer in together] == [answer.text for answers, _ in alone for answer in answers]
    assert tokens == sum(count for _, count in alone)


def test_a_tokenizer_without_pad_and_eos_token(text_model, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(text_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    prompts = [Prompt(question("red")), Prompt(question("red blue green"))]
    texts = []
    for size in (1, 2):
        base = HfBase(HfConfig(pretrained=str(folder), batch_size=size))
        texts.append(
            [a.text for i in range(0, 2, size) for a in base.generate(prompts[i : i + size], {"max_new_tokens": 4})[0]]
        )
    assert texts[0] == texts[1]


def test_a_prompt_that_does_not_fit_says_what_mends_it(text_model):
    base = HfBase(HfConfig(pretrained=str(text_model)))
    context = base.context
    alone, shown = Prompt(question("red")), Prompt(question("red"), [Demonstration(question("red"), "blue")] * 200)
    with pytest.raises(ContextLengthError, match=rf"at most {context - 1} max_new_tokens") as failed:
        base.generate([alone], {"max_new_tokens": context})
    assert "shots" not in str(failed.value)
    with pytest.raises(ContextLengthError, match="smaller shots="):
        base.generate([shown], {"max_new_tokens": 5})
    with pytest.raises(ContextLengthError, match="question alone is too long"):
        base.generate([Prompt(question("red " * 400))], {"max_new_tokens": 5})


def test_generation_arguments_reach_transformers_and_unknown_ones_are_named_once(text_model, said):
    base = HfBase(HfConfig(pretrained=str(text_model)))
    prompt = Prompt(question("red"), fewshot_delimiter="")
    plain = base.generate([prompt], {"max_new_tokens": 8})[0][0].text
    first = plain.split()[0]
    ids = [base._tokenizer(first, add_special_tokens=False)["input_ids"][:1]]
    assert base.generate([prompt], {"max_new_tokens": 8, "bad_words_ids": ids})[0][0].text != plain
    for _ in range(2):
        base.generate([prompt], {"max_new_tokens": 8, "tempperature": 3, "use_cache": False})
    assert [line for line in said if "change nothing: tempperature, use_cache" in line] == said[-1:]


class TestPlaces:
    def test_a_task_name_does_not_lead_out_of_the_results(self, tmp_path):
        for name in ("own", "group/own", "../own", str(tmp_path / "elsewhere")):
            vector = SimpleNamespace(card=SimpleNamespace(task=name, method="mtv"), id="0" * 16)
            path = record.vector_path(tmp_path / "model", vector)
            assert path.resolve().is_relative_to((tmp_path / "model").resolve())
        assert record.vector_path(tmp_path, SimpleNamespace(card=SimpleNamespace(task="a", method="mtv"), id="1")) == (
            tmp_path / "a" / "mtv-1" / "vector.safetensors"
        )

    @pytest.mark.slow
    def test_a_fit_is_kept_where_its_copy_cannot_be_written(self, tmp_path, said):
        from lmms_eval.api.task import Task

        folder, library = task_file(tmp_path / "tasks"), tmp_path / "library"
        (tmp_path / "file").write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "args", None, raising=False)
            found = simple_evaluate(
                *("mtv", f"pretrained=tiny,library={library},{SHORT}"),
                tasks=["custom"],
                task_manager=own_tasks(folder),
                limit=2,
                cli_args=Arguments(tmp_path / "file"),
            )
        assert found["results"]["custom"]["exact_match,none"] >= 0
        (path,) = library.rglob("vector.safetensors")
        assert TaskVector.load(path).card.task == "custom"
        assert any("results cannot be written" in line and "in the library alone" in line for line in said)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, "-m", "lmms_mtv", *command], env=os.environ | environment, timeout=120)


class TestTerminals:
    @pytest.mark.slow
    def test_output_that_is_not_utf8(self, tmp_path):
        grids.write(tmp_path / "grid", grids.plan(tasks=["shapes_color_en"], seeds=[0, 1]))
        done = run("report", str(tmp_path / "grid"), PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert " ? " in done.stdout
        assert "±" in run("report", str(tmp_path / "grid"), PYTHONIOENCODING="utf-8").stdout

    @pytest.mark.slow
    def test_a_reader_that_closes_early(self, tmp_path):
        grids.write(tmp_path / "grid", grids.plan(tasks=["shapes_color_en"], seeds=[0, 1]))
        pipe = subprocess.Popen(
            [sys.executable, "-m", "lmms_mtv", "report", str(tmp_path / "grid")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert pipe.stdout is not None
        assert pipe.stderr is not None
        pipe.stdout.close()
        assert pipe.stderr.read() == ""
        assert pipe.wait(timeout=60) == 0


CHANGES = {
    "revision": lambda cell: {"model": {**cell.model, "revision": "sha256:1"}},
    "precision": lambda cell: {"model": {**cell.model, "dtype": "bfloat16"}},
    "documents": lambda cell: {"samples": {**cell.samples, "documents": [n + 1 for n in range(cell.n)]}},
    "prompts": lambda cell: {"samples": {**cell.samples, "prompts": ["0" * 8] * cell.n}},
}


class TestOneTable:
    @pytest.fixture(params=CHANGES)
    def mixed(self, request, tmp_path) -> Path:
        import dataclasses

        def change(key, cell):
            odd = (key.arm, key.seed) == ("MTV", 1)
            return dataclasses.replace(cell, **CHANGES[request.param](cell)) if odd else cell

        planned = grids.plan(tasks=["shapes_color_en"], seeds=[0, 1], arms={n: ARMS[n] for n in ("zero-shot", "MTV")})
        return grids.write(tmp_path / "grid", planned, change)

    @pytest.mark.slow
    def test_report_and_check_refuse_cells_that_do_not_belong_together(self, mixed):
        with pytest.raises(ResultsError, match=r"do not belong in one table: .*MTV"):
            results.read(mixed)
        (difference,) = check.stored(mixed)
        assert difference.what == "one table"
        assert "MTV" in difference.found
        assert run("report", str(mixed)).returncode == 1

    def test_few_shot_prompts_of_other_seeds_and_shots_may_differ(self, tmp_path):
        import dataclasses

        def change(key, cell):
            written = [f"{cell.shots}{key.seed if cell.shots else 0}"] * cell.n
            return dataclasses.replace(cell, samples={**cell.samples, "prompts": written})

        folder = grids.write(tmp_path / "grid", grids.plan(tasks=["shapes_color_en"], seeds=[0, 1]), change)
        assert cells.contradictions(cells.read_all(folder)) == []

    def test_a_comparison_goes_on_with_the_same_model_alone(self, tmp_path):
        planned = grids.plan(tasks=["shapes_color_en"], seeds=[0], arms={n: ARMS[n] for n in ("zero-shot", "MTV")})
        folder = grids.write(tmp_path / "grid", planned, lambda p, c: c if p.arm == "MTV" else None)
        bench = SimpleNamespace(
            groups={}, leads=True, model={"name": "tiny", "revision": "sha256:9", "dtype": "float32"}
        )
        with pytest.raises(ArgumentError, match=r"revision sha256:0 .*this model is tiny revision sha256:9"):
            compare.run(planned, folder, lambda *_: bench)


class TestTrial:
    @pytest.mark.slow
    def test_a_fit_is_tried_on_training_queries(self, tmp_path, caplog):
        from lmms_eval.api.task import Task

        folder = task_file(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "args", None, raising=False)
            options = {"tasks": ["custom"], "task_manager": own_tasks(folder), "limit": 2}
            given = "pretrained=tiny,iterations=40,fit_shots=4,steps=100,loss=all,batch_size=8,reuse=False"
            simple_evaluate("mtv", given, cli_args=Arguments(tmp_path / "out"), **options)
        (stored,) = records(tmp_path / "out")
        tried = stored["tasks"]["custom"]["fit_accuracy"]
        assert tried["queries"] == 16
        assert tried["edited"] > tried["unedited"]
        assert tried["endless"] < 0.5
        (path,) = (tmp_path / "out").rglob("vector.safetensors")
        assert TaskVector.load(path).card.accuracy == tried

    def test_what_speaks_against_a_vector(self):
        good = {"queries": 16.0, "unedited": 0.1, "edited": 0.9, "endless": 0.0}
        first = card(config={"loss": "first", "steps": 9}, seed=7)
        assert doubts(Trial(), first) == doubts(Trial(good), first) == []
        assert "same token" in doubts(Trial(good, True), first)[0]
        (worse,) = doubts(Trial(good | {"edited": 0.0}), first)
        assert worse.startswith("method=mtv, seed=7: with the vector 0% of 16 training queries are answered right")
        assert worse.endswith("without it 10%: pass loss=all, more steps=, or another method=")
        (endless,) = doubts(Trial(good | {"endless": 0.9}), first)
        assert endless.startswith("90% of the answers with the vector run on past the target: fit it with loss=all")

    @pytest.mark.parametrize("config", [{"loss": "all", "steps": 9}, {"iterations": 9}])
    def test_a_loss_that_is_in_use_already_is_no_advice(self, config):
        bad = Trial({"queries": 16.0, "unedited": 0.1, "edited": 0.0, "endless": 0.9}, True)
        worse, endless = doubts(bad, card(config=config))
        assert "loss=all" not in worse + endless
        assert "fewshot_delimiter" in worse
        assert "fewshot_delimiter" in endless
        assert ("more steps=" in worse and "more steps=" in endless) == ("steps" in config)

    @pytest.mark.parametrize("name", methods.own())
    def test_a_control_may_be_worse_than_no_vector(self, name):
        method = methods.get(name)
        assert method.control == (name in ("random", "degraded"))
        worse = Trial({"queries": 16.0, "unedited": 0.1, "edited": 0.0, "endless": 0.0})
        assert bool(doubts(worse, card(), method.control)) != method.control

    @pytest.mark.slow
    def test_a_loss_on_a_token_that_all_targets_share_is_told(self, tmp_path, said):
        """As the bare space before a number is, with many tokenizers."""
        from lmms_eval.api.task import Task

        folder = task_file(tmp_path, doc_to_target="marked")
        with (folder / "utils.py").open("a", encoding="utf-8") as file:
            file.write("\n\ndef marked(doc):\n    return 'red ' + color_en(doc)\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "args", None, raising=False)
            for loss in ("first", "all"):
                said.clear()
                simple_evaluate(
                    "mtv",
                    f"pretrained=tiny,{SHORT},loss={loss}",
                    tasks=["custom"],
                    task_manager=own_tasks(folder),
                    limit=1,
                )
                assert any("begin with the same token" in line for line in said) == (loss == "first")

    def test_blanks_before_a_target_tell_nothing_of_it(self):
        """Whatever stands before all answers is written with the answer, and is not its first token."""
        base = HfBase(HfConfig(pretrained="tiny"))
        prompt = Prompt(question("what is this?"), target="red circle")
        spaced = dataclasses.replace(prompt, target_delimiter="\n")
        assert base.lead_ids(prompt) == []
        assert base._tokenizer.convert_ids_to_tokens(base.lead_ids(spaced)) == ["\n"]
        assert base.target_ids(spaced) == base.target_ids(prompt)
        assert blanks([7, 8], lambda ids: " ") == 0, "a target of blanks alone is what it is"


def test_logging_is_as_it_was():
    assert logging.root.manager.disable == logging.NOTSET
    assert CHECKPOINT.is_dir()
