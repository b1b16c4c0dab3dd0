"""`python -m mmkernels patch MODULE:FACTORY`: what patching would do to a user's model, told without doing it."""

import json
import sys

import pytest

click_testing = pytest.importorskip("click.testing")
pytest.importorskip("rich")

from mmkernels import cli  # noqa: E402


def call(*arguments):
    return click_testing.CliRunner().invoke(cli.main, [str(a) for a in arguments])


MODELS = """
from torch import nn

LIMIT = 3


class ToyAttention(nn.Linear):
    pass


def small():
    return nn.Sequential(ToyAttention(2, 2), nn.Sequential(nn.MultiheadAttention(4, 2)).eval())


class Zoo:
    model = nn.MultiheadAttention(4, 2)


def nothing():
    return nn.Linear(2, 2)


def number():
    return 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A user's own module, in the current folder."""
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "needy_models.py").write_text("import a_package_that_is_missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("my_models", None)


def test_patch(models, tmp_path):
    result = call("patch", "my_models:small", "--json", tmp_path / "patch.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "patch.json").read_text())
    assert found["title"] == "1 of 2 modules that look like attention would be replaced"
    toy, heads = found["rows"]
    assert (toy["name"], toy["kind"], toy["operation"]) == ("0", "ToyAttention", None)
    assert toy["reason"] == "no operation is known to fit this class"
    assert (heads["name"], heads["operation"]) == ("1.0", "absorbed_attention")
    for told in (found["title"], "ToyAttention", "absorbed_attention", "no operation is known"):
        assert told in result.output
    assert "forward" not in sys.modules["my_models"].Zoo.model.__dict__


def test_patch_of_a_model_and_of_nothing(models):
    assert "1 of 1 modules" in call("patch", "my_models:Zoo.model").output
    assert "0 of 0 modules that look like attention would be replaced" in call("patch", "my_models:nothing").output


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_models", "joined by a colon, got 'my_models'"),
        (":small", "joined by a colon, got ':small'"),
        ("your_models:small", "there is no module your_models"),
        ("needy_models:small", "it needs a_package_that_is_missing"),
        ("my_models:large", "my_models has no large"),
        ("my_models:Zoo.lion", "Zoo has no lion"),
        ("my_models:LIMIT", "LIMIT must be a function or a torch.nn.Module, got int"),
        ("my_models:number", "number() must return a torch.nn.Module, got int"),
    ],
)
def test_patch_names_what_is_wrong(models, factory, message):
    result = call("patch", factory)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\u2502", " ").split())
