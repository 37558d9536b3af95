import pytest


def test_list_models_shows_the_released_sizes_without_a_hub(inft, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = inft("list-models")
    assert found.status == 0
    assert "10.67 B" in found.out
    assert "8.47 B" in found.out
    assert found.out.count("embedded (--demo)") == 3


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # parts, layers, and trained parameters at rank 64 as measured on the released shapes
        (["llama32"], ["cross-attention │     32 │    32 │     13,631,488", "753,664", "210,468,864", "209,715,200"]),
        (["aya"], ["projector      │      2 │     0 │              0 │        2 │           950,272", "168,722,432"]),
        (["aya", "--training-mode", "basic"], ["167,772,160"]),
        (["llama32", "--set", "lora.r=32"], ["LoRA rank 32", "105,234,432"]),
    ],
)
def test_list_modules_shows_what_each_mode_adapts_on_the_released_shapes(inft, args, expected):
    found = inft("list-modules", *args)
    assert found.status == 0, found.err
    for text in expected:
        assert text in found.out, text


@pytest.mark.parametrize("model", ["llama32", "aya", "text"])
def test_list_modules_reads_the_embedded_models(inft, model):
    found = inft("list-modules", model, "--demo")
    assert found.status == 0, found.err
    assert f"linear layers of embedded {model}" in found.out
    assert "model." in found.out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["lama32"], "did you mean llama32?"),
        (["aya", "--training-mode", "advancd"], "did you mean advanced?"),
        (["aya", "--model", "/absent/model"], "/absent/model"),
        (["aya", "--set", "lora.target_modules=mm_projector"], "mm_projector"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(inft, args, complaint):
    found = inft("list-modules", *args)
    assert found.status == 2
    assert complaint in found.err
    assert "Traceback" not in found.err
