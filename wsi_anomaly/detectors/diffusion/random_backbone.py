"""Stable Diffusion with random weights, small or of full size, for tests, benchmarks and dry runs. It shows nothing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wsi_anomaly.detectors.diffusion.backbone import Backbone, quiet_libraries, write_backbone

Size = Literal["tiny", "sd15"]


def write_random_backbone(folder: Path, *, size: Size, seed: int = 0, texts: Sequence[str] = ()) -> None:
    """Write a complete folder of diffusers; equal arguments, equal files."""
    write_backbone(random_backbone(size, seed=seed, texts=texts), folder)


def random_backbone(size: Size, *, seed: int = 0, texts: Sequence[str] = ()) -> Backbone:
    """The parts with weights as layers draw them, frozen; "tiny" for tiles of 64 px, "sd15" of the sizes of SD 1.5.

    The tokenizer takes any text, and words of `texts` as one token. Made inside `torch.device(...)`, the networks are
    on that device; on "meta" they take no memory.
    """
    sizes = _SIZES[size]
    tokenizer = _tokenizer(texts)
    text_config = CLIPTextConfig(
        **sizes.text_encoder,
        vocab_size=max(len(tokenizer), sizes.vocabulary),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = (UNet2DConditionModel(**sizes.unet), AutoencoderKL(**sizes.vae), CLIPTextModel(text_config))
    unet, vae, text_encoder = (network.requires_grad_(requires_grad=False).eval() for network in networks)
    return Backbone(unet, vae, text_encoder, tokenizer, dict(PNDMScheduler(**_SCHEDULE).config))


def _tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A vocabulary as CLIP's: each byte, each byte that ends a word, what merges give, and the two marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(texts, letters)
    words = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_MARKS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=_CONTEXT)


def _merges(texts: Sequence[str], letters: Sequence[str]) -> list[tuple[str, str]]:
    learner = Tokenizer(BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        initial_alphabet=list(letters),
        end_of_word_suffix=_WORD_END,
        # Words of one letter: left to itself, the trainer numbers them in another order each time.
        special_tokens=[letter + _WORD_END for letter in letters],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the classes of diffusers and transformers are called with, where it differs from their defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    vocabulary: int


_CONTEXT = 77
_VAE_LEVELS = 4
_SIZES: dict[Size, _Sizes] = {
    "tiny": _Sizes(
        unet={
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        },
        vae={
            "sample_size": 64,
            "block_out_channels": (8,) * _VAE_LEVELS,
            "down_block_types": ("DownEncoderBlock2D",) * _VAE_LEVELS,
            "up_block_types": ("UpDecoderBlock2D",) * _VAE_LEVELS,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 4.0,  # of untrained layers, latents are small: this gives them a deviation near one
        },
        text_encoder={
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": _CONTEXT,
        },
        vocabulary=0,
    ),
    "sd15": _Sizes(
        unet={"sample_size": 64, "cross_attention_dim": 768},
        vae={
            "sample_size": 512,
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * _VAE_LEVELS,
            "up_block_types": ("UpDecoderBlock2D",) * _VAE_LEVELS,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
        text_encoder={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": _CONTEXT,
        },
        vocabulary=49408,
    ),
}
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_WORD_END = "</w>"
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_LARGEST_VOCABULARY = 4096
