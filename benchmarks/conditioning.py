"""Prompt conditioning: prompts per second of `PromptEncoder` against compel, which takes one prompt at a time.

    python benchmarks/conditioning.py [--size full|small] [--prompts N] [--threads N] [--repeats N] [--device cpu|cuda]

Each prompt has five keywords of the lymph node list, drawn at random, two of weight above 1 and two below: three passes
of the text encoder. Compel gets them as strings, which it parses, and as fragments. `PromptEncoder` gets them when it
has seen nothing, when it has seen the same keywords with other weights, and when it has seen the same prompts. The text
encoder has random weights; `full` has the sizes of Stable Diffusion 1's (CLIP ViT-L/14), `small` a quarter of its width
and a third of its layers. All take turns; a rate is that of the median time, and ratios are those of rates. The
difference is the largest to compel's fragments.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from compel import Compel  # noqa: E402
from compel.prompt_parser import FlattenedPrompt, Fragment  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from wsi_anomaly.detectors.diffusion.conditioning import PromptEncoder  # noqa: E402
from wsi_anomaly.detectors.protocol import Prompt  # noqa: E402
from wsi_anomaly.devices import resolve_device  # noqa: E402
from wsi_anomaly.prompts.keywords import load_keywords  # noqa: E402

SIZES = {"full": (768, 12), "small": (192, 4)}
"""Width and number of layers."""


def main() -> None:
    """Print the rates of all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = clip_tokenizer()
    text_encoder = random_text_encoder(tokenizer, *SIZES[arguments.size]).to(resolve_device(arguments.device))
    ways = ways_to_encode(tokenizer, text_encoder, arguments.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(arguments.repeats):
        for name, (prepare, encode) in ways.items():
            given = prepare()
            results[name], taken = timed(encode, given)
            seconds[name].append(taken)
    table = Table("way", "prompts/s", "to strings", "to fragments", "difference")
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    parsed, unparsed = list(medians.values())[:2]
    oracle = results["compel: fragments"]
    for name, median in medians.items():
        ratios = [f"{arguments.prompts / median:.1f}", f"{parsed / median:.2f}", f"{unparsed / median:.2f}"]
        table.add_row(name, *ratios, f"{(results[name] - oracle).abs().max().item():.1e}")
    Console().print(table)


Way = tuple[Callable[[], PromptEncoder | None], Callable[[PromptEncoder | None], torch.Tensor]]
"""What is done beforehand and does not count, and what counts."""


def ways_to_encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, count: int) -> dict[str, Way]:
    """All of them give the embeddings of the same prompts."""
    prompts, others = random_prompts(count, weight_seed=1), random_prompts(count, weight_seed=2)
    compel = Compel(tokenizer=tokenizer, text_encoder=text_encoder)

    def after(*seen: list[Prompt]) -> PromptEncoder:
        encoder = PromptEncoder(tokenizer, text_encoder)
        for earlier in seen:
            encoder.encode(earlier)
        return encoder

    def batched(encoder: PromptEncoder) -> torch.Tensor:
        return encoder.encode(prompts)

    return {
        "compel: strings": (lambda: None, lambda _: torch.cat([compel(as_string(prompt)) for prompt in prompts])),
        "compel: fragments": (lambda: None, lambda _: torch.cat([by_fragments(compel, prompt) for prompt in prompts])),
        "ours: new prompts": (after, batched),
        "ours: new weights": (lambda: after(others), batched),
        "ours: seen prompts": (lambda: after(prompts), batched),
    }


@torch.no_grad()
def by_fragments(compel: Compel, prompt: Prompt) -> torch.Tensor:
    """One embedding, without parsing."""
    pieces = [Fragment(text, weight) for text, weight in prompt]
    (embedding, _), _ = compel.build_conditioning_tensor_for_prompt_object(FlattenedPrompt(pieces))
    return embedding


def timed(encode: Callable[[PromptEncoder | None], torch.Tensor], given: PromptEncoder | None) -> tuple:
    """The embeddings and the seconds until the device has them."""
    started = time.perf_counter()
    embeddings = encode(given)
    embeddings[-1, -1, -1].item()
    return embeddings, time.perf_counter() - started


def random_prompts(count: int, *, weight_seed: int) -> list[Prompt]:
    """The keywords are the same for every seed of the weights."""
    keywords = [keyword.text for keyword in load_keywords("lymph_node").normal]
    which, weigh = np.random.default_rng(0), np.random.default_rng(weight_seed)
    prompts = []
    for _ in range(count):
        above, below = np.sort(weigh.uniform(0.01, 0.12, 2))[::-1], np.sort(weigh.uniform(0.01, 0.12, 2))
        weights = np.concatenate([1 + above, [1], 1 - below]).round(2).tolist()
        texts = [keywords[number] for number in which.permutation(len(keywords))[:5]]
        joined = [piece for pair in zip(texts, weights, strict=True) for piece in (("and", 1.0), pair)]
        prompts.append((("a histopathological photograph of", 1.0), *joined[1:]))
    return prompts


def as_string(prompt: Prompt) -> str:
    """The prompt in compel's language; none of its keywords holds a character that means something there."""
    return " ".join(text if weight == 1 else f"({text}){weight}" for text, weight in prompt)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own, from the merges that come with open_clip."""
    known = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in known.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(known.bpe_ranks), model_max_length=77)


def random_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A text encoder of CLIP's kind, with random weights."""
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    layout = {"num_hidden_layers": layers, "num_attention_heads": width // 64, "vocab_size": len(tokenizer)}
    return CLIPTextModel(CLIPTextConfig(**marks, **sizes, **layout)).eval()


if __name__ == "__main__":
    main()
