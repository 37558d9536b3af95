"""Rollouts: what is sampled, and that one forward pass scores it as step by step generation does."""

import copy
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policies import llama
from transformers import GPT2Config, GPT2LMHeadModel

from craft.ppo.policy import Reference, ValueHead, disable_dropout, score_tokens
from craft.ppo.rollout import (
    end_token_ids,
    ended,
    generation_config,
    placeholder_ids,
    sample_completions,
    with_completions,
)


@dataclass(kw_only=True)
class Sampling:
    max_completion_length: int = 6
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def config_of(model, *, do_sample: bool = True, end_ids=(), never=(), **sampling):
    return generation_config(
        model, Sampling(**sampling), end_ids=list(end_ids), never=list(never), pad_token_id=3, do_sample=do_sample
    )


def prompts_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of these lengths."""
    torch.manual_seed(1)
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return {"input_ids": torch.where(mask.bool(), torch.randint(10, 200, mask.shape), 3), "attention_mask": mask}


def step_by_step(model, prompts, ids, temperature):
    """Log-probabilities of completions [B, C], each from a forward pass over one row's tokens so far, unpadded."""
    found = torch.zeros(ids.shape, dtype=torch.float64)
    per_row = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask") if len(ids) > 1 else ()
    per_token = ("input_ids", "attention_mask", "cross_attention_mask", "token_type_ids", "mm_token_type_ids")
    for row in range(len(ids)):
        real = prompts["attention_mask"][row].bool()
        own = {k: v[row : row + 1, real] if k in per_token else v for k, v in prompts.items()}
        own |= {k: v[row : row + 1] for k, v in own.items() if k in per_row}
        for t, token in enumerate(ids[row].tolist()):
            with torch.no_grad():
                logits = model(**own).logits[0, -1].double() / temperature
            found[row, t] = logits.log_softmax(-1)[token]
            new = torch.tensor([[token]])
            own["input_ids"] = torch.cat([own["input_ids"], new], dim=1)
            for name in ("attention_mask", "cross_attention_mask"):
                if name in own:
                    own[name] = torch.cat([own[name], own[name][:, -1:]], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in own:
                    own[name] = torch.cat([own[name], torch.zeros_like(new)], dim=1)
    return found


def assert_scores_are_those_of_generation(model, prompts):
    model.eval()
    ids, mask = sample_completions(model, prompts, config_of(model, temperature=0.8), seed=5)
    inputs = with_completions(prompts, ids, mask)
    with torch.no_grad():
        scores = score_tokens(model, inputs, ids.shape[1], temperature=0.8, value_head=ValueHead(model), entropy=True)
    expected = step_by_step(model, prompts, ids, 0.8)
    torch.testing.assert_close(scores.logprobs_BC.double(), expected, atol=2e-5, rtol=1e-5)
    assert scores.values_BC.shape == scores.entropy_BC.shape == ids.shape
    assert (scores.entropy_BC > 0).all()


def test_scores_of_llama_32_vision_are_those_of_generation(llama32, make_sample):
    samples = [make_sample(news="A little news."), make_sample(size=(64, 200), news="")]
    assert_scores_are_those_of_generation(llama32.model(), llama32.collator().prompts(samples))


def test_scores_of_aya_are_those_of_generation(aya, make_sample):
    prompts = aya.collator().prompts([make_sample(news="A little news.")])
    assert_scores_are_those_of_generation(aya.model(), prompts)


def test_rows_of_aya_score_alike_alone_and_in_a_batch(aya, make_sample):
    # its tiles are not per row: a batch must be scored whole
    model, collator = aya.model().eval(), aya.collator()
    samples = [make_sample(news="Some words of news."), make_sample(size=(64, 200)), make_sample(image=False)]
    prompts = collator.prompts(samples)
    ids, mask = sample_completions(model, prompts, config_of(model), seed=0)
    with torch.no_grad():
        together = score_tokens(model, with_completions(prompts, ids, mask), ids.shape[1], temperature=1.0)
        for row, sample in enumerate(samples):
            alone = with_completions(collator.prompts([sample]), ids[row : row + 1], mask[row : row + 1])
            own = score_tokens(model, alone, ids.shape[1], temperature=1.0)
            torch.testing.assert_close(own.logprobs_BC[0], together.logprobs_BC[row], atol=2e-5, rtol=1e-5)


def test_scores_of_a_text_model_are_those_of_generation(text, make_sample):
    samples = [make_sample(image=False), make_sample(image=False, news="Much longer: it has news.")]
    assert_scores_are_those_of_generation(text.model(), text.collator().prompts(samples))


def test_scores_with_absolute_positions_are_those_of_generation():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    assert_scores_are_those_of_generation(GPT2LMHeadModel(config), prompts_of(3, 9, 5))


def test_per_token_inputs_go_on_and_the_rest_stays():
    prompts = {
        **prompts_of(2, 4),
        "cross_attention_mask": torch.arange(2 * 4 * 1 * 3).view(2, 4, 1, 3),
        "token_type_ids": torch.ones(2, 4, dtype=torch.long),
        "mm_token_type_ids": torch.ones(2, 4, dtype=torch.long),
        "pixel_values": torch.randn(5, 3, 4, 4),
    }
    ids, mask = torch.tensor([[11, 12], [13, 3]]), torch.tensor([[True, True], [True, False]])
    inputs = with_completions(prompts, ids, mask)
    assert inputs["input_ids"][:, 4:].tolist() == ids.tolist()
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert torch.equal(
        inputs["cross_attention_mask"][:, 4:], prompts["cross_attention_mask"][:, 3:].expand(-1, 2, 1, 3)
    )
    for name in ("token_type_ids", "mm_token_type_ids"):
        assert inputs[name].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert inputs["pixel_values"] is prompts["pixel_values"]
    assert prompts["input_ids"].shape == (2, 4)


def test_completions_end_with_the_first_end_token():
    model = llama()
    prompts = prompts_of(3, 5, 4, 6, 2, 7)
    free, _ = sample_completions(model, prompts, config_of(model, max_completion_length=12), seed=3)
    end = int(free[0, 4])  # a token that one row does sample
    ids, mask = sample_completions(model, prompts, config_of(model, max_completion_length=12, end_ids=[end]), seed=3)
    for row, real in zip(ids, mask, strict=True):
        length = int(real.sum())
        assert real.tolist() == [True] * length + [False] * (len(real) - length)
        assert end not in row[: length - 1].tolist()
        assert length == 12 or row[length - 1] == end
    assert mask.any(0).all()  # as wide as the longest
    done = ended(with_completions(prompts, ids, mask)["input_ids"], mask, [end])
    assert done.tolist() == [end in row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    assert done[0]


def test_sampling_is_a_function_of_its_seed_and_disturbs_nothing():
    model = llama(attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prompts, config = prompts_of(3, 5), config_of(model)
    state = torch.get_rng_state()
    first, again, other = (sample_completions(model, prompts, config, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert model.is_gradient_checkpointing


def test_a_release_s_sampling_settings_are_not_sampled_with():
    model, changed = llama(), llama()
    changed.generation_config.update(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0, min_p=0.9, max_length=2
    )
    prompts = prompts_of(3, 5, 4)
    plain = sample_completions(model, prompts, config_of(model), seed=1)[0]
    assert torch.equal(sample_completions(changed, prompts, config_of(changed), seed=1)[0], plain)


def test_no_image_token_is_written(aya, make_sample):
    # a completion with one would ask for features of an image that is not there
    model, prompts = aya.model().eval(), aya.collator().prompts([make_sample()])
    [image_token] = placeholder_ids(aya.processor)
    model.get_output_embeddings().register_forward_hook(
        lambda m, args, logits: logits.index_fill(-1, torch.tensor(image_token), 1e4)
    )
    ids, _ = sample_completions(model, prompts, config_of(model), seed=0)
    assert (ids == image_token).all()
    ids, _ = sample_completions(model, prompts, config_of(model, never=[image_token]), seed=0)
    assert image_token not in ids


def test_every_declared_end_token_ends_a_completion(tokenizer):
    model = llama()
    model.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(model, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})


def test_the_value_is_read_in_float32_and_is_0_before_training():
    model = llama().to(torch.bfloat16)
    head = ValueHead(model)
    prompts = prompts_of(3, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = score_tokens(model, prompts, 2, temperature=1.0, value_head=head).values_BC
    assert values.dtype == torch.float32
    assert not values.any()


def test_dropout_is_turned_off_also_where_it_is_a_function_call():
    model = get_peft_model(llama(attention_dropout=0.3), LoraConfig(lora_dropout=0.2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="dropout was turned off in 4 places.*disable_dropout=False"):
        disable_dropout(model)
    model.train()
    prompts = prompts_of(6)
    first, second = (score_tokens(model, prompts, 3, temperature=1.0).logprobs_BC for _ in range(2))
    assert torch.equal(first, second)


def lora(model, **options):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))


def trained_lora():
    model = lora(llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


POLICIES = {
    "whole model": llama,
    "new LoRA": lambda: lora(llama()),
    "trained LoRA": trained_lora,
    "PiSSA": lambda: lora(llama(), init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_the_reference_is_the_policy_before_training(kind):
    model = POLICIES[kind]()
    before = copy.deepcopy(model).eval()
    reference = Reference(model)
    assert reference.disable == (kind == "new LoRA")  # the cheapest way where it is exact
    prompts = prompts_of(4, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        trained = [p.clone() for p in model.parameters()]
        now = score_tokens(model, prompts, 3, temperature=1.0).logprobs_BC
        expected = score_tokens(before, prompts, 3, temperature=1.0).logprobs_BC
    model.train()
    found = reference.logprobs(prompts, 3, temperature=1.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, now, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True))
    assert model.training


def test_a_reference_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 300 tokens and the model one of 260"):
        Reference(llama(), llama(vocab_size=300))
