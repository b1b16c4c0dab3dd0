"""Models as files: the same again, and nothing else is taken. Needs mmkernels[demo]."""

import hashlib
import json
import pickle

import pytest
import torch

for package in ("safetensors", "tokenizers"):
    pytest.importorskip(package)

from mmkernels import data, saving  # noqa: E402
from mmkernels.models import ImageTextModel  # noqa: E402

SMALL = {"channels": (4, 8), "embedding": 4, "hidden": 8}
MODELS = {
    "article": {},
    "classes": {"task": "multiclass", "outputs": 3, "fusion": "gated"},
    "sound": {"architecture": "hierarchical", "fusion": "bidirectional", "sound": True, "norm": "batch"},
    "numbers": {"task": "regression", "architecture": "aligned", "fusion": "channel"},
}


def drawn(**options):
    torch.manual_seed(0)
    return ImageTextModel(20, **SMALL, **options).eval()


@pytest.fixture
def folder(tmp_path):
    saving.save(tmp_path / "model", drawn(), data.Preprocessing(size=16, labels=("no", "yes"), task="binary"))
    return tmp_path / "model"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_again(kind, dtype, tmp_path):
    model = drawn(**MODELS[kind]).to(dtype)
    tokenizer = data.train_tokenizer(["some words"], min_frequency=1)
    given = data.Preprocessing(size=(16, 20), tokenizer=tokenizer, mean=(0.1, 0.2, 0.3), task="regression", labels=())
    saving.save(tmp_path, model, given)
    again, preprocessing = saving.load(tmp_path)
    image, text = torch.randn(3, 3, 16, 20, dtype=dtype), torch.randint(20, (3, 5))
    sound = torch.randn(3, 8, 9, dtype=dtype) if again.config["sound"] else None
    assert torch.equal(again(image, text, sound), model(image, text, sound))
    assert preprocessing.to_dict() == given.to_dict() and again.config == model.config and not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


def test_without_preprocessing(tmp_path):
    saving.save(tmp_path, drawn())
    assert saving.load(tmp_path)[1] is None


def change(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    change(folder, weights=hashlib.sha256(content).hexdigest())


def other_weights(folder):
    from safetensors.torch import save

    replace_weights(folder, save(ImageTextModel(21, **SMALL).state_dict()))


def pickled(folder):
    replace_weights(folder, pickle.dumps(Planted()))


class Planted:
    """What would be run if anything unpickled it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


CONFIG = drawn().config
WRONG = {
    "no folder": (lambda f: (f / "model.json").rename(f.parent / "gone"), "model.json can't be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors can't be read"),
    "not text": (lambda f: (f / "model.json").write_bytes(b"\xff\xfe\0"), "no JSON"),
    "no JSON": (lambda f: (f / "model.json").write_text("{"), "no JSON"),
    "deep JSON": (lambda f: (f / "model.json").write_text("[" * 100_000), "no JSON|isn't a model"),
    "a list": (lambda f: (f / "model.json").write_text("[]"), "isn't a model of mmkernels"),
    "foreign": (lambda f: change(f, format="other"), "isn't a model of mmkernels"),
    "newer": (lambda f: change(f, version=2), "reads up to 1.*upgrade"),
    "no version": (lambda f: change(f, version=None), "version None"),
    "no arguments": (lambda f: change(f, model=None), "model is missing"),
    "unknown argument": (lambda f: change(f, model={**CONFIG, "evil": 1}), "describes no model.*evil"),
    "wrong argument": (lambda f: change(f, model={**CONFIG, "fusion": "glue"}), "describes no model.*glue"),
    "too large for memory": (lambda f: change(f, model={**CONFIG, "vocabulary": 10**12}), "doesn't fit"),
    "too large for numbers": (lambda f: change(f, model={**CONFIG, "vocabulary": 10**30}), "describes no model"),
    "preprocessing": (lambda f: change(f, preprocessing={"size": 3}), "preprocessing must have"),
    "other weights": (other_weights, "doesn't fit the model"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), "damaged"),
    "no safetensors": (lambda f: replace_weights(f, b"\0" * 99), "can't be read"),
    "a pickle": (pickled, "can't be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_refused(kind, folder):
    spoil, message = WRONG[kind]
    spoil(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        saving.load(folder)
    assert str(folder) in str(caught.value)


def test_a_stopped_save_is_noticed(folder, monkeypatch):
    """Between the two files: what is there doesn't belong together, and says so. Nothing else stays behind."""
    write = saving._write

    def stop(path, content):
        if path.name == "model.json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(saving, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        saving.save(folder, drawn(fusion="gated"))
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ValueError, match="isn't the file that model.json was written with"):
        saving.load(folder)


def test_a_file_is_written_whole(folder, monkeypatch):
    before = (folder / "model.json").read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(saving.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        saving._write(folder / "model.json", b"{}")
    assert (folder / "model.json").read_bytes() == before and len(list(folder.iterdir())) == 2
