"""BDH for Hugging Face transformers: this file is copied into exported folders and runs there, without the package it comes from.

The same layer, with the same weights, is applied `n_layer` times. Attention has no softmax and keys that are its queries, so what a token
needs of all earlier ones is a state (H, N, D) a layer: `generate` carries it along, at a cost per token that does not grow. Padding on the
left is left out of it by the attention mask; rotations depend on distances only.

B rows, T tokens, V vocabulary, D n_embd, H n_head, N neurons a head.   Source: arXiv:2509.26507; pathwaycom/bdh, bdh.py.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

ROPE_THETA = 2.0**16  # pathwaycom/bdh, bdh.py
INIT_STD = 0.02
CHUNK = 128  # tokens whose scores are computed at once; earlier ones are in the state
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""What this version of transformers calls the state."""


class BDHConfig(PretrainedConfig):
    """Shape of the network, in the published names."""

    model_type = "bdh"

    def __init__(
        self,
        n_layer: int = 6,
        n_embd: int = 256,
        dropout: float = 0.1,
        n_head: int = 4,
        mlp_internal_dim_multiplier: int = 128,
        vocab_size: int = 256,
        **kwargs: Any,
    ) -> None:
        self.n_layer, self.n_embd, self.n_head = n_layer, n_embd, n_head
        self.dropout, self.mlp_internal_dim_multiplier, self.vocab_size = dropout, mlp_internal_dim_multiplier, vocab_size
        self.attention_decay = float(kwargs.pop("attention_decay", 0.0))
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = n_embd, n_layer, n_head
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class BDHRotations(nn.Module):
    """How fast neurons turn.   freqs: (1, 1, 1, N), full turns a token, fp32 whatever the dtype of the model; equal within a pair."""

    freqs: Tensor

    def __init__(self, neurons: int) -> None:
        super().__init__()
        pair = torch.arange(neurons, dtype=torch.float32) // 2 * 2
        self.register_buffer("freqs", (1.0 / (ROPE_THETA ** (pair / neurons)) / (2 * math.pi)).view(1, 1, 1, -1))

    def _apply(self, fn: Any, recurse: bool = True) -> "BDHRotations":
        before = self.freqs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.freqs.dtype is not torch.float32:
            self.freqs = before.to(self.freqs.device)
        return self


class BDHFading(NamedTuple):
    """Factors of each head.   between: tokens, (H, T, T).   since_start, to_end: of a stretch, (H, T, 1).   over: all of it, (H, 1, 1)."""

    between: Tensor
    since_start: Tensor
    to_end: Tensor
    over: Tensor


