"""How far fine-tuning moved a model's hidden states, layer by layer: what CRAFT claims to keep in shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inft.evaluation.captioner import Captioner
from inft.evaluation.generate import evaluating
from inft.evaluation.records import Drift
from inft.sample import Sample

LEAST_ROWS = 4  # of debiased CKA


def measure_drift(captioner: Captioner, samples: Sequence[Sample], *, data: str, split: str, fingerprint: str) -> Drift:
    """Compare the base's and the adapted model's hidden states of the same rows, prompt and reference.

    Per layer, 0 being the embeddings: the debiased linear CKA of the rows' mean hidden states (4 rows at least), and
    the mean cosine over all token positions. Both are 1 where nothing changed. Row by row, so that the states of one
    row and two models are all that must be held.
    """
    assert captioner.adapted, "drift is measured between a base model and its adapter"
    assert len(samples) >= LEAST_ROWS, "debiased CKA needs four rows"
    with evaluating(captioner.model), torch.no_grad():
        rows = [_compared(captioner, sample) for sample in samples]
    base_LNH, adapted_LNH = (torch.stack([row[side] for row in rows], dim=1) for side in (0, 1))
    cosine_L = sum(row[2] for row in rows) / sum(row[3] for row in rows)
    return Drift(
        data=data,
        split=split,
        rows=len(samples),
        fingerprint=fingerprint,
        layers=tuple(range(len(base_LNH))),
        cka=tuple(linear_cka(x_NH, y_NH) for x_NH, y_NH in zip(base_LNH, adapted_LNH, strict=True)),
        cosine=tuple(cosine_L.tolist()),
    )


def _compared(captioner: Captioner, sample: Sample) -> tuple[Tensor, Tensor, Tensor, int]:
    """Of one row: base's and adapter's mean states [layers, hidden], the sum of cosines [layers], its tokens."""
    batch = captioner.collator([sample])
    batch.pop("labels")
    with captioner.base():
        before = _hidden_states(captioner, batch)
    after = _hidden_states(captioner, batch)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    cosines = []
    for base_TH, adapted_TH in zip(before, after, strict=True):
        base_TH, adapted_TH = base_TH.float(), adapted_TH.float()
        sides[0].append(base_TH.mean(0).cpu())
        sides[1].append(adapted_TH.mean(0).cpu())
        # Rounding goes past 1.
        cosines.append(torch.cosine_similarity(base_TH, adapted_TH, dim=-1).clamp(-1, 1).double().sum().cpu())
    return torch.stack(sides[0]), torch.stack(sides[1]), torch.stack(cosines), len(before[0])


def _hidden_states(captioner: Captioner, batch: dict[str, Tensor]) -> list[Tensor]:
    """[tokens, hidden] of the embeddings and of each layer, of the one row of the batch."""
    inputs = {name: tensor.to(captioner.model.device) for name, tensor in batch.items()}
    outputs = captioner.model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return [states[0] for states in outputs.hidden_states]


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
