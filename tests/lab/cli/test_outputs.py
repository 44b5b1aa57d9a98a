"""Where measurements go when nobody says: never over what is there, and never an error for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridkv.errors import UsageError
from hybridkv_lab.cli.outputs import output_path
from tests.cli.conftest import Cli

TEXT = Path(__file__).parents[2] / "data" / "heldout_excerpt.txt"
SMALL = ("-f", TEXT, "-c", 64, "--windows", 1, "-n", 0, "-t", 1, "--types", "q8_0")


@pytest.mark.usefixtures("no_pictures")
def test_a_second_measurement_has_a_name_of_its_own(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "note: hybridkv-eval" not in cli("eval", *SMALL).err
    first = (tmp_path / "hybridkv-eval.jsonl").read_bytes()
    done = cli("eval", *SMALL)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "note: hybridkv-eval.jsonl is there from before; this run writes hybridkv-eval-2.jsonl" in said
    assert (tmp_path / "hybridkv-eval.jsonl").read_bytes() == first
    assert (tmp_path / "hybridkv-eval-2.jsonl").exists()


@pytest.mark.parametrize(("default", "others"), [("kv.toml", (".npz", ".json")), ("run.jsonl", (".npz",))])
def test_names(
    default: str,
    others: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stem, suffix = Path(default).stem, Path(default).suffix

    def path(asked: str | None = None, *, resume: bool = False) -> str:
        return str(output_path(asked, default, others, resume=resume))

    with pytest.raises(UsageError, match=f"--resume: there is no {stem}.npz"):
        path(resume=True)
    assert path() == default
    Path(default).touch()
    assert path() == f"{stem}-2{suffix}"
    Path(f"{stem}-2.npz").touch()  # of a run that was interrupted
    assert path() == f"{stem}-3{suffix}"
    assert path(resume=True) == f"{stem}-2{suffix}"
    assert f"this run writes {stem}-3{suffix}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match="exists") as refused:
        path(default)
    assert refused.value.hint == "--resume goes on with it; or choose another -o"
    with pytest.raises(UsageError, match=f"allowed: a file name that ends in {suffix}"):
        path("x.txt")
    with pytest.raises(UsageError, match="there is no directory nowhere"):
        path(f"nowhere/{default}")
