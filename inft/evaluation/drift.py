"""How far fine-tuning moved a model's hidden states, layer by layer: what CRAFT claims to keep in shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inft.evaluation.captioner import Captioner
from inft.evaluation.generate import evaluating
from inft.evaluation.records import Drift
from inft.sample import Sample


def measure_drift(captioner: Captioner, samples: Sequence[Sample], *, batch_size: int, data: str, split: str) -> Drift:
    """Compare the base's and the adapted model's hidden states of the same rows, prompt and reference.

    Per layer, 0 being the embeddings: the debiased linear CKA of the rows' mean hidden states (4 rows at least), and
    the mean cosine over all token positions. Both are 1 where nothing changed.
    """
    assert captioner.adapted, "drift is measured between a base model and its adapter"
    assert len(samples) >= 4, "debiased CKA needs four rows"
    means: tuple[list[Tensor], list[Tensor]] = ([], [])  # base, adapted: [layers, rows, hidden] a batch
    cosines: Tensor | float = 0.0
    tokens = 0
    with evaluating(captioner.model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = captioner.collator(samples[start : start + batch_size])
            batch.pop("labels")
            with captioner.base():
                before = _hidden_states(captioner, batch)
            after = _hidden_states(captioner, batch)
            mask_BT = batch["attention_mask"].bool()
            for states, found in ((before, means[0]), (after, means[1])):
                found.append(_row_means(states, mask_BT))
            alike_LBT = torch.stack([torch.cosine_similarity(b, a, dim=-1) for b, a in zip(before, after, strict=True)])
            alike_LBT = alike_LBT.clamp(-1, 1)  # rounding goes past 1
            cosines = cosines + alike_LBT[:, mask_BT].double().sum(1)
            tokens += int(mask_BT.sum())
    base_LNH, adapted_LNH = (torch.cat(found, dim=1) for found in means)
    assert isinstance(cosines, Tensor)
    return Drift(
        data=data,
        split=split,
        rows=len(samples),
        layers=tuple(range(len(base_LNH))),
        cka=tuple(linear_cka(x_NH, y_NH) for x_NH, y_NH in zip(base_LNH, adapted_LNH, strict=True)),
        cosine=tuple((cosines / tokens).tolist()),
    )


def _hidden_states(captioner: Captioner, batch: dict[str, Tensor]) -> list[Tensor]:
    """[rows, tokens, hidden] of the embeddings and of each layer, on the CPU in float32."""
    inputs = {name: tensor.to(captioner.model.device) for name, tensor in batch.items()}
    outputs = captioner.model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return [states.float().cpu() for states in outputs.hidden_states]


def _row_means(states: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """[layers, rows, hidden]: the mean over each row's own tokens."""
    weights_BT1 = (mask_BT / mask_BT.sum(1, keepdim=True))[..., None]
    return torch.stack([(layer_BTH * weights_BT1).sum(1) for layer_BTH in states])


def linear_cka(x_NH: Tensor, y_NK: Tensor) -> float:
    """Return the linear CKA of two representations of N rows, with the unbiased estimator of HSIC.

    Kornblith et al. 2019 (arXiv 1905.00414), eq. 3, with HSIC estimated as by Song et al. 2012, eq. 5: the plain
    estimate is near 1 for anything when the rows are fewer than the dimensions. It may be slightly below 0 for
    unrelated representations; nan where one of them is constant.
    """
    x, y = (matrix.double() @ matrix.double().T for matrix in (x_NH - x_NH.mean(0), y_NK - y_NK.mean(0)))
    cross, own_x, own_y = _hsic(x, y), _hsic(x, x), _hsic(y, y)
    scale = (own_x * own_y) ** 0.5 if own_x > 0 and own_y > 0 else float("nan")
    return float(cross / scale)


def _hsic(x_NN: Tensor, y_NN: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion of two Gram matrices; N is 4 at least."""
    n = len(x_NN)
    x, y = (gram - torch.diag(torch.diag(gram)) for gram in (x_NN, y_NN))
    whole = float((x * y).sum()) + float(x.sum() * y.sum()) / ((n - 1) * (n - 2))
    return (whole - 2 * float(x.sum(0) @ y.sum(0)) / (n - 2)) / (n * (n - 3))
