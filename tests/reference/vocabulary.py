"""A small SentencePiece model with T5's special tokens, byte pieces and normalisation."""

import io
import random

# fmt: off
WORDS = (
    "a", "the", "red", "ball", "rolling", "left", "猫", "在", "跑", "größe", "naïve", "fi", "ﬁne", "①", "Ａ",
    "ｈｅｌｌｏ", "cat", "dog", "moves", "slowly", "sky",
)
# fmt: on


def train_spiece(*, vocab_size: int = 390) -> bytes:
    """Train one; it has at most `vocab_size` pieces."""
    import sentencepiece

    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(300)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=vocab_size,
        model_type="unigram",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        user_defined_symbols=["<extra_id_0>"],
        minloglevel=2,
        num_threads=1,
    )
    return written.getvalue()
