"""What of a working folder a job gets, against the archive that Ray itself makes of it."""

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from ray_rl import working_folder
from ray_rl.errors import ConfigError
from ray_rl.working_folder import PROGRAM, WorkingFolder

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkout with files that stay here, for one reason or another."""
    for name in PROGRAM:
        write(tmp_path / name / "__init__.py")
    write(tmp_path / ".gitignore", "runs/\n*.log\n")
    write(tmp_path / ".rayignore", "/tests/\n")
    for name in (
        "mine/recipe.yaml", "reward.py", "runs/a/model.bin", "mine/x.log", "tests/test_x.py", ".git/config",
        "mine/.venv/bin/python", "mine/__pycache__/x.pyc", "mine/data/tests/kept", "mine/left/out",
    ):  # fmt: skip
        write(tmp_path / name)
    write(tmp_path / "mine" / ".gitignore", "left\n")
    return tmp_path


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def archived(folder: Path, target: Path) -> set[str]:
    create_package(str(folder), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_files_are_those_of_rays_own_archive(folder, tmp_path_factory):
    files = WorkingFolder.read(folder).files
    assert files.keys() == archived(folder, tmp_path_factory.mktemp("archive") / "folder.zip")
    assert {"mine/recipe.yaml", "reward.py", "mine/data/tests/kept"} <= files.keys()
    left_out = ("runs", "mine/x.log", "tests", ".git/", "mine/.venv", "mine/__pycache__", "mine/left")
    assert not [name for name in files if name.startswith(left_out)]


def test_this_repository_is_small_and_complete():
    folder = WorkingFolder.read(ROOT)
    folder.check()
    assert folder.bytes < 10 * 2**20
    assert folder.holds("ray_rl/embedded/policy/model.safetensors")
    assert folder.holds("ray_rl/recipes/laptop-grpo.yaml")
    assert not folder.holds("tests")


def test_a_folder_without_the_program_is_refused(folder):
    (folder / "actors" / "__init__.py").unlink()
    write(folder / ".rayignore", "learner/\n")
    with pytest.raises(ConfigError, match=r"^working folder: .* lacks actors, learner, or an ignore file names them"):
        WorkingFolder.read(folder).check()


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(folder, monkeypatch):
    monkeypatch.setattr(working_folder, "_MOST_BYTES", 3 * 2**20)
    for size in (1, 2, 3):
        write(folder / f"model{size}.bin", "x" * size * 2**20)
    line = (
        r"6\.0 MiB to send, and at most 3\.0 MiB are; .*\.rayignore; the largest: model3\.bin \(3\.0 MiB\), "
        r"model2\.bin \(2\.0 MiB\), model1\.bin"
    )
    with pytest.raises(ConfigError, match=line):
        WorkingFolder.read(folder).check()
    write(folder / ".rayignore", "*.bin")
    WorkingFolder.read(folder).check()


@pytest.mark.parametrize("given", ["mine/recipe.yaml", "./mine/../mine/recipe.yaml", "{folder}/mine/recipe.yaml"])
def test_a_file_goes_by_its_place_in_the_folder(folder, monkeypatch, given):
    monkeypatch.chdir(folder)
    found = WorkingFolder.read(folder).relative(given.format(folder=folder), option="recipe")
    assert found == "mine/recipe.yaml"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("../other.yaml", r"^recipe: \.\./other\.yaml lies outside of the working folder .*; put it in there$"),
        ("runs/a/model.bin", r"^recipe: runs/a/model\.bin stays here, since \.gitignore or \.rayignore names it"),
    ],
)
def test_a_file_that_would_not_arrive_is_refused(folder, monkeypatch, given, line):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=line):
        WorkingFolder.read(folder).relative(given, option="recipe")
