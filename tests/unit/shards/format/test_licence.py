"""The licence of the pictures: stated when they are packed, and repeated in the cards of models trained on them."""

import json
import shutil
from pathlib import Path

import pytest

from shards.edit.merge import merge
from shards.format.manifest import read_manifest
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER
from uniemox_dist.release.model_card import collect_data_facts


def test_a_licence_is_in_the_manifest_and_changes_no_identity(
    photo_folder: Path, photo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shards", "pack", str(photo_folder), str(out), "--layout", "folder", "--persons", "none"]
    command += ["--shard-samples", "8", "--workers", "0"]
    assert run([*command, "--licence", "CC-BY-4.0"]) == EXIT_DONE
    manifest = read_manifest(out)
    assert manifest.provenance["licence"] == "CC-BY-4.0"
    assert manifest.identity == read_manifest(photo_shards).identity
    assert "licence" not in read_manifest(photo_shards).provenance
    assert run([*command, "--resume", "--license", "CC-BY-4.0"]) == EXIT_DONE
    assert run([*command, "--resume"]) == EXIT_DONE
    capsys.readouterr()
    assert run([*command, "--resume", "--licence", "MIT"]) == EXIT_USER
    assert capsys.readouterr().err.strip().splitlines() == [
        f"uniemox: error: OUT={out}: was packed with --licence=CC-BY-4.0; give the same, or delete OUT"
    ]


def test_an_indexed_folder_states_one(photo_shards: Path, tmp_path: Path) -> None:
    shutil.copy(photo_shards / "000000.tar", tmp_path / "a.tar")
    assert run(["shards", "index", str(tmp_path), "--licence", "research only"]) == EXIT_DONE
    assert read_manifest(tmp_path).provenance["licence"] == "research only"


@pytest.mark.parametrize("text", ["", "  ", "two\nlines", "x" * 201])
def test_an_invalid_line_is_refused(
    text: str, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shards", "pack", str(photo_folder), str(tmp_path / "out"), "--layout", "folder"]
    assert run([*command, "--licence", text]) == EXIT_USER
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "--licence=" in lines[0]
    assert not list(tmp_path.iterdir())


def test_parts_of_two_licences_are_not_joined(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = PackSettings(str(photo_folder), "folder", persons="none")
    parts = [tmp_path / "1", tmp_path / "2"]
    for number, (folder, licence) in enumerate(zip(parts, ("MIT", "CC0-1.0")), 1):
        pack(settings, folder, part=(number, 2), licence=licence)
    assert run(["shards", "merge", str(tmp_path / "out"), *map(str, parts)]) == EXIT_USER
    assert "was packed with a different licence than" in capsys.readouterr().err
    shutil.rmtree(parts[1])
    pack(settings, parts[1], part=(2, 2), licence="MIT")
    merge(tmp_path / "out", parts)
    assert read_manifest(tmp_path / "out").provenance["licence"] == "MIT"


def test_a_release_names_each_source_with_its_licence(
    photo_shards: Path, emoji_shards: Path, tmp_path: Path
) -> None:
    stated = tmp_path / "photos"
    shutil.copytree(photo_shards, stated)
    manifest = json.loads((stated / "manifest.json").read_text())
    manifest["provenance"]["licence"] = "research only"
    (stated / "manifest.json").write_text(json.dumps(manifest))
    sources = [{"path": str(stated)}, {"path": str(emoji_shards / "train")}]
    config = Config.model_validate(
        {"run": {"max_steps": 1}, "data": {"sources": sources}, "teacher": {"name": "shipped:demo"}}
    )
    from shards.format.manifest import combined_identity

    identity = combined_identity([read_manifest(source["path"]).identity for source in sources])
    facts = collect_data_facts(config, identity)
    assert facts is not None
    assert [(s["name"], s["samples"], s["licence"]) for s in facts["sources"]] == [
        ("photos", 20, "research only"),
        ("shards/train", 72, None),
    ]
    assert collect_data_facts(config, "0" * 64) is None
