"""The same few rows through two models: what each predicts for their answers, and how far apart that is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from inft.data.prompts import build_prompt
from inft.data.sample import keywords, scenes
from inft.data.scene_captions import caption
from inft.models.collate import CaptionCollator
from inft.models.spec import ModelSpec
from inft.sample import Sample
from params.munichus import MUNIChusLoadConfig

LANGUAGES = ("en", "zh", "ar", "hi", "ja", "si")  # six scripts
Batch = Mapping[str, Tensor]


def probe_samples(spec: ModelSpec) -> list[Sample]:
    """A drawn scene with its caption in each of LANGUAGES; a text model is told in words what is to be seen."""
    config = MUNIChusLoadConfig(context="none" if spec.takes_images else "content")
    return [
        Sample(
            image=scene.image if spec.takes_images else None,
            prompt=build_prompt(config, language=language, title="", content=keywords(scene.attributes)),
            answer=caption(scene.attributes, language),
            language=language,
            meta={"title": scene.name},
        )
        for scene, language in zip(scenes("test", rounds=1), LANGUAGES, strict=False)
    ]


def probe_batches(collator: CaptionCollator, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
    """A batch for each row alone: no padding, and the logits of a large vocabulary take little memory at a time."""
    return [collator([sample]) for sample in samples]


@torch.no_grad()
def answer_logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """What a model predicts at each token of the answers: logits [tokens, vocabulary], float32, on the CPU."""
    found = []
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[0]  # [tokens, vocabulary]
        supervised = batch["labels"][0, 1:] >= 0  # the token after each position
        found.append(logits[:-1][supervised.to(logits.device)].float().cpu())
    return torch.cat(found)


def logits_distance(found: Tensor, reference: Tensor) -> float:
    """How far apart two models' logits are: ||found - reference|| / ||reference||, centred over the vocabulary.

    0 for equal predictions: what is added to all the logits of a token changes none of its probabilities.
    """
    difference, spread = _centred(found - reference), _centred(reference)
    return float(difference.norm() / spread.norm())


def mean_kl(reference: Tensor, found: Tensor) -> float:
    """Mean over the tokens of KL(reference || found), in nats."""
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def equal_top(reference: Tensor, found: Tensor) -> float:
    """Share of the tokens, 0 to 1, for which both models hold the same token the most likely one."""
    return float((reference.argmax(-1) == found.argmax(-1)).float().mean())


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)
