"""A small tokenizer.json: a byte-level BPE, trained on a few lines, with the tokens of ChatML."""

from pathlib import Path

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "{role}", "@@"]

_LINES = ["hello world, how are you today?", "the quick brown fox jumps over the lazy dog", "你好,世界。今天天气很好。"]


def trained(folder: Path) -> Path:
    """Train a tokenizer and return its file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 5, trainer)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file
