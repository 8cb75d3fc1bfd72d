"""Transformers for translation: Marian's encoder-decoder of Hugging Face's library, which is that of Vaswani et al.

Post-norm, ReLU, sinusoidal positions, one table of embeddings for both sides and the output.
"""

from __future__ import annotations

from torch import nn

from luqrun.config import ModelConfig
from luqrun.internals.of_transformers import transformers
from luqrun.tasks.translation.subwords import END, PADDING

# layers of each side, width, width of the feed-forward layers, heads, dropout
SIZES = {
    "transformer_base": (6, 512, 2048, 8, 0.1),
    "transformer_tiny": (4, 128, 256, 4, 0.1),  # as work on Multi30k has it (Wu et al. 2021), there with dropout 0.3
}


def build_network(config: ModelConfig, vocabulary: int, max_length: int) -> nn.Module:
    """A MarianMTModel for `vocabulary` joint subwords and sentences of up to max_length of them.

    Its weights come from torch's generator, initialised as fairseq does: Xavier for the layers, a deviation of
    width^-0.5 for the embeddings.
    """
    library = transformers()
    layers, width, inner, heads, dropout = SIZES[config.name]
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("ffn_dim", inner), ("attention_heads", heads))
    }
    settings = library.MarianConfig(
        **sides,
        d_model=width,
        vocab_size=vocabulary,
        max_position_embeddings=2 * max_length + 16,  # a translation may be longer
        dropout=dropout if config.dropout is None else config.dropout,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=PADDING,
        eos_token_id=END,
        decoder_start_token_id=PADDING,
        forced_eos_token_id=None,
    )
    model = library.MarianMTModel(settings)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            joint = name.endswith(("q_proj", "k_proj", "v_proj"))  # there as if the three were one matrix
            nn.init.xavier_uniform_(module.weight, gain=2**-0.5 if joint else 1.0)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.model.shared.weight, std=width**-0.5)
    nn.init.zeros_(model.model.shared.weight[PADDING].detach())
    return model
