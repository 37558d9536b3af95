"""inft merge and inft inspect: what they print, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stored_adapters import store_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import inft.cli.merge
from inft.models import MODELS
from inft.training.storage import file_sha256
from inft.training.stored import WEIGHTS_FILE


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a stored adapter of each family, named by it; Aya's was trained on 4-bit weights."""
    root = tmp_path_factory.mktemp("adapters")
    for name in MODELS:
        store_adapter(root / name, name, quantised=name == "aya")
    return root


@pytest.mark.parametrize(
    ("name", "layers", "note"),
    [
        ("llama32", "36: 12 self-attention", "mixes rows with and without an image"),
        ("aya", "30: 2 projector", "text_config.logit_scale"),
        ("text", "28: 16 self-attention", None),
    ],
)
def test_merge_says_what_it_did_and_how_to_load_it(inft, adapters, tmp_path, name, layers, note):
    found = inft("merge", "--adapter", str(adapters / name), "-o", str(tmp_path / "out"), "--dtype", "bfloat16")
    assert found.status == 0, found.err
    for text in ("step 7", f"the embedded {name}", f"layers      {layers}", "difference  layers by", "bfloat16"):
        assert text in found.out
    assert ("note:" in found.out) == (note is not None)
    assert (note or "") in found.out
    assert ("KL " in found.out) == ("4-bit" in found.out) == (name == "aya")
    assert f"inft train {name} --model {tmp_path / 'out'}" in found.out


def test_the_lines_that_merge_prints_load_the_model(inft, adapters, tmp_path):
    found = inft("merge", "--adapter", str(adapters / "text"), "-o", str(tmp_path / "out"))
    lines = [line.strip() for line in found.out.splitlines() if line.startswith("    ")]
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert isinstance(names["model"], type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert isinstance(names["tokenizer"], type(AutoTokenizer.from_pretrained(tmp_path / "out")))


@pytest.mark.parametrize("name", ["llama32", "text"])
def test_a_merged_model_is_trained_further(inft, adapters, tmp_path, name):
    out = tmp_path / "out"
    assert inft("merge", "--adapter", str(adapters / name), "-o", str(out)).status == 0
    rows = ["--data", "sample", "--languages", "en", "--max-rows-per-lang", "8", "--max-steps", "1"]
    sets = [f"basic.logs_dir={tmp_path}/logs", "sft.per_device_train_batch_size=2", "data.num_workers=0"]
    args = ["--no-quantize", "--output-dir", str(tmp_path / "run"), *(part for s in sets for part in ("--set", s))]
    found = inft("train", name, "--model", str(out), *rows, *args)
    assert found.status == 0, found.err
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["base_model"] == str(out)


def test_merge_replaces_only_what_it_wrote(inft, adapters, tmp_path):
    args = ("merge", "--adapter", str(adapters / "text"), "-o", str(tmp_path / "out"))
    assert inft(*args).status == 0
    refused = inft(*args)
    assert refused.status == 2
    assert "--overwrite" in refused.err
    assert inft(*args, "--dtype", "float16", "--overwrite").status == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["dtype"] == "float16"
    before = file_sha256(adapters / "text" / WEIGHTS_FILE)
    refused = inft("merge", "--adapter", str(adapters / "text"), "-o", str(adapters / "text"), "--overwrite")
    assert "files that no merge wrote" in refused.err
    assert file_sha256(adapters / "text" / WEIGHTS_FILE) == before


def half_copy(adapter: Path) -> None:
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])


def forget_record(adapter: Path) -> None:
    (adapter / "best.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "args", "complaint"),
    [
        (half_copy, [], "half copied"),
        (forget_record, [], "--family llama32|aya|text"),
        (None, ["--family", "aya"], "of the family text, not aya"),
        (None, ["--dtype", "int8"], "use bfloat16, float16, float32"),
        (None, ["--model", "./nowhere"], "no model directory at ./nowhere"),
        (None, ["--model", "{embedded}/aya"], "is a aya_vision model"),
        (None, ["--adapter", "/absent"], "there is no directory /absent"),
    ],
)
def test_what_cannot_be_merged_is_told_and_nothing_is_written(inft, adapters, tmp_path, spoil, args, complaint):
    adapter = Path(shutil.copytree(adapters / "text", tmp_path / "adapter"))
    if spoil:
        spoil(adapter)
    embedded = Path(inft_package()).parent / "embedded"
    given = [arg.replace("{embedded}", str(embedded)) for arg in args]
    found = inft("merge", "--adapter", str(adapter), "-o", str(tmp_path / "out"), *given)
    assert found.status == 2
    assert complaint in found.err
    assert "Traceback" not in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def inft_package() -> str:
    found = inft.cli.merge.__file__
    assert found is not None
    return str(Path(found).parent)


def test_a_base_that_has_moved_is_asked_for_and_found_by_model(inft, tmp_path):
    base = Path(shutil.copytree(Path(inft_package()).parent / "embedded" / "text", tmp_path / "base"))
    store_adapter(tmp_path / "adapter", "text", model_name=str(base))
    base.rename(tmp_path / "moved")
    args = ("merge", "--adapter", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"))
    lost = inft(*args)
    assert lost.status == 2
    assert "say with --model where that lies now" in lost.err
    found = inft(*args, "--model", str(tmp_path / "moved"))
    assert found.status == 0, found.err
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["base_model"] == str(tmp_path / "moved")


def test_a_merge_does_not_replace_its_own_base(inft, adapters, tmp_path):
    out = str(tmp_path / "out")
    assert inft("merge", "--adapter", str(adapters / "text"), "-o", out).status == 0
    found = inft("merge", "--adapter", str(adapters / "text"), "-o", out, "--model", out, "--overwrite")
    assert found.status == 2
    assert "is the base model itself" in found.err


def test_inspect_shows_an_adapter(inft, adapters):
    found = inft("inspect", str(adapters / "aya"))
    assert found.status == 0, found.err
    for text in (
        "the embedded aya",
        "advanced, on 4-bit weights",
        "7, eval_loss 0.5000",
        "lowest loss of a test",
        "r 4, alpha 8",
        "35,584 (F32)",
        "files hold",
        file_sha256(adapters / "aya" / WEIGHTS_FILE),
        "projector",
        "largest changes",
    ):
        assert text in found.out, text
    assert "NEVER TRAINED" not in found.out


def test_inspect_warns_of_what_is_wrong(inft, tmp_path):
    store_adapter(tmp_path, "text", std=0.0, use_dora=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = inft("inspect", str(tmp_path))
    assert found.status == 0
    for text in ("changed or missing: tokenizer.json", "NEVER TRAINED", "and 25 more", "DoRA: the norms"):
        assert text in found.out, text


def test_inspect_prints_the_same_as_json(inft, adapters, tmp_path):
    found = json.loads(inft("inspect", str(adapters / "llama32"), "--json").out)
    assert (found["kind"], found["adapter"]["family"], found["adapter"]["step"]) == ("adapter", "llama32", 7)
    assert {part["part"] for part in found["adapter"]["parts"]} == {
        "projector",
        "self-attention",
        "cross-attention",
        "MLP",
    }
    inft("merge", "--adapter", str(adapters / "llama32"), "-o", str(tmp_path / "out"))
    assert json.loads(inft("inspect", str(tmp_path / "out"), "--json").out)["merged"]["layers"]["MLP"] == 15


def test_inspect_refuses_what_inft_did_not_write(inft, tmp_path):
    found = inft("inspect", str(tmp_path))
    assert found.status == 2
    assert "nothing that inft wrote" in found.err
