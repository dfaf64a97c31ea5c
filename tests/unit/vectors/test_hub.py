"""Vectors on the hub: pushed and pulled through the real client, against a local fake of the hub."""

from __future__ import annotations

import logging
import re

import huggingface_hub
import pytest
import torch
import yaml

from lmms_mtv import Edit, Library, TaskVector, applied, find_sites
from lmms_mtv.errors import ArgumentError, HubError, LibraryError, MtvError, VectorFileError
from lmms_mtv.runtime import tensor_files
from lmms_mtv.vectors.library import hub as hub_of_vectors
from lmms_mtv.vectors.library import page
from lmms_mtv.vectors.library.place import FILE, PAGE
from support import fake_hub, zoo
from support.vectors import card, vector


@pytest.fixture
def hub(monkeypatch):
    """A fake hub that the client is sent to, with the token to write to it."""
    with fake_hub.running() as found:
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # Xet has a protocol of its own, which only the hub speaks; without it the client uses LFS.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield found


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def offered(hub: fake_hub.Hub, files_of_it: dict[str, bytes], **changes) -> fake_hub.Repository:
    hub.repositories["owner/name"] = repository = fake_hub.Repository(**changes)
    repository.commit(files_of_it)
    return repository


def test_a_vector_pushes_itself_and_is_loaded_by_its_name(hub):
    rng = torch.Generator().manual_seed(0)
    edit = Edit.replace(torch.randn(2, 2, 4, generator=rng), torch.tensor([[1, 0], [0, 1]]))
    geometry = ((0, "a.0", 2, 4), (1, "a.1", 2, 4))
    made = TaskVector({"heads": edit}, card(model="tiny", geometry=geometry))
    assert made.push_to_hub("owner/name") == f"{hub.endpoint}/owner/name"
    for found in (TaskVector.from_pretrained("owner/name"), TaskVector.load("hub:owner/name")):
        assert found.checksum == made.checksum
        assert found.card == made.card


def downloads(hub: fake_hub.Hub) -> list[str]:
    return [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]


def test_a_pushed_vector_pulled_into_an_empty_library_gives_the_same_logits(hub, library, monkeypatch, tmp_path):
    tiny = zoo.build(zoo.idefics3)
    inputs = tiny.inputs([[5, 6, 7], [8, 9, 10, 11]])
    geometry = find_sites(tiny.model).geometry
    rng = torch.Generator().manual_seed(0)
    shape = (len(geometry), geometry[0][2], geometry[0][3])
    edit = Edit.replace(torch.randn(shape, generator=rng), torch.rand(shape[:2], generator=rng) < 0.5)
    made = TaskVector({"heads": edit}, card(model="tiny", geometry=geometry))
    address = hub_of_vectors.pushed(made.save(tmp_path / FILE), "owner/name")
    assert address == f"{hub.endpoint}/owner/name"
    monkeypatch.delenv("HF_TOKEN")
    entry = library.pull("owner/name")
    assert library.entries() == [entry]
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        with applied(tiny.model, made):
            before = tiny.model(**inputs).logits
        with applied(tiny.model, library.get(made.card)):
            after = tiny.model(**inputs).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, plain)


def test_a_push_is_one_commit_with_a_page_of_the_hub(hub, tmp_path):
    path = vector().save(tmp_path / FILE)
    hub_of_vectors.pushed(path, "owner/name", private=True)
    repository = hub.repositories["owner/name"]
    assert repository.private
    (commit,) = repository.commits.values()
    assert commit.keys() == {FILE, PAGE}
    assert commit[FILE] == path.read_bytes()
    _, front, text = commit[PAGE].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lmms-mtv",
        "base_model": "some/model",
        "tags": ["task-vector", "multimodal-task-vectors", "mtv"],
    }
    for said in (
        "vector=hub:owner/name",
        "2 of 4 (layer 0: 0; layer 2: 1)",
        'from_pretrained("owner/name")',
        '"steps": 600',
    ):
        assert said in text
    hub_of_vectors.pushed(vector(values=1).save(path), "owner/name")
    assert len(repository.commits) == 2


@pytest.mark.parametrize(
    ("model", "split", "said", "base"),
    [
        ("some/model", "train", "pretrained=some/model,vector=hub:owner/name --tasks task", True),
        ("some/model", "", "pretrained=some/model,vector=hub:owner/name --tasks TASK", True),
        ("lmms-mtv/tiny", "train", "pretrained=tiny,vector=hub:owner/name --tasks task", False),
        ("lmms-mtv/other", "train", "pretrained=lmms-mtv/other,vector=hub:owner/name --tasks task", True),
        ("lmms-mtv/pictures", "train", "pretrained=pictures,vector=hub:owner/name --tasks task", False),
        ("local/4af64c71", "train", "pretrained=FOLDER,vector=hub:owner/name --tasks task", False),
    ],
)
def test_the_page_has_only_what_others_can_run(model, split, said, base):
    text = page.of(vector(model=model, split=split), "owner/name")
    assert said in text
    assert ("base_model" in text) == base
    assert ("FOLDER` is your folder of the model" in text) == model.startswith("local/")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "page", "exec")


