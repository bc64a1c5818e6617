"""Settings: typed, listed, and strict about what is not a setting."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dspark_sglang.config import Settings, read_settings
from dspark_sglang.errors import ConfigError


def test_nothing_set_gives_the_defaults() -> None:
    settings = read_settings({"PATH": "/bin", "SGLANG_PLATFORM": "x", "dspark_seed": "1"})
    assert settings == Settings()
    assert (settings.plugin, settings.schedule, settings.seed) == ("auto", "adaptive", -1)


@pytest.mark.parametrize(
    ("name", "raw", "field", "value"),
    [
        ("DSPARK_PLUGIN", "off", "plugin", "off"),
        ("DSPARK_SCHEDULE", "all", "schedule", "all"),
        ("DSPARK_STS", "/a/sts.json", "sts", "/a/sts.json"),
        ("DSPARK_SEED", "-7", "seed", -7),
        ("DSPARK_CPU_THREADS", "3", "cpu_threads", 3),
        ("DSPARK_ALLOW_OTHER_SGLANG", "1", "allow_other_sglang", True),
        ("DSPARK_ALLOW_OTHER_SGLANG", "TRUE", "allow_other_sglang", True),
        ("DSPARK_ALLOW_OTHER_SGLANG", "0", "allow_other_sglang", False),
        ("DSPARK_ALLOW_OTHER_SGLANG", "false", "allow_other_sglang", False),
        ("DSPARK_CACHE_DIR", "/models", "cache_dir", "/models"),
    ],
    ids=lambda value: str(value),
)
def test_each_setting_is_read_and_typed(name: str, raw: str, field: str, value: object) -> None:
    settings = read_settings({name: raw})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)
    others = {n: v for n, v in msgspec.structs.asdict(settings).items() if n != field}
    defaults = {n: v for n, v in msgspec.structs.asdict(Settings()).items() if n != field}
    assert others == defaults


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("DSPARK_SCHEDUL", "DSPARK_SCHEDULE"),
        ("DSPARK_PLUGINS", "DSPARK_PLUGIN"),
        ("DSPARK_CPU_THREAD", "DSPARK_CPU_THREADS"),
        ("DSPARK_ALLOW_OTHER_SGLANGS", "DSPARK_ALLOW_OTHER_SGLANG"),
    ],
)
def test_an_unknown_name_is_refused_with_the_close_one(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({typo: "1"})
    assert typo in caught.value.found
    assert meant in caught.value.expected
    assert caught.value.fix == f"Did you mean {meant}?"


def test_an_unknown_name_without_a_neighbour_says_to_unset_it() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({"DSPARK_QQQQQQQQQQ": ""})
    assert caught.value.fix == "Unset DSPARK_QQQQQQQQQQ."
    for field in msgspec.structs.fields(Settings):
        assert "DSPARK_" + field.name.upper() in caught.value.expected


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("DSPARK_PLUGIN", "maybe", "auto or off"),
        ("DSPARK_PLUGIN", "", "auto or off"),
        ("DSPARK_SCHEDULE", "ADAPTIVE", "adaptive or lagged or all"),
        ("DSPARK_SEED", "1.5", "an integer"),
        ("DSPARK_CPU_THREADS", "many", "an integer"),
        ("DSPARK_ALLOW_OTHER_SGLANG", "yes", "0 or 1"),
    ],
    ids=lambda value: str(value) or "empty",
)
def test_a_bad_value_is_refused(name: str, raw: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({name: raw})
    assert caught.value.found == f"{name} is {raw!r}."
    assert caught.value.expected == expected
    assert name in caught.value.fix
    assert caught.value.__cause__ is None


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_SEED", "41")
    assert read_settings().seed == 41


def test_cache_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(cache_dir=str(tmp_path)).cache_path == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(cache_dir="~/models").cache_path == tmp_path / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Settings().cache_path == tmp_path / "xdg" / "dspark-sglang"
