"""An adapter merged into its unquantised base: a whole model, read back and compared before it takes its place."""

import copy
import gc
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inft.evaluation.merged import DTYPES, MERGE_FILE, Difference, Dtype, Merged, QuantisedGap, to_json
from inft.evaluation.probe import answer_logits, equal_top, logits_distance, mean_kl, probe_batches, probe_samples
from inft.models import load_spec
from inft.models.loading import find_source, load_model, load_processor, read_config
from inft.models.modules import linear_modules, meta_model, part_of, shape_of
from inft.models.spec import ModelSpec
from inft.training.callbacks import sigterm_interrupts
from inft.training.quantise import after_quantised_load, quantization_config
from inft.training.storage import staged
from inft.training.stored import StoredAdapter, base_title, load_adapter
from params.basic import BasicParams
from params.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# With u the unit roundoff of a dtype: two ways to compute the same logits differ in 16 bits, as logits_distance
# measures it, by 2 u to 24 u on the embedded models and on SmolLM2-135M (30 layers), the more the further an adapter
# moved the model. 32 u are allowed. In float32 it is 8 u to 120 u, far below any defect, and there is room to spare.
TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-4, "float16": 2**-6, "bfloat16": 2**-3}
# Of one layer by itself nothing differs but its weights, each rounded once and so by u at the most. This sees what the
# noise of 16-bit logits hides, such as one layer that was forgotten.
LAYER_TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}
PROBES = 8  # random inputs by which a layer is compared
SHARD = "5GB"  # of a weights file
GPU_SHARE = 0.8  # of the GPU's free memory that a model's weights may take

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is merged into what."""

    stored: StoredAdapter
    spec: ModelSpec
    base_model: str
    basic: BasicParams  # of the run: its dtype is the one in which the adapter saw the base
    dtype: Dtype  # of the merged model
    processor: Any
    batches: Batches  # of the probe rows


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What base and unmerged adapter compute."""

    logits: Tensor
    effect: float
    layers: Mapping[str, Tensor]  # name of each adapted layer -> its outputs for random inputs [probes, outputs]
    base_config_sha256: str


def merge_adapter(
    stored: StoredAdapter,
    out: Path,
    *,
    model_name: str | None = None,
    dtype: Dtype | None = None,
    tell: Callable[[str], None] = print,
) -> Merged:
    """Write base and adapter as one model, with its processor and merge.json, to ``out``; return what was measured.

    ``stored`` has a family. ``model_name`` is another place of the same base; ``dtype`` defaults to the run's. The
    adapter is added in float32, so that each weight is rounded once. Errors: UserError, with ``out`` left as it was,
    for a base that cannot be loaded or is not the adapter's, for a merged model whose logits or layers differ from
    the adapter's by more than the dtype explains, and for a full disk.
    """
    job = _job(stored, model_name, dtype)
    if threads := job.basic.num_threads or (1 if job.base_model == "" else None):
        torch.set_num_threads(threads)
    trained = None
    if stored.quantised:
        tell("computing what the adapter does on the 4-bit weights that it was trained on …")
        trained = _trained_logits(job)
    with (
        sigterm_interrupts(),
        staged(out, what="the merged model", remedy="Free space there, then merge again.") as staging,
    ):
        tell(f"merging into {base_title(job.base_model, job.spec.name)}, unquantised, as {job.dtype} …")
        before = _write_merged(job, staging)
        _release_memory()
        tell("reading back what was written …")
        merged = _verified(job, before, trained, staging)
        (staging / MERGE_FILE).write_text(to_json(merged), encoding="utf-8")
    return merged


def merge_layers(model: "PeftModel", dtype: torch.dtype) -> "tuple[PreTrainedModel, dict[str, Tensor]]":
    """Merge an adapter in place, one layer after the other in float32, and round the model to ``dtype``.

    Returns the plain model and, by name, what each adapted layer made of random inputs before, [probes, outputs].
    Errors: UserError for an adapted layer that is not linear.
    """
    from peft.tuners.lora import LoraLayer

    before: dict[str, Tensor] = {}
    linear = linear_modules(model)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, base = path.removeprefix("base_model.model."), layer.get_base_layer()
        if name not in linear:
            raise UserError(f"the adapter changes {name}, a {type(base).__name__}: inft merges linear layers only.")
        base.to(torch.float32)
        with torch.no_grad():
            before[name] = layer(_layer_inputs(base)).cpu()
        layer.merge(safe_merge=True)
        base.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = model.merge_and_unload(safe_merge=True)  # what is left: modules that the adapter replaces as a whole
    return merged.to(dtype), before