class BDHState:
    """What is remembered of the tokens so far.   position: how many there were.   layers: (B, H, N, D) each, None before the first."""

    is_compileable = False
    is_linear = (True,)  # what transformers asks of a cache that it need not cut to size

    def __init__(self, layers: int) -> None:
        self.position = 0
        self.layers: list[Tensor | None] = [None] * layers

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens so far."""
        return self.position

    def reorder_cache(self, rows: Tensor) -> "BDHState":
        """Rows of the batch in another order, as beam search wants them."""
        self.layers = [None if state is None else state.index_select(0, rows) for state in self.layers]
        return self


class BDHForCausalLM(PreTrainedModel, GenerationMixin):
    """The network.   Parameters: embed.weight (V, D), encoder and encoder_v (H, D, N), decoder (H * N, D), lm_head (D, V).

    Buffer: attn.freqs (1, 1, 1, N).
    """

    config_class = BDHConfig
    base_model_prefix = ""
    accepts_loss_kwargs = True  # `num_items_in_batch`: transformers' Trainer then leaves the mean over accumulated batches to the loss
    _keep_in_fp32_modules_strict = ["attn"]
    _is_stateful = True  # a state cannot be taken back by some tokens, as speculative decoding would need

    def __init__(self, config: BDHConfig) -> None:
        super().__init__(config)
        heads, width = config.n_head, config.n_embd
        self.neurons = config.mlp_internal_dim_multiplier * width // heads
        self.embed = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.Parameter(torch.empty(heads, width, self.neurons))
        self.encoder_v = nn.Parameter(torch.empty(heads, width, self.neurons))
        self.decoder = nn.Parameter(torch.empty(heads * self.neurons, width))
        self.lm_head = nn.Parameter(torch.empty(width, config.vocab_size))
        self.attn = BDHRotations(self.neurons)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.normal_(parameter, std=INIT_STD)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.embed = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The vocabulary stays as it was trained: `embed` and `lm_head` would have to grow together.   Raises ValueError."""
        if new_num_tokens in (None, self.config.vocab_size):
            return self.embed
        raise ValueError(f"the vocabulary of this model stays at {self.config.vocab_size} tokens")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: BDHState | None = None,
        past_key_values: BDHState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits for the token after each position.

        input_ids: (B, T), of which the last ones belong to the mask's (B, S >= T), 0 where there is padding.   labels: (B, T) ids, shifted
        here; -100 does not count.   cache: state of the tokens before, also under its older name `past_key_values`.

        logits_to_keep: of the last tokens only; 0 for all.   num_items_in_batch: labels that the loss is a mean over; those of this call if
        not given. Raises ValueError for no tokens, and for what this model does not have.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("hidden states and attentions are not given back: there is one layer, applied again and again, and no softmax")
        if input_ids.shape[1] == 0:
            raise ValueError("no tokens: a text begins with the separator, bos_token_id")
        state = cache if cache is not None else past_key_values
        keep = use_cache is True or state is not None
        state = state if state is not None else BDHState(self.config.n_layer)
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if mask is not None and bool((mask != 0).all()):
            mask = None
        outs = []
        for start in range(0, input_ids.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            more = keep or start + CHUNK < input_ids.shape[1]
            outs.append(self._chunk(input_ids[:, part], None if mask is None else mask[:, part], state, more))
        logits = torch.cat(outs, dim=1)[:, -logits_to_keep:] @ self.lm_head
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the logits of all tokens")
            mean = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=mean)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **({CACHE: state} if keep else {}))
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Only the tokens that the state does not know yet."""
        state = next((kwargs[name] for name in ("cache", "past_key_values") if isinstance(kwargs.get(name), BDHState)), None)
        if state is not None:
            input_ids = input_ids[:, state.position :]
        asked = {CACHE: state, "use_cache": use_cache is not False, "logits_to_keep": 1}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **asked}

    def _chunk(self, ids: Tensor, mask: Tensor | None, state: BDHState, more: bool) -> Tensor:
        """All layers for the next tokens (B, T).   more: others will follow, so the state takes these in.   Returns (B, T, D), normed."""
        x = _norm(self.embed(ids))
        cos, sin = self._rotations(torch.arange(state.position, state.position + ids.shape[1], device=ids.device))
        fading = self._fading(ids.shape[1], x)
        for depth in range(self.config.n_layer):
            xs = F.relu(x.unsqueeze(1) @ self.encoder)
            if mask is not None:
                xs = xs * mask[:, None, :, None].to(xs.dtype)
            q, memory = _rotated(xs, cos, sin), state.layers[depth]
            values = x.unsqueeze(1)
            scores = (q @ q.mT).tril(diagonal=-1)
            attended = (scores if fading is None else scores * fading.between) @ values
            if memory is not None:
                attended = attended + (q @ memory if fading is None else fading.since_start * (q @ memory))
            if more:
                taken_in = q.mT @ (values if fading is None else fading.to_end * values)
                kept = memory if fading is None or memory is None else fading.over * memory
                state.layers[depth] = taken_in if kept is None else kept + taken_in
            gated = xs * F.relu(_norm(attended) @ self.encoder_v)
            gated = F.dropout(gated, self.config.dropout, training=self.training)
            x = _norm(x + _norm(gated.transpose(1, 2).flatten(2) @ self.decoder))
        if more:
            state.position += ids.shape[1]
        return x

    def _fading(self, tokens: int, like: Tensor) -> "BDHFading | None":
        """How attention fades over so many tokens: by exp(-attention_decay 2^(-8 h / H) d) over d of them in head h = 1 .. H."""
        if not self.config.attention_decay:
            return None
        heads = self.config.n_head
        rates = self.config.attention_decay * 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        powers = torch.exp(-rates.unsqueeze(1) * torch.arange(tokens + 1)).to(like.dtype).to(like.device)
        places = torch.arange(tokens, device=like.device)
        between = powers[:, (places.unsqueeze(1) - places).clamp_min(0)]
        return BDHFading(between, powers[:, :-1, None], powers[:, 1:, None].flip(1), powers[:, -1:, None])

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, N / 2), fp32, computed in full turns modulo 1 as the published code does."""
        angle = ((positions.float().unsqueeze(1) * self.attn.freqs.flatten()[0::2]) % 1) * (2 * math.pi)
        return torch.cos(angle), torch.sin(angle)


def _norm(x: Tensor) -> Tensor:
    """LayerNorm without gain or bias, in fp32 at least."""
    return F.layer_norm(x if x.dtype is torch.float64 else x.float(), x.shape[-1:]).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neurons 2i and 2i + 1 turned by their token's position."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
