"""Where a ServiceClient finds its engine, and what it refuses to guess."""

import subprocess
import sys
from pathlib import Path

import pytest
import tg_tinker

from inft.client import ServiceClient
from inft.client.sdk.settings import settings_of
from params.client import EngineParams
from params.errors import UserError

KEY = "a-key-nobody-guesses"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFT_BASE_URL", raising=False)
    monkeypatch.delenv("INFT_API_KEY", raising=False)


def test_without_a_url_the_engine_is_in_process():
    settings = settings_of(None, {})
    assert settings.base_url is None
    assert settings.engine == EngineParams()


def test_a_text_is_a_url():
    assert settings_of("http://localhost:1", {}).base_url == "http://localhost:1"


def test_a_mapping_holds_a_services_address():
    settings = settings_of({"base_url": "https://host", "api_key": KEY, "tenant_id": "a", "timeout": 3}, {})
    assert (settings.base_url, settings.api_key, settings.tenant_id, settings.timeout) == ("https://host", KEY, "a", 3)


def test_a_mapping_holds_an_engines_parameters(tmp_path: Path):
    settings = settings_of({"state_dir": tmp_path, "models": {"m": tmp_path / "m"}}, {})
    assert settings.engine == EngineParams(state_dir=str(tmp_path), models={"m": str(tmp_path / "m")})


def test_the_environment_stands_in_for_a_url_and_a_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INFT_BASE_URL", "http://localhost:1")
    monkeypatch.setenv("INFT_API_KEY", KEY)
    settings = settings_of(None, {})
    assert (settings.base_url, settings.api_key) == ("http://localhost:1", KEY)


def test_what_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("INFT_BASE_URL", "http://localhost:1")
    assert settings_of("http://localhost:2", {}).base_url == "http://localhost:2"
    assert settings_of({"state_dir": tmp_path}, {}).base_url is None


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        ({"base_url": "http://a", "state_dir": "x"}, {}, "state_dir: settings of an engine in process"),
        ({"api_key": KEY}, {}, "api_key is for a service"),
        ({"base_url": "http://a"}, {"base_url": "http://b"}, "base_url is given both"),
        ({"stat_dir": "x"}, {}, "'stat_dir' is not known"),
        ({"max_pending": 0}, {}, "max_pending must be at least 1"),
        ({"base_url": 7}, {}, "base_url is int"),
        ({"base_url": ""}, {}, "base_url is empty"),
        ({"base_url": "http://a", "timeout": 0}, {}, "timeout is 0"),
        ({"base_url": "http://a", "timeout": True}, {}, "timeout is True"),
        ({"base_url": "http://a", "api_key": "key\n"}, {}, "api_key holds a space"),
        ({"base_url": "http://a", "tenant_id": "a\r\nX: b"}, {}, "tenant_id holds a line end"),
        (7, {}, "config is int"),
    ],
)
def test_a_setting_that_cannot_hold_is_an_error(config: object, given: dict[str, str], words: str):
    with pytest.raises(UserError, match=words):
        settings_of(config, given)


@pytest.mark.parametrize("url", ["localhost:1", "ftp://host", "http://", "http://me:secret@host", "http://host/?a=b"])
def test_a_url_that_is_none_is_refused_before_anything_is_sent(url: str):
    with pytest.raises(UserError, match="base_url") as refused:
        ServiceClient(url)
    assert "secret" not in str(refused.value)


def test_a_key_is_in_no_text_about_the_client():
    with ServiceClient({"base_url": "http://localhost:1", "api_key": KEY}) as service:
        assert KEY not in repr(service)
    assert KEY not in repr(settings_of({"base_url": "http://localhost:1", "api_key": KEY}, {}))


def test_the_guides_module_has_what_ours_has():
    import inft.client

    assert {name: getattr(tg_tinker, name) for name in tg_tinker.__all__} == {
        name: getattr(inft.client, name) for name in inft.client.__all__
    }
    with pytest.raises(AttributeError, match="'tg_tinker' has no attribute 'nothing'"):
        _ = tg_tinker.nothing


def test_neither_the_modules_nor_a_client_of_a_service_bring_torch():
    code = (
        "import sys, tg_tinker\n"
        "assert not {'torch', 'numpy', 'httpx'} & set(sys.modules), 'import'\n"
        "import random\n"
        "before = random.getstate()\n"
        "tg_tinker.ServiceClient({'base_url': 'http://127.0.0.1:1'})\n"
        "assert 'httpx' in sys.modules\n"
        "assert random.getstate() == before, 'the numbers that a program drew itself'\n"
        "tg_tinker.ServiceClient()\n"
        "assert 'torch' not in sys.modules, 'client'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