def layer_differences(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """How much each layer differs from what it was: ||W' x - y|| / (||W'|| ||x||), computed in float32.

    Rounding changes each weight by its unit roundoff at the most, and the ratio by about half of that.
    """
    modules = dict(model.named_modules())
    return {name: _layer_difference(modules[name], outputs) for name, outputs in before.items()}


def refuse_difference(difference: Difference, *, dtype: str, worst: str) -> None:
    """UserError when a merged model differs from the adapter by more than rounding to ``dtype`` does."""
    remedy = (
        f"Merge with another --dtype (in {dtype} a weight may be too large or too small), and use the adapter "
        "unmerged if that fails too."
    )
    if not difference.layer <= difference.layer_tolerance:  # true of nan, too
        raise UserError(
            f"the merged layer {worst} differs from base and adapter by {difference.layer:.2g} of its weights, and "
            f"rounding to {dtype} explains {difference.layer_tolerance:.2g}: nothing was kept. {remedy}"
        )
    if not difference.logits <= difference.logits_tolerance:
        raise UserError(
            f"the merged model's logits differ from the adapter's by {difference.logits:.2g} of their spread, and "
            f"{dtype} explains {difference.logits_tolerance:.2g}: nothing was kept. {remedy}"
        )


def _job(stored: StoredAdapter, model_name: str | None, dtype: Dtype | None) -> _Job:
    """Everything that can be found wrong before a model is loaded."""
    assert stored.family is not None
    spec = load_spec(stored.family)
    base = stored.base_model if model_name is None else model_name
    if base is None:
        raise UserError(f"nothing in {stored.directory} names the adapter's base model: say it with --model.")
    basic = _run_precision(stored, spec, base)
    place = str(stored.directory) if (stored.directory / "tokenizer_config.json").is_file() else base
    processor = load_processor(spec, place, max_image_tiles=basic.max_image_tiles)
    return _Job(
        stored=stored,
        spec=spec,
        base_model=base,
        basic=basic,
        dtype=dtype or basic.dtype,
        processor=processor,
        batches=probe_batches(spec.collator(processor), probe_samples(spec)),
    )


def _run_precision(stored: StoredAdapter, spec: ModelSpec, base: str) -> BasicParams:
    """The basic section of the run; the dtype is that of the base's own files where no record says another."""
    basic: BasicParams = stored.section("basic")
    if stored.record is None:
        own = read_config(spec, find_source(spec, base)).dtype
        basic = replace(basic, dtype=next((dtype for dtype in DTYPES if own == getattr(torch, dtype)), "float32"))
    # Flash attention needs a GPU and 16 bits; sdpa computes the same without.
    return replace(basic, attn_impl="sdpa" if basic.attn_impl == "flash" else basic.attn_impl)


def _trained_logits(job: _Job) -> Tensor:
    """Logits of the model as it was trained, on 4-bit weights; nothing of it stays in memory."""
    quantisation = quantization_config(job.stored.section("qlora"), job.spec)
    base = load_model(job.spec, job.base_model, basic=job.basic, quantization_config=quantisation)
    model = load_adapter(after_quantised_load(base), job.stored, spec=job.spec)
    logits = answer_logits(model, job.batches)
    del base, model
    _release_memory()
    return logits


def _write_merged(job: _Job, staging: Path) -> _Before:
    """Merge and save model and processor; return what base and adapter computed before."""
    from inft.training.best import config_sha256

    spec, name = job.spec, job.base_model
    base = load_model(spec, name, basic=_on_one_device(job.basic, spec, name))
    if job.dtype != job.basic.dtype:
        base.to(torch.float32)  # exact, so that all of the difference is of the other dtype's making
    digest = config_sha256(base.config)
    untuned = answer_logits(base, job.batches)
    tuned = load_adapter(base, job.stored, spec=spec)
    logits = answer_logits(tuned, job.batches)
    merged, layers = merge_layers(tuned, getattr(torch, job.dtype))
    _restore_cache(merged, read_config(spec, find_source(spec, name)))
    merged.save_pretrained(str(staging), max_shard_size=SHARD)
    job.processor.save_pretrained(str(staging))
    for path in staging.glob("*.safetensors"):  # which safetensors lets nobody but their owner read
        path.chmod((staging / "config.json").stat().st_mode)
    effect = logits_distance(untuned, logits)
    return _Before(logits=logits, effect=effect, layers=layers, base_config_sha256=digest)


def _verified(job: _Job, before: _Before, trained: Tensor | None, staging: Path) -> Merged:
    """Load what was written and compare it; UserError when it is not what the adapter computes."""
    spec = job.spec
    _refuse_other_processor(job, staging)
    basic = _on_one_device(replace(job.basic, dtype=job.dtype), spec, str(staging))
    model = load_model(spec, str(staging), basic=basic)
    logits = answer_logits(model, job.batches)
    layers = layer_differences(model, before.layers)
    worst = max(layers, key=lambda name: math.inf if math.isnan(layers[name]) else layers[name])
    difference = Difference(
        logits=logits_distance(logits, before.logits),
        logits_tolerance=TOLERANCE[job.dtype],
        effect=before.effect,
        layer=layers[worst],
        layer_tolerance=LAYER_TOLERANCE[job.dtype],
    )
    refuse_difference(difference, dtype=job.dtype, worst=worst)
    gap = None if trained is None else QuantisedGap(kl=mean_kl(trained, logits), equal_top=equal_top(trained, logits))
    return Merged(
        family=spec.name,
        base_model=job.base_model,
        base_config_sha256=before.base_config_sha256,
        adapter=str(job.stored.directory),
        adapter_sha256=job.stored.sha256,
        step=(job.stored.record or {}).get("step"),
        dtype=job.dtype,
        layers=dict(Counter(part_of(name, spec) for name in layers)),
        parameters=model.num_parameters(),
        difference=difference,
        quantised=gap,
        mended=any(module._forward_hooks for module in model.modules()),
        files={path.name: path.stat().st_size for path in sorted(staging.iterdir())},
    )


def _refuse_other_processor(job: _Job, staging: Path) -> None:
    """UserError when the processor that was written makes other batches of the probe rows."""
    again = probe_batches(job.spec.collator(load_processor(job.spec, str(staging))), probe_samples(job.spec))
    for one, other in zip(job.batches, again, strict=True):
        if one.keys() != other.keys() or not all(one[name].equal(other[name]) for name in one):
            raise UserError(
                f"the processor of {job.stored.directory} does not survive being saved: read back, it makes other "
                "tokens or images of the same rows. Nothing was kept; use the adapter unmerged."
            )


def _layer_inputs(layer: nn.Module) -> Tensor:
    inputs, _ = shape_of(layer)
    drawn = torch.randn(PROBES, inputs, generator=torch.Generator().manual_seed(inputs))
    return drawn.to(layer.weight.device)


@torch.no_grad()
def _layer_difference(module: nn.Module, before: Tensor) -> float:
    layer = copy.deepcopy(module).to(torch.float32)
    difference = layer(_layer_inputs(layer)).cpu() - before
    size = sum(float(parameter.square().sum()) for parameter in layer.parameters()) ** 0.5
    return float(difference.norm()) / (size * PROBES**0.5)  # each input has as many random numbers of variance 1


def _on_one_device(basic: BasicParams, spec: ModelSpec, name: str) -> BasicParams:
    """The same on the GPU that holds the whole model, else on the CPU: offloaded weights cannot be merged in place."""
    if not torch.cuda.is_available():
        return basic
    size = sum(parameter.numel() for parameter in meta_model(spec, name).parameters())
    free, _ = torch.cuda.mem_get_info()
    fits = size * getattr(torch, basic.dtype).itemsize < GPU_SHARE * free
    return replace(basic, device_map="cuda:0" if fits else "cpu")


def _restore_cache(model: "PreTrainedModel", own: Any) -> None:
    """Turn decoding's cache, which load_model turns off for training, back to what the base's config says."""
    for part, original in ((model.config, own), (model.config.get_text_config(), own.get_text_config())):
        if hasattr(original, "use_cache"):
            part.use_cache = original.use_cache
        elif hasattr(part, "use_cache"):
            del part.use_cache


def _release_memory() -> None:
    """Give back what models that went out of use held: the next one may need all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