def test_a_revision_is_pulled_by_its_name(hub, library):
    first = offered(hub, {FILE: vector(seed=1).content()}).commits.keys()
    (oid,) = list(first)
    hub.repositories["owner/name"].commit({FILE: vector(seed=2).content()})
    assert library.pull(f"owner/name@{oid}").card.seed == 1
    assert library.resolve("hub:owner/name").card.seed == 2
    assert library.resolve(f"hub:owner/name@{oid}").card.seed == 1
    assert TaskVector.from_pretrained("owner/name", revision=oid).card.seed == 1
    assert TaskVector.from_pretrained("owner/name").card.seed == 2
    with pytest.raises(HubError, match=r"has no such revision: check what follows the @"):
        library.pull("owner/name@nowhere")


def test_only_the_vector_is_downloaded(hub, library, tmp_path):
    others = {"../../outside": b"x", "/etc/passwd": b"x", PAGE: b"x", "pickle.bin": b"x"}
    repository = offered(hub, {**others, FILE: vector().content()})
    entry = library.pull("owner/name")
    assert downloads(hub) == [f"/owner/name/resolve/{next(iter(repository.commits))}/{FILE}"]
    assert {path.name for path in library.root.rglob("*") if path.is_file()} == {FILE, PAGE}
    assert [path.name for path in tmp_path.iterdir()] == ["library"]
    assert "lmms-eval" in (entry.path.parent / PAGE).read_text()


def test_a_repository_without_a_vector_or_with_too_large_a_one_is_not_downloaded(hub, library):
    offered(hub, {"sub/" + FILE: vector().content(), f"../{FILE}": b"x"})
    with pytest.raises(HubError, match=f"has no {FILE}"):
        library.pull("owner/name")
    for size, said in ((tensor_files.LIMIT + 1, "1,073,741,825 bytes"), (None, "an unknown number of bytes")):
        offered(hub, {FILE: vector().content()}, sizes={FILE: size})
        with pytest.raises(VectorFileError, match=f"{said}.*it is not downloaded"):
            library.pull("owner/name")
    assert downloads(hub) == []
    assert not library.root.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        (10 * 2**30).to_bytes(8, "little") + b"{}",
        tensor_files.safetensors_bytes({}, {"format": "other"}),
    ],
    ids=["empty", "pickle", "claim", "foreign"],
)
def test_what_is_no_vector_is_refused(hub, library, content):
    offered(hub, {FILE: content})
    with pytest.raises(MtvError, match="owner/name"):
        library.pull("owner/name")
    assert not library.root.exists()


def test_a_card_with_a_path_is_pulled_into_the_library(hub, library, tmp_path):
    offered(hub, {FILE: vector(task="../../../outside", model="/etc").content()})
    assert library.pull("owner/name").path.is_relative_to(library.root)
    assert [path.name for path in tmp_path.iterdir()] == ["library"]


def test_other_edits_of_the_same_recipe_do_not_replace_those_of_the_library(hub, library, caplog):
    path = library.add(vector())
    offered(hub, {FILE: vector(values=1).content()})
    with pytest.raises(LibraryError, match=f"library rm {vector().id}"):
        library.pull("owner/name")
    assert torch.equal(library.get(card()).edits["heads"].value, vector().edits["heads"].value)
    offered(hub, {FILE: vector().content()})
    assert library.pull("owner/name").path == path
    path.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert library.pull("owner/name").path == path
    assert library.verify() == []


def test_a_missing_token_or_repository_is_said(hub, library, monkeypatch):
    with pytest.raises(HubError, match="pulled from owner/name: there is none of this name, or it is private"):
        library.pull("owner/name")
    offered(hub, {FILE: vector().content()}, private=True)
    assert library.pull("owner/name").id == vector().id
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="or it is private; run `hf auth login`, or set HF_TOKEN"):
        library.pull("owner/name")
    for repository in ("owner/name", "owner/new"):
        with pytest.raises(HubError, match="wants a token that may write there; run `hf auth login`, or set HF_TOKEN"):
            hub_of_vectors.pushed(library.add(vector()), repository)


def test_a_hub_that_is_not_there_is_said(hub, library, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="nothing can be pulled from owner/name"):
        library.pull("owner/name")
    with pytest.raises(HubError, match="nothing can be pushed to owner/name"):
        hub_of_vectors.pushed(library.add(vector()), "owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, unset it"):
        library.pull("owner/name")


@pytest.mark.parametrize("name", ["name", "a/b/c", "../x", "a/..", "a/b@", "a/b@c@d", "/a", "a/", "a b/c", ""])
def test_a_name_that_is_no_repository_is_refused(library, name):
    with pytest.raises(ArgumentError, match="is no repository of the hub"):
        library.resolve(f"hub:{name}")
    with pytest.raises(ArgumentError, match="is no repository of the hub"):
        hub_of_vectors.pushed(library.add(vector()), name)


def test_what_is_pushed_is_an_intact_vector_and_the_newest_revision(hub, library):
    path = library.add(vector())
    with pytest.raises(ArgumentError, match="leave @main out"):
        hub_of_vectors.pushed(path, "owner/name@main")
    path.write_bytes(b"damaged")
    with pytest.raises(VectorFileError):
        hub_of_vectors.pushed(path, "owner/name")
    assert hub.asked == []
