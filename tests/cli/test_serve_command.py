import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from inft.cli.serve import allowed, named_models
from inft.client.losses.registry import BUILT_IN
from params import UserError

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KEY = "tml-of-ada-0123456789"
BATCH = {"prompt": ["Once upon a time"] * 8, "completion": [" there was a model" * 4] * 8}


def client(url):
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


@contextmanager
def running(state, *args, cwd=ROOT):
    """`inft serve` in a process of its own: the process, its URL and its first line."""
    # As the console script has it, the current directory is not among the places of modules.
    command = [sys.executable, "-P", "-m", "inft", "serve", "--port", "0", "--state-dir", str(state), *args]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving http://"), line + process.stderr.read()
        yield process, line.split()[1], line
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_sigterm_finishes_what_runs_and_the_rest_runs_after_a_restart(inft, tmp_path):
    state, keys = tmp_path / "state", tmp_path / "keys"
    keys.write_text(f"ada {KEY}\n")
    keys.chmod(0o600)
    args = ("--model", "demo=embedded/text", "--api-key-file", str(keys))
    with running(state, *args) as (process, url, line):
        assert "models: demo" in line
        assert "tenants: ada" in line
        assert "stop with Ctrl-C" in line
        with client(url) as http:
            assert http.post("/v1/training_clients", json={"model_ref": "embedded/text"}).status_code == 422
            config = {"model_ref": "demo", "seed": 0}
            path = f"/v1/training_clients/{http.post('/v1/training_clients', json=config).json()['id']}"
            bodies = [("forward_backward", {"batch": BATCH}), ("optim_step", {})] * 6
            futures = [http.post(f"{path}/{kind}", json=body).json()["id"] for kind, body in bodies]
        found = inft("audit", "verify", str(state))  # while the service writes
        assert (found.status, found.out.split(",")[0]) == (0, "'ada': whole")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "stopped: what had not run is kept" in out
        assert "Traceback" not in err
        assert KEY not in out + err
    with running(state, *args) as (process, url, _):
        with client(url) as http:
            answers = [http.get(f"/v1/futures/{future}/result?wait=60").json() for future in futures]
            assert [answer["status"] for answer in answers] == ["completed"] * 12
            assert answers[-1]["result"]["step"] == 6
            assert answers[-2]["result"]["loss"] < answers[0]["result"]["loss"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_loses_nothing(tmp_path):
    state = tmp_path / "state"
    with running(state, "--model", "demo=embedded/text") as (process, url, _):
        with client(url) as http:
            path = f"/v1/training_clients/{http.post('/v1/training_clients', json={'model_ref': 'demo'}).json()['id']}"
            body = {"prompts": ["a"] * 64, "max_tokens": 2000}
            future = http.post(f"{path}/sample?wait=0", json=body).json()["id"]
            while http.get(f"/v1/futures/{future}").json()["status"] != "running":
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None  # it finishes the operation
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    with running(state, "--model", "demo=embedded/text") as (_, url, _), client(url) as http:
        assert http.get(f"/v1/futures/{future}").json()["status"] in ("queued", "running")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--host", "0.0.0.0"), "there are no keys: give --api-key-file"),
        (("--host", "::"), "there are no keys: give --api-key-file"),
        (("--host", "no.such.host.invalid"), "there is no such address"),
        (("--port", "70000"), "port 70000 is above 65535"),
        (("--port", "-1"), "--port: port must be at least 0"),
        (("--rate-limit", "0"), "--rate-limit: rate_limit must be above 0"),
        (("--max-pending", "many", "--device", "tpu"), "--device: device should be"),
        (("--model", "=x"), "give NAME, or NAME=PATH"),
        (("--model", "a=embedded/text", "--model", "a=embedded/aya"), "--model a is given twice"),
        (("--model", "a=embedded/nothing"), "no embedded model"),
        (("--model", "a=/nowhere/at/all"), "/nowhere/at/all"),
        (("--allow-loss", "token_ce"), "always allowed"),
        (("--allow-loss", "nowhere:loss"), "no module nowhere"),
        (("--api-key-file", "nowhere"), "nowhere could not be read"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(inft, tmp_path, args, words):
    port = () if "--port" in args else ("--port", "0")
    found = inft("serve", *port, "--state-dir", str(tmp_path / "state"), *args)
    assert found.status == 2, found
    assert words in found.err
    assert found.out == ""


def test_a_port_that_is_taken_is_named(inft, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = inft("serve", "--port", str(port), "--state-dir", str(tmp_path))
    assert found.status == 2
    assert f"127.0.0.1:{port} cannot be used" in found.err


def test_a_state_directory_in_use_is_refused(inft, tmp_path):
    from inft.client.engine import Engine
    from params.client import EngineParams

    with Engine(EngineParams(state_dir=str(tmp_path))):
        found = inft("serve", "--port", "0", "--state-dir", str(tmp_path), "--model", "embedded/text")
    assert found.status == 2
    assert "another process is running training clients" in found.err


def test_without_a_model_the_embedded_ones_are_offered():
    assert set(named_models(None)) == {"embedded/text", "embedded/llama32", "embedded/aya"}
    assert named_models(["org/model", "b=dir=1"]) == {"org/model": "org/model", "b": "dir=1"}


def test_the_built_in_losses_and_no_others_are_allowed_unless_named():
    assert allowed(None) == tuple(BUILT_IN)
    assert allowed(["math:sqrt"])[-1] == "math:sqrt"
    with pytest.raises(UserError, match="always allowed"):
        allowed(["mse"])


def test_what_is_missing_is_said_with_the_extra_that_brings_it(inft, monkeypatch):
    from inft.cli import extras

    monkeypatch.setattr(extras, "CLIENT", ("fastapi", "no_such_module"))
    found = inft("serve", "--port", "0")
    assert found.status == 2
    assert "not installed here: no_such_module. Install them: pip install 'inft[client]'" in found.err


def test_the_help_names_every_parameter_of_the_service(inft):
    from dataclasses import fields

    from params.client import EngineParams, ServeParams

    words = inft("serve", "--help").out
    beside = {"models", "any_model", "losses"}
    for field in (*fields(EngineParams), *fields(ServeParams)):
        assert field.name in beside or f"--{field.name.replace('_', '-')}" in words
    for option in ("--model", "--allow-loss"):
        assert option in words


def test_the_command_needs_no_torch_for_its_help():
    code = (
        "import sys, json\n"
        "from inft.__main__ import main\n"
        "try:\n    main(['serve', '--help'])\n"
        "except SystemExit:\n    print(json.dumps([m for m in ('torch', 'fastapi', 'uvicorn') if m in sys.modules]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == []


def test_a_loss_of_the_current_directory_is_allowed_and_run(tmp_path):
    source = "from inft.client.losses.token_ce import token_ce\ndef focal(inputs):\n    return token_ce(inputs)\n"
    (tmp_path / "my_losses.py").write_text(source)
    args = ("--model", "demo=embedded/text", "--allow-loss", "my_losses:focal")
    with running(tmp_path / "state", *args, cwd=tmp_path) as (_, url, _), client(url) as http:
        path = f"/v1/training_clients/{http.post('/v1/training_clients', json={'model_ref': 'demo'}).json()['id']}"
        body = {"batch": {"input_ids": [[1, 2, 3]]}, "loss": "my_losses:focal"}
        answer = http.post(f"{path}/forward_backward?wait=30", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["result"]["loss"] > 0
        assert http.post(f"{path}/forward_backward", json={**body, "loss": "os:getcwd"}).status_code == 422
