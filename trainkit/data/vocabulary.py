"""A vocabulary of words for the model that is trained from scratch: texts in, a tokenizer out."""

from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from trainkit.serve.errors import InputError

PAD, PAD_ID = "[PAD]", 0
UNK, UNK_ID = "[UNK]", 1


def word_tokenizer(texts: Sequence[str], min_count: int = 2, max_size: int = 30_000) -> Tokenizer:
    """Return a tokenizer whose tokens are the words and punctuation marks of these texts.

    Words are lowercased and lose their accents, as in uncased BERT. A word gets an id where it
    occurs ``min_count`` times or more; the commonest come first, equally common ones in
    alphabetical order, so that the same texts give the same ids. ``max_size`` counts ``[PAD]``
    and ``[UNK]`` too. Raises ``InputError`` if no word is left.
    """
    normalizer = BertNormalizer(lowercase=True)
    pre_tokenizer = BertPreTokenizer()
    counts = Counter(
        word
        for text in texts
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )
    frequent = [word for word, count in counts.items() if count >= min_count]
    words = sorted(frequent, key=lambda word: (-counts[word], word))[: max(0, max_size - 2)]
    if not words:
        raise InputError(
            f"No word occurs {min_count} times in the {len(texts)} texts, or max_size={max_size} "
            "has no room for one; give more texts, a lower min_count or a larger max_size."
        )
    vocabulary = {token: index for index, token in enumerate([PAD, UNK, *words])}
    # No trainer of tokenizers: it registers [PAD] as an added token, and then a user's text that
    # has "[PAD]" in it is given the padding id. Here it is three tokens: [, pad and ].
    # WordPiece without pieces gives the tokens of WordLevel, in which JavaScript's tokenizers give
    # an unknown word no id. A word longer than all known ones is unknown without a search.
    longest = max(map(len, vocabulary))
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=longest))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer
