"""Prompts as embeddings: compel is the oracle, asked one prompt at a time through its public functions."""

import math
import random
from collections.abc import Callable

import pytest
import torch

from wsi_anomaly.torchvision_shim import make_importable

make_importable()  # transformers looks for torchvision

from compel import Compel  # noqa: E402
from compel.prompt_parser import FlattenedPrompt, Fragment  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from wsi_anomaly.detectors.diffusion.conditioning import PromptEncoder  # noqa: E402
from wsi_anomaly.detectors.protocol import Prompt  # noqa: E402

KEYWORDS = (("small cells", 1.07), ("capsule", 1.03), ("vessels", 1.0), ("large cells", 0.97), ("sinus", 0.94))
FIVE = (("a photograph of", 1.0), *(piece for keyword in KEYWORDS for piece in (keyword, ("and", 1.0))))[:-1]
TEXTS = [
    "HER2+",
    "ER-",
    "(CD8+ T cells)",
    'say "a" and',
    "a, b; c.",
    "",
    " ",
    "é 漢字",
    "😀",
    "\\",
    "B cells ",
    "a:1.5",
    "a",
]
WEIGHTS = [0.0, 1e-6, 0.3, 0.94, 0.97, 1.0, 1.0, 1.03, 1.07, 2.5]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """One token for each byte, as CLIP's tokenizer has them before the merges."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


MakeTextEncoder = Callable[..., CLIPTextModel]


@pytest.fixture(scope="module")
def make_text_encoder(tokenizer: CLIPTokenizer) -> MakeTextEncoder:
    """Text encoders of CLIP's kind with random weights."""

    def make(*, layers: int = 2, width: int = 32, heads: int = 4) -> CLIPTextModel:
        marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        layout = {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": len(tokenizer)}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return CLIPTextModel(CLIPTextConfig(**marks, **sizes, **layout)).eval()

    return make


@pytest.fixture
def text_encoder(make_text_encoder: MakeTextEncoder) -> CLIPTextModel:
    """A tiny one."""
    return make_text_encoder()


@pytest.fixture
def encoder(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> PromptEncoder:
    """With nothing in its cache."""
    return PromptEncoder(tokenizer, text_encoder)


@pytest.fixture
def passes(text_encoder: CLIPTextModel) -> list[int]:
    """Grows by the batch size whenever the text encoder runs."""
    sizes: list[int] = []
    text_encoder.encoder.register_forward_hook(
        lambda _, __, given, ___: sizes.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    return sizes


@pytest.fixture
def by_compel(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Callable[[Prompt], torch.Tensor]:
    """Compel's own embedding of a prompt."""
    compel = Compel(tokenizer=tokenizer, text_encoder=text_encoder, truncate_long_prompts=True)

    @torch.no_grad()
    def embed(prompt: Prompt) -> torch.Tensor:
        pieces = [Fragment(text, weight) for text, weight in prompt or (("", 1.0),)]
        (embedding, _), _ = compel.build_conditioning_tensor_for_prompt_object(FlattenedPrompt(pieces))
        return embedding[0]

    return embed


def random_prompts(count: int, *, fragments: int, seed: int) -> list[Prompt]:
    """Of awkward texts and of all kinds of weights; compel has none for a text without tokens below weight 1."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    prompts = []
    for _ in range(count):
        texts = draw.choices(TEXTS, k=draw.randint(0, fragments))
        prompts.append(tuple((text, draw.choice(WEIGHTS) if text.strip() else 1.0) for text in texts))
    return prompts


def plain(text: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """The bare text encoder's embedding of a text, as a diffusion pipeline makes it."""
    tokens = tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder(tokens).last_hidden_state


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("fragments", [5, 14])
def test_embeddings_are_those_of_compel(
    fragments: int,
    batch_size: int | None,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    by_compel: Callable[[Prompt], torch.Tensor],
) -> None:
    """For five fragments, which fit, and up to fourteen, of which some are cut off; one by one and in batches."""
    encoder = PromptEncoder(tokenizer, text_encoder, batch_size=batch_size)
    prompts = [FIVE, *random_prompts(60, fragments=fragments, seed=fragments)]
    expected = torch.stack([by_compel(prompt) for prompt in prompts])
    torch.testing.assert_close(encoder.encode(prompts), expected, atol=1e-5, rtol=0)


def test_embeddings_are_those_of_the_string_that_compel_parses(
    encoder: PromptEncoder, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """Where no keyword holds a character that means something to its parser."""
    text = "a photograph of (small cells)1.07 and (capsule)1.03 and (vessels)1.0 and (large cells)0.97 and (sinus)0.94"
    expected = Compel(tokenizer=tokenizer, text_encoder=text_encoder)(text)
    torch.testing.assert_close(encoder.encode([FIVE]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("before", [60, 68, 69, 70, 73, 74, 75, 76, 90])
@pytest.mark.parametrize("weight", [0.5, 1.5])
def test_a_weighted_fragment_that_is_cut_off_is_treated_as_in_compel(
    before: int, weight: float, encoder: PromptEncoder, by_compel: Callable[[Prompt], torch.Tensor]
) -> None:
    """Of its six letters all fit, the last are cut, or none is left; another fragment follows."""
    prompt = (("x" * before, 1.0), ("sinus2", weight), ("tail", 0.9))
    torch.testing.assert_close(encoder.encode([prompt])[0], by_compel(prompt), atol=1e-5, rtol=0)


def test_the_empty_prompt_is_that_of_the_bare_text_encoder(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """Bit for bit, by both of its names and with its neighbours weighted."""
    encoder = PromptEncoder(tokenizer, text_encoder, batch_size=1)
    assert torch.equal(encoder.empty, plain("", tokenizer, text_encoder))
    assert torch.equal(encoder.encode([FIVE, ()])[1:], encoder.empty)


@pytest.mark.parametrize("text", ["plain words", *(text for text in TEXTS if text.strip())])
def test_weight_one_changes_nothing(text: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """The bare text encoder's embedding, bit for bit: no character of a text acts as a weight."""
    encoder = PromptEncoder(tokenizer, text_encoder, batch_size=1)
    assert torch.equal(encoder.encode([((text, 1.0),)]), plain(text, tokenizer, text_encoder))


def test_weight_zero_is_almost_the_prompt_without_the_fragment(encoder: PromptEncoder) -> None:
    """The mark of the end, which sees the whole prompt, no longer tells which word was there."""
    cat, dog = (encoder.encode([(("a", 1.0), (word, 0.0))])[0, 5] for word in ("cat", "dog"))
    loud_cat, loud_dog = (encoder.encode([(("a", 1.0), (word, 1.0))])[0, 5] for word in ("cat", "dog"))
    assert (cat - dog).abs().max() < 1e-3 * (loud_cat - loud_dog).abs().max()


def test_a_fragment_without_tokens_has_no_weight(encoder: PromptEncoder, passes: list[int]) -> None:
    """Nothing of it can be hidden, so nothing new goes through the text encoder."""
    plainly = encoder.encode([(("cells", 1.0),)])
    assert torch.equal(encoder.encode([(("cells", 1.0), (" ", 0.5))]), plainly)
    assert len(passes) == 2  # the empty prompt, and this one


@pytest.mark.parametrize(
    ("size", "count"), [({"layers": 2, "width": 32, "heads": 4}, 13), ({"layers": 1, "width": 768, "heads": 12}, 3)]
)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_an_embedding_does_not_depend_on_the_prompts_it_comes_with(
    size: dict[str, int],
    count: int,
    batch_size: int | None,
    tokenizer: CLIPTokenizer,
    make_text_encoder: MakeTextEncoder,
) -> None:
    """Bit for bit, in any order, alone or not, encoded or remembered; also with layers of full width."""
    text_encoder, prompts = make_text_encoder(**size), random_prompts(count, fragments=6, seed=3)
    together = PromptEncoder(tokenizer, text_encoder, batch_size=batch_size).encode(prompts)
    alone = PromptEncoder(tokenizer, text_encoder, batch_size=batch_size)
    assert torch.equal(torch.cat([alone.encode([prompt]) for prompt in prompts[::-1]]), together.flip(0))
    assert torch.equal(alone.encode(prompts), together)


def test_every_batch_has_the_same_size(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, passes: list[int]
) -> None:
    """Texts with equally many hidden fragments have batches of their own, and all are filled up."""
    prompts = [FIVE, (("a", 1.0),), (("b", 2.0),)]
    in_eights = PromptEncoder(tokenizer, text_encoder, batch_size=8).encode(prompts)
    assert passes == [8, 8]
    one_by_one = PromptEncoder(tokenizer, text_encoder).encode(prompts)
    assert passes[2:] == [1] * 4  # the empty prompt too
    torch.testing.assert_close(in_eights, one_by_one, atol=1e-5, rtol=0)


def test_equal_prompts_are_encoded_once(encoder: PromptEncoder, passes: list[int]) -> None:
    """Within one call and over calls; the result has a row for each."""
    first = encoder.encode([FIVE] * 20)
    assert (len(first), len(passes)) == (20, 2)
    assert torch.equal(encoder.encode([FIVE]), first[7:8])
    assert len(passes) == 2


def test_other_weights_need_no_further_pass(encoder: PromptEncoder, passes: list[int]) -> None:
    """What the text encoder is asked depends on texts alone, as long as no other fragment falls below weight 1."""
    encoder.encode([(("a", 1.1), ("b", 1.0), ("c", 0.9))])
    done = len(passes)
    encoder.encode([(("a", 1.2), ("b", 1.01), ("c", 0.85))])
    assert len(passes) == done
    encoder.encode([(("a", 1.2), ("b", 0.99), ("c", 0.85))])
    assert len(passes) == done + 1


def test_the_cache_forgets_what_was_not_used_for_longest(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, passes: list[int]
) -> None:
    """Three texts fit: the empty prompt, which every call needs, and two more."""
    encoder = PromptEncoder(tokenizer, text_encoder, cache_prompts=3, batch_size=1)
    used = []
    for letter in "abacab":
        encoder.encode([((letter, 1.0),)])
        used.append(len(passes))
    assert used == [2, 3, 3, 4, 4, 5]


def test_the_empty_prompt_stays_in_a_cache_that_one_call_fills(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, passes: list[int]
) -> None:
    """Guidance needs it all the time."""
    encoder = PromptEncoder(tokenizer, text_encoder, cache_prompts=2, batch_size=1)
    encoder.encode([((letter, 1.0),) for letter in "abc"])
    encoder.encode([(("c", 2.0),), ()])
    assert len(passes) == 4


def test_a_call_may_hold_more_prompts_than_the_cache(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Even where nothing is kept."""
    prompts = random_prompts(20, fragments=4, seed=4)
    expected = PromptEncoder(tokenizer, text_encoder).encode(prompts)
    assert torch.equal(PromptEncoder(tokenizer, text_encoder, cache_prompts=0).encode(prompts), expected)


def test_writing_into_an_embedding_does_not_reach_the_cache(encoder: PromptEncoder) -> None:
    """Not even for prompts that are taken from it as they are."""
    prompts: list[Prompt] = [(), (("cells", 1.0),), FIVE]
    before = encoder.encode(prompts).clone()
    encoder.encode(prompts).zero_()
    encoder.empty.zero_()
    assert torch.equal(encoder.encode(prompts), before)


def test_no_prompts_give_no_embeddings(encoder: PromptEncoder) -> None:
    """Of the right width."""
    assert encoder.encode([]).shape == (0, 77, 32)


def test_a_network_can_be_trained_on_embeddings_made_in_inference_mode(encoder: PromptEncoder) -> None:
    """They carry no gradients themselves."""
    with torch.inference_mode():
        embeddings = encoder.encode([FIVE])
    layer = torch.nn.Linear(32, 1)
    layer(embeddings).sum().backward()
    assert layer.weight.grad is not None
    assert not embeddings.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_have_the_precision_of_the_text_encoder(
    dtype: torch.dtype, encoder: PromptEncoder, tokenizer: CLIPTokenizer, make_text_encoder: MakeTextEncoder
) -> None:
    """And are near those in full precision."""
    half = PromptEncoder(tokenizer, make_text_encoder().to(dtype)).encode([FIVE, ()])
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), encoder.encode([FIVE, ()]), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_without_a_meaning_is_refused(weight: float, encoder: PromptEncoder) -> None:
    """The message names fragment and weight."""
    with pytest.raises(ValueError, match=rf"weight of 'cells' in a prompt is {weight}"):
        encoder.encode([(("cells", weight),)])
