"""NeoBERT for transformers: a pre-norm encoder with rotary positions, SwiGLU and full attention in every layer.

Le Breton et al. 2025, "NeoBERT: A Next-Generation BERT". Attribute names are those of the published weights. Every
model runs on one flat stream of tokens: a padded batch goes in without its padding and comes out padded with zeros.

Axes: B rows, S columns of a padded batch, T tokens of a flat stream, N documents, A heads, D features of a head,
H hidden size, W feed-forward width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from inft.models.masked_lm import FusedKernel, MaskedLMLossOutput, Reduction, full_loss, masked_loss
from inft.models.neobert_attention import Rotary, check_backend, document_attention, rotary_angles, rotate
from inft.models.neobert_config import NeoBERTConfig
from inft.models.neobert_layout import Documents, Stream, flat_stream, padded_stream
from params.errors import UserError

__all__ = ["NeoBERTConfig", "NeoBERTForMaskedLM", "NeoBERTForSequenceClassification", "NeoBERTModel"]

HEAD_NAMES = r"^decoder\."


class SwiGLU(nn.Module):
    """w3(silu(w1 x) ⊙ w2 x), w1 and w2 in one matrix (Shazeer 2020)."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=False)
        self.w3 = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return [T, H]."""
        gate_TW, up_TW = self.w12(x_TH).chunk(2, dim=-1)
        return self.w3(F.silu(gate_TW) * up_TW)


class GELU(nn.Module):
    """w2 gelu(w1 x)."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.w2 = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return [T, H]."""
        return self.w2(F.gelu(self.w1(x_TH)))


def _norm(config: NeoBERTConfig) -> nn.Module:
    # torch's RMSNorm sums squares in float32 whatever its input is.
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


