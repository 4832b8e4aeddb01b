"""A small model of CONCH's class with random weights, for tests, benchmarks and dry runs. Its vectors mean nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from wsi_anomaly.checkpoints import Weights
from wsi_anomaly.errors import OptionsError
from wsi_anomaly.prompts.conch import SIZES_FILE, SPECIAL_TOKENS, TOKENIZER_FILES
from wsi_anomaly.prompts.conch_network import ConchNetwork, ConchSizes


def write_random_conch(folder: Path, sizes: ConchSizes, *, seed: int = 0, texts: Sequence[str]) -> None:
    """Write weights, sizes and a tokenizer that learned its merges from `texts`; equal arguments, equal files.

    Raises:
        OptionsError: the vocabulary has no room for each byte and the special tokens.
    """
    tokenizer = _tokenizer(sizes.vocabulary, texts)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(sizes, seed=seed), folder / "model.safetensors")
    (folder / SIZES_FILE).write_text(sizes.model_dump_json(indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / TOKENIZER_FILES[0]))


def random_weights(sizes: ConchSizes, *, seed: int) -> Weights:
    """All tensors of a model, drawn in the order of their names, the same on every machine.

    Scaled as layers want them: products by the square root of their width, the scale of a norm about one, and
    embeddings large enough that tiles and texts differ.
    """
    with torch.device("meta"):
        wanted = ConchNetwork(sizes).state_dict()
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, tensor in sorted(wanted.items()):
        drawn = generator.standard_normal(tuple(tensor.shape))
        if tensor.ndim > 1:
            drawn /= np.sqrt(tensor[0].numel())
        else:
            drawn = 0.05 * drawn + name.endswith(".weight")
        weights[name] = torch.from_numpy(np.asarray(drawn, np.float32))
    return weights


def _tokenizer(vocabulary: int, texts: Sequence[str]) -> Tokenizer:
    """Byte-level pairs, as CONCH has them: case and accents do not count."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocabulary < smallest:
        raise OptionsError(f"a vocabulary of {vocabulary} is too small: bytes and special tokens alone are {smallest}")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[(token, SPECIAL_TOKENS[token]) for token in ("<start_of_text>", "<end_of_text>")],
    )
    return tokenizer
