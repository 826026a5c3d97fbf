"""Keys from the command line, settings from three places, and addresses at which nobody serves by oversight."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.service.commands.launch import check_exposure
from topkapi.service.keys import KeyRing, digest_of, is_loopback, read_line
from topkapi.service.quotas import Limits
from topkapi.service.settings import Settings


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("TOPKAPI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield


def test_a_new_key_and_its_line_belong_together(capsys) -> None:
    options = ["--role", "admin", "--requests-per-minute", "60", "--concurrency", "4", "--priority", "-5"]
    assert main(["key", "new", "alice", *options]) == 0
    printed = capsys.readouterr()
    key, line = printed.out.splitlines()
    found = read_line(line)
    assert (found.name, found.role, found.digest, found.priority) == ("alice", "admin", digest_of(key), -5)
    assert found.limits == Limits(requests_per_minute=60, concurrency=4) and key not in line
    assert len(key) > 40 and key not in printed.err


def test_keys_are_added_to_a_file_that_only_its_owner_reads(capsys, tmp_path) -> None:
    file = tmp_path / "keys"
    for name in ("alice", "bob"):
        assert main(["key", "new", name, "--append", str(file)]) == 0
    alice, bob = capsys.readouterr().out.split()
    ring = KeyRing(file)
    assert [ring.find(key).name for key in (alice, bob)] == ["alice", "bob"]  # type: ignore[union-attr]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and alice not in file.read_text()


def test_a_key_of_ones_own_is_hashed(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a key that was made elsewhere\n"))
    with pytest.raises(SystemExit):
        main(["key", "hash", "alice"])
    monkeypatch.setattr("sys.stdin", io.StringIO("made-elsewhere-0123456789\n"))
    assert main(["key", "hash", "alice"]) == 0
    assert digest_of("made-elsewhere-0123456789") in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["a/b"], ["a", "--concurrency", "0"], ["a", "--priority", "101"], ["a", "--role", "x"]]
)
def test_what_is_no_key_makes_none(capsys, options) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["key", "new", *options])
    assert ended.value.code == 2 and not capsys.readouterr().out


def effective(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["config", "--json", *arguments]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_flags_come_before_variables_and_these_before_the_file(capsys, monkeypatch, tmp_path) -> None:
    file = tmp_path / "topkapi.yaml"
    file.write_text("port: 1\nmax_queue: 2\nstream_grace: 3\ncors_origins: [http://a.example]\nthreads: null\n")
    monkeypatch.setenv("TOPKAPI_PORT", "4")
    monkeypatch.setenv("TOPKAPI_MAX_QUEUE", "5")
    for by_flag in (True, False):
        if not by_flag:
            monkeypatch.setenv("TOPKAPI_CONFIG", str(file))
        shown = effective(capsys, "--port", "6", *(["--config", str(file)] if by_flag else []))
        assert shown["port"] == {"value": 6, "source": "--port"}
        assert shown["max_queue"] == {"value": 5, "source": "TOPKAPI_MAX_QUEUE"}
        assert shown["stream_grace"] == {"value": 3.0, "source": f"stream_grace in {file}"}
        assert shown["cors_origins"]["value"] == ["http://a.example"]
        assert shown["threads"] == {"value": None, "source": "default"}
        assert shown["host"] == {"value": "127.0.0.1", "source": "default"}


def test_what_it_prints_is_a_file_that_gives_the_same(capsys, tmp_path) -> None:
    assert main(["config", "--port", "7", "--allowed-hosts", "a.example,*.b.example", "--no-studio"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^port: 7  # --port$", printed, re.MULTILINE)
    file = tmp_path / "again.yaml"
    file.write_text(printed)
    assert Settings.read(config=str(file)) == Settings.read(
        config=str(file), port=7, allowed_hosts=("a.example", "*.b.example"), studio=False
    )
    assert yaml.safe_load(printed).keys() == Settings.model_fields.keys() - {"config", "api_key"}


def test_keys_are_told_by_their_names_and_secrets_never(capsys, monkeypatch, tmp_path) -> None:
    secret = "a-secret-of-some-length"
    monkeypatch.setenv("TOPKAPI_API_KEY", secret)
    (tmp_path / "keys").write_text(f"alice use {digest_of('x' * 20)}\n")
    assert main(["config", "--keys", "keys"]) == 0
    printed = capsys.readouterr().out
    assert "# key alice: use" in printed and "# api_key is given by TOPKAPI_API_KEY and not shown" in printed
    shown = effective(capsys, "--keys", "keys")
    assert shown["api_key"]["source"] == "TOPKAPI_API_KEY"
    assert secret not in printed + json.dumps(shown) + repr(Settings.read())
    monkeypatch.setenv("TOPKAPI_API_KEY", "too short")
    assert main(["config"]) == 2
    assert "too short" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "did you mean port?"),
        ("port: 1\nport: 2", "line 2 is not YAML: port is given twice"),
        ("port: eighty", "port in topkapi.yaml must be a whole number from 0 to 65535, not 'eighty'"),
        ("- port", "must hold settings by their names"),
        ("port: [", "is not YAML"),
        ("config: other.yaml", "there is no setting 'config'"),
        ("api_key: 5", "api_key in topkapi.yaml is not 16 to 512"),
        ("? [a, b]\n: 1", "is not YAML"),
        ("port: !!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_file_that_can_not_be_used_says_why(capsys, text, said) -> None:
    Path("topkapi.yaml").write_text(text)
    assert main(["serve", "--config", "topkapi.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_a_variable_that_was_misspelt_is_told_of(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TOPKAPI_MAX_QUEU", "5")
    assert main(["config"]) == 0
    assert "TOPKAPI_MAX_QUEU is no setting; did you mean TOPKAPI_MAX_QUEUE?" in capsys.readouterr().err


def test_beyond_this_machine_nobody_is_served_without_keys_by_oversight(capsys, monkeypatch, tmp_path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "", "example.org"):
        assert main(["serve", f"--host={host}"]) == 2
        told = capsys.readouterr().err
        assert "there are no keys" in told and "--insecure" in told and "topkapi key new" in told, host
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_exposure(Settings.read(host=host))
    check_exposure(Settings.read(host="0.0.0.0", insecure=True))
    (tmp_path / "keys").write_text(f"alice use {digest_of('x' * 20)}\n")
    check_exposure(Settings.read(host="0.0.0.0", keys="keys"))
    monkeypatch.setenv("TOPKAPI_API_KEY", "x" * 20)
    check_exposure(Settings.read(host="0.0.0.0"))
    # As compose passes on what is not set.
    monkeypatch.setenv("TOPKAPI_API_KEY", "")
    with pytest.raises(SettingsError, match="there are no keys"):
        check_exposure(Settings.read(host="0.0.0.0"))
    assert not is_loopback("127.0.0.1.evil.example")


def test_bench_sends_the_key_of_the_environment(serve, tiny_checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TOPKAPI_API_KEY", "a-secret-of-some-length")
    with serve(tiny_checkpoint("benched")) as served:
        bench = [
            "bench",
            "--url",
            served.url,
            "--streams",
            "1",
            "--tokens",
            "8",
            "--prompt-tokens",
            "8",
            "--repeats",
            "1",
        ]
        assert main([*bench, "--json"]) == 0
        monkeypatch.setenv("TOPKAPI_API_KEY", "another-one-of-some-length")
        assert main(bench) == 2
        assert "set TOPKAPI_API_KEY to one of its keys" in capsys.readouterr().err
        monkeypatch.delenv("TOPKAPI_API_KEY")
        assert main(bench) == 2


@pytest.mark.parametrize("text", ["", "# nobody\n", "alice use x\n", "environment use " + digest_of("y" * 20)])
def test_keys_that_can_not_be_used_end_the_start(capsys, monkeypatch, text) -> None:
    Path("keys").write_text(text)
    if text.startswith("environment"):
        monkeypatch.setenv("TOPKAPI_API_KEY", "x" * 20)
    assert main(["serve", "--keys", "keys"]) == 2
    assert "keys" in capsys.readouterr().err