class NeoBERTBlock(GradientCheckpointingLayer):
    """x += wo(attention(norm x)); x += ffn(norm x)."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.attn_backend = config.attn_backend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.ffn = SwiGLU(config) if config.hidden_act == "swiglu" else GELU(config)
        self.attention_norm = _norm(config)
        self.ffn_norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x_TH: Tensor, *, rotary: Rotary | None, documents: Documents) -> Tensor:
        """Return [T, H]; no rotary angles where positions are learned."""
        x_TH = x_TH + self.dropout(self.wo(self._attention(self.attention_norm(x_TH), rotary, documents)))
        return x_TH + self.dropout(self.ffn(self.ffn_norm(x_TH)))

    def _attention(self, x_TH: Tensor, rotary: Rotary | None, documents: Documents) -> Tensor:
        # Each head's rows of the fused matrix are its q, its k and its v.
        qkv = self.qkv(x_TH).unflatten(-1, (-1, 3, self.head_size))  # T A 3 D
        qk, v_TAD = qkv[:, :, :2], qkv[:, :, 2]
        q_TAD, k_TAD = (qk if rotary is None else rotate(qk, rotary)).unbind(2)
        attended_TAD = document_attention(
            q_TAD, k_TAD, v_TAD, documents.cu_seqlens, documents.max_seqlen, self.attn_backend
        )
        return attended_TAD.flatten(1)


class NeoBERTPreTrainedModel(PreTrainedModel):
    """What the models share: their configuration and the draw of new weights."""

    config_class = NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("NeoBERTBlock",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        limit = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.uniform_(module.weight, -limit, limit)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            initialization.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            initialization.zeros_(module.bias)


class NeoBERTModel(NeoBERTPreTrainedModel):
    """The encoder without a head."""

    _keys_to_ignore_on_load_unexpected = (HEAD_NAMES,)  # what the base model leaves out of a masked-LM checkpoint

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        # No padding_idx: padding never enters the stream, and a tied head must learn that [PAD] is no prediction.
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.rope:
            self.positional_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.transformer_encoder = nn.ModuleList(NeoBERTBlock(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = _norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of tokens."""
        return self.encoder

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.encoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Return last_hidden_state, and with output_hidden_states that of the embedding and of every block.

        Padded: input_ids [B, S] with attention_mask [B, S], 1 for real tokens on either side; hidden states [B, S, H]
        are zeros at padding. Flat: input_ids [T] with cu_seqlens [N + 1] (repeated values are empty documents),
        position_ids [T] that restart in each document and max_seqlen; hidden states [T, H]. The last hidden state is
        the normalised one. return_dict=False gives a tuple.
        Errors: ValueError for inputs of other shapes; UserError for texts beyond max_position_embeddings, for
        token types other than 0, and where the attention backend is not at hand.
        """
        _refuse(token_type_ids, output_attentions)
        stream = self._stream(input_ids, attention_mask, position_ids, cu_seqlens, max_seqlen)
        x_TH = self._embed(stream)
        if not torch.compiler.is_compiling():  # the search for a package is nothing to compile
            check_backend(self.config.attn_backend, x_TH.device.type, _attention_dtype(x_TH))
        rotary = self._rotary(stream.documents.position_ids_T, x_TH)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        kept = [x_TH]
        for block in self.transformer_encoder:
            x_TH = block(x_TH, rotary=rotary, documents=stream.documents)
            if wanted:
                kept.append(x_TH)
        last = stream.restore(self.layer_norm(x_TH))
        hidden_states = (*(stream.restore(x) for x in kept[:-1]), last) if wanted else None
        return BaseModelOutput(last_hidden_state=last, hidden_states=hidden_states)

    def _stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Stream:
        if input_ids.dim() == 1:
            if attention_mask is not None:
                raise ValueError("A flat stream input_ids [T] has no padding: give cu_seqlens, no attention_mask.")
            return flat_stream(input_ids, position_ids, cu_seqlens, max_seqlen)
        if input_ids.dim() != 2 or cu_seqlens is not None:
            raise ValueError(
                f"input_ids must be [B, S] with an attention_mask, or [T] with cu_seqlens: it is "
                f"{list(input_ids.shape)}, {'with' if cu_seqlens is not None else 'without'} cu_seqlens."
            )
        return padded_stream(input_ids, attention_mask, position_ids, limit=self.config.max_position_embeddings)

    def _embed(self, stream: Stream) -> Tensor:
        x_TH = self.encoder(stream.input_ids_T)
        if self.config.rope:
            return x_TH
        return x_TH + self.positional_embedding(stream.documents.position_ids_T)

    def _rotary(self, position_ids_T: Tensor, x_TH: Tensor) -> Rotary | None:
        if not self.config.rope:
            return None
        return rotary_angles(position_ids_T, self.config.head_size, self.config.rope_theta, x_TH.dtype)


class NeoBERTForMaskedLM(NeoBERTPreTrainedModel):
    """The encoder with a head that predicts tokens."""

    # A mapping: as a list, transformers 5 would take it for names to leave out and lose the tie.
    _tied_weights_keys = {"decoder.weight": "model.encoder.weight"}  # noqa: RUF012 -- transformers copies it

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERTModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        masked_only: bool = False,
        fused: FusedKernel = "off",
        reduction: Reduction = "mean",
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMLossOutput:
        """Return logits [*input_ids, V], and with labels (-100 where nothing is predicted) the cross-entropy.

        With `masked_only` the positions without a label never meet the head: the output has the loss and the number
        of correct predictions, and no logits. `fused` joins head and loss in one kernel. The other inputs are
        NeoBERTModel's. Without any label the loss is 0.
        Errors: ValueError for masked_only without labels, or fused without masked_only.
        """
        if (masked_only and labels is None) or (fused != "off" and not masked_only):
            raise ValueError("masked_only needs labels, and a fused loss needs masked_only.")
        # Before the encoder: on CUDA this waits for the labels alone, not for all the layers.
        masked_M = None if labels is None else (labels.flatten() != -100).nonzero().squeeze(1)
        encoded = self.model(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = encoded.last_hidden_state
        if masked_only:
            loss, correct = masked_loss(self.decoder, hidden, labels, masked_M, fused=fused, reduction=reduction)
            return MaskedLMLossOutput(loss=loss, correct=correct, hidden_states=encoded.hidden_states)
        logits = self.decoder(hidden)
        loss, correct = (None, None) if labels is None else full_loss(logits, labels, masked_M, reduction=reduction)
        return MaskedLMLossOutput(loss=loss, logits=logits, correct=correct, hidden_states=encoded.hidden_states)


class NeoBERTForSequenceClassification(NeoBERTPreTrainedModel):
    """The encoder with a head on the first token of each text, for classes or regression."""

    _keys_to_ignore_on_load_unexpected = (HEAD_NAMES,)

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NeoBERTModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits [B, num_labels] of padded texts, and with labels the loss of config.problem_type.

        The other inputs are NeoBERTModel's. Errors: ValueError for a flat stream.
        """
        if input_ids.dim() != 2:
            raise ValueError("Classification takes padded texts: input_ids [B, S] with an attention_mask.")
        encoded = self.model(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        first_B = 0 if attention_mask is None else attention_mask.bool().int().argmax(1)
        cls_BH = encoded.last_hidden_state[torch.arange(len(input_ids), device=input_ids.device), first_B]
        pooled_BH = torch.tanh(self.dense(self.dropout(cls_BH)))
        logits = self.classifier(self.dropout(pooled_BH))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


def _attention_dtype(x_TH: Tensor) -> torch.dtype:
    device = x_TH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TH.dtype


def _refuse(token_type_ids: Tensor | None, output_attentions: bool | None) -> None:
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise UserError(
            "NeoBERT has no token types, and token_type_ids are not all 0. Tokenise with return_token_type_ids=False."
        )
    if output_attentions:
        raise UserError("NeoBERT's attention kernels keep no weights: leave output_attentions out.")


AutoConfig.register("neobert", NeoBERTConfig, exist_ok=True)
AutoModel.register(NeoBERTConfig, NeoBERTModel, exist_ok=True)
AutoModelForMaskedLM.register(NeoBERTConfig, NeoBERTForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(NeoBERTConfig, NeoBERTForSequenceClassification, exist_ok=True)
